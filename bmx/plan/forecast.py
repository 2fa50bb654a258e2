"""How long a run will take: the steps that the scheduler would take, played through, each timed by a roofline.

A step's products take what the matrix rate or the bandwidth allows, whichever is slower; what is no product takes
the bandwidth, and every operator its start. Knows sizes and rates; touches no tensor and loads no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

from bmx.errors import MemoryLimitError
from bmx.kernels.contract import KernelProfile
from bmx.kv.layout import KVLayout
from bmx.model.spec import ModelSpec
from bmx.plan.chunks import chunk_ends
from bmx.plan.machine_speed import Rates
from bmx.plan.memory import group_for
from bmx.plan.planner import Length, Plan

PLAYED_ROWS = 256  # at least so many requests are played through, or as many as fill the slots three times
WORTH = 1.03  # times the slots that smaller steps must give to be looked at
UNPACK_PASSES = 4  # times that what is stored in fewer bits is written or read in the activations' type
INT8_SPEED = 1.9  # times as fast as in bfloat16 are products of bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        seconds: for all requests.
        prefill_rate, decode_rate: prompt tokens and decoded tokens a second, counted as ``Stats`` does.
    """

    seconds: float
    prefill_rate: float
    decode_rate: float


def forecast(
    spec: ModelSpec,
    plan: Plan,
    lengths: Seq[Length],
    rates: Rates,
    profile: KernelProfile,
    decode_layouts: Seq[KVLayout] | None = None,
) -> Forecast:
    """Play a plan through; of long jobs an even sample, scaled up.

    Args:
        profile: how the chosen kernels use these rates.
        decode_layouts: what is left of a slot of each group once its prompt is read, if not all of it.
    """
    largest = max(group.capacity for group in plan.groups)
    served = [length for length in lengths if length.rows_needed <= largest]
    stride = max(1, len(served) // max(PLAYED_ROWS, 3 * plan.slots))
    ordered = sorted(served, key=lambda one: (one.prompt_tokens, one.max_tokens)) if stride > 1 else served
    played = ordered[stride // 2 :: stride]
    clock = _Clock(spec, plan, rates, profile, decode_layouts or plan.layouts)
    prompt_seconds = decode_seconds = 0.0
    decoded = 0
    for step in _steps(plan, played):
        seconds = clock.seconds(step) * step.repeats
        decodes = sum(step.decodes)
        share = decodes / (decodes + sum(chunk.length for chunk in step.chunks))
        decoded += decodes * step.repeats
        decode_seconds += seconds * share
        prompt_seconds += seconds * (1 - share)
    prompts = sum(length.prompt_tokens for length in played)
    scale = sum(map(_tokens, served)) / max(1, sum(map(_tokens, played)))
    return Forecast(
        seconds=(prompt_seconds + decode_seconds) * scale,
        prefill_rate=prompts / prompt_seconds if prompt_seconds else 0.0,
        decode_rate=decoded / decode_seconds if decode_seconds else 0.0,
    )


def _tokens(length: Length) -> int:
    return length.prompt_tokens + length.max_tokens


@dataclass(frozen=True, slots=True)
class SimulatedChunk:
    """Tokens start .. start + length of a prompt in a slot of a group."""

    group: int
    start: int
    length: int
    last: bool


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """Prompt chunks, decoding tokens by group, and how often the same step is repeated."""

    chunks: tuple[SimulatedChunk, ...]
    decodes: tuple[int, ...]
    repeats: int


def _steps(plan: Plan, lengths: Seq[Length]) -> Iterator[SimulatedStep]:
    """The steps that the scheduler would take, all prompts known: by numbers alone, and decoding in long strides."""
    waiting = sorted(lengths, key=lambda length: -length.steps(plan.step.chunk_size))
    free = [group.slots for group in plan.groups]
    decodes = [0] * len(free)
    prompts: list[tuple[int, Length, list[SimulatedChunk]]] = []
    ends: list[tuple[int, int]] = []  # (step, group) in which an answer is finished
    now = 0
    while True:
        while ends and ends[0][0] <= now:
            group = heappop(ends)[1]
            decodes[group], free[group] = decodes[group] - 1, free[group] + 1
        waiting = _admit(plan, waiting, free, prompts)
        chunks = _next_chunks(prompts, plan.step.max_num_batched_tokens - sum(decodes))
        if not chunks and not ends:
            return
        repeats = 1 if chunks else ends[0][0] - now
        yield SimulatedStep(tuple(chunks), tuple(decodes), repeats)
        now += repeats
        for group, length, left in prompts:
            if not left:
                decodes[group] += 1
                heappush(ends, (now + length.max_tokens - 1, group))
        prompts = [prompt for prompt in prompts if prompt[2]]


def _admit(
    plan: Plan, waiting: list[Length], free: list[int], prompts: list[tuple[int, Length, list[SimulatedChunk]]]
) -> list[Length]:
    """Give slots to those who wait, the longest first; returns those that found none."""
    if not any(free):
        return waiting
    left = []
    for at, length in enumerate(waiting):
        group = group_for(length.rows_needed, plan.groups, free)
        if group is not None:
            free[group] -= 1
            prompts.append((group, length, _cut(group, length.prompt_tokens, plan.step.chunk_size)))
        else:
            left.append(length)
        if not any(free):
            return left + waiting[at + 1 :]
    return left


def _cut(group: int, tokens: int, chunk_size: int) -> list[SimulatedChunk]:
    """A prompt in its chunks, the last one first."""
    ends = [0, *chunk_ends(tokens, chunk_size)]
    return [SimulatedChunk(group, a, b - a, b == tokens) for a, b in pairwise(ends)][::-1]


def _next_chunks(prompts: list[tuple[int, Length, list[SimulatedChunk]]], room: int) -> list[SimulatedChunk]:
    """The next chunk of each prompt while they fit, and one in any case."""
    chunks: list[SimulatedChunk] = []
    for _, _, left in prompts:
        if chunks and left[-1].length > room:
            break
        chunks.append(left.pop())
        room -= chunks[-1].length
    return chunks


def fastest(
    plans: Seq[Callable[[], Plan]],
    spec: ModelSpec,
    lengths: Seq[Length],
    profile: KernelProfile,
    rates: Callable[[], Rates],
) -> Plan:
    """The plan that answers the most rows, the fastest of those; rates are only asked for where it is open.

    Args:
        plans: what to choose from, the fastest first where all have the same slots.

    Raises:
        MemoryLimitError: none of them fits; the last one's.
    """
    made: list[Plan] = []
    for attempt in plans:
        try:
            plan = attempt()
        except MemoryLimitError:
            if attempt is plans[-1] and not made:
                raise
            continue
        if not made or plan.too_large < made[-1].too_large or plan.slots > WORTH * max(one.slots for one in made):
            made.append(plan)
    if len(made) == 1:
        return made[0]
    measured = rates()
    return min(made, key=lambda plan: (plan.too_large, forecast(spec, plan, lengths, measured, profile).seconds))


class _Clock:
    """Seconds of a step."""

    def __init__(
        self, spec: ModelSpec, plan: Plan, rates: Rates, profile: KernelProfile, layouts: Seq[KVLayout]
    ) -> None:
        self._spec, self._plan, self._rates = spec, plan, rates
        self._profile = profile
        self._layers: Counter[tuple[int | None, int, int]] = Counter(
            (layer.window, layer.query_heads, layer.key_dim + layer.value_dim) for layer in spec.layers
        )
        self._passes = spec.itemsize * self._profile.score_passes
        self._slot_bytes = [self._read_by_a_token(layout) for layout in layouts]

    def _read_by_a_token(self, layout: KVLayout) -> int:
        """Bytes of a slot's keys and values, and of its scores as often as they are touched."""
        layers = list(zip(layout.layers, self._spec.layers, strict=True))
        scores = self._passes * sum(layer.capacity * spec.query_heads for layer, spec in layers)
        unpacked = sum(
            layer.capacity * spec.kv_heads * (spec.key_dim + spec.value_dim) * self._spec.itemsize
            for layer, spec in layers
            if layer.encoding is not None
        )
        return layout.kv_bytes + scores + UNPACK_PASSES * unpacked

    def seconds(self, step: SimulatedStep) -> float:
        """What the roofline allows, and the operators' starts."""
        spec, rates, pace = self._spec, self._rates, self._profile
        tokens = sum(step.decodes) + sum(chunk.length + self._plan.step.probe for chunk in step.chunks)
        sampled = sum(step.decodes) + sum(chunk.last for chunk in step.chunks)
        weights = min(spec.weight_bytes - spec.head_bytes, tokens * spec.costs.flops // 2 * spec.itemsize)
        own = spec.costs.flops / (INT8_SPEED if spec.int8 else 1)
        flops = tokens * own + sampled * 2 * spec.head_bytes // spec.itemsize
        read = weights + (spec.head_bytes if sampled else 0)
        touched = pace.own_operators * tokens * spec.costs.traffic_bytes + sampled * spec.vocab * spec.itemsize
        groups = sum(count > 0 for count in step.decodes)
        started = pace.chunk_operators * len(step.chunks) + pace.decode_operators * groups
        starting = (pace.own_operators * spec.costs.operators + len(spec.layers) * started) * rates.operator_seconds
        computing = (
            max(flops / rates.flops, read / rates.thin_bandwidth / pace.thin_bandwidth)
            + touched / rates.bandwidth
            + sum(map(self._prompt, step.chunks))
            + sum(self._decode(group, active) for group, active in enumerate(step.decodes) if active)
        )
        if pace.ahead:
            return max(computing, starting if step.chunks else 0.0)
        return computing + starting

    def _prompt(self, chunk: SimulatedChunk) -> float:
        """Attention of a chunk to its slot and to itself."""
        capacity = self._plan.groups[chunk.group].capacity
        seconds = 0.0
        for (window, heads, dims), layers in self._layers.items():
            past = min(chunk.start, capacity, window or capacity)
            scores = layers * heads * (chunk.length * past + chunk.length * (chunk.length + 1) // 2)
            seconds += self._profile.thin_product * 2 * scores * dims / self._rates.flops
            seconds += scores * self._passes / self._rates.bandwidth
        return seconds

    def _decode(self, group: int, active: int) -> float:
        """Attention of a group to its slots: all take part, or copies of those that decode, or these alone."""
        slots = self._plan.groups[group].slots
        touched = slots if 2 * active >= slots else 3 * active
        touched = touched if self._profile.all_slots else active
        return touched * self._slot_bytes[group] / self._rates.thin_bandwidth / self._profile.slot_bandwidth
