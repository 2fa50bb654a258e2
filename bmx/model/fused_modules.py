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
from bmx.kernels.linear import Linear

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
MERGED = ("gate_up_proj", "down_proj")
ROTARY = "apply_rotary_pos_emb"  # what transformers' models call it
CLOSE = 2**-7  # of the largest number, which bfloat16 rounds to within 2^-9


class Int8Linear(nn.Module):
    """A linear layer with weights and, while it works, inputs in bytes (W8A8).

    A scale per output for weights, a scale and a zero per token for inputs: the vector-wise quantisation of LLM.int8
    (arXiv 2208.07339, section 2.1), without its outliers.
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return reference.product((_seen(self),))(x)[0]


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
    chosen = kernels.module
    with ExitStack() as undone:
        if model.dtype in chosen.SUPPORTED_DTYPES:
            _take_over(model, chosen, undone)
        yield


@torch.inference_mode()
def _take_over(model: Any, chosen: Any, undone: ExitStack) -> None:
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    for module in model.modules():
        for part, forward in _replacements(module, chosen, like):
            if "forward" not in vars(part):  # taken over with others before
                part.forward = forward
                undone.callback(delattr, part, "forward")
    _take_rotary(model, chosen, like, undone)


def _replacements(module: Any, chosen: Any, like: Tensor) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """How the kernels compute a module, or parts of it, where they can and it gave the same numbers."""
    parts = dict(module.named_children())
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if _is_linear(module):
        return [(module, _first(chosen.product((_seen(module),))))]
    if all(_is_linear(parts.get(name)) for name in QKV):
        return _together([parts[name] for name in QKV], chosen)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if isinstance(epsilon, float) and not parts and own == {"weight"}:
        made: Callable[..., Tensor] = partial(chosen.rms_norm, weight=module.weight, epsilon=epsilon)
        width = len(module.weight)
    elif all(_is_linear(parts.get(name)) for name in GATED) and not own:
        gate, up, down = (_seen(parts[name]) for name in GATED)
        made = _gated_mlp(chosen.product((gate, up), gated=True), _first(chosen.product((down,))))
        width = gate.weight.shape[1]
    elif all(_is_linear(parts.get(name)) for name in MERGED) and not own:
        both, down = (_seen(parts[name]) for name in MERGED)
        made = _merged_mlp(_first(chosen.product((both,))), chosen.gate, _first(chosen.product((down,))))
        width = both.weight.shape[1]
    else:
        return []
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(like)
    return [(module, made)] if _same(lambda: module(x), lambda: made(x)) else []


def _is_linear(module: Any) -> bool:
    return type(module) in (nn.Linear, Int8Linear)


def _seen(module: Any) -> Linear:
    """A linear layer as kernels see it."""
    if isinstance(module, Int8Linear):
        return Linear(weight=module.codes, bias=module.bias, scales=module.scales, sums=module.sums)
    return Linear(weight=module.weight, bias=module.bias)


def _first(product: Callable[[Tensor], list[Tensor]]) -> Callable[..., Tensor]:
    return lambda x: product(x)[0]


def _gated_mlp(product: Callable[[Tensor], list[Tensor]], down: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x: down(product(x)[0])


def _merged_mlp(
    both: Callable[[Tensor], Tensor], gate: Callable[[Tensor, Tensor], Tensor], down: Callable[[Tensor], Tensor]
) -> Callable[..., Tensor]:
    return lambda x: down(gate(*both(x).chunk(2, dim=-1)))


def _together(modules: list[Any], chosen: Any) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Queries, keys and values of the same input in one product: whoever is asked first computes for the others too."""
    product = chosen.product(tuple(map(_seen, modules)))
    alone = [_first(chosen.product((_seen(module),))) for module in modules]
    left: dict[int, tuple[Tensor, Tensor]] = {}  # by number: the input, and what was made of it

    def forward(number: int, x: Tensor) -> Tensor:
        if number == 0:
            made = product(x)
            left.update({i: (x, made[i]) for i in range(1, len(made))})
            return made[0]  # type: ignore[no-any-return]
        of, found = left.pop(number, (None, None))
        return found if found is not None and of is x else alone[number](x)

    return [(module, partial(forward, number)) for number, module in enumerate(modules)]


def _take_rotary(model: Any, chosen: Any, like: Tensor, undone: ExitStack) -> None:
    """Replace the function by which a model's code turns queries and keys, in the code's own module."""
    for code in {sys.modules[type(module).__module__] for module in model.modules()}:
        before = getattr(code, ROTARY, None)
        if before is None:
            continue
        turned = partial(_rotary, chosen, before)
        random = torch.Generator().manual_seed(0)
        q, k, cos, sin = (torch.randn(*shape, generator=random).to(like) for shape in _ROTARY_SHAPES)
        if _same(lambda: torch.cat(before(q, k, cos, sin), 1), lambda: torch.cat(turned(q, k, cos, sin), 1)):  # noqa: B023
            setattr(code, ROTARY, turned)
            undone.callback(setattr, code, ROTARY, before)


_ROTARY_SHAPES = ((1, 3, 2, 64), (1, 1, 2, 64), (1, 2, 64), (1, 2, 64))


def _rotary(
    chosen: Any, before: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *told: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
    alike = len({t.dtype for t in (q, k, cos, sin)}) == 1 and q.dtype in chosen.SUPPORTED_DTYPES
    if told or named or not (whole and alike):
        return before(q, k, cos, sin, *told, **named)  # type: ignore[no-any-return]
    return chosen.rotate(q, cos, sin), chosen.rotate(k, cos, sin)


def _same(before: Callable[[], Tensor], now: Callable[[], Tensor]) -> bool:
    """Whether two ways to compute give the same numbers but for rounding; no, if one of them cannot."""
    try:
        wanted, made = before(), now()
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False
    if (wanted.shape, wanted.dtype) != (made.shape, made.dtype):
        return False
    return bool((wanted.float() - made.float()).abs().max() <= CLOSE * wanted.float().abs().max())
