"""Trial launches: each function that Triton computes runs once on a few numbers, beside plain torch.

A function that raises, or whose numbers are wrong, is computed by plain torch from then on, and the reason is kept with
the choice of kernels. So a card, a driver or a compiler that nobody has tried makes a run slower, and never stops it.

Shapes: S slots, K kv heads, C rows of a head in a slot, T tokens of a chunk, P positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bmx.errors import DeviceError
from bmx.kernels import BY_CHANNEL, MIXERS, STEPS, Kernels, reference
from bmx.kernels.contract import FUNCTIONS, KernelModule
from bmx.kernels.formats import KEY_GROUP, Stored
from bmx.kernels.registry import interpreted
from bmx.kernels.slot_views import Rows
from bmx.kernels.trial_channels import results_by_channel
from bmx.kernels.trial_inputs import SLOTS, TOKENS, Attention, Inputs
from bmx.kernels.trial_mixers import Mixer, results_of_mixer
from bmx.kernels.trial_parts import FEW, PARTS

TOLERANCE = {2: 0.03, 4: 0.003}  # of the length of all numbers together, by bytes of a number
MISPLACED = 1 / 16  # of all pairs: where scores are nearly equal, rounding decides which pair stays
NEW = 9.0  # above all ranks of a trial
REASON = 200  # most characters of a reason

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a function computed: numbers by name, and those of pairs [S * K, P, ...], where ``kept`` [S * K, P] says."""

    numbers: Mapping[str, Tensor]
    pairs: Mapping[str, Tensor]
    kept: Tensor | None = None


def tried(kernels: Kernels, layers: Iterable[Attention | Mixer], dtype: torch.dtype, device: torch.device) -> Kernels:
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
    if replaced.keys() >= own - BY_CHANNEL - MIXERS:
        return _plain(kernels, next(iter(replaced.values())))
    for name, reason in replaced.items():
        _warn(f"plain torch computes {name}, slower, in place of Triton's: {reason}")
    return replace(kernels, replaced=replaced)


def without(kernels: Kernels, error: Exception) -> Kernels:
    """Plain torch alone, because of an error that kernels raised."""
    return _plain(kernels, _reason(error))


def _plain(kernels: Kernels, reason: str) -> Kernels:
    _warn(f"plain torch computes all that Triton would, slower: {reason}")
    return Kernels(
        "reference", f"plain torch: {reason} ({kernels.why})", replaced=dict.fromkeys([*TRIALS, *MIXERS], reason)
    )


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
    kernels: Kernels, layer: Attention | Mixer, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[str, str], ...]:
    """The functions that fail, each with the reason."""
    found: dict[str, str] = {}
    rounded = layer.state[1] if isinstance(layer, Mixer) else dtype
    tolerance = TOLERANCE[min(dtype.itemsize, rounded.itemsize)]
    for name, trials in _trials(layer, dtype, device):
        needed = name != "attend_chunk" or not STEPS.isdisjoint(found)  # chunks attend so where a step has failed
        needed = needed or (isinstance(layer, Attention) and not layer.fused)
        if needed and _is_own(kernels.module, name):
            reason = _failure(name, kernels.module, trials, tolerance, device)
            found |= {name: reason} if reason else {}
    return tuple(found.items())


def _trials(
    layer: Attention | Mixer, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, list[Callable[[KernelModule], Results | None]]]]:
    """The functions that a layer needs, in order, and how each is tried."""
    if isinstance(layer, Mixer):
        yield layer.function, [lambda module: _numbers(**results_of_mixer(module, layer, device))]
        return
    inputs = Inputs(layer, dtype, device)
    for name, trials in TRIALS.items():
        if layer.fused if name in STEPS else layer.channel_formats is not None if name in BY_CHANNEL else True:
            yield name, [partial(_on, inputs, trial) for trial in trials]


def _on(inputs: Inputs, trial: Trial, module: KernelModule) -> Results | None:
    return trial(module, inputs)


def _failure(
    name: str,
    module: KernelModule,
    trials: Iterable[Callable[[KernelModule], Results | None]],
    tolerance: float,
    device: torch.device,
) -> str:
    """Why a function fails; empty if it does not."""
    try:
        for trial in trials:
            results, expected = trial(module), trial(reference)
            if results and expected and (reason := _difference(results, expected, tolerance)):
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


Trial = Callable[[KernelModule, Inputs], Results | None]


def _as_numbers(trial: Callable[[KernelModule, Inputs], dict[str, Tensor]]) -> Trial:
    return lambda module, inputs: _numbers(**trial(module, inputs))


TRIALS: Mapping[str, tuple[Trial, ...]] = {
    "decode_step": (_decode, _decode_long),
    "prefill_step": (_prefill,),
    **dict.fromkeys(sorted(BY_CHANNEL), (_channels,)),
    "decode_by_channel": (_channels, _channels_long),
    "attend_chunk": (_chunk,),
    **{name: (_as_numbers(trial),) for name, trial in PARTS.items()},
}
