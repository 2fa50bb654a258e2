"""How long a run will take: the scheduler's steps are simulated, and a roofline says how long each one takes.

A step's matrix products take as long as the matrix rate or the bandwidth allows, whichever is slower. Its other
operators take the bandwidth, and each operator takes its start besides. The states of layers without attention are read
and written once for each decoding row and each chunk of a prompt; their products are few beside those of the weights
(about 1 % in Qwen 3.5), and are not counted. Knows sizes and rates; touches no tensor and loads no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

from bmx.errors import MemoryLimitError
from bmx.kernels.profile import KernelProfile
from bmx.kv.layout import KVLayout
from bmx.model.spec import ModelSpec
from bmx.plan.chunks import chunk_ends
from bmx.plan.machine_speed import Rates
from bmx.plan.memory import group_for
from bmx.plan.planner import Length, Plan, own_lengths

PLAYED_ROWS = 256  # requests that are simulated at least; more if the slots can be filled three times
WORTH = 1.03  # smaller steps are considered if they leave room for this many times the slots


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The expected time of a run.

    Attributes:
        seconds: for all requests.
        prefill_rate: prompt tokens a second of the steps that read prompts, and decode beside them.
        decode_rate: tokens a second of the steps that only decode; 0 without such steps.
        generated_rate: generated tokens a second of the whole run, if every answer is as long as it may get.
    """

    seconds: float
    prefill_rate: float
    decode_rate: float
    generated_rate: float


