"""The trial of the functions that mixers call: decoding tokens, an idle row, prompts and a probe in one step.

What a model's mixers ask for is found by a forward in which plain torch computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmx.kernels import reference
from bmx.kernels.contract import KernelModule
from bmx.kernels.segments import Segments

SLOTS = 4
DECODING = (3, -1)  # slots of the first rows; the second row is idle
PROMPTS = ((2, 70, 0, True), (72, 2, 2, True), (74, 5, 1, True), (79, 3, 1, False))  # as ``Segments.of`` takes them
TOKENS = 82
BY_TOKEN = {"convolve": (0,), "delta_rule": (0, 1, 2, 3, 4), "state_space": (0, 1, 3, 4)}  # operands [T, ...]
# Numbers that an operand of a function may have, where not all may be
RANGES: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {
    ("delta_rule", 3): lambda decay: -decay.square(),
    ("delta_rule", 4): torch.sigmoid,
    ("state_space", 1): torch.square,
    ("state_space", 2): lambda rate: -rate.exp(),
}


@dataclass(frozen=True, slots=True)
class Mixer:
    """What one function is compiled for.

    Attributes:
        function: its name.
        operands: shape and type of each, without tokens; None for one that is not given.
        state: shape and type of a slot's state.
        options: by name.
    """

    function: str
    operands: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    state: tuple[tuple[int, ...], torch.dtype]
    options: tuple[tuple[str, bool], ...]


class Noting:
    """Functions of plain torch that note what they are called for.

    Attributes:
        mixers: what they were called for, each once.
    """

    def __init__(self) -> None:
        self.mixers: dict[Mixer, None] = {}

    def __getattr__(self, function: str) -> Callable[..., Tensor]:
        def call(*arguments: Any, **options: bool) -> Tensor:
            *operands, states, _ = arguments
            kinds = tuple(
                None if one is None else (tuple(one.shape[i in BY_TOKEN[function] :]), one.dtype)
                for i, one in enumerate(operands)
            )
            state = tuple(states.shape[1:]), states.dtype
            self.mixers[Mixer(function, kinds, state, tuple(options.items()))] = None
            return getattr(reference, function)(*arguments, **options)  # type: ignore[no-any-return]

        return call


def results_of_mixer(module: KernelModule, mixer: Mixer, device: torch.device) -> dict[str, Tensor]:
    """The outputs of all tokens but the idle one, and the states that slots hold then.

    Args:
        module: of the kernels.
        mixer: what is tried.
        device: where the numbers are.
    """
    random = torch.Generator().manual_seed(0)
    operands: list[Tensor | None] = []
    for place, kind in enumerate(mixer.operands):
        if kind is None:
            operands.append(None)
            continue
        shape, dtype = kind
        tokens = (TOKENS,) if place in BY_TOKEN[mixer.function] else ()
        numbers = torch.randn(*tokens, *shape, generator=random)
        allowed = RANGES.get((mixer.function, place))
        operands.append((numbers if allowed is None else allowed(numbers)).to(device, dtype))
    states = torch.randn(SLOTS + 1, *mixer.state[0], generator=random).to(device, mixer.state[1])
    segments = Segments.of(torch.tensor(DECODING, device=device), PROMPTS, device)
    output = getattr(module, mixer.function)(*operands, states, segments, **dict(mixer.options))
    return {"output": torch.cat([output[:1], output[2:]]), "states": states[:SLOTS]}
