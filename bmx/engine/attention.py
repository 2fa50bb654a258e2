"""The attention function that transformers calls in every layer: where the model meets the KV cache.

Knows the step's chunks and the pool; knows nothing of sequences, sampling or why a chunk was scheduled. A chunk's keys
are not stored before its attention is computed: attention reads the slot and the chunk, then the survivors are written.

Shapes: N packed tokens of the step, T tokens of one chunk, B decoding tokens, M sums of attention, H query heads,
K kv heads, C rows of a slot, P rows in use, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bmx.compress.policy import CompressionPolicy
from bmx.compress.requests import EvictionRequest, PrefillChunk
from bmx.compress.scorer_api import Needs
from bmx.engine.by_channel import append_chunk, decode_tokens, layers_by_channel, read_slot
from bmx.engine.layer_inputs import ChunkState, Forward, FusedLayer, LayerInputs, Pairs, by_part
from bmx.engine.packed import DecodeGroup, PackedStep, PromptChunk
from bmx.engine.ranking import DecodingSlot, Ranking
from bmx.engine.recalling import RecallingAttention
from bmx.kernels import Kernels
from bmx.kernels.contract import Capabilities, KernelModule
from bmx.kernels.formats import hadamard
from bmx.kernels.linear import Linear
from bmx.kernels.scores import out_of_window
from bmx.kernels.transfer import upload
from bmx.kv.layout import LayerLayout
from bmx.kv.pool import KVPool, LayerSlots

CACHED_WEIGHTS = 64  # chunk lengths whose query weights stay on the device


class SlotAttention:
    """The attention function of one model: it attends to slots and chunks, and compresses.

    Args:
        pool: the slots in which prompts are read.
        policy: chooses which pairs stay.
        kernels: compute the attention.
        archive: the slots on which answers are written, where those are others.
    """

    def __init__(
        self, pool: KVPool, policy: CompressionPolicy, kernels: Kernels, archive: KVPool | None = None
    ) -> None:
        self._pool, self._archive = pool, archive
        self._answering = archive or pool
        self._policy = policy
        self._kernels = kernels.module
        self._fused_prefill = _fused_layers(pool, policy, kernels.capabilities)
        self._fused_decode = _fused_layers(self._answering, policy.answering, kernels.capabilities)
        self._ranking = Ranking(policy, pool.dtype, self._fused_decode)
        self._by_channel = layers_by_channel(self._answering, kernels.capabilities)
        recall = policy.answering.recall
        self._recalling = RecallingAttention(recall, self._kernels) if recall else None
        self._rotations = _rotations((pool, self._answering), self._kernels)
        self._query_weights: dict[tuple[int, int], Tensor | None] = {}
        self._forward: Forward | None = None

    @contextmanager
    def forward(self, step: PackedStep) -> Iterator[None]:
        """Let the model be called once over a packed step."""
        self._forward = Forward(step)
        try:
            yield
        finally:
            self._forward = None

    def __call__(
        self,
        _module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,  # noqa: ARG002 - always None: no mask function is registered
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention of one layer over the packed step.

        Args:
            query: [1, H, N, D].
            key: [1, K, N, D], rotary embedding applied.
            value: [1, K, N, E].
            attention_mask: None.
            scaling: factor of the dot products; None for D ** -0.5.
            softcap: cap of the scores, or None.
            s_aux: [H] logits of the attention sinks, or None.

        Returns:
            [1, N, H, E] and None, as transformers expects.
        """
        forward = self._forward
        if forward is None:
            raise RuntimeError("the model was called outside a step")
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, H or K, D or E]
        rotation = self._rotations[forward.layer]
        if rotation is not None:
            [q], [k] = rotation(q), rotation(k)
        inputs = LayerInputs(q, k, v, query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap, s_aux)
        output = inputs.output()
        self._decode_tokens(forward, output, inputs)
        self._prefill_chunks(forward, output, inputs)
        forward.layer += 1
        return output.unsqueeze(0), None

    @property
    def fuses_all_layers(self) -> bool:
        """Whether kernels can do every layer's whole part of a plain step, or of its decoding tokens by channel."""
        decoding = [one or other for one, other in zip(self._fused_decode, self._by_channel, strict=True)]
        reading = self._fused_prefill if self._archive else decoding  # of the same slots
        return self._recalling is None and None not in (*reading, *decoding)

    def rank(self, slots: Iterable[DecodingSlot]) -> None:
        """Rank the pairs of the slots that are due before their next tokens, where kernels evict by rank."""
        self._ranking.rank_slots(slots)

    def _decode_tokens(self, forward: Forward, output: Tensor, inputs: LayerInputs) -> None:
        """Attention of the decoding tokens, the first rows of the output [N, H, E]."""
        step = forward.step
        if step.decode_batch is None or self._decode_fused(forward, output, inputs):
            return
        if not step.decode_groups:
            raise RuntimeError("the kernels declined a step that was packed for them alone")
        for group in step.decode_groups:
            parts = self._answering.layer(group.group, forward.layer)
            for i, (part, own_output, own) in enumerate(by_part(parts, output, inputs)):
                shared = self._read_shared(self._answering, group, forward.layer, i)
                own_output[group.rows] = self._decode_group(part, forward.layer, group, own, shared)

    def _prefill_chunks(self, forward: Forward, output: Tensor, inputs: LayerInputs) -> None:
        """Attention of the prompt chunks, the rows of the output [N, H, E] behind the decoding tokens."""
        step = forward.step
        if not self._prefill_fused(forward, output, inputs):
            self._read(step.prompts, self._pool, self._policy, forward, output, inputs)
        self._archive_chunks(forward, inputs)
        self._read(step.endings, self._answering, self._policy.answering, forward, output, inputs)

    def _read(
        self,
        chunks: tuple[PromptChunk, ...],
        pool: KVPool,
        policy: CompressionPolicy,
        forward: Forward,
        output: Tensor,
        inputs: LayerInputs,
    ) -> None:
        """Attention of chunks to their slots and to themselves; a policy says what the slots keep of them."""
        for chunk in chunks:
            parts = pool.layer(chunk.group, forward.layer)
            for i, (part, own_output, own) in enumerate(by_part(parts, output, inputs)):
                shared = self._read_shared(pool, chunk, forward.layer, i)
                own_output[chunk.rows] = self._prefill_chunk(part, policy, forward, chunk, own, shared)

    def _read_shared(self, pool: KVPool, reader: DecodeGroup | PromptChunk, layer: int, part: int) -> Pairs | None:
        """The rows of a shared slot that are read before others, in one part of a layer; None for none."""
        if reader.shared is None:
            return None
        slots = pool.layer(reader.shared.group, layer)[part]
        keys, values = slots.read(reader.shared.slot, reader.shared_rows)
        return Pairs(keys, values, slots.positions[reader.shared.slot, :, : reader.shared_rows])

    def _archive_chunks(self, forward: Forward, inputs: LayerInputs) -> None:
        """Archive all pairs of the prompt chunks, in the layer that owns them."""
        for chunk in forward.step.prompts:
            if self._archive is None or chunk.archive is None:
                return
            [part] = self._archive.layer(chunk.archive.group, forward.layer)
            if part.layout.owner == forward.layer:
                rows = slice(chunk.rows.start, chunk.rows.start + chunk.length)
                pairs = ChunkState(inputs.key[rows], inputs.value[rows])
                self._store(self._policy.answering, part, chunk.archived, pairs, inputs)

    def _decode_fused(self, forward: Forward, output: Tensor, inputs: LayerInputs) -> bool:
        """Let kernels do the decoding tokens' whole part of a layer; False, with nothing done, if they cannot."""
        fused, step, batch = self._fused_decode[forward.layer], forward.step, forward.step.decode_batch
        channels = self._by_channel[forward.layer]
        if channels is not None and batch is not None:
            return decode_tokens(self._kernels, channels, batch, output, inputs)
        if fused is None or batch is None or not step.plain or self._recalling is not None:
            return False
        (rows, order, _), tokens = fused, slice(len(batch.slots))
        return self._kernels.decode_step(
            output[tokens],
            inputs.query[tokens],
            inputs.key[tokens],
            inputs.value[tokens],
            rows,
            batch.slots,
            batch.positions,
            batch.row_limits,
            order=order,
            decay=self._policy.answering.decay(1),
            accumulate=rows.mass is not None and batch.evicting,
            shared=batch.shared,
            **inputs.options,
        )

    def _prefill_fused(self, forward: Forward, output: Tensor, inputs: LayerInputs) -> bool:
        """Let kernels do the chunks' whole part of a layer; False, with nothing done, if they cannot."""
        fused, step = self._fused_prefill[forward.layer], forward.step
        if fused is None or step.chunks is None or not step.plain:
            return False
        (rows, order, _), ranking = fused, None
        if order.by == "rank":
            ranking = partial(self._ranking.rank_chunks, fused, step.chunks, inputs.key, forward.ranked)
        vectors = inputs.query, inputs.key, inputs.value
        options = {"order": order, "ranking": ranking, **inputs.options}
        return self._kernels.prefill_step(output, *vectors, rows, step.chunks, **options)

    def _prefill_chunk(
        self,
        part: LayerSlots,
        policy: CompressionPolicy,
        forward: Forward,
        chunk: PromptChunk,
        inputs: LayerInputs,
        shared: Pairs | None,
    ) -> Tensor:
        """A chunk attends to its slot and to itself, and its survivors are stored: output [T, H, E]."""
        rows, key = chunk.rows, (part.layout.owner, chunk.rows.start)
        state = forward.shared.get(key) or ChunkState(inputs.key[rows], inputs.value[rows])
        output, sums = self._attend_chunk(part, chunk, state, inputs, shared)
        if sums is not None:
            state.add(sums)
        if forward.layer < part.layout.last_reader:
            forward.shared[key] = state
        else:
            self._store(policy, part, chunk, state, inputs)
        return output

    def _attend_chunk(
        self, part: LayerSlots, chunk: PromptChunk, state: ChunkState, inputs: LayerInputs, shared: Pairs | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a chunk: output [T, H, E], and sums [M, K, P + T] if pairs are ranked by them."""
        layout, used = part.layout, chunk.used_rows(part.layout.capacity)
        own = Pairs(*read_slot(self._kernels, part, chunk.slot, used), part.positions[chunk.slot, :, :used])
        keys, values, positions = own if shared is None else shared.before(own)
        output, sums = self._kernels.attend_chunk(
            inputs.query[chunk.rows],
            state.key,
            state.value,
            keys,
            values,
            hidden=out_of_window(positions, chunk.start, chunk.length + chunk.probes, layout.window),
            query_weights=self._weights_of(chunk, layout, keys.device),
            squares=Needs.SQUARES in self._policy.needs,
            past_places=positions - chunk.start,
            distance=self._policy.distance,
            power=self._policy.summed.power,
            **inputs.options,
        )
        return output, None if sums is None else sums[..., : used + chunk.length]  # without the probe's keys

    def _weights_of(self, chunk: PromptChunk, layout: LayerLayout, device: torch.device) -> Tensor | None:
        """Query weights [M, T + probes] of a chunk; None if its sequence's pairs are not ranked by attention."""
        if not layout.row_stats or chunk.total <= min(chunk.row_limit, layout.capacity):
            return None
        key = (chunk.length, chunk.probes)
        if key not in self._query_weights:
            if len(self._query_weights) >= CACHED_WEIGHTS:
                self._query_weights.clear()
            weights = self._policy.query_weights(*key)
            self._query_weights[key] = upload(weights, device, torch.float32) if weights else None
        return self._query_weights[key]

    def _store(
        self, policy: CompressionPolicy, part: LayerSlots, chunk: PromptChunk, state: ChunkState, inputs: LayerInputs
    ) -> None:
        """Store the chunk's pairs, or those of them and of the slot's that a policy keeps."""
        tokens = chunk.length
        if append_chunk(self._kernels, part, chunk.slot, chunk.start, state.key[:tokens], state.value[:tokens]):
            return
        queries = inputs.query[chunk.rows][:tokens]
        policy.compress(
            part,
            PrefillChunk(
                slot=chunk.slot,
                start=chunk.start,
                row_limit=chunk.row_limit,
                spans=chunk.spans,
                key=state.key[:tokens],
                value=state.value[:tokens],
                queries=queries.view(tokens, part.layout.kv_heads, -1, queries.shape[-1]),
                scale=inputs.scale,
                sums=state.sums,
                elsewhere=chunk.shared_rows,
            ),
        )

    def _decode_group(
        self, part: LayerSlots, layer: int, group: DecodeGroup, inputs: LayerInputs, shared: Pairs | None
    ) -> Tensor:
        """Each token takes a row of its slot, then attends to the slot: output [B, H, E]."""
        query, key, value = inputs.query[group.rows], inputs.key[group.rows], inputs.value[group.rows]
        if owns_rows := part.layout.owner == layer:
            self._insert(part, group, key, value)
        if self._recalling is not None and part.layout.recall is not None:
            return self._recalling(part, group, query, owns_rows, inputs.options)
        output, sums = self._attend_slots(part, group, inputs, shared)
        if sums is not None:
            self._policy.answering.observe(part, group.slots, sums, first=owns_rows)
        return output

    def _attend_slots(
        self, part: LayerSlots, group: DecodeGroup, inputs: LayerInputs, shared: Pairs | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one token per slot: output [B, H, E] and sums [M, B, K, C].

        Slots are read as they lie; of those in fewer bits, only rows in use are decoded.
        """
        row_stats, capacity, in_place = part.layout.row_stats, part.layout.capacity, part.reads_in_place
        rows = capacity if in_place else min(group.longest, capacity)
        keys, values = part.read_slots(slice(None) if in_place else group.slots, rows)
        if self._recalling is None or part.layout.window is not None:
            hidden = _hidden_rows(part, group, rows)
        else:
            own_keys = keys[group.slots] if in_place else keys
            hidden = self._recalling.unread(part, group, inputs.query[group.rows], own_keys, inputs.scale)
        output, sums = self._kernels.attend_slots(
            inputs.query[group.rows],
            keys,
            values,
            group.slots if in_place else None,
            hidden=hidden,
            want_mass="mass" in row_stats and group.evicting(capacity),
            squares="squares" in row_stats,
            power=self._policy.summed.power,
            shared=None if shared is None else (shared.keys, shared.values),
            **inputs.options,
        )
        return output, None if sums is None else pad(sums, (0, capacity - rows))

    def _insert(self, part: LayerSlots, group: DecodeGroup, key: Tensor, value: Tensor) -> None:
        """Write the tokens' own pairs: into the next empty row, or over the lowest-ranked unprotected pair."""
        capacity = part.layout.capacity
        full = group.full(capacity)
        rows = group.next_rows.unsqueeze(1)  # [B, 1]
        if any(full):
            row_limits = None if group.row_limits is None else group.row_limits.clamp(max=capacity)
            request = EvictionRequest(
                slots=group.slots,
                slots_host=group.slots_host,
                positions=group.positions,
                positions_host=group.positions_host,
                row_limits_host=group.row_limits_host,
                row_limits=row_limits,
                spans=group.spans,
            )
            victims = self._policy.answering.victims(part, request)
            first_full = capacity if row_limits is None else row_limits.unsqueeze(1)
            rows = victims if all(full) else torch.where(rows >= first_full, victims, rows)
        part.write(group.slots, rows, key, value, group.positions)
        if part.index is not None:
            part.index.write(group.slots, group.positions, group.positions_host, key)


def _rotations(pools: tuple[KVPool, KVPool], kernels: KernelModule) -> list[Callable[[Tensor], list[Tensor]] | None]:
    """By layer, what rotates queries and keys [..., D], so that keys lose less in few bits; None for nothing."""
    rotations = {}
    first = pools[0].layer(0, 0)[0]
    layers = [[pool.layer(0, layer)[0].layout for pool in pools] for layer in range(len(pools[0].rows))]
    rotated = [any(layout.rotates_keys for layout in layouts) for layouts in layers]
    for dim in {layouts[0].key_dim for layouts, wanted in zip(layers, rotated, strict=True) if wanted}:
        columns = hadamard(dim, pools[0].dtype, first.positions.device).T.contiguous()
        rotations[dim] = kernels.product((Linear(weight=columns, bias=None),))
    return [rotations[layouts[0].key_dim] if wanted else None for layouts, wanted in zip(layers, rotated, strict=True)]


def _fused_layers(pool: KVPool, policy: CompressionPolicy, capabilities: Capabilities) -> list[FusedLayer | None]:
    """By layer, what kernels need to do its whole part of a step; None where they cannot."""
    fused: list[FusedLayer | None] = []
    for layer, rows in enumerate(pool.rows):
        layout = pool.layer(0, layer)[0].layout
        order, shares_nothing = policy.eviction_order(layout), layout.owner == layer == layout.last_reader
        able = order is not None and capabilities.fuses(order.by, *layout.formats) and shares_nothing
        fused.append(FusedLayer(rows, order, layout.key_dim) if able and rows is not None and order else None)
    return fused


def _hidden_rows(part: LayerSlots, group: DecodeGroup, count: int) -> Tensor | None:
    """Of the first rows, those that are not in use yet or out of a sliding window; None if there are none.

    Args:
        part: the layer's slots.
        group: the decoding tokens.
        count: R.

    Returns:
        Broadcastable to [B, K, R].
    """
    layout = part.layout
    last = group.positions.view(-1, 1, 1)
    hidden = None
    if group.row_limits is not None or min(group.positions_host) + 1 - group.shared_rows < count:
        rows = torch.arange(count, device=last.device)
        hidden = rows > group.next_rows.view(-1, 1, 1)
        if group.row_limits is not None:
            hidden = hidden | (rows >= group.row_limits.view(-1, 1, 1))
    if layout.window is not None and not layout.by_age:
        out = part.positions[group.slots, :, :count] <= last - layout.window
        hidden = out if hidden is None else hidden | out
    return hidden
