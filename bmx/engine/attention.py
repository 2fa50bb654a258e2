"""Where the model meets the cache: the attention function that transformers calls in every layer.

Knows the step's chunks and the pool; knows nothing of sequences, sampling or why a chunk was scheduled. The chunk's
keys are never stored before they are chosen: attention reads the slot and the chunk, then the survivors are written.

Shapes: N packed tokens of the step, T tokens of one chunk, B decoding tokens of one group, H query heads, K kv heads,
C rows of a slot, P rows in use, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bmx.compress.policy import Arrived, CompressionPolicy, Decoding
from bmx.compress.seen import Needs
from bmx.kernels import Kernels
from bmx.kv.pool import KVPool, LayerSlots

KEPT_VOTES = 64  # lengths of chunks whose votes are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChunk:
    """A run of prompt tokens of one sequence, and the probe's behind them.

    Attributes:
        rows: packed rows, the probe's included.
        group, slot: where its sequence lives; ``start``: tokens of it before the chunk.
        probes: how many of the packed rows are the probe's: they see the chunk, and leave nothing behind.
        total: tokens of the sequence when its answer is as long as it may get.
        limit: rows of the slot that it may use.
        spans: positions from .. to that are never evicted.
    """

    rows: slice
    group: int
    slot: int
    start: int
    total: int
    limit: int
    probes: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the chunk, without the probe's (T)."""
        return int(self.rows.stop - self.rows.start) - self.probes


@dataclass(frozen=True, slots=True, kw_only=True)
class Decodes:
    """The decoding tokens of one group, one per slot.

    Attributes:
        rows: their packed rows.
        slots: [B]; positions [B]: the tokens' positions, equal to the tokens of their sequences seen before.
        seen: the positions again, on the host; ``totals`` and ``limits`` as in ``PromptChunk``.
        limited: [B] the limits, where some sequence may not use all of its slot; else None.
        spans: [B, N, 2] positions that are never evicted, or None.
    """

    rows: slice
    group: int
    slots: Tensor
    positions: Tensor
    seen: tuple[int, ...]
    totals: tuple[int, ...]
    limits: tuple[int, ...]
    limited: Tensor | None = None
    spans: Tensor | None = None

    def evicting(self, capacity: int) -> bool:
        """Whether any of these sequences will ever evict in a layer of so many rows."""
        return any(total > min(limit, capacity) for total, limit in zip(self.totals, self.limits, strict=True))


@dataclass(slots=True)
class PackedStep:
    """A step as the device sees it.

    Attributes:
        input_ids, positions: [1, N].
        logits_at: packed rows whose logits are wanted.
        decodes: decoding tokens by group, first in the packing.
        prompts: prompt chunks, after them.
        layer: the layer whose turn it is.
    """

    input_ids: Tensor
    positions: Tensor
    logits_at: Tensor
    decodes: tuple[Decodes, ...]
    prompts: tuple[PromptChunk, ...]
    layer: int = 0
    shared: dict[tuple[int, int], Shared] = field(default_factory=dict)


