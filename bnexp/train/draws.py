"""A run's own state of torch's generators, from which dropout and other code of the user's own draw."""

import torch
from torch import Tensor

APART = 0x6272616E  # keeps what is drawn here apart from the weights and batches, which the same seed draws


class Draws:
    """The states of torch's generators, of the CPU and of ``device``, that belong to one run; without a device none.

    Inside ``with draws:`` torch draws from them; afterwards its generators are what they were. So runs that take turns
    in one process draw what each draws alone, and a resumed run draws what it would have drawn.
    """

    def __init__(self, seed: int = 0, device: torch.device | None = None) -> None:
        self.generators = [torch.default_generator] if device else []
        if device and device.type == "cuda":
            self.generators.append(torch.cuda.default_generators[device.index or 0])  # the model has started CUDA
        self.states = [torch.Generator(each.device).manual_seed(seed ^ APART).get_state() for each in self.generators]
        self.outside: list[Tensor] = []  # the states to put back, inside the block

    def __enter__(self) -> None:
        outside = [each.get_state() for each in self.generators]
        self.put(self.states)
        self.outside = outside

    def __exit__(self, *error: object) -> None:
        self.states = self.state_dict()
        outside, self.outside = self.outside, []  # from here on state_dict() is right, whatever interrupts this
        self.put(outside)

    def put(self, states: list[Tensor]) -> None:
        """Set torch's generators to ``states``."""
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)

    def state_dict(self) -> list[Tensor]:
        """The states, uint8 (bytes,) on the CPU: that of the CPU's generator and that of the GPU's, if there is one."""
        return [each.get_state() for each in self.generators] if self.outside else self.states

    def load_state_dict(self, states: list[Tensor]) -> None:
        self.states = [each.cpu() for each in states]
