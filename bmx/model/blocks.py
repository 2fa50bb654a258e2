"""A model's parts that kernels compute in its place: linear layers, norms, gated MLPs and the rotary embedding.

Knows torch's modules by what they do: a part is taken over only if it gave the same numbers when it was tried. Knows
nothing of attention, caches or files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bmx.kernels import Kernels, reference

ROTARY = "apply_rotary_pos_emb"  # what transformers' models call it
CLOSE = 2**-7  # of the largest number, which bfloat16 rounds to within 2^-9


class Int8Linear(nn.Module):
    """A linear layer with weights and, while it works, inputs in bytes (W8A8): a scale per output and per token.

    The vector-wise quantisation of LLM.int8 (arXiv 2208.07339, section 2.1), without its outliers.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1).clamp(min=1e-30) / 127
        self.register_buffer("codes", (weight / scales.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.register_buffer("sums", self.codes.sum(1, dtype=torch.int32))
        self.bias = linear.bias
        self.multiply: Callable[..., Tensor] = reference.linear_int8

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """[..., I] -> [..., O], times the gate's SiLU if there is one."""
        return self.multiply(x, self.codes, self.scales, self.sums, self.bias, gate)


def quantise(model: Any) -> int:
    """Put the weights of a model's linear layers into bytes, all but those of the output head; returns how many."""
    head, count = model.get_output_embeddings(), 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, Int8Linear(child))
                count += 1
    return count


@contextmanager
def taken_over(model: Any, kernels: Kernels) -> Iterator[None]:
    """Have these kernels compute what they can of a model, for as long as the body runs."""
    chosen, own = kernels.module, kernels.module.linear is not reference.linear
    with ExitStack() as undone, torch.inference_mode():
        for module in model.modules():
            if isinstance(module, Int8Linear):
                undone.callback(setattr, module, "multiply", module.multiply)
                module.multiply = chosen.linear_int8
            elif own and model.dtype == torch.bfloat16:
                forward = _replacement(module, chosen)
                if forward:
                    module.forward = forward
                    undone.callback(delattr, module, "forward")
        if own and model.dtype == torch.bfloat16:
            _take_rotary(model, chosen, undone)
        yield


def _replacement(module: nn.Module, chosen: Any) -> Callable[..., Tensor] | None:
    """How the kernels compute a module, if they can."""
    if type(module) is nn.Linear:
        return partial(_linear, module, chosen)
    made: Callable[..., Tensor]
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(epsilon, float) and _named_children(module) == set() and _parameters(module) == {"weight"}:
        made, width = partial(_norm, module, chosen, epsilon), len(module.weight)  # type: ignore[arg-type]
    elif _named_children(module) >= {"gate_proj", "up_proj", "down_proj"} and not _parameters(module):
        gate = module.gate_proj
        if not isinstance(gate, (nn.Linear, Int8Linear)):
            return None
        made, width = partial(_gated_mlp, module, chosen), _inner(gate)
    else:
        return None
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return made if _same(lambda: module(x), lambda: made(x)) else None


def _named_children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _parameters(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters(recurse=False)}


def _inner(linear: nn.Linear | Int8Linear) -> int:
    return linear.in_features if isinstance(linear, nn.Linear) else linear.codes.shape[1]


def _linear(module: nn.Linear, chosen: Any, x: Tensor, gate: Tensor | None = None) -> Tensor:
    return chosen.linear(x, module.weight, module.bias, gate)  # type: ignore[no-any-return]


def _norm(module: nn.Module, chosen: Any, epsilon: float, x: Tensor) -> Tensor:
    return chosen.rms_norm(x, module.weight, epsilon)  # type: ignore[no-any-return]


def _gated_mlp(module: Any, chosen: Any, x: Tensor) -> Tensor:
    gate = module.gate_proj(x)
    if isinstance(module.up_proj, Int8Linear):
        return module.down_proj(module.up_proj(x, gate))  # type: ignore[no-any-return]
    return module.down_proj(_linear(module.up_proj, chosen, x, gate))  # type: ignore[no-any-return]


def _take_rotary(model: Any, chosen: Any, undone: ExitStack) -> None:
    """Replace the function by which a model's code turns queries and keys, in the code's own module."""
    for code in {sys.modules[type(module).__module__] for module in model.modules()}:
        before = getattr(code, ROTARY, None)
        if before is None:
            continue
        turned = partial(_rotary, chosen, before)
        random = torch.Generator().manual_seed(0)
        q, k, cos, sin = (torch.randn(*shape, generator=random).to(torch.bfloat16) for shape in _ROTARY_SHAPES)
        if _same(lambda: torch.cat(before(q, k, cos, sin), 1), lambda: torch.cat(turned(q, k, cos, sin), 1)):  # noqa: B023
            setattr(code, ROTARY, turned)
            undone.callback(setattr, code, ROTARY, before)


_ROTARY_SHAPES = ((1, 3, 2, 64), (1, 1, 2, 64), (1, 2, 64), (1, 2, 64))


def _rotary(
    chosen: Any, before: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *told: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    if told or named:  # another order of dimensions, or something that only the model knows
        return before(q, k, cos, sin, *told, **named)  # type: ignore[no-any-return]
    return chosen.rotate(q, cos, sin), chosen.rotate(k, cos, sin)


def _same(before: Callable[[], Tensor], now: Callable[[], Tensor]) -> bool:
    """Whether two ways to compute give the same numbers but for rounding; no, if one of them cannot."""
    try:
        wanted, made = before().float(), now().float()
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False
    return wanted.shape == made.shape and bool((wanted - made).abs().max() <= CLOSE * wanted.abs().max())