@dataclass(slots=True)
class Shared:
    """A chunk's keys and values that later layers read too, and the attention they have received so far."""

    key: Tensor
    value: Tensor
    sums: Tensor | None


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
        for decodes in step.decodes:
            output[decodes.rows] = self._decode(step, decodes, q, k, v, details)
        for index, chunk in enumerate(step.prompts):
            output[chunk.rows] = self._prompt(step, index, chunk, q, k, v, details)
        step.layer += 1
        return output.unsqueeze(0), None

    def _prompt(
        self, step: PackedStep, index: int, chunk: PromptChunk, q: Tensor, k: Tensor, v: Tensor, details: Details
    ) -> Tensor:
        """A chunk attends to its slot and itself, and its survivors move in: output [T, H, E]."""
        part = self._pool.layer(chunk.group, step.layer)
        layout, tokens = part.layout, chunk.length
        used = min(chunk.start, chunk.limit, layout.capacity)
        shared = step.shared.get((layout.owner, index)) or Shared(k[chunk.rows], v[chunk.rows], None)
        keys, values = part.read(chunk.slot, used)
        evicting = chunk.total > min(chunk.limit, layout.capacity)
        votes = self._votes(tokens, chunk.probes, q.device) if evicting and layout.notes else None
        output, sums = self._kernels.attend_chunk(
            q[chunk.rows],
            shared.key,
            shared.value,
            keys,
            values,
            hidden=_hidden_from_chunk(part, chunk, used),
            votes=votes,
            squares=Needs.SQUARES in self._policy.needs,
            **details.options,
        )
        if sums is not None:
            sums = sums[..., : used + tokens]
            shared.sums = sums if shared.sums is None else shared.sums + sums
        if step.layer < layout.last_reader:
            step.shared[layout.owner, index] = shared
            return output  # type: ignore[no-any-return]
        arrived = Arrived(
            slot=chunk.slot,
            start=chunk.start,
            limit=chunk.limit,
            spans=chunk.spans,
            key=shared.key[:tokens],
            value=shared.value[:tokens],
            queries=q[chunk.rows][:tokens].view(tokens, layout.kv_heads, -1, q.shape[-1]),
            scale=details.scale,
            sums=shared.sums,
        )
        if not self._compressed_at_once(part, arrived, used):
            self._policy.compress(part, arrived)
        return output  # type: ignore[no-any-return]

    def _compressed_at_once(self, part: LayerSlots, new: Arrived, used: int) -> bool:
        """Choose and write the survivors in one call, where the kernels have one for what is wanted."""
        ranking = self._policy.ranking(part.layout)
        if self._kernels.compress is None or ranking is None or new.spans or not part.as_they_are:
            return False
        keys, values = part.read(new.slot, part.layout.capacity)
        mass = part.notes.get("mass")
        return self._kernels.compress(  # type: ignore[no-any-return]
            new.key,
            new.value,
            keys,
            values,
            part.positions[new.slot],
            mass if mass is None else mass[new.slot],
            new.sums if new.sums is None else new.sums[0],
            used=used,
            start=new.start,
            limit=min(new.limit, part.layout.capacity),
            ranking=ranking,
            old=self._policy.old(new.key.shape[0]),
        )

    def _votes(self, tokens: int, probes: int, device: torch.device) -> Tensor | None:
        """[M, T + probes], or None if attention is not looked at."""
        found = self._weights.get((tokens, probes))
        if found is None:
            if len(self._weights) >= KEPT_VOTES:
                self._weights.clear()
            votes = self._policy.votes(tokens, probes)
            found = self._weights[tokens, probes] = torch.tensor(votes, device=device) if votes else None
        return found

    def _decode(self, step: PackedStep, decodes: Decodes, q: Tensor, k: Tensor, v: Tensor, details: Details) -> Tensor:
        """Each token takes a row of its slot, then attends to the slot: output [B, H, E]."""
        part = self._pool.layer(decodes.group, step.layer)
        output = self._decode_at_once(step, decodes, part, q, k, v, details)
        if output is not None:
            return output
        if part.layout.owner == step.layer:
            self._insert(part, decodes, k[decodes.rows], v[decodes.rows])
        output, sums = self._attend(part, decodes, q[decodes.rows], details)
        if sums is not None:
            self._policy.observe(part, decodes.slots, sums, first=part.layout.owner == step.layer)
        return output

    def _decode_at_once(
        self, step: PackedStep, decodes: Decodes, part: LayerSlots, q: Tensor, k: Tensor, v: Tensor, details: Details
    ) -> Tensor | None:
        """The same in one call, where the kernels have one for what is wanted; else None, and nothing is done."""
        layout, rows = part.layout, decodes.rows
        ranking = self._policy.ranking(layout)
        if self._kernels.decode_slots is None or ranking is None or decodes.spans is not None:
            return None
        if not part.as_they_are or layout.owner != step.layer or layout.last_reader != step.layer:
            return None
        keys, values = part.read_slots(slice(None))
        return self._kernels.decode_slots(  # type: ignore[no-any-return]
            q[rows],
            k[rows],
            v[rows],
            keys,
            values,
            part.positions,
            part.notes.get("mass"),
            decodes.slots,
            decodes.positions,
            decodes.limited,
            ranking=ranking,
            old=self._policy.old(1),
            count=decodes.evicting(layout.capacity),
            **details.options,
        )

    def _attend(
        self, part: LayerSlots, decodes: Decodes, query: Tensor, details: Details
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one token per slot: output [B, H, E] and sums [M, B, K, C]."""
        options, layout = details.options, part.layout
        options["want_mass"] = "mass" in layout.notes and decodes.evicting(layout.capacity)
        options["squares"] = "squares" in layout.notes
        options["hidden"] = _hidden_from_decodes(part, decodes)
        if part.as_they_are:
            return self._kernels.attend_slots(query, *part.read_slots(slice(None)), decodes.slots, **options)  # type: ignore[no-any-return]
        return self._kernels.attend_slots(query, *part.read_slots(decodes.slots), **options)  # type: ignore[no-any-return]

    def _insert(self, part: LayerSlots, decodes: Decodes, k: Tensor, v: Tensor) -> None:
        """Write the tokens' own keys: into the next empty row, or over the lowest-ranked unprotected one."""
        capacity = part.layout.capacity
        full = [now >= min(limit, capacity) for now, limit in zip(decodes.seen, decodes.limits, strict=True)]
        rows = decodes.positions.unsqueeze(1)  # [B, 1]
        if any(full):
            limited = decodes.limited if decodes.limited is None else decodes.limited.clamp(max=capacity)
            going = Decoding(
                slots=decodes.slots,
                now=decodes.positions,
                seen=decodes.seen,
                limits=decodes.limits,
                rows=limited,
                spans=decodes.spans,
            )
            victims = self._policy.victims(part, going)
            least = capacity if limited is None else limited.unsqueeze(1)
            rows = victims if all(full) else torch.where(rows >= least, victims, rows)
        part.write(decodes.slots, rows, k, v, decodes.positions)


def _hidden_from_chunk(part: LayerSlots, chunk: PromptChunk, used: int) -> Tensor | None:
    """[K, T, P + T]: keys that a sliding window hides from the chunk's queries; None if it hides nothing."""
    window, tokens = part.layout.window, chunk.length + chunk.probes
    if window is None or chunk.start + tokens <= window:
        return None
    own = torch.arange(chunk.start, chunk.start + tokens, device=part.positions.device)
    past = part.positions[chunk.slot, :, :used]
    positions = torch.cat([past, own.expand(len(past), -1)], dim=1)  # [K, P+T]
    return positions.unsqueeze(1) <= own.view(1, -1, 1) - window


def _hidden_from_decodes(part: LayerSlots, decodes: Decodes) -> Tensor | None:
    """Broadcastable to [B, K, C]: rows not in use yet or out of a sliding window; None if all count."""
    layout = part.layout
    last = decodes.positions.view(-1, 1, 1)
    hidden = None
    if decodes.limited is not None or min(decodes.seen) + 1 < layout.capacity:
        rows = torch.arange(layout.capacity, device=last.device)
        hidden = rows > last
        if decodes.limited is not None:
            hidden = hidden | (rows >= decodes.limited.view(-1, 1, 1))
    if layout.window is not None and not layout.by_age:
        old = part.positions[decodes.slots] <= last - layout.window
        hidden = old if hidden is None else hidden | old
    return hidden
