"""Rankings that kernels do not compute: a policy's scores of the pairs of many slots at once, written as their ranks.

Kernels then evict by these ranks, so that steps stay fused and graphs contain no ranking. When a slot is ranked depends
on its own sequence alone: while a prompt is read, at each chunk that evicts; in decoding, before the token that finds
the slot full, and before each ``every``-th one after it. Works for scorers on which empty rows have no influence.

Shapes: L layers, N slots, K kv heads, C rows and T tokens of each that are ranked, P packed tokens, D key dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmx.compress.kernel_orders import RANKED_BYTES, ranked_pair_bytes
from bmx.compress.policy import CompressionPolicy
from bmx.compress.scorer_api import Needs, Seen
from bmx.engine.layer_inputs import FusedLayer
from bmx.kernels.formats import Stored
from bmx.kernels.slot_views import Chunks, Rows
from bmx.kernels.transfer import upload
from bmx.kv.stores import EMPTY


class DecodingSlot(NamedTuple):
    """A slot before its next token.

    Attributes:
        slot: its number over all groups.
        position: of the token.
        row_limit: rows of it that its sequence may use.
    """

    slot: int
    position: int
    row_limit: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Candidates:
    """Where the pairs are that are ranked: in rows of slots, and behind them tokens of a chunk for each slot.

    Where a slot or chunk has fewer, its last pair is repeated, and given the same rank.

    Attributes:
        rows: [N, K, C] of ``Rows``.
        in_use: [N, K, C] bool, not a repetition.
        tokens: [N, T] packed tokens.
        given: [N, 1, T] bool, not a repetition.
        token_positions: [N, K, T] int32, -1 for a repetition.
        numbers: [N, K, C + T] which candidate of its head each one is.
        ranked: [N, K, 1] bool, heads that are ranked now.
        now: [N, 1, 1] tokens of each sequence seen so far.
    """

    rows: Tensor
    in_use: Tensor
    tokens: Tensor
    given: Tensor
    token_positions: Tensor
    numbers: Tensor
    ranked: Tensor
    now: Tensor

    @classmethod
    def of_slots(cls, rows: Rows, due: Tensor, count: int, every: int) -> Candidates:
        """The pairs of decoding slots.

        Args:
            rows: of a layer.
            due: [3, N] slots, positions of their next tokens, and row limits.
            count: rows of a head, at most (C).
            every: tokens between two rankings.
        """
        slots, positions, limits = due
        used = torch.minimum(limits.unsqueeze(1), rows.capacity[slots])  # [N, K]
        since, nothing = positions.unsqueeze(1) - used, positions.new_zeros(len(slots))
        ranked = (since >= 0) & (since % every == 0)
        return cls._of(rows, slots, used, count, (nothing, nothing, nothing), 0, ranked, positions)

    @classmethod
    def of_chunks(cls, rows: Rows, table: Tensor, count: int, longest: int) -> Candidates:
        """The pairs of chunks and of their slots.

        Args:
            rows: of a layer.
            table: [6, N] columns of ``Chunks``.
            count: rows of a head, at most (C).
            longest: tokens of a chunk, at most (T).
        """
        offsets, lengths, slots, starts, limits, _ = table
        most, now = torch.minimum(limits.unsqueeze(1), rows.capacity[slots]), starts + lengths
        used, ranked = torch.minimum(starts.unsqueeze(1), most), now.unsqueeze(1) > most  # [N, K]
        return cls._of(rows, slots, used, count, (offsets, lengths, starts), longest, ranked, now)

    @classmethod
    def _of(
        cls,
        rows: Rows,
        slots: Tensor,
        used: Tensor,
        count: int,
        chunk: tuple[Tensor, Tensor, Tensor],
        longest: int,
        ranked: Tensor,
        now: Tensor,
    ) -> Candidates:
        """From rows in use [N, K], and the chunks' offsets, lengths and starts [N]."""
        offsets, lengths, starts = (column.unsqueeze(1) for column in chunk)
        held, in_use = _counted(used, count)
        number, given = _counted(lengths.squeeze(1), longest)  # [N, T]
        own = torch.where(given, starts + number, EMPTY).to(torch.int32)
        heads = (-1, rows.kv_heads, -1)
        return cls(
            rows=rows.first[slots].unsqueeze(-1) + held,
            in_use=in_use,
            tokens=offsets + number,
            given=given.unsqueeze(1),
            token_positions=own.unsqueeze(1).expand(heads),
            numbers=torch.cat([held, (count + number).unsqueeze(1).expand(heads)], -1),
            ranked=ranked.unsqueeze(-1),
            now=now.view(-1, 1, 1),
        )

    def positions(self, held: Tensor) -> Tensor:
        """[L, N, K, C + T] int32, -1 for a repetition, from those of the rows [L, N, K, C]."""
        held = torch.where(self.in_use, held, EMPTY)
        return torch.cat([held, self.token_positions.expand(len(held), -1, -1, -1)], -1)

    def masses(self, held: Tensor, sums: Tensor | None) -> Tensor:
        """[L, N, K, C + T], 0 for a repetition, from those of the rows [L, N, K, C] and of packed tokens [K, P]."""
        held = torch.where(self.in_use, held, 0.0)
        if sums is None:
            return held
        own = torch.where(self.given, sums[:, self.tokens].transpose(0, 1), 0.0)
        return torch.cat([held, own.unsqueeze(0)], -1)

    def keys(self, held: Tensor, key: Tensor | None) -> Tensor:
        """[L, N, K, C + T, D] float32, from those of the rows [L, N, K, C, D] and of packed tokens [P, K, D]."""
        own = [] if key is None else [key[self.tokens].transpose(1, 2).unsqueeze(0)]
        return torch.cat([held, *own], -2).float()


