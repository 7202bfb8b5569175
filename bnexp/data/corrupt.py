"""Test images that differ from the training images: contrast, blur, noise or brightness are changed."""

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from bnexp.errors import UserError

DEFAULTS = {"contrast": 0.3, "blur": 2.0, "noise": 0.26, "brightness": 0.3}  # of data.strength, by data.corrupt
MOST_STRENGTH = 100
NOISE_SEED = 20190328  # one for all runs, so that every variant and seed is tested on the same images


def check_corruption(kind: str, strength: float | None) -> None:
    """Raise :class:`UserError` for an unknown ``kind``, or a ``strength`` that is no number above 0."""
    if kind != "none" and kind not in DEFAULTS:
        raise UserError(f"data.corrupt={kind}: not known; choose one of none, {', '.join(DEFAULTS)}")
    if strength is not None and kind == "none":
        raise UserError(f"data.strength={strength}: nothing is changed; give data.corrupt={'|'.join(DEFAULTS)} too")
    if strength is not None and not (type(strength) in (int, float) and 0 < strength <= MOST_STRENGTH):
        raise UserError(f"data.strength={strength}: give a number above 0 and up to {MOST_STRENGTH}, or null")


def corrupt(images: Tensor, kind: str, strength: float | None = None) -> Tensor:
    """Images uint8 (N, C, H, W), each changed in the same way every time, rounded and cut off at 0 and 255.

    With x in [0, 1] and s the ``strength``, after Hendrycks & Dietterich 2019, arXiv:1903.12261:

        contrast     mean + s (x - mean), mean over the pixels of an image's channel
        blur         a Gaussian of deviation s pixels, with the edge pixels repeated
        noise        x + N(0, s^2), independent in every pixel
        brightness   x + s (the paper adds to the value of a colour, which is the same for grey)
    """
    if kind == "none":
        return images
    s, generator = strength or DEFAULTS[kind], torch.Generator().manual_seed(NOISE_SEED)
    changed = []
    for chunk in images.split(1024):
        x = chunk.float() / 255
        if kind == "contrast":
            mean = x.mean((2, 3), keepdim=True)
            x = mean + s * (x - mean)
        elif kind == "blur":
            x = blurred(x, s)
        elif kind == "noise":
            x = x + s * torch.randn(x.shape, generator=generator)
        else:
            x = x + s
        changed.append((x.clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(changed)


def blurred(x: Tensor, deviation: float) -> Tensor:
    """``x`` (N, C, H, W) convolved with a Gaussian, cut off at three deviations, along H and then along W."""
    radius = math.ceil(3 * deviation)
    kernel = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    planes = pad(x, (radius,) * 4, mode="replicate").flatten(0, 1).unsqueeze(1)
    return conv2d(conv2d(planes, kernel), kernel.transpose(2, 3)).view(x.shape)
