"""Indexes of a layer's keys: small estimates of every row's dot product, by which rows are chosen before they are read.

An index stands beside slots that evict nothing: row = position. It follows their sequences token by token, and holds
nothing that depends on which slot it was or what the slot held before. What an index estimates are the exact keys, as
they were given to it, not those that a store of fewer bits decodes.

Shapes: S slots, K kv heads, G query heads of each, H = K * G, C rows of a head in a slot, R rows that are looked at,
D key dim, B slots addressed, T tokens of a chunk, P pages, N clusters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from bmx.kernels.formats import KEY_GROUP
from bmx.kv.layout import BITS_FORMAT, CLUSTER_GROUP, CLUSTER_SIZE, PAGE, LayerLayout
from bmx.kv.stores import ByChannel, allocate_by_channel

ITERATIONS = 4  # of k-means; ten choose no better
WAITING = -1  # the label of a row that is in no cluster yet

Self = TypeVar("Self", bound="Index")


class Index(ABC):
    """Estimates the dot products of queries and keys."""

    __slots__ = ()

    @property
    @abstractmethod
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors held: [S, K, ...]."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what ``RecallLayout.nbytes`` says."""
        return sum(part.nbytes for part in self.parts)

    @abstractmethod
    def append(self, slot: int, start: int, keys: Tensor) -> None:
        """Add the keys of a chunk.

        Args:
            slot: the sequence's.
            start: tokens of the sequence before the chunk.
            keys: [K, T, D].
        """

    @abstractmethod
    def write(self, slots: Tensor, positions: Tensor, positions_host: Sequence[int], keys: Tensor) -> None:
        """Add the key of one token to each of B slots.

        Args:
            slots: [B].
            positions: [B], of the tokens.
            positions_host: the same on the host.
            keys: [B, K, D].
        """

    @abstractmethod
    def products(self, query: Tensor, slots: Tensor, positions: Tensor, rows: int) -> Tensor:
        """The estimated dot product of each query and each of the first rows.

        Args:
            query: [B, H, D].
            slots: [B].
            positions: [B], of the newest token of each slot.
            rows: R.

        Returns:
            [B, K, G, R] float32, not scaled; of rows that are not in use, any number.
        """

    def copy_state(self: Self, slot: int, source: Self, source_slot: int) -> None:
        """Take over what another slot's index knows.

        Args:
            slot: of this index.
            source: the other index, of the same kind.
            source_slot: its slot.
        """
        for part, other in zip(self.parts, source.parts, strict=True):
            length = min(part.shape[2], other.shape[2])
            part[slot, :, :length] = other[source_slot, :, :length]


