"""Networks from elsewhere: torchvision's, timm's, and the user's own, with their batch norms exchanged."""

import inspect
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from bnexp.errors import UserError, first_line, nearest
from bnexp.models.convert import PLANS, convert
from bnexp.models.initialize import Weights

NO_ARGS: Mapping[str, Any] = MappingProxyType({})
DOWNLOADS = ("weights", "pretrained", "checkpoint")  # how arguments begin that read or download weights
AUXILIARY = dict.fromkeys(("googlenet", "inception_v3"), {"init_weights": True, "aux_logits": False})
TRIED_SIZES = range(32, 513, 32)  # pixels, tried where images are too small


def torchvision(
    in_shape: Sequence[int], num_classes: int, norm: Callable[..., nn.Module], *, name: str | None = None,
    args: Mapping[str, Any] = NO_ARGS, fuse: bool = True,
) -> nn.Module:  # fmt: skip
    """The classification network of this name in ``torchvision.models``, without trained weights."""
    from torchvision import models

    check_model_name("torchvision", name, models.list_models(module=models), args)
    args = {**AUXILIARY.get(name, {}), **args}
    if args.get("aux_logits"):
        raise UserError("model.args.aux_logits=true: its further logits in training are not trained on; leave it out")
    make = partial(models.get_model, name, weights=None, num_classes=num_classes, **args)
    return finished(make, in_shape, norm, fuse, f"model.name={name}", str(args))


def timm(
    in_shape: Sequence[int], num_classes: int, norm: Callable[..., nn.Module], *, name: str | None = None,
    args: Mapping[str, Any] = NO_ARGS, fuse: bool = True,
) -> nn.Module:  # fmt: skip
    """The network of this name in timm's registry, without trained weights."""
    try:
        import timm as library
    except ImportError:
        raise UserError("model=timm: timm is not installed; pip install 'bnexp[timm]'") from None
    check_model_name("timm", name, library.list_models(), args)
    make = partial(library.create_model, name, pretrained=False, num_classes=num_classes, **args)
    return finished(make, in_shape, norm, fuse, f"model.name={name}", str(args))


def own(
    in_shape: Sequence[int], num_classes: int, norm: Callable[..., nn.Module], *, path: Any = None,
    args: Mapping[str, Any] = NO_ARGS, fuse: bool = True,
) -> nn.Module:  # fmt: skip
    """What ``path(**args)`` returns, an ``nn.Module``: path is the user's class or function.

    It gets ``num_classes`` and ``in_shape`` too if it has parameters of these names.
    """
    known = {"num_classes": num_classes, "in_shape": tuple(in_shape)}
    takes = inspect.signature(path).parameters
    make = partial(path, **{key: value for key, value in known.items() if key in takes} | {**args})
    label = f"model.path={path.__module__}.{path.__qualname__}"
    return finished(make, in_shape, norm, fuse, label, (path, str(args)))


def check_model_name(library: str, name: str | None, known: Sequence[str], args: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` for a name that the library does not have, and for arguments that ask for weights."""
    if name not in known:
        found = f"{library} has no such model{nearest(str(name), known)}; it has {len(known)}, such as resnet18"
        raise UserError(f"model.name={name or 'null'}: {found}")
    if asked := [key for key in args if key.startswith(DOWNLOADS)]:
        raise UserError(f"model.args.{asked[0]}: networks start untrained, nothing is downloaded; leave it out")


def finished(
    make: Callable[[], nn.Module], in_shape: Sequence[int], norm: Callable, fuse: bool, label: str, args: Any
) -> nn.Module:  # fmt: skip
    """The model that ``make`` returns for images of this shape, converted; it keeps its own initial weights.

    A constructor that computes with numbers, as RegNet's, fails on torch's meta device; it then builds on the CPU.
    """
    device = torch.get_default_device()
    try:
        model = make()
    except (NotImplementedError, RuntimeError):
        if device.type != "meta":
            raise
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = make().to(device)
    if not isinstance(model, nn.Module):
        raise UserError(f"{label}: returns an object of type {type(model).__name__}; return a torch.nn.Module")
    key = (label, args, tuple(in_shape), fuse)
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        with torch.no_grad():
            model.eval()(torch.zeros(2, *in_shape))
            model.train()
    channels = next((m.in_channels for m in model.modules() if isinstance(m, _ConvNd)), in_shape[0])
    shape = (channels if in_shape[0] == 1 else in_shape[0], *in_shape[1:])
    if key not in PLANS:
        check_image_size(model, shape, label)
    if shape[0] != in_shape[0]:
        model.register_forward_pre_hook(partial(expand_grey, shape[0]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.rand(4, *in_shape, dtype=torch.float64)
    convert(model, norm, images, fuse, label, key)
    model.initial_weights = Weights("own")
    return model


def expand_grey(channels: int, model: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """The images with their one channel repeated."""
    return (args[0].expand(-1, channels, *args[0].shape[2:]), *args[1:])


def check_image_size(model: nn.Module, shape: Sequence[int], label: str) -> None:
    """Raise :class:`UserError` if images of this ``shape`` are too small, with the smallest size that works.

    Any other error of the model's forward is raised as it is, once there are weights.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def fault(size: Sequence[int], device: str = "meta") -> Exception | None:
        here = {key: tensor.detach().to(device, copy=True) for key, tensor in tensors.items()}
        images = torch.zeros(2, shape[0], *size, device=device)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.func.functional_call(model, here, (images,))
        except Exception as error:
            return error

    if (error := fault(shape[1:])) is None:
        return
    if works := next((size for size in TRIED_SIZES if fault((size, size)) is None), 0):
        least = works - 31 + bisect_left(range(works - 31, works + 1), True, key=lambda size: not fault((size, size)))
        raise UserError(
            f"{label}: {shape[1]}x{shape[2]} images do not fit ({first_line(error)}); "
            f"the smallest that work are {least}x{least} (data.size={least})"
        )
    is_meta = any(tensor.is_meta for tensor in tensors.values())
    if not is_meta and (error := fault(shape[1:], "cpu")):
        raise error
