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

from bmx.compress.policy import CompressionPolicy
from bmx.kernels import Kernels
from bmx.kv.pool import KVPool, LayerSlots


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A run of prompt tokens of one sequence: packed rows, and where its sequence lives."""

    rows: slice
    group: int
    slot: int
    start: int
    scored: bool

    @property
    def length(self) -> int:
        """Tokens of the chunk (T)."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, slots=True)
class Decodes:
    """The decoding tokens of one group, one per slot.

    Attributes:
        rows: their packed rows.
        slots: [B]; positions [B]: the tokens' positions, equal to the tokens of their sequences seen before.
        first, last: the least and greatest position.
    """

    rows: slice
    group: int
    slots: Tensor
    positions: Tensor
    first: int
    last: int
    scored: bool


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
    mass: Tensor | None


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
        layout = part.layout
        used = min(chunk.start, layout.capacity)
        shared = step.shared.get((layout.owner, index)) or Shared(k[chunk.rows], v[chunk.rows], None)
        output, mass = self._kernels.attend_chunk(
            q[chunk.rows],
            shared.key,
            shared.value,
            part.keys[chunk.slot, :, :used],
            part.values[chunk.slot, :, :used],
            hidden=_hidden_from_chunk(part, chunk, used),
            want_mass=chunk.scored and self._policy.needs_mass(layout),
            **details.options,
        )
        shared.mass = mass if shared.mass is None else shared.mass + mass
        if step.layer < layout.last_reader:
            step.shared[layout.owner, index] = shared
        else:
            self._policy.compress(part, chunk.slot, chunk.start, shared.key, shared.value, shared.mass)
        return output  # type: ignore[no-any-return]

    def _decode(self, step: PackedStep, decodes: Decodes, q: Tensor, k: Tensor, v: Tensor, details: Details) -> Tensor:
        """Each token takes a row of its slot, then attends to the slot: output [B, H, E]."""
        part = self._pool.layer(decodes.group, step.layer)
        if part.layout.owner == step.layer:
            self._insert(part, decodes, k[decodes.rows], v[decodes.rows])
        output, mass = self._attend(part, decodes, q[decodes.rows], details)
        if mass is not None:
            part.mass.index_add_(0, decodes.slots, mass)
        return output

    def _attend(
        self, part: LayerSlots, decodes: Decodes, query: Tensor, details: Details
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one token per slot: output [B, H, E] and mass [B, K, C].

        Copying the keys of some slots costs more than attending to all: from half of them on, those that do not
        decode take part with a query of zeros.
        """
        slots, options = decodes.slots, details.options
        options["want_mass"] = decodes.scored and self._policy.needs_mass(part.layout)
        hidden = _hidden_from_decodes(part, decodes)
        if 2 * len(slots) < len(part.keys):
            return self._kernels.attend_slots(query, part.keys[slots], part.values[slots], hidden=hidden, **options)  # type: ignore[no-any-return]
        everyone = query.new_zeros(len(part.keys), *query.shape[1:]).index_copy_(0, slots, query)
        if hidden is not None:
            shown = hidden.new_zeros(len(part.keys), *hidden.shape[1:])
            hidden = shown.index_copy_(0, slots, hidden.expand(len(slots), *hidden.shape[1:]))
        output, mass = self._kernels.attend_slots(everyone, part.keys, part.values, hidden=hidden, **options)
        return output[slots], None if mass is None else mass[slots]

    def _insert(self, part: LayerSlots, decodes: Decodes, k: Tensor, v: Tensor) -> None:
        """Write the tokens' own keys: into the next empty row, or over the lowest-ranked unprotected one."""
        capacity = part.layout.capacity
        rows = decodes.positions.unsqueeze(1)  # [B, 1]
        if decodes.last >= capacity:
            victims = self._policy.victims(part, decodes.slots, decodes.positions)
            rows = victims if decodes.first >= capacity else torch.where(rows >= capacity, victims, rows)
        part.write(decodes.slots, rows, k, v, decodes.positions)


def _hidden_from_chunk(part: LayerSlots, chunk: PromptChunk, used: int) -> Tensor | None:
    """[K, T, P + T]: keys that a sliding window hides from the chunk's queries; None if it hides nothing."""
    window = part.layout.window
    if window is None or chunk.start + chunk.length <= window:
        return None
    own = torch.arange(chunk.start, chunk.start + chunk.length, device=part.positions.device)
    past = part.positions[chunk.slot, :, :used]
    positions = torch.cat([past, own.expand(len(past), -1)], dim=1)  # [K, P+T]
    return positions.unsqueeze(1) <= own.view(1, -1, 1) - window


def _hidden_from_decodes(part: LayerSlots, decodes: Decodes) -> Tensor | None:
    """Broadcastable to [B, K, C]: rows not in use yet or out of a sliding window; None if all count."""
    layout = part.layout
    last = decodes.positions.view(-1, 1, 1)
    hidden = None
    if decodes.first + 1 < layout.capacity:
        hidden = torch.arange(layout.capacity, device=last.device) > last
    if layout.window is not None and not layout.by_age:
        old = part.positions[decodes.slots] <= last - layout.window
        hidden = old if hidden is None else hidden | old
    return hidden
