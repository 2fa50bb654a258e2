"""Trial launches: each function that Triton computes runs once on a few numbers, beside plain torch.

A function that raises, or whose numbers are wrong, is computed by plain torch from then on, and the reason is kept with
the choice of kernels. So a card, a driver or a compiler that nobody has tried makes a run slower, and never stops it.

Shapes: S slots, K kv heads, C rows of a head in a slot, T tokens of a chunk, P positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bmx.errors import DeviceError
from bmx.kernels import BY_CHANNEL, STEPS, Kernels, reference
from bmx.kernels.contract import FUNCTIONS, KernelModule
from bmx.kernels.formats import KEY_GROUP, MODEL, Stored
from bmx.kernels.fp8_products import round_rows
from bmx.kernels.linear import Linear
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.registry import interpreted
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.trial_channels import results_by_channel

SLOTS, ROWS, TOKENS = 2, 40, 16  # slots of a trial, rows of each of their heads, tokens of a chunk
TOKENS_TO_DRAW = 5000  # of a trial's vocabulary: more than a program looks at together
FLOAT8_SIZES = (48, 128)  # outputs and inputs of a layer with float8 weights
FEW = 3  # tokens whose numbers are independent of each other
OLDER = 24  # tokens of the first slot that were evicted: it is full, and the second one has room for a chunk
TOLERANCE = {2: 0.03, 4: 0.003}  # of the length of all numbers together, by bytes of a number
MISPLACED = 1 / 16  # of all pairs: where scores are nearly equal, rounding decides which pair stays
NEW = 9.0  # above all ranks of a trial
REASON = 200  # most characters of a reason

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """What the kernels of an attention layer are compiled for.

    Attributes:
        heads: query heads.
        kv_heads: K.
        key_dim: numbers of a key.
        value_dim: numbers of a value.
        formats: how keys and values are stored.
        order: which pair is evicted first.
        mass: whether rows hold the attention that they received.
        decays: whether queries weigh differently, and earlier attention decays.
        softcap: of the scores, or None.
        sinks: whether there are extra logits without a value.
        fused: whether kernels do whole steps; if not, chunks attend and a policy does the rest.
        channel_formats: how keys and values are stored, where keys are scaled by channel; else None.
        float8: whether the model's linear layers have float8 weights.
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    order: EvictionOrder
    formats: tuple[str, str] = (MODEL, MODEL)
    mass: bool = False
    decays: bool = False
    softcap: float | None = None
    sinks: bool = False
    fused: bool = True
    channel_formats: tuple[str, str] | None = None
    float8: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a function computed: numbers by name, and those of pairs [S * K, P, ...], where ``kept`` [S * K, P] says."""

    numbers: Mapping[str, Tensor]
    pairs: Mapping[str, Tensor]
    kept: Tensor | None = None


def tried(kernels: Kernels, layers: Iterable[Attention], dtype: torch.dtype, device: torch.device) -> Kernels:
    """The kernels, with plain torch in place of each function that cannot compute these layers.

    Each kind of layer is tried once in a process.

    Args:
        kernels: as chosen; only Triton's are tried, and only where they are compiled.
        layers: what they are to compute.
        dtype: of the model's numbers.
        device: where it is.

    Raises:
        DeviceError: after a trial the GPU refuses every call.
    """
    if kernels.name == "reference" and device.type == "cuda" and not kernels.replaced:
        _warn(f"plain torch computes attention on this GPU, slower than kernels would: {kernels.why}")
    if kernels.name != "triton" or interpreted():
        return kernels
    whole = replace(kernels, replaced={})
    try:
        own = {name for name in FUNCTIONS if _is_own(whole.module, name)}
    except Exception as error:
        return without(kernels, error)
    replaced = dict(kernels.replaced)
    for layer in dict.fromkeys(layers):  # each once, in their order
        replaced = dict(_failures(whole, layer, dtype, device)) | replaced
    if replaced.keys() >= own - BY_CHANNEL:
        return _plain(kernels, next(iter(replaced.values())))
    for name, reason in replaced.items():
        _warn(f"plain torch computes {name}, slower, in place of Triton's: {reason}")
    return replace(kernels, replaced=replaced)


def without(kernels: Kernels, error: Exception) -> Kernels:
    """Plain torch alone, because of an error that kernels raised."""
    return _plain(kernels, _reason(error))


def _plain(kernels: Kernels, reason: str) -> Kernels:
    _warn(f"plain torch computes all that Triton would, slower: {reason}")
    return Kernels("reference", f"plain torch: {reason} ({kernels.why})", replaced=dict.fromkeys(TRIALS, reason))


@cache
def _warn(message: str) -> None:
    """Say it, once in a process."""
    logger.warning(message)


def _is_own(module: KernelModule, name: str) -> bool:
    """Whether a function is not plain torch's."""
    return getattr(module, name) is not getattr(reference, name)


