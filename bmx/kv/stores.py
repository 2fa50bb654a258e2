"""Stores of a layer's keys or values, in the model's dtype or encoded; and exact copies of the newest pairs.

Vectors of a slot are independent of each other, so that one can be overwritten alone; only ``ByChannel`` ties groups of
rows together. Knows rows; knows nothing of scores, and does not tell keys from values.

Shapes: S slots, K kv heads, C rows, D dim, W exact rows, B slots addressed, R rows in use, T chunk tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bmx.kernels.formats import FORMATS, KEY_GROUP, Format, Stored
from bmx.kernels.transfer import fetch, fetch_rows, put
from bmx.kv.layout import LayerLayout
from bmx.kv.places import DeviceMemory, Place

EMPTY = -1  # a row or position that holds no pair
Shape = tuple[int, int, int]  # slots, kv heads, rows
Slots = Tensor | slice | int


class Store(ABC):
    """Vectors [S, K, C, D] in parts: tensors whose first dimensions are slots, heads, and rows or groups of rows.

    Attributes:
        device: where vectors that are read and written are; the parts may lie elsewhere (``bmx.kv.places``).
    """

    __slots__ = ()
    device: torch.device

    @property
    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that hold the vectors."""

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    @abstractmethod
    def read(self, slots: Slots, rows: int) -> Tensor:
        """The first rows of slots, in the model's dtype; they may be views of the store.

        Args:
            slots: one slot, or several.
            rows: R.

        Returns:
            [B, K, R, D]; [K, R, D] of one slot.
        """

    @abstractmethod
    def read_rows(self, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Vectors [B, K, N, D] of some rows, in the model's dtype.

        Args:
            index: slots [B, 1, 1], heads [K, 1], rows [B, K, N].
        """

    @abstractmethod
    def append(self, slot: int, used: int, vectors: Tensor) -> None:
        """Write a chunk into the rows of a slot behind the ``used`` ones.

        Args:
            slot: of the group.
            used: rows in use.
            vectors: [K, T, D].
        """

    @abstractmethod
    def write_tokens(self, index: tuple[Tensor, Tensor, Tensor], positions: Tensor, vectors: Tensor) -> None:
        """Write one vector per slot and head.

        Args:
            index: slots [B, 1], heads [K], rows [B, K] or [B, 1].
            positions: [B], of the tokens in their sequences.
            vectors: [B, K, D].
        """

    @abstractmethod
    def replace(self, slot: int, evicted: Tensor, chosen: Tensor, vectors: Tensor) -> None:
        """Overwrite evicted rows of a slot, without reading on the host which.

        Args:
            slot: of the group.
            evicted: [K, R] bool, which of the first rows are overwritten.
            chosen: [K, R], which of the vectors is written there.
            vectors: [T, K, D].
        """

    def copy_rows(self, slot: int, source: Store, source_slot: int, rows: int) -> None:
        """Copy the first rows of another store's slot, of the same kind, to a slot of this one.

        Args:
            slot: of this store.
            source: the other store.
            source_slot: its slot.
            rows: how many.
        """
        length = self.length_of(rows)
        for part, other in zip(self.parts, source.parts, strict=True):
            part[slot, :, :length] = other[source_slot, :, :length]

    def length_of(self, rows: int) -> int:
        """How many entries of a part's third dimension hold the first ``rows`` rows."""
        return rows

    def clear(self, slot: int) -> None:
        """Set all vectors of a slot to zero."""
        for part in self.parts:
            part[slot] = 0

    def _fetched(self, index: Any) -> list[Tensor]:
        """All parts at an index, on the device."""
        return [fetch(part, index, self.device) for part in self.parts]

    def _put(self, index: Any, encoded: Sequence[Tensor]) -> None:
        """Write what belongs into each of the parts, from the device, at an index."""
        for part, own in zip(self.parts, encoded, strict=True):
            put(part, index, own)


@dataclass(frozen=True, slots=True, eq=False)
class RowStore(Store):
    """A store of independent rows.

    Attributes:
        stored: [S, K, C, D].
        dim: D.
        dtype: of the vectors that are read.
        device: see ``Store``.
    """

    stored: Stored
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The vectors, or their codes and scales."""
        return self.stored.parts

    def read(self, slots: Slots, rows: int) -> Tensor:
        """See ``Store``."""
        return self._decoded(self._fetched((slots, slice(None), slice(rows))))

    def read_rows(self, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See ``Store``."""
        return self._decoded([fetch_rows(part, index, self.device) for part in self.parts])

    def _decoded(self, fetched: list[Tensor]) -> Tensor:
        """Vectors from what was fetched of each part."""
        numbers, *scales = fetched
        return Stored(numbers, scales[0] if scales else None, self.stored.format).read(..., self.dim, self.dtype)

    def append(self, slot: int, used: int, vectors: Tensor) -> None:
        """See ``Store``."""
        self._put((slot, slice(None), slice(used, used + vectors.shape[1])), self.stored.encode(vectors))

    def write_tokens(self, index: tuple[Tensor, Tensor, Tensor], positions: Tensor, vectors: Tensor) -> None:  # noqa: ARG002
        """See ``Store``."""
        self._put(index, self.stored.encode(vectors))

    def replace(self, slot: int, evicted: Tensor, chosen: Tensor, vectors: Tensor) -> None:
        """See ``Store``."""
        heads = torch.arange(len(evicted), device=evicted.device).unsqueeze(1)
        index = (slot, slice(None), slice(evicted.shape[1]))
        new = zip(self.stored.encode(vectors), self._fetched(index), strict=True)
        self._put(index, [torch.where(evicted.unsqueeze(-1), encoded[chosen, heads], held) for encoded, held in new])


@dataclass(frozen=True, slots=True, eq=False)
class ByChannel(Store):
    """Keys with a scale and an offset per channel for each group of rows (KIVI, arXiv 2402.02750, section 3.2).

    Rows are in the order of tokens, since nothing is evicted. A group is written when its last row arrives; until then
    its keys are among the exact ones.

    Attributes:
        format: encodes and decodes.
        codes: [S, K, C / G, G, D] uint8, or fewer bytes for each vector, with G = ``KEY_GROUP``.
        scales: [S, K, C / G, D, 2] float16: scale and offset.
        newest: [S, K, G, D], the exact newest keys; those of position p are at p mod G. Another object counts their
            bytes.
        dtype: of the vectors that are read.
        device: see ``Store``.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    newest: Tensor
    dtype: torch.dtype
    device: torch.device

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return self.codes, self.scales

    def read(self, slots: Slots, rows: int) -> Tensor:
        """See ``Store``."""
        index = (slots, slice(None), slice(self.length_of(rows)))
        codes, scales = self._fetched(index)
        vectors = self.format.decode_groups(codes, scales, self.dtype)
        return vectors.flatten(-3, -2)[..., :rows, :]

    def read_rows(self, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See ``Store``; those of a group that is not complete have no meaning."""
        slots, heads, rows = index
        groups = rows // KEY_GROUP
        codes = fetch_rows(self.codes, (slots, heads, groups, rows % KEY_GROUP), self.device)
        scales = fetch_rows(self.scales, (slots, heads, groups), self.device)
        return self.format.decode_groups(codes.unsqueeze(-2), scales, self.dtype).squeeze(-2)  # groups of one row

    def append(self, slot: int, used: int, vectors: Tensor) -> None:
        """Write the groups that the chunk completes; the first one begins among the newest keys."""
        keys = torch.cat([self.newest[slot, :, : used % KEY_GROUP], vectors], dim=1)
        groups, first = keys.shape[1] // KEY_GROUP, used // KEY_GROUP
        if groups:
            whole = keys[:, : groups * KEY_GROUP].reshape(len(keys), groups, KEY_GROUP, -1)
            self._put((slot, slice(None), slice(first, first + groups)), self.format.encode_groups(whole))

    def write_tokens(self, index: tuple[Tensor, Tensor, Tensor], positions: Tensor, vectors: Tensor) -> None:  # noqa: ARG002
        """Write the groups that these tokens complete; the tokens' keys are among the newest already."""
        slots, heads, _ = index
        groups = (slots, heads, (positions // KEY_GROUP).unsqueeze(1))
        complete = (positions % KEY_GROUP == KEY_GROUP - 1).view(-1, 1, 1, 1)
        new = zip(self.format.encode_groups(self.newest[slots.squeeze(1)]), self._fetched(groups), strict=True)
        self._put(groups, [torch.where(complete, encoded, held) for encoded, held in new])

    def replace(self, slot: int, evicted: Tensor, chosen: Tensor, vectors: Tensor) -> None:  # noqa: ARG002
        """Never called: a layer whose keys are scaled by channel evicts nothing."""
        raise RuntimeError("groups of rows cannot be replaced row by row")

    def length_of(self, rows: int) -> int:
        """Groups that hold the first ``rows`` rows."""
        return -(-rows // KEY_GROUP)


@dataclass(frozen=True, slots=True, eq=False)
class ExactWindow:
    """The newest pairs of each slot in the model's own dtype, beside their codes: position p is at p mod W.

    Where keys are scaled by channel, W is a group of them.

    Attributes:
        keys: [S, K, W, D].
        values: [S, K, W, E].
        rows: [S, K, W] int32, the row that each pair has in its slot, -1 for none.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor

    @classmethod
    def allocate(cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device) -> ExactWindow:
        """An empty window for each of ``slots`` slots.

        Args:
            layout: the layer's.
            slots: how many.
            dtype: of keys and values.
            device: where the tensors are.
        """
        shape = (slots, layout.kv_heads, KEY_GROUP)
        return cls(
            torch.zeros(*shape, layout.key_dim, dtype=dtype, device=device),
            torch.zeros(*shape, layout.value_dim, dtype=dtype, device=device),
            torch.full(shape, EMPTY, dtype=torch.int32, device=device),
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes + self.rows.nbytes

    @property
    def size(self) -> int:
        """W."""
        return self.rows.shape[-1]

    def overlay(self, slots: Tensor | slice, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Replace, in place, the decoded vectors of the newest pairs by their exact ones.

        An unused entry i of the window is written to row i, which is empty too, so the write is harmless. So is that of
        an entry beyond the rows that are read: they were left by another sequence, of a trial step.

        Args:
            slots: B slots.
            keys: [B, K, R, D], all that are in use, decoded; written.
            values: [B, K, R, E], decoded; written.
        """
        size = min(self.size, keys.shape[-2])
        rows = self.rows[slots][..., :size]
        unused = (rows < 0) | (rows >= keys.shape[-2])
        index = torch.where(unused, torch.arange(size, device=rows.device), rows.long()).unsqueeze(-1)
        for decoded, exact in ((keys, self.keys[slots][..., :size, :]), (values, self.values[slots][..., :size, :])):
            decoded.scatter_(-2, index.expand(exact.shape), exact)
        return keys, values

    def replace_rows(self, index: tuple[Tensor, Tensor, Tensor], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Some rows' vectors, with exact ones for the newest of them; row = position.

        Args:
            index: slots [B, 1, 1], heads [K, 1], rows [B, K, N].
            keys: [B, K, N, D], decoded.
            values: [B, K, N, E], decoded.
        """
        slots, heads, rows = index
        entries = (slots, heads, rows % self.size)
        held = (self.rows[entries] == rows).unsqueeze(-1)
        exact = (fetch_rows(part, entries, keys.device) for part in (self.keys, self.values))
        own_keys, own_values = (torch.where(held, own, read) for own, read in zip(exact, (keys, values), strict=True))
        return own_keys, own_values

    def write_tokens(self, index: tuple[Tensor, Tensor, Tensor], positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Remember one token per slot.

        Args:
            index: slots [B, 1], heads [K], and the rows [B, K] or [B, 1] that the token has in its slot.
            positions: [B].
            key: [B, K, D].
            value: [B, K, E].
        """
        slots, heads, rows = index
        entries = (slots, heads, (positions % self.size).unsqueeze(1))
        self.keys[entries], self.values[entries] = key, value
        self.rows[entries] = rows.to(torch.int32).expand(-1, len(heads))

    def write_chunk(self, slot: int, held: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Remember the last tokens of a chunk, and in which rows they are.

        Args:
            slot: of the group.
            held: [K, C] int32, the positions that the slot's rows hold now.
            positions: [T], of the chunk.
            key: [T, K, D].
            value: [T, K, E].
        """
        size, last = self.size, positions[-self.size :]
        entries = (slot, slice(None), last % size)
        self.keys[entries] = key[-size:].transpose(0, 1)
        self.values[entries] = value[-size:].transpose(0, 1)
        matches = held.unsqueeze(-1) == last.to(torch.int32)  # [K, C, W]
        self.rows[entries] = torch.where(matches.any(1), matches.byte().argmax(1), EMPTY).to(torch.int32)

    def copy_newest(self, slot: int, source: ExactWindow, source_slot: int, tokens: int) -> None:
        """Copy what another window holds of the newest tokens of a sequence.

        Args:
            slot: of this window.
            source: the other window.
            source_slot: its slot.
            tokens: of the sequence so far.
        """
        size = min(self.size, source.size)
        last = torch.arange(max(0, tokens - size), tokens, device=self.rows.device)
        entries, others = (slot, slice(None), last % self.size), (source_slot, slice(None), last % source.size)
        self.keys[entries] = source.keys[others]
        self.values[entries] = source.values[others]
        self.rows[entries] = source.rows[others]

    def clear(self, slot: int) -> None:
        """Forget the pairs of a slot. Values are zeroed: a NaN times a weight of zero is a NaN."""
        self.rows[slot] = EMPTY
        self.values[slot] = 0.0


def allocate_by_channel(name: str, shape: Shape, newest: Tensor, place: Place | None = None) -> ByChannel:
    """An empty store of keys that are scaled by channel.

    Args:
        name: of the format.
        shape: slots, kv heads, rows.
        newest: [S, K, G, D], the exact newest keys, in the dtype in which keys are read.
        place: where the codes are; beside the newest keys if left out.
    """
    form, dim, place = FORMATS[name], newest.shape[-1], place or DeviceMemory(newest.device)
    groups = (*shape[:2], -(-shape[2] // KEY_GROUP))
    codes = place.zeros((*groups, KEY_GROUP, form.code_bytes(dim)), torch.uint8)
    scales = place.zeros((*groups, dim, 2), torch.float16)
    return ByChannel(form, codes, scales, newest, newest.dtype, newest.device)