def forecast(
    spec: ModelSpec,
    plan: Plan,
    lengths: Seq[Length],
    rates: Rates,
    profile: KernelProfile,
    decode_layouts: Seq[KVLayout] | None = None,
) -> Forecast:
    """Simulate a run under a plan; of a long job an even sample of its requests, scaled up.

    Args:
        spec: the model's sizes.
        plan: the plan.
        lengths: of the requests.
        rates: how fast the device is.
        profile: how the chosen kernels use these rates.
        decode_layouts: for each group, what is left of a slot once its prompt is read; all of it if left out.
    """
    largest = max(group.capacity for group in plan.groups)
    served = [length for length in lengths if length.rows_needed <= largest]
    if plan.shared_slots:
        _, served = own_lengths(served)
    stride = max(1, len(served) // max(PLAYED_ROWS, 3 * plan.slots))
    ordered = sorted(served, key=lambda length: (length.prompt_tokens, length.max_tokens)) if stride > 1 else served
    sample = ordered[stride // 2 :: stride]
    clock = _Clock(spec, plan, rates, profile, decode_layouts or plan.layouts)
    prompt_seconds = decode_seconds = 0.0
    decoded = 0
    for step in _steps(plan, sample):
        seconds = clock.seconds(step) * step.repeats
        if step.chunks:
            prompt_seconds += seconds
        else:
            decode_seconds += seconds
            decoded += sum(step.decodes) * step.repeats
    seconds = prompt_seconds + decode_seconds
    prompts, generated = (sum(getattr(length, name) for length in sample) for name in ("prompt_tokens", "max_tokens"))
    scale = sum(map(_tokens, served)) / max(1, sum(map(_tokens, sample)))
    return Forecast(
        seconds=seconds * scale,
        prefill_rate=prompts / prompt_seconds if prompt_seconds else 0.0,
        decode_rate=decoded / decode_seconds if decode_seconds else 0.0,
        generated_rate=generated / seconds if seconds else 0.0,
    )


def _tokens(length: Length) -> int:
    return length.prompt_tokens + length.max_tokens


@dataclass(frozen=True, slots=True)
class SimulatedChunk:
    """Tokens start .. start + length of a prompt, in a slot of ``group``; ``last``: whether they end the prompt."""

    group: int
    start: int
    length: int
    last: bool


@dataclass(slots=True)
class SimulatedPrompt:
    """A prompt that is being read: its slot's group, its request, and the chunks that are left, the last one first."""

    group: int
    length: Length
    chunks_left: list[SimulatedChunk]


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """A step: its prompt chunks, its decoding sequences by group, and how often the same step is repeated."""

    chunks: tuple[SimulatedChunk, ...]
    decodes: tuple[int, ...]
    repeats: int


def _steps(plan: Plan, lengths: Seq[Length]) -> Iterator[SimulatedStep]:
    """The steps that the scheduler would take if it knew all requests; steps that only decode are taken together."""
    waiting = sorted(lengths, key=lambda length: -length.steps(plan.step.chunk_size))
    free = [group.slots for group in plan.groups]
    decodes = [0] * len(free)
    prompts: list[SimulatedPrompt] = []
    ends: list[tuple[int, int]] = []  # (step, group) at which an answer is finished
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
        for prompt in prompts:
            if not prompt.chunks_left:
                decodes[prompt.group] += 1
                heappush(ends, (now + prompt.length.max_tokens - 1, prompt.group))
        prompts = [prompt for prompt in prompts if prompt.chunks_left]


def _admit(plan: Plan, waiting: list[Length], free: list[int], prompts: list[SimulatedPrompt]) -> list[Length]:
    """Admit waiting requests while a free slot fits, as the scheduler does.

    Args:
        plan: the plan.
        waiting: requests without a slot, the longest first.
        free: free slots of each group; reduced.
        prompts: prompts that are being read; admitted ones are added.

    Returns:
        The requests that still wait.
    """
    if not any(free):
        return waiting
    left = []
    for at, length in enumerate(waiting):
        group = group_for(length.rows_needed, plan.groups, free)
        if group is not None:
            free[group] -= 1
            chunks = _chunks(group, length, plan.step.chunk_size)
            prompts.append(SimulatedPrompt(group, length, chunks[::-1]))
        else:
            left.append(length)
        if not any(free):
            return left + waiting[at + 1 :]
    return left


def _chunks(group: int, length: Length, chunk_size: int) -> list[SimulatedChunk]:
    """The chunks of a prompt.

    Args:
        group: of its slot.
        length: of the request.
        chunk_size: most tokens of a chunk.
    """
    tokens = length.prompt_tokens
    ends = dict.fromkeys([0, *chunk_ends(tokens - length.ending, chunk_size), tokens])
    return [SimulatedChunk(group, a, b - a, b == tokens) for a, b in pairwise(ends)]


def _next_chunks(prompts: list[SimulatedPrompt], room: int) -> list[SimulatedChunk]:
    """The next chunk of each prompt while they fit into ``room`` tokens, and one in any case."""
    chunks: list[SimulatedChunk] = []
    for prompt in prompts:
        if chunks and prompt.chunks_left[-1].length > room:
            break
        chunks.append(prompt.chunks_left.pop())
        room -= chunks[-1].length
    return chunks


def fastest(
    plans: Seq[Callable[[], Plan]],
    spec: ModelSpec,
    lengths: Seq[Length],
    profile: KernelProfile,
    rates: Callable[[], Rates],
) -> Plan:
    """The plan that answers the most requests; of several such plans, the one with the shortest forecast.

    Args:
        plans: make the plans to choose from, the fastest first where all have the same slots.
        spec: the model's sizes.
        lengths: of the requests.
        profile: how the chosen kernels use the device's rates.
        rates: says how fast the device is; called only where several plans must be compared.

    Raises:
        MemoryLimitError: no plan fits; the error is that of the last one.
    """
    candidates: list[Plan] = []
    for attempt in plans:
        try:
            plan = attempt()
        except MemoryLimitError:
            if attempt is plans[-1] and not candidates:
                raise
            continue
        most_slots = max((candidate.slots for candidate in candidates), default=0)
        if not candidates or plan.too_large < candidates[-1].too_large or plan.slots > WORTH * most_slots:
            candidates.append(plan)
    if len(candidates) == 1:
        return candidates[0]
    measured = rates()
    return min(candidates, key=lambda plan: (plan.too_large, forecast(spec, plan, lengths, measured, profile).seconds))


class _Clock:
    """Says how many seconds a step takes.

    Args:
        spec: the model's sizes.
        plan: the plan.
        rates: how fast the device is.
        profile: how the kernels use these rates.
        layouts: for each group, what decoding reads of a slot.
    """

    def __init__(
        self, spec: ModelSpec, plan: Plan, rates: Rates, profile: KernelProfile, layouts: Seq[KVLayout]
    ) -> None:
        self._spec, self._plan, self._rates = spec, plan, rates
        self._profile = profile
        self._layers: Counter[tuple[int | None, int, int]] = Counter(
            (layer.window, layer.query_heads, layer.key_dim + layer.value_dim) for layer in spec.layers
        )
        self._passes = spec.itemsize * self._profile.score_passes
        self._slot_bytes = [self._bytes_read(layout) for layout in layouts]
        self._state_bytes = 2 * layouts[0].state_bytes  # read and written

    def _bytes_read(self, layout: KVLayout) -> int:
        """Bytes that one decoding token reads: its slot's keys and values, and its scores in each pass over them."""
        layers = list(zip(layout.layers, self._spec.layers, strict=True))
        scores = self._passes * sum(layer.rows * spec.query_heads // spec.kv_heads for layer, spec in layers)
        unpacked = sum(
            layer.rows * (spec.key_dim + spec.value_dim) * self._spec.itemsize
            for layer, spec in layers
            if layer.encodes and not (layer.by_channel and self._profile.reads_by_channel)
        )
        return layout.kv_bytes + scores + self._profile.unpack_passes * unpacked

    def seconds(self, step: SimulatedStep) -> float:
        """The seconds that the roofline allows, and those of the operators' starts."""
        spec, rates, profile = self._spec, self._rates, self._profile
        tokens = sum(step.decodes) + sum(chunk.length + self._plan.step.probe for chunk in step.chunks)
        sampled = sum(step.decodes) + sum(chunk.last for chunk in step.chunks)
        weights = min(spec.weight_bytes - spec.head_bytes, tokens * spec.costs.flops // 2 * spec.itemsize)
        own = spec.costs.flops / profile.product_speed(spec.quantization)
        flops = tokens * own + sampled * 2 * spec.head_bytes // spec.itemsize
        read = weights + (spec.head_bytes if sampled else 0)
        touched = profile.own_operators * tokens * spec.costs.traffic_bytes + sampled * spec.vocab * spec.itemsize
        groups = sum(count > 0 for count in step.decodes)
        started = profile.chunk_operators * len(step.chunks) + profile.decode_operators * groups
        starting = (profile.own_operators * spec.costs.operators + len(spec.layers) * started) * rates.operator_seconds
        computing = (
            max(flops / rates.flops, read / rates.thin_bandwidth)
            + (touched + self._state_bytes * (sum(step.decodes) + len(step.chunks))) / rates.bandwidth
            + sum(map(self._prompt, step.chunks))
            + sum(self._decode(group, active) for group, active in enumerate(step.decodes) if active)
        )
        if profile.ahead:
            return max(computing, starting if step.chunks else 0.0)
        return computing + starting

    def _prompt(self, chunk: SimulatedChunk) -> float:
        """Seconds of a chunk's attention to its slot and to itself."""
        reading = self._plan.reading
        capacity = reading.layout.capacity if reading and not chunk.last else self._plan.groups[chunk.group].capacity
        seconds = 0.0
        for (window, heads, dims), layers in self._layers.items():
            past = min(chunk.start, capacity, window or capacity)
            scores = layers * heads * (chunk.length * past + chunk.length * (chunk.length + 1) // 2)
            seconds += self._profile.thin_product * 2 * scores * dims / self._rates.flops
            seconds += scores * self._passes / self._rates.bandwidth
        return seconds

    def _decode(self, group: int, active: int) -> float:
        """Seconds of a group's attention: to all slots, to copies of the active ones, or to the active ones alone."""
        slots = self._plan.groups[group].slots
        touched = slots if 2 * active >= slots else 3 * active
        touched = touched if self._profile.all_slots else active
        return touched * self._slot_bytes[group] / self._rates.thin_bandwidth / self._profile.slot_bandwidth