class Ranking:
    """Ranks the pairs of layers whose kernels evict by rank.

    Args:
        policy: scores pairs.
        dtype: of keys, before they are encoded.
        decoding: the layers in which sequences decode.
    """

    def __init__(self, policy: CompressionPolicy, dtype: torch.dtype, decoding: Sequence[FusedLayer | None]) -> None:
        self._policy, self._dtype = policy, dtype
        self._alike: dict[Any, list[FusedLayer]] = {}  # layers that are ranked together
        for layer in decoding:
            if layer is not None and layer.order.by == "rank":
                kind = id(layer.rows.first), layer.order, layer.key_dim, layer.rows.formats
                self._alike.setdefault(kind, []).append(layer)

    def rank_slots(self, slots: Iterable[DecodingSlot]) -> None:
        """Rank the pairs of the slots that are due before these tokens, in every layer."""
        every = self._policy.every
        slots = list(slots) if self._alike and every else []
        for layers in self._alike.values():
            first = layers[0]
            due = [one for one in slots if _is_due(one, first.rows.capacities[one.slot], every)]
            if not due:
                continue
            columns = upload(list(zip(*due, strict=True)), first.rows.first.device)
            most = [min(one.row_limit, max(first.rows.capacities[one.slot])) for one in due]
            for piece in self._pieces(first, max(most), len(due)):
                candidates = Candidates.of_slots(first.rows, columns[:, piece], max(most[piece]), every)
                for some in self._pieces(first, max(most) * len(due[piece]), len(layers)):
                    self._rank(layers[some], candidates)

    def rank_chunks(
        self,
        layer: FusedLayer,
        chunks: Chunks,
        key: Tensor,
        selected: dict[int, list[Candidates]],
        sums: Tensor | None,
    ) -> Tensor:
        """Rank the pairs of chunks that evict, and of their slots.

        Args:
            layer: its ranks are written.
            chunks: the step's.
            key: [K, P, D] of all packed tokens.
            selected: what was ranked in earlier layers of this step, by their table of slots; written.
            sums: [K, P] attention that the chunks' keys received, where the policy adds it up.

        Returns:
            [K, P] ranks of the packed tokens, +inf in chunks that evict nothing.
        """
        ranks = torch.full((key.shape[1], len(key)), float("inf"), device=key.device)
        table = id(layer.rows.first)
        if table not in selected:
            selected[table] = list(self._evicting(layer, chunks))
        for candidates in selected[table]:
            self._rank([layer], candidates, key, sums, ranks)
        return ranks

    def _evicting(self, layer: FusedLayer, chunks: Chunks) -> Iterator[Candidates]:
        """The candidates of the chunks that evict, and of some between them, a few chunks at a time."""
        rows, longest = layer.rows, max(chunks.lengths)
        limits = [
            [min(limit, capacity) for capacity in (min(rows.capacities[slot]), max(rows.capacities[slot]))]
            for slot, limit in zip(chunks.slots, chunks.row_limits, strict=True)
        ]
        now = [start + length for start, length in zip(chunks.starts, chunks.lengths, strict=True)]
        for piece in self._pieces(layer, max(most for _, most in limits) + longest, len(now)):
            if any(seen > least for seen, (least, _) in zip(now[piece], limits[piece], strict=True)):
                count = max(most for _, most in limits[piece])
                yield Candidates.of_chunks(rows, chunks.table[:, piece], count, max(chunks.lengths[piece]))

    def _pieces(self, layer: FusedLayer, candidates: int, count: int) -> Iterator[slice]:
        """As many of ``count`` slots or layers at a time as memory is meant for; each has so many candidates a head."""
        pair = ranked_pair_bytes(self._policy.needs, layer.key_dim)
        step = max(1, RANKED_BYTES // (pair * candidates * layer.rows.kv_heads))
        return (slice(begin, begin + step) for begin in range(0, count, step))

    def _rank(
        self,
        layers: Sequence[FusedLayer],
        candidates: Candidates,
        key: Tensor | None = None,
        sums: Tensor | None = None,
        ranks: Tensor | None = None,
    ) -> None:
        """Rank pairs of rows of L layers, or of one layer and of packed tokens, whose ``ranks`` [K, P] are written."""
        at, first = candidates.rows, layers[0]
        positions = candidates.positions(_gathered([layer.rows.positions for layer in layers], at))
        inputs = {}
        if Needs.ATTENTION_MASS in self._policy.needs:
            inputs["mass"] = candidates.masses(_gathered([layer.rows.mass for layer in layers], at), sums)
        if Needs.KEYS in self._policy.needs:
            codes = _gathered([layer.rows.keys for layer in layers], at)
            scales = None
            if first.rows.key_scales is not None:
                scales = _gathered([layer.rows.key_scales for layer in layers], at)
            held = Stored(codes, scales, first.rows.key_format).read(..., first.key_dim, self._dtype)
            inputs["keys"] = candidates.keys(held, key).masked_fill_((positions < 0).unsqueeze(-1), 0)
        window, distance = first.order.window, first.order.distance
        seen = Seen(positions=positions, now=candidates.now, inputs=inputs, window=window, distance=distance)
        scores = self._policy.score(seen)
        scores = scores.gather(-1, candidates.numbers.expand(scores.shape))
        written = candidates.ranked & candidates.in_use[..., :1]  # repetitions too: those of a row write the same
        before = _gathered([layer.rows.ranks for layer in layers], at)
        after = torch.where(written, scores[..., : at.shape[-1]], before)
        for layer, own in zip(layers, after, strict=True):
            if layer.rows.ranks is not None:
                layer.rows.ranks[at] = own
        if ranks is not None:
            of_tokens = torch.where(candidates.ranked, scores[0, ..., at.shape[-1] :], float("inf"))
            ranks[:, candidates.tokens] = of_tokens.transpose(0, 1)


def _gathered(parts: Sequence[Tensor | None], rows: Tensor) -> Tensor:
    """[L, N, K, C, ...] what L layers hold in rows [N, K, C]."""
    gathered = [part[rows] for part in parts if part is not None]
    return gathered[0].unsqueeze(0) if len(gathered) == 1 else torch.stack(gathered)


def _counted(limits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[..., count]: 0, 1, ... and, from the limit [...] on, the last below it again; and which are no repetitions."""
    number = torch.arange(count, device=limits.device)
    return torch.minimum(number, (limits.unsqueeze(-1) - 1).clamp(min=0)), number < limits.unsqueeze(-1)


def _is_due(one: DecodingSlot, capacities: tuple[int, ...], every: int) -> bool:
    """Whether some head of a slot is ranked before its next token."""
    since = [one.position - min(one.row_limit, capacity) for capacity in set(capacities)]
    return any(tokens >= 0 and tokens % every == 0 for tokens in since)
