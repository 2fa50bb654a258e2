"""Parts of a model that kernels compute in its place: linear layers, norms, gated MLPs and the rotary embedding.

Knows torch's modules by what they do: a part is replaced only if the kernel gives the same numbers on a trial input.
Only instances of this model's modules are changed, never their classes or the code that they come from. Knows nothing
of attention, caches or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bmx.kernels import Kernels
from bmx.kernels.contract import KernelModule
from bmx.kernels.linear import Linear
from bmx.model.forwards import set_forward, with_functions
from bmx.model.fp8_modules import Fp8Linear
from bmx.model.int8_modules import Int8Linear
from bmx.model.joined_weights import join_weights

QKV = ("q_proj", "k_proj", "v_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
MERGED = ("gate_up_proj", "down_proj")
ROTARY = "apply_rotary_pos_emb"  # the function's name in the code of transformers' models
CLOSE = 2**-7  # of the largest number, which bfloat16 rounds to within 2^-9
KINDS = {"Norm": "norm", "MLP": "mlp", "Attention": "rotary", "Experts": "experts"}  # by the end of a class's name
Forward = Callable[..., Tensor]
Counts = Mapping[str, Mapping[str, Any]]


@contextmanager
def fused_modules(model: Any, kernels: Kernels) -> Iterator[Counts]:
    """Let kernels compute what they can of a model while the body runs.

    Yields:
        By kind of module (``linear``, ``norm``, ``mlp``, ``rotary``, ``experts``): how many ``kernels`` compute, how
        many are left to ``torch`` and, where a kernel was tried, ``why``.
    """
    dtypes = {getattr(torch, name) for name in kernels.capabilities.model_dtypes}
    left: dict[nn.Module, str] = {}
    with ExitStack() as undo:
        if model.dtype in dtypes:
            if kernels.capabilities.joins_layers:
                join_weights(model)
            left = _replace_forwards(model, kernels.module, dtypes, undo)
        yield _counts(model, left)


@torch.inference_mode()
def _replace_forwards(
    model: Any, kernels: KernelModule, dtypes: set[torch.dtype], undo: ExitStack
) -> dict[nn.Module, str]:
    """Replace what can be; returns why modules are left to torch that were tried."""
    like, left = torch.empty(0, dtype=model.dtype, device=model.device), dict[nn.Module, str]()
    has_gated_norms = any(map(_is_gated_norm, model.modules()))
    for module in model.modules():
        for part, forward in _replacements(module, kernels, like, left, has_gated_norms):
            set_forward(part, forward, undo)
    _replace_rotary(model, kernels, dtypes, like, undo, left)
    return left


def _counts(model: Any, left: Mapping[nn.Module, str]) -> Counts:
    """See ``fused_modules``."""
    counts: dict[str, dict[str, Any]] = {}
    for module in model.modules():
        name = type(module).__name__
        of_name = next((kind for ending, kind in KINDS.items() if name.endswith(ending)), "")
        if kind := "linear" if isinstance(module, nn.Linear) or _is_linear(module) else of_name:
            count = counts.setdefault(kind, {"kernels": 0, "torch": 0})
            count["kernels" if "forward" in vars(module) else "torch"] += 1
            if module in left:
                count["why"] = f"{name}: {left[module]}"
    return counts


def _replacements(
    module: Any, kernels: KernelModule, like: Tensor, left: dict[nn.Module, str], hybrid: bool
) -> list[tuple[nn.Module, Forward]]:
    """How the kernels compute a module, or parts of it; empty if they cannot, or not with the same numbers.

    Args:
        module: of the model.
        kernels: compute it.
        like: of the model's type, where it is.
        left: written; why a module is left to torch.
        hybrid: whether the model has gated norms: then norms whose weights are offsets from 1 are replaced too.
    """
    parts = dict(module.named_children())
    own = {name for name, _ in module.named_parameters(recurse=False)}
    if _is_linear(module):
        return [(module, _first(kernels.product((_weights(module),))))]
    if all(_is_linear(parts.get(name)) for name in QKV):
        return _together([parts[name] for name in QKV], kernels)
    forwards: list[Forward]
    if _is_norm(module):
        forwards, width = _norms(module, kernels, hybrid), len(module.weight)
    elif all(_is_linear(parts.get(name)) for name in GATED) and not own:
        gate, up, down = (_weights(parts[name]) for name in GATED)
        forwards = [_gated_mlp(kernels.product((gate, up), gated=True), _first(kernels.product((down,))))]
        width = gate.weight.shape[1]
    elif all(_is_linear(parts.get(name)) for name in MERGED) and not own:
        merged, down = (_weights(parts[name]) for name in MERGED)
        forwards = [_merged_mlp(_first(kernels.product((merged,))), kernels.gate, _first(kernels.product((down,))))]
        width = merged.weight.shape[1]
    else:
        return []
    count = 2 if _is_gated_norm(module) else 1
    inputs = torch.randn(count, 2, width, generator=torch.Generator().manual_seed(0)).to(like).unbind()
    reasons = [_difference(partial(module, *inputs), partial(forward, *inputs)) for forward in forwards]
    if "" in reasons:
        return [(module, forwards[reasons.index("")])]
    left[module] = reasons[0]
    return []


def _is_norm(module: Any) -> bool:
    """Whether a module has the parts of a root-mean-square norm."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return isinstance(_epsilon(module), float) and own == ["weight"] and not list(module.children())


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_gated_norm(module: Any) -> bool:
    """Whether it is a norm that takes a gate beside its input."""
    return _is_norm(module) and len(signature(type(module).forward).parameters) == len(("self", "x", "gate"))


