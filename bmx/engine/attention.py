"""Where the model meets the cache: the attention function that transformers calls in every layer.

Knows the step's chunks and the pool; knows nothing of sequences, sampling or why a chunk was scheduled. The chunk's
keys are never stored before they are chosen: attention reads the slot and the chunk, then the survivors are written.

Shapes: N packed tokens of the step, T tokens of one chunk, B decoding tokens of one group, H query heads, K kv heads,
C rows of a slot, P rows in use, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmx.compress.policy import CompressionPolicy, EvictionRequest, PrefillChunk
from bmx.compress.scorer_api import Needs
from bmx.engine.packed import DecodeGroup, PackedStep, PromptChunk, Shared
from bmx.kernels import Kernels
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.reference import out_of_window
from bmx.kernels.slot_views import Rows
from bmx.kernels.transfer import upload
from bmx.kv.pool import KVPool, LayerSlots

KEPT_VOTES = 64  # lengths of chunks whose votes are kept


@dataclass(frozen=True, slots=True)
class Details:
    """What a layer's attention asks for beside queries, keys and values."""

    scale: float
    softcap: float | None
    sinks: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """As keyword arguments of a kernel."""
        return {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks}


class SlotAttention:
    """The attention function of one model: attends to slots and chunks, then compresses.

    Args:
        pool: the slots.
        policy: who stays.
        kernels: how attention is computed.
    """

    def __init__(self, pool: KVPool, policy: CompressionPolicy, kernels: Kernels) -> None:
        self._pool = pool
        self._policy = policy
        self._kernels = kernels.module
        self._fused = kernels.capabilities.fuses_steps
        self._alone = [self._left_alone(layer) for layer in range(len(pool.rows))]
        self._weights: dict[tuple[int, int], Tensor | None] = {}
        self.step: PackedStep | None = None

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
            query: [1, H, N, D]; key [1, K, N, D]; value [1, K, N, E], rotary embedding applied.
            scaling, softcap, s_aux: as transformers passes them (scale, score cap, attention sinks).

        Returns:
            [1, N, H, E] and None, as transformers expects.
        """
        step = self.step
        if step is None:
            raise RuntimeError("the model was called outside a step")
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        details = Details(scale, softcap, s_aux)
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, H or K, D or E]
        output = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=q.dtype, device=q.device)
        if not self._decoded(step, output, q, k, v, details):
            if step.decode_batch is not None and not step.decode_groups:
                raise RuntimeError("no kernel takes this step")
            for group in step.decode_groups:
                output[group.rows] = self._decode(step, group, q, k, v, details)
        if not self._read(step, output, q, k, v, details):
            for index, chunk in enumerate(step.prompts):
                output[chunk.rows] = self._prompt(step, index, chunk, q, k, v, details)
        step.layer += 1
        return output.unsqueeze(0), None

    @property
    def alone(self) -> bool:
        """Whether kernels do all that there is to do in every layer, as long as a step is plain."""
        return all(self._alone)

    def _left_alone(self, layer: int) -> tuple[Rows, EvictionOrder] | None:
        """What kernels need to do a layer's part of a step by themselves; None where they cannot."""
        rows, layout = self._pool.rows[layer], self._pool.layer(0, layer).layout
        ranking = self._policy.eviction_order(layout)
        mine = layout.owner == layer == layout.last_reader
        return (rows, ranking) if self._fused and mine and rows is not None and ranking is not None else None

    def _decoded(self, step: PackedStep, output: Tensor, q: Tensor, k: Tensor, v: Tensor, details: Details) -> bool:
        """Have the kernels do all that decoding tokens need in a layer; False, and nothing is done, if they cannot."""
        alone, decode_batch = self._alone[step.layer], step.decode_batch
        if alone is None or not step.plain:
            return False
        if decode_batch is None:
            return True
        (rows, ranking), mine = alone, slice(len(decode_batch.slots))
        return self._kernels.decode_step(
            output[mine],
            q[mine],
            k[mine],
            v[mine],
            rows,
            decode_batch.slots,
            decode_batch.positions,
            decode_batch.row_limits,
            order=ranking,
            decay=self._policy.decay(1),
            accumulate=rows.mass is not None and decode_batch.evicting,
            **details.options,
        )

    def _read(self, step: PackedStep, output: Tensor, q: Tensor, k: Tensor, v: Tensor, details: Details) -> bool:
        """The same of prompt chunks."""
        alone = self._alone[step.layer]
        if alone is None or not step.plain:
            return False
        rows, ranking = alone
        return step.chunks is None or self._kernels.prefill_step(
            output, q, k, v, rows, step.chunks, order=ranking, **details.options
        )

    def _prompt(
        self, step: PackedStep, index: int, chunk: PromptChunk, q: Tensor, k: Tensor, v: Tensor, details: Details
    ) -> Tensor:
        """A chunk attends to its slot and itself, and its survivors move in: output [T, H, E]."""
        part = self._pool.layer(chunk.group, step.layer)
        layout, tokens = part.layout, chunk.length
        used = min(chunk.start, chunk.row_limit, layout.capacity)
        shared = step.shared.get((layout.owner, index)) or Shared(k[chunk.rows], v[chunk.rows], None)
        keys, values = part.read(chunk.slot, used)
        evicting = chunk.total > min(chunk.row_limit, layout.capacity)
        votes = self._votes(tokens, chunk.probes, q.device) if evicting and layout.row_stats else None
        output, sums = self._kernels.attend_chunk(
            q[chunk.rows],
            shared.key,
            shared.value,
            keys,
            values,
            hidden=out_of_window(
                part.positions[chunk.slot, :, :used], chunk.start, tokens + chunk.probes, layout.window
            ),
            query_weights=votes,
            squares=Needs.SQUARES in self._policy.needs,
            **details.options,
        )
        if sums is not None:
            sums = sums[..., : used + tokens]
            shared.sums = sums if shared.sums is None else shared.sums + sums
        if step.layer < layout.last_reader:
            step.shared[layout.owner, index] = shared
            return output
        arrived = PrefillChunk(
            slot=chunk.slot,
            start=chunk.start,
            row_limit=chunk.row_limit,
            spans=chunk.spans,
            key=shared.key[:tokens],
            value=shared.value[:tokens],
            queries=q[chunk.rows][:tokens].view(tokens, layout.kv_heads, -1, q.shape[-1]),
            scale=details.scale,
            sums=shared.sums,
        )
        self._policy.compress(part, arrived)
        return output

    def _votes(self, tokens: int, probes: int, device: torch.device) -> Tensor | None:
        """[M, T + probes], or None if attention is not looked at."""
        found = self._weights.get((tokens, probes))
        if found is None:
            if len(self._weights) >= KEPT_VOTES:
                self._weights.clear()
            votes = self._policy.query_weights(tokens, probes)
            sent = upload(votes, device, torch.float32) if votes else None
            found = self._weights[tokens, probes] = sent
        return found

    def _decode(
        self, step: PackedStep, group: DecodeGroup, q: Tensor, k: Tensor, v: Tensor, details: Details
    ) -> Tensor:
        """Each token takes a row of its slot, then attends to the slot: output [B, H, E]."""
        part = self._pool.layer(group.group, step.layer)
        if part.layout.owner == step.layer:
            self._insert(part, group, k[group.rows], v[group.rows])
        output, sums = self._attend(part, group, q[group.rows], details)
        if sums is not None:
            self._policy.observe(part, group.slots, sums, first=part.layout.owner == step.layer)
        return output

    def _attend(
        self, part: LayerSlots, group: DecodeGroup, query: Tensor, details: Details
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one token per slot: output [B, H, E] and sums [M, B, K, C]."""
        options, layout = details.options, part.layout
        options["want_mass"] = "mass" in layout.row_stats and group.evicting(layout.capacity)
        options["squares"] = "squares" in layout.row_stats
        options["hidden"] = _hidden_from_decodes(part, group)
        if part.reads_in_place:
            return self._kernels.attend_slots(query, *part.read_slots(slice(None)), group.slots, **options)
        return self._kernels.attend_slots(query, *part.read_slots(group.slots), **options)

    def _insert(self, part: LayerSlots, group: DecodeGroup, k: Tensor, v: Tensor) -> None:
        """Write the tokens' own keys: into the next empty row, or over the lowest-ranked unprotected one."""
        capacity = part.layout.capacity
        limits = zip(group.positions_host, group.row_limits_host, strict=True)
        full = [position >= min(limit, capacity) for position, limit in limits]
        rows = group.positions.unsqueeze(1)  # [B, 1]
        if any(full):
            row_limits = group.row_limits if group.row_limits is None else group.row_limits.clamp(max=capacity)
            going = EvictionRequest(
                slots=group.slots,
                slots_host=group.slots_host,
                positions=group.positions,
                positions_host=group.positions_host,
                row_limits_host=group.row_limits_host,
                row_limits=row_limits,
                spans=group.spans,
            )
            victims = self._policy.victims(part, going)
            least = capacity if row_limits is None else row_limits.unsqueeze(1)
            rows = victims if all(full) else torch.where(rows >= least, victims, rows)
        part.write(group.slots, rows, k, v, group.positions)


def _hidden_from_decodes(part: LayerSlots, group: DecodeGroup) -> Tensor | None:
    """Broadcastable to [B, K, C]: rows not in use yet or out of a sliding window; None if all count."""
    layout = part.layout
    last = group.positions.view(-1, 1, 1)
    hidden = None
    if group.row_limits is not None or min(group.positions_host) + 1 < layout.capacity:
        rows = torch.arange(layout.capacity, device=last.device)
        hidden = rows > last
        if group.row_limits is not None:
            hidden = hidden | (rows >= group.row_limits.view(-1, 1, 1))
    if layout.window is not None and not layout.by_age:
        old = part.positions[group.slots] <= last - layout.window
        hidden = old if hidden is None else hidden | old
    return hidden