@dataclass(frozen=True, slots=True, eq=False)
class PageIndex(Index):
    """The least and the greatest number of each channel in each page of consecutive keys (Quest, arXiv 2406.10774).

    What is estimated is an upper bound: no key of the page has a greater dot product. Keys are numbers of the model's
    type, so bounds in that type are exact.

    Attributes:
        low: [S, K, P, D] in the model's type.
        high: [S, K, P, D].
    """

    low: Tensor
    high: Tensor

    @classmethod
    def allocate(cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device) -> PageIndex:
        """Pages of no keys.

        Args:
            layout: of the layer.
            slots: S.
            dtype: of keys.
            device: where the tensors are.
        """
        shape = (slots, layout.kv_heads, -(-layout.capacity // PAGE), layout.key_dim)
        return cls(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The bounds."""
        return self.low, self.high

    def append(self, slot: int, start: int, keys: Tensor) -> None:
        """See ``Index``; a page that the chunk does not begin keeps what earlier chunks brought."""
        front, first = start % PAGE, start // PAGE
        back = -(front + keys.shape[1]) % PAGE
        for bounds, nothing, closest in ((self.low, float("inf"), torch.amin), (self.high, -float("inf"), torch.amax)):
            padded = pad(keys, (0, 0, front, back), value=nothing)
            if front:
                padded[:, 0] = bounds[slot, :, first]
            pages = closest(padded.view(len(keys), -1, PAGE, keys.shape[-1]), 2)
            bounds[slot, :, first : first + pages.shape[1]] = pages

    def write(self, slots: Tensor, positions: Tensor, positions_host: Sequence[int], keys: Tensor) -> None:  # noqa: ARG002
        """See ``Index``; the first token of a page begins it anew."""
        begins = (positions % PAGE == 0).view(-1, 1, 1)
        index = _index(slots, keys, positions // PAGE)
        for bounds, closer in ((self.low, torch.minimum), (self.high, torch.maximum)):
            bounds[index] = torch.where(begins, keys, closer(bounds[index], keys))

    def products(self, query: Tensor, slots: Tensor, positions: Tensor, rows: int) -> Tensor:  # noqa: ARG002
        """See ``Index``: where a query's number is positive, the greatest key is the bound, else the least."""
        pages = -(-rows // PAGE)
        asking = _grouped(query, self.low.shape[1])
        low, high = (bounds.index_select(0, slots)[:, :, :pages].float().transpose(-1, -2) for bounds in self.parts)
        bounds = asking.clamp(min=0) @ high + asking.clamp(max=0) @ low
        return bounds.repeat_interleave(PAGE, -1)[..., :rows]


@dataclass(frozen=True, slots=True, eq=False)
class ClusterIndex(Index):
    """The mean keys of clusters of similar ones, and each row's cluster (ClusterKV, arXiv 2412.03213).

    Clusters are made when their tokens arrive: of each chunk by itself, and of every ``CLUSTER_GROUP`` tokens of an
    answer, one for 16 keys; the tokens [a, b) get the clusters a / 16 .. b / 16. Newer tokens wait, with their exact
    keys. The first ``sink`` tokens, whose keys resemble no others, are a cluster of their own.

    Attributes:
        centroids: [S, K, N, D] in the model's type.
        labels: [S, K, C] int32, each row's cluster; ``WAITING`` where it has none yet.
        waiting: [S, K, CLUSTER_GROUP, D], keys that wait; those of position p are at p mod CLUSTER_GROUP.
        sink: number of first tokens that stand apart.
    """

    centroids: Tensor
    labels: Tensor
    waiting: Tensor
    sink: int

    @classmethod
    def allocate(
        cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device, sink: int
    ) -> ClusterIndex:
        """No clusters yet.

        Args:
            layout: of the layer.
            slots: S.
            dtype: of keys.
            device: where the tensors are.
            sink: number of first tokens that stand apart.
        """
        shape, dim = (slots, layout.kv_heads), layout.key_dim
        return cls(
            torch.zeros(*shape, layout.capacity // CLUSTER_SIZE, dim, dtype=dtype, device=device),
            torch.full((*shape, layout.capacity), WAITING, dtype=torch.int32, device=device),
            torch.zeros(*shape, CLUSTER_GROUP, dim, dtype=dtype, device=device),
            sink,
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Centroids, labels and waiting keys."""
        return self.centroids, self.labels, self.waiting

    def append(self, slot: int, start: int, keys: Tensor) -> None:
        """See ``Index``; clusters are made of all whole groups of tokens, those that waited among them."""
        begin = start - start % CLUSTER_GROUP
        keys = torch.cat([self.waiting[slot, :, : start - begin], keys], dim=1)
        tokens = keys.shape[1] - keys.shape[1] % CLUSTER_GROUP
        if tokens:
            labels, centroids = clusters_of(keys[:, :tokens], max(0, self.sink - begin))
            first = begin // CLUSTER_SIZE
            self.labels[slot, :, begin : begin + tokens] = labels + first
            self.centroids[slot, :, first : first + centroids.shape[1]] = centroids.to(keys.dtype)
        self.waiting[slot, :, : keys.shape[1] - tokens] = keys[:, tokens:]
        self.labels[slot, :, begin + tokens : begin + keys.shape[1]] = WAITING

    def write(self, slots: Tensor, positions: Tensor, positions_host: Sequence[int], keys: Tensor) -> None:
        """See ``Index``; clusters are made where a group of tokens is complete."""
        self.waiting[_index(slots, keys, positions % CLUSTER_GROUP)] = keys
        self.labels[_index(slots, keys, positions)] = WAITING
        complete = [i for i, position in enumerate(positions_host) if (position + 1) % CLUSTER_GROUP == 0]
        for i in complete:
            slot = slots[i]
            begin = positions_host[i] + 1 - CLUSTER_GROUP
            labels, centroids = clusters_of(self.waiting[slot], max(0, self.sink - begin))
            first = begin // CLUSTER_SIZE
            self.labels[slot, :, begin : begin + CLUSTER_GROUP] = labels + first
            self.centroids[slot, :, first : first + centroids.shape[1]] = centroids.to(keys.dtype)

    def products(self, query: Tensor, slots: Tensor, positions: Tensor, rows: int) -> Tensor:  # noqa: ARG002
        """See ``Index``: the mean of the cluster's dot products, or the exact one of a row that waits."""
        clusters, asking = rows // CLUSTER_SIZE, _grouped(query, self.centroids.shape[1])
        keys = torch.cat([self.centroids[slots, :, :clusters], self.waiting[slots]], dim=2).float()
        of_keys = asking @ keys.transpose(-1, -2)  # [B, K, G, clusters + CLUSTER_GROUP]
        labels, places = self.labels[slots, :, :rows].long(), torch.arange(rows, device=query.device) % CLUSTER_GROUP
        which = torch.where(labels == WAITING, clusters + places, labels).clamp(max=of_keys.shape[-1] - 1)
        return of_keys.gather(-1, which.unsqueeze(2).expand(-1, -1, asking.shape[2], -1))


@dataclass(frozen=True, slots=True, eq=False)
class BitsIndex(Index):
    """The keys themselves in the fewest bits there are, the newest of them exact (SpeCache, arXiv 2503.16163).

    Attributes:
        keys: store of [S, K, C, D], scaled by channel.
    """

    keys: ByChannel

    @classmethod
    def allocate(cls, layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device) -> BitsIndex:
        """No keys yet.

        Args:
            layout: of the layer.
            slots: S.
            dtype: of keys.
            device: where the tensors are.
        """
        shape = (slots, layout.kv_heads, layout.capacity)
        newest = torch.zeros(*shape[:2], KEY_GROUP, layout.key_dim, dtype=dtype, device=device)
        return cls(allocate_by_channel(BITS_FORMAT, shape, newest))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Codes, scales and the newest keys."""
        return *self.keys.parts, self.keys.newest

    def append(self, slot: int, start: int, keys: Tensor) -> None:
        """See ``Index``."""
        self.keys.append(slot, start, keys)
        last = torch.arange(start, start + keys.shape[1], device=keys.device)[-KEY_GROUP:]
        self.keys.newest[slot, :, last % KEY_GROUP] = keys[:, -KEY_GROUP:]

    def write(self, slots: Tensor, positions: Tensor, positions_host: Sequence[int], keys: Tensor) -> None:  # noqa: ARG002
        """See ``Index``."""
        self.keys.newest[_index(slots, keys, positions % KEY_GROUP)] = keys
        self.keys.write_tokens(_index(slots, keys, positions), positions, keys)

    def products(self, query: Tensor, slots: Tensor, positions: Tensor, rows: int) -> Tensor:
        """See ``Index``: the dot product with the decoded key, or with the exact one of the newest rows.

        Keys are not decoded: a query is multiplied by a group's scales instead, and with its offsets.
        """
        asking, groups = _grouped(query, self.keys.newest.shape[1]), self.keys.length_of(rows)
        codes, scales = (part.index_select(0, slots)[:, :, :groups] for part in self.keys.parts)
        levels = self.keys.format.unpack(codes)[..., : query.shape[-1]].float()  # [B, K, groups, KEY_GROUP, D]
        scale, offset = scales.float().unsqueeze(3).unbind(-1)  # [B, K, groups, 1, D]
        of_group = asking.unsqueeze(2)
        coarse = (of_group * scale) @ levels.transpose(-1, -2) + (of_group * offset).sum(-1, keepdim=True)
        coarse = coarse.transpose(2, 3).flatten(3)[..., :rows]
        exact = asking @ self.keys.newest[slots].float().transpose(-1, -2)  # [B, K, G, KEY_GROUP]
        row = torch.arange(rows, device=query.device)
        newest = row > positions.view(-1, 1, 1, 1) - KEY_GROUP
        return torch.where(newest, exact[..., row % KEY_GROUP], coarse)


def allocate_index(layout: LayerLayout, slots: int, dtype: torch.dtype, device: torch.device) -> Index | None:
    """The index that a layer's layout asks for; None if it asks for none.

    Args:
        layout: of the layer.
        slots: S.
        dtype: of keys.
        device: where the index is.
    """
    by = "attention" if layout.recall is None else layout.recall.by
    if layout.recall is None or by == "attention":
        return None
    if by == "clusters":
        return ClusterIndex.allocate(layout, slots, dtype, device, layout.recall.sink)
    return (PageIndex if by == "pages" else BitsIndex).allocate(layout, slots, dtype, device)


def clusters_of(keys: Tensor, sink: int) -> tuple[Tensor, Tensor]:
    """Clusters of keys by k-means on their directions, one for ``CLUSTER_SIZE`` keys.

    It begins with keys at equal distances from each other, so it is the same in every run.

    Args:
        keys: [K, T, D].
        sink: number of first keys that are a cluster of their own.

    Returns:
        labels: [K, T], the cluster of each key.
        centroids: [K, T / CLUSTER_SIZE, D] float32, the mean key of each cluster; zeros of one that is empty.
    """
    clusters = keys.shape[1] // CLUSTER_SIZE
    keys, apart = keys.float(), min(1, sink)
    unit = normalize(keys[:, sink:], dim=-1)
    labels = torch.zeros(keys.shape[:2], dtype=torch.long, device=keys.device)
    if unit.shape[1] and clusters > apart:
        begins = torch.arange(clusters - apart, device=keys.device) * unit.shape[1] // (clusters - apart)
        centres = unit[:, begins]
        for _ in range(ITERATIONS):
            own = (unit @ centres.transpose(-1, -2)).argmax(-1)
            sums = one_hot(own, clusters - apart).float().transpose(-1, -2) @ unit
            empty = (sums == 0).all(-1, keepdim=True)
            centres = torch.where(empty, centres, normalize(sums, dim=-1))
        labels[:, sink:] = own + apart
    members = one_hot(labels, clusters).float().transpose(-1, -2)
    return labels, members @ keys / members.sum(-1, keepdim=True).clamp(min=1)


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """Queries [B, H, D] by kv head, [B, K, G, D] float32."""
    return query.float().reshape(len(query), kv_heads, -1, query.shape[-1])


def _index(slots: Tensor, keys: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the vectors [B, K, D] of one row [B] of each slot are in [S, K, R, D]."""
    return slots.unsqueeze(1), torch.arange(keys.shape[1], device=keys.device), rows.unsqueeze(1)