@cache
@torch.inference_mode()
def _failures(
    kernels: Kernels, layer: Attention, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[str, str], ...]:
    """The functions that fail, each with the reason."""
    found: dict[str, str] = {}
    for name in TRIALS:
        fused = layer.fused and STEPS.isdisjoint(found)  # chunks attend by themselves where a step has failed
        needed = layer.fused if name in STEPS else not fused if name == "attend_chunk" else True
        needed = layer.channel_formats is not None if name in BY_CHANNEL else needed
        if needed and _is_own(kernels.module, name):
            reason = _failure(name, kernels.module, layer, dtype, device)
            found |= {name: reason} if reason else {}
    return tuple(found.items())


def _failure(name: str, module: KernelModule, layer: Attention, dtype: torch.dtype, device: torch.device) -> str:
    """Why a function fails; empty if it does not."""
    inputs = Inputs(layer, dtype, device)
    try:
        for trial in TRIALS[name]:
            results, expected = trial(module, inputs), trial(reference, inputs)
            if results and expected and (reason := _difference(results, expected, TOLERANCE[dtype.itemsize])):
                return reason
        return ""
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        _check_alive(device, name, error)
        return _reason(error)


def _check_alive(device: torch.device, name: str, cause: Exception) -> None:
    """Refuse to go on where an error has broken the process's access to the GPU: no later call can succeed.

    Raises:
        DeviceError: it has.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        message = f"a trial of the kernel {name} stopped the GPU: {_reason(cause)}"
        raise DeviceError(message, hint="BMX_KERNELS=reference runs without kernels of bmx's own") from cause


def _reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:REASON]


def _difference(results: Results, expected: Results, tolerance: float) -> str:
    """How results are wrong; empty if they are those that are expected, but for rounding."""
    both = None
    if expected.kept is not None and results.kept is not None:
        both = results.kept & expected.kept
        misplaced = int((results.kept ^ expected.kept).sum())
        if misplaced > MISPLACED * int(expected.kept.sum()):
            return f"wrong numbers: {misplaced} pairs are kept or evicted that should not be"
    for name, number in expected.numbers.items():
        if reason := _wrong(name, results.numbers[name], number, tolerance):
            return reason
    for name, number in expected.pairs.items():
        if reason := _wrong(name, results.pairs[name][both], number[both], tolerance):
            return reason
    return ""


def _wrong(name: str, numbers: Tensor, expected: Tensor, tolerance: float) -> str:
    off, size = float((numbers.float() - expected.float()).norm()), float(expected.float().norm())
    return "" if off <= tolerance * size else f"wrong numbers: {name} is off by {off / max(size, 1e-9):.1%}"


class Inputs:
    """Numbers for trials, the same whenever they are asked for.

    Args:
        layer: sizes.
        dtype: of the model.
        device: where they are.
        per_head: rows of each head of a slot.

    Attributes:
        starts: tokens that each slot has seen.
    """

    def __init__(self, layer: Attention, dtype: torch.dtype, device: torch.device, per_head: int = ROWS) -> None:
        self.layer, self.dtype, self.device = layer, dtype, device
        self.per_head, self.starts = per_head, (per_head + OLDER, TOKENS)

    def normal(self, *shape: int, seed: int) -> Tensor:
        """Numbers of the model's type that are distributed normally."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device, self.dtype)

    def tensor(self, numbers: Any, dtype: torch.dtype = torch.long) -> Tensor:
        """Given numbers."""
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def vectors(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of packed tokens."""
        layer = self.layer
        query = self.normal(tokens, layer.heads, layer.key_dim, seed=1)
        key = self.normal(tokens, layer.kv_heads, layer.key_dim, seed=2)
        return query, key, self.normal(tokens, layer.kv_heads, layer.value_dim, seed=3)

    @property
    def options(self) -> dict[str, Any]:
        """What all functions of attention are told."""
        layer = self.layer
        sinks = self.normal(layer.heads, seed=4) if layer.sinks else None
        return {"scale": layer.key_dim**-0.5, "softcap": layer.softcap, "sinks": sinks}

    def rows(self) -> Rows:
        """Two slots: the first is full, and holds any tokens; the second holds its first tokens."""
        layer, heads = self.layer, SLOTS * self.layer.kv_heads
        order = torch.Generator().manual_seed(5)
        full = [torch.randperm(self.starts[0], generator=order)[: self.per_head] for _ in range(layer.kv_heads)]
        begun = torch.arange(self.per_head).masked_fill(torch.arange(self.per_head) >= self.starts[1], -1)
        keys = Stored.zeros(layer.formats[0], (heads * self.per_head,), layer.key_dim, self.dtype, self.device)
        values = Stored.zeros(layer.formats[1], (heads * self.per_head,), layer.value_dim, self.dtype, self.device)
        keys.write(slice(None), self.normal(heads * self.per_head, layer.key_dim, seed=6))
        values.write(slice(None), self.normal(heads * self.per_head, layer.value_dim, seed=7))
        return Rows(
            keys=keys.numbers,
            values=values.numbers,
            positions=torch.cat([*full, *[begun] * layer.kv_heads]).int().to(self.device),
            mass=self.normal(heads * self.per_head, seed=8).float().abs() / self.per_head if layer.mass else None,
            first=(torch.arange(heads) * self.per_head).view(SLOTS, -1).to(self.device),
            capacity=torch.full((SLOTS, layer.kv_heads), self.per_head).to(self.device),
            kv_heads=layer.kv_heads,
            capacities=((self.per_head,) * layer.kv_heads,) * SLOTS,
            largest=self.per_head,
            key_scales=keys.scales,
            value_scales=values.scales,
            key_format=layer.formats[0],
            value_format=layer.formats[1],
            ranks=self.normal(heads * self.per_head, seed=22).float() if layer.order.by == "rank" else None,
        )

    def chunks(self) -> Chunks:
        """A chunk for each slot; both sequences evict sooner or later."""
        columns = {
            "offsets": tuple(TOKENS * slot for slot in range(SLOTS)),
            "lengths": (TOKENS,) * SLOTS,
            "slots": tuple(range(SLOTS)),
            "starts": self.starts,
            "row_limits": (self.per_head,) * SLOTS,
            "totals": (self.starts[0] + 2 * self.per_head,) * SLOTS,
        }
        weights = decay = None
        if self.layer.decays:
            weights = self.normal(TOKENS * SLOTS, seed=9).float().abs()
            decay = self.tensor((0.5,) * SLOTS, torch.float32)
        return Chunks(**columns, table=self.tensor(list(columns.values())), query_weights=weights, decay=decay)


def _results(output: Tensor, rows: Rows, inputs: Inputs) -> Results:
    """What a step wrote: its output, and the slots' pairs by head and position."""
    heads, layer = SLOTS * inputs.layer.kv_heads, inputs.layer
    positions = rows.positions.view(heads, inputs.per_head).long()
    stored = {
        "keys": Stored(rows.keys, rows.key_scales, rows.key_format).read(slice(None), layer.key_dim, inputs.dtype),
        "values": Stored(rows.values, rows.value_scales, rows.value_format).read(
            slice(None), layer.value_dim, inputs.dtype
        ),
    }
    stored |= {} if rows.mass is None else {"mass": rows.mass.unsqueeze(1)}
    stored |= {} if rows.ranks is None else {"ranks": rows.ranks.clamp(max=NEW).unsqueeze(1)}
    last = max(inputs.starts) + TOKENS
    places = torch.where(positions < 0, last, positions).clamp(max=last)  # empty rows have a place of their own
    pairs = {}
    for name, numbers in stored.items():
        by_place = numbers.new_zeros(heads, last + 1, numbers.shape[-1])
        by_place.scatter_(
            1, places.unsqueeze(2).expand(-1, -1, numbers.shape[-1]), numbers.view(heads, inputs.per_head, -1)
        )
        pairs[name] = by_place[:, :last]
    kept = torch.zeros(heads, last + 1, dtype=torch.bool, device=positions.device).scatter_(1, places, True)
    return Results(numbers={"output": output}, pairs=pairs, kept=kept[:, :last])


def _decode(module: KernelModule, inputs: Inputs) -> Results | None:
    """A token in each slot, and an idle row."""
    layer, rows = inputs.layer, inputs.rows()
    query, key, value = inputs.vectors(SLOTS + 1)
    output = value.new_zeros(SLOTS + 1, layer.heads, layer.value_dim)
    slots = inputs.tensor([*range(SLOTS), -1])
    positions, limits = inputs.tensor([*inputs.starts, 0]), inputs.tensor([inputs.per_head] * (SLOTS + 1))
    of_policy: dict[str, Any] = {"order": layer.order, "decay": 0.5 if layer.decays else 1.0, "accumulate": layer.mass}
    done = module.decode_step(output, query, key, value, rows, slots, positions, limits, **of_policy, **inputs.options)
    return _results(output, rows, inputs) if done else None


def _decode_long(module: KernelModule, inputs: Inputs) -> Results | None:
    """The same in slots that are read in pieces."""
    from bmx.kernels.triton_splits import SPLITS

    return _decode(module, Inputs(inputs.layer, inputs.dtype, inputs.device, SPLITS.whole + TOKENS))


def _channels(module: KernelModule, inputs: Inputs, tokens: int = 2 * KEY_GROUP + FEW) -> Results | None:
    """A chunk and a token of a sequence whose keys are scaled by channel."""
    formats = inputs.layer.channel_formats
    found = formats and results_by_channel(module, formats, inputs.vectors(tokens), inputs.options)
    return _numbers(**found) if found else None


def _channels_long(module: KernelModule, inputs: Inputs) -> Results | None:
    """The same of a sequence that is read in pieces."""
    from bmx.kernels.triton_splits import SPLITS

    return _channels(module, inputs, SPLITS.whole + 2 * KEY_GROUP + FEW)


def _prefill(module: KernelModule, inputs: Inputs) -> Results | None:
    """A chunk in each slot: one evicts, and one is appended."""
    layer, rows = inputs.layer, inputs.rows()
    query, key, value = inputs.vectors(TOKENS * SLOTS)
    output = value.new_zeros(TOKENS * SLOTS, layer.heads, layer.value_dim)
    options, ranks = {"order": layer.order, **inputs.options}, inputs.normal(TOKENS * SLOTS, layer.kv_heads, seed=23)
    if rows.ranks is not None:
        options["ranking"] = lambda _: ranks.t().float().contiguous()
    done = module.prefill_step(output, query, key, value, rows, inputs.chunks(), **options)
    return _results(output, rows, inputs) if done else None


def _chunk(module: KernelModule, inputs: Inputs) -> Results:
    """A chunk and a slot's rows, as policies see it that rank by themselves."""
    layer = inputs.layer
    query, key, value = inputs.vectors(TOKENS)
    past_key = inputs.normal(layer.kv_heads, inputs.per_head, layer.key_dim, seed=10)
    past_value = inputs.normal(layer.kv_heads, inputs.per_head, layer.value_dim, seed=11)
    places = torch.arange(-inputs.per_head, 0, dtype=torch.int32).expand(layer.kv_heads, -1).to(inputs.device)
    output, sums = module.attend_chunk(
        query,
        key,
        value,
        past_key,
        past_value,
        query_weights=inputs.tensor([[1.0] * TOKENS], torch.float32),
        past_places=places,
        distance=layer.order.distance,
        power=layer.order.power,
        **inputs.options,
    )
    return _numbers(output=output, **({} if sums is None else {"sums": sums}))


def _numbers(**numbers: Tensor) -> Results:
    return Results(numbers=numbers, pairs={})


def _product(module: KernelModule, inputs: Inputs) -> Results:
    """A linear layer, a gated pair of them, and one with float8 weights if the model has such."""
    dim = inputs.layer.key_dim
    x = inputs.normal(FEW, dim, seed=12)
    gate, up = (Linear(weight=inputs.normal(2 * dim, dim, seed=seed) / dim**0.5, bias=None) for seed in (13, 14))
    [output], [gated] = module.product((gate,))(x), module.product((gate, up), gated=True)(x)
    if inputs.layer.float8:
        codes, scales = round_rows(inputs.normal(*FLOAT8_SIZES, seed=23))
        wide = inputs.normal(FEW, FLOAT8_SIZES[1], seed=24)
        [wide] = module.product((Linear(weight=codes, bias=None, scales=scales),))(wide)
        return _numbers(output=output, gated=gated, float8=wide)
    return _numbers(output=output, gated=gated)


def _gate(module: KernelModule, inputs: Inputs) -> Results:
    gate, up = (inputs.normal(FEW, inputs.layer.key_dim, seed=seed) for seed in (15, 16))
    return _numbers(output=module.gate(gate, up))


def _norm(module: KernelModule, inputs: Inputs) -> Results:
    x, weight = inputs.normal(FEW, inputs.layer.key_dim, seed=17), inputs.normal(inputs.layer.key_dim, seed=18)
    return _numbers(output=module.rms_norm(x, weight, 1e-5))


def _rotation(module: KernelModule, inputs: Inputs) -> Results:
    layer = inputs.layer
    x = inputs.normal(1, FEW, layer.heads, layer.key_dim, seed=19).transpose(1, 2)
    cos, sin = (inputs.normal(1, FEW, layer.key_dim, seed=seed) for seed in (20, 21))
    return _numbers(output=module.rotate(x, cos, sin))


def _drawn(module: KernelModule, inputs: Inputs) -> Results:
    """Rows with each cut, with all and with none; the second row is left out."""
    rows = inputs.tensor([0, *range(2, 7)])
    cuts = [(1.0, 0, 1.0, 0.0), (0.7, 9, 1.0, 0.0), (1.5, 0, 0.6, 0.0), (1.0, 0, 1.0, 0.2), (0.9, 40, 0.9, 0.05)]
    sampling = [(*cut, 0.15 * number) for number, cut in enumerate([*cuts, cuts[0]])]
    logits = inputs.normal(len(sampling) + 1, TOKENS_TO_DRAW, seed=22)
    return _numbers(tokens=module.draw(logits, rows, inputs.tensor(sampling, torch.float64).t().contiguous()))


TRIALS: Mapping[str, tuple[Callable[[KernelModule, Inputs], Results | None], ...]] = {
    "decode_step": (_decode, _decode_long),
    "prefill_step": (_prefill,),
    **dict.fromkeys(sorted(BY_CHANNEL), (_channels,)),
    "decode_by_channel": (_channels, _channels_long),
    "attend_chunk": (_chunk,),
    "product": (_product,),
    "gate": (_gate,),
    "rms_norm": (_norm,),
    "rotate": (_rotation,),
    "draw": (_drawn,),
}