def _norms(module: Any, kernels: KernelModule, hybrid: bool) -> list[Forward]:
    """The norms that a module may be."""
    norms: tuple[Forward, ...] = (kernels.rms_norm, kernels.offset_norm) if hybrid else (kernels.rms_norm,)
    if _is_gated_norm(module):
        group = getattr(module, "group_size", len(module.weight))
        norms = (kernels.gated_norm, partial(kernels.norm_of_gated, group=group))
    return [partial(norm, weight=module.weight, epsilon=_epsilon(module)) for norm in norms]


def _is_linear(module: Any) -> bool:
    return type(module) in (nn.Linear, Int8Linear, Fp8Linear)


def _weights(module: Any) -> Linear:
    """A linear layer as kernels see it."""
    if isinstance(module, Int8Linear | Fp8Linear):
        return module.layer
    return Linear(weight=module.weight, bias=module.bias)


def _first(product: Callable[[Tensor], list[Tensor]]) -> Forward:
    return lambda x: product(x)[0]


def _gated_mlp(product: Callable[[Tensor], list[Tensor]], down: Forward) -> Forward:
    return lambda x: down(product(x)[0])


def _merged_mlp(merged: Forward, gate: Callable[[Tensor, Tensor], Tensor], down: Forward) -> Forward:
    return lambda x: down(gate(*merged(x).chunk(2, dim=-1)))


def _together(modules: list[Any], kernels: KernelModule) -> list[tuple[nn.Module, Forward]]:
    """Queries, keys and values of the same input in one product: the first projection computes the others as well."""
    product = kernels.product(tuple(map(_weights, modules)))
    alone = [_first(kernels.product((_weights(module),))) for module in modules]
    waiting: dict[int, tuple[Tensor, Tensor]] = {}  # by projection: the input, and the output that nobody took yet

    def forward(number: int, x: Tensor) -> Tensor:
        if number == 0:
            outputs = product(x)
            waiting.clear()  # a layer that reads another one's pairs takes no keys
            waiting.update({i: (x, outputs[i]) for i in range(1, len(outputs))})
            return outputs[0]
        source, output = waiting.pop(number, (None, None))
        return output if output is not None and source is x else alone[number](x)

    return [(module, partial(forward, number)) for number, module in enumerate(modules)]


def _replace_rotary(
    model: Any,
    kernels: KernelModule,
    dtypes: set[torch.dtype],
    like: Tensor,
    undo: ExitStack,
    left: dict[nn.Module, str],
) -> None:
    """Give the model's attention modules a ``forward`` that turns queries and keys with the kernel.

    That ``forward`` is their own code, with another function under the name ``apply_rotary_pos_emb``.
    """
    copies: dict[Any, FunctionType | str] = {}
    for module in model.modules():
        code = type(module).forward
        if ROTARY not in getattr(getattr(code, "__code__", None), "co_names", ()):
            continue
        if code not in copies:
            copies[code] = _with_rotary(code, kernels, dtypes, like)
        copy = copies[code]
        if isinstance(copy, str):
            left[module] = copy
        else:
            set_forward(module, MethodType(copy, module), undo)


def _with_rotary(code: Any, kernels: KernelModule, dtypes: set[torch.dtype], like: Tensor) -> FunctionType | str:
    """A copy of a ``forward`` that calls the kernel; the reason if the kernel cannot do what its own function does."""
    own = code.__globals__.get(ROTARY)
    turned = partial(_rotary, kernels, dtypes, own)
    random = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(*shape, generator=random).to(like) for shape in _ROTARY_SHAPES)
    if reason := _difference(lambda: torch.cat(own(q, k, cos, sin), 1), lambda: torch.cat(turned(q, k, cos, sin), 1)):
        return reason
    return with_functions(code, {ROTARY: turned})


_ROTARY_SHAPES = ((1, 3, 2, 64), (1, 1, 2, 64), (1, 2, 64), (1, 2, 64))


def _rotary(
    kernels: KernelModule,
    dtypes: set[torch.dtype],
    own: Any,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the kernel; by the model's own function where it is asked for something else."""
    whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
    alike = len({t.dtype for t in (q, k, cos, sin)}) == 1 and q.dtype in dtypes
    if args or kwargs or not (whole and alike):
        return own(q, k, cos, sin, *args, **kwargs)  # type: ignore[no-any-return]
    together = _as_one(q, k)
    if together is None:
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
    turned, heads = kernels.rotate(together, cos, sin), q.shape[1]
    return turned[:, :heads], turned[:, heads:]


def _as_one(q: Tensor, k: Tensor) -> Tensor | None:
    """Queries and keys as the heads of one tensor, where one product has left them side by side; else None."""
    beside = q.data_ptr() + q.shape[1] * q.stride(1) * q.element_size() == k.data_ptr()
    if not beside or q.stride() != k.stride() or q.untyped_storage().data_ptr() != k.untyped_storage().data_ptr():
        return None
    return q.as_strided((1, q.shape[1] + k.shape[1], *q.shape[2:]), q.stride())


def _difference(own: Callable[[], Tensor], replaced: Callable[[], Tensor]) -> str:
    """How a way to compute differs from a module's own; empty if the numbers are the same but for rounding."""
    try:
        expected, output = own(), replaced()
    except Exception as error:  # Triton's errors have no type in common with torch's
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if (expected.shape, expected.dtype) != (output.shape, output.dtype):
        return "the kernel's output has another shape or type"
    close = (expected.float() - output.float()).abs().max() <= CLOSE * expected.float().abs().max()
    return "" if close else "the kernel's numbers are others"
