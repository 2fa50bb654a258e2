"""The policy: a scorer, a budget, a format and the tokens that are never evicted, as one value; and who survives.

Knows ranks and rows; knows nothing of models' sizes beyond the spec, of memory or of steps.

Shapes: K kv heads, G query heads of each, C rows of a slot, P rows in use, T chunk tokens, M ways of adding up
attention, B decoding slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmx.compress.attention_scorers import AttentionMass, AverageAttention, Recency, scorer_named
from bmx.compress.budgets import Budget
from bmx.compress.scorer_api import RANK_EVERY, TENSORS, Needs, QueryWeights, Scorer, Seen
from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.kernels.ranking import EvictionOrder
from bmx.kv.layout import KEY_GROUP, ROW_STATS, FormatName, KVLayout, LayerLayout
from bmx.model.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bmx.kv.pool import LayerSlots

UNRANKED = 1e30  # what comes after the last ranking stays as long as anything ranked is left
POSITIONS = 2.0**23  # that a float32 can tell apart above it


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillChunk:
    """A prompt chunk that has attended, and wants to move into its slot.

    Attributes:
        slot: the sequence's row of the batch.
        start: tokens of the sequence before the chunk.
        row_limit: rows of the slot that the sequence may use.
        spans: positions from .. to that are never evicted.
        key: [T, K, D]; value [T, K, E]: the chunk's own.
        queries: [T, K, G, D].
        scale: factor of the dot products.
        sums: [M, K, P + T] attention received from the chunk's queries, slot rows first, or None if unscored.
    """

    slot: int
    start: int
    row_limit: int
    spans: tuple[tuple[int, int], ...]
    key: Tensor
    value: Tensor
    queries: Tensor
    scale: float
    sums: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionRequest:
    """Decoding tokens of a group, one per slot, each about to take a row.

    Attributes:
        slots: [B] slots of the group; ``positions`` [B]: of the tokens, equal to the tokens seen before.
        slots_host, positions_host: the same numbers on the host.
        row_limits_host: rows of its slot that each sequence may use.
        row_limits: [B] the same, or None where each may use all of its slot.
        spans: [B, N, 2] positions that are never evicted, or None.
    """

    slots: Tensor
    positions: Tensor
    slots_host: tuple[int, ...]
    positions_host: tuple[int, ...]
    row_limits_host: tuple[int, ...]
    row_limits: Tensor | None = None
    spans: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPolicy:
    """Which KV pairs a sequence keeps, how many, and how they are stored.

    Attributes:
        scorer: ranks the pairs; None keeps them all.
        budget: how many each layer and head may keep (unused without a scorer).
        sink: first tokens that are never evicted.
        recent: newest tokens that are never evicted.
        value_norm: scores are multiplied by the length of the pair's value (VATP, arXiv 2406.12335, section 3).
        probe: the share of the probe's attention in the scores; 0 if there is no probe.
        format: how pairs are stored.
        protects: the job's instructions are never evicted.
    """

    scorer: Scorer | None
    budget: Budget
    sink: int
    recent: int
    value_norm: bool = False
    probe: float = 0.0
    format: FormatName = "auto"
    protects: bool = False

    @classmethod
    def from_config(cls, config: EngineConfig) -> CompressionPolicy:
        """The policy that the configuration names.

        Raises:
            UsageError: no such scorer, or one that cannot be combined with the rest.
        """
        scorer = scorer_named(config.kv_policy)
        adds_up = scorer is not None and Needs.ATTENTION_MASS in scorer.needs
        for name, asked in (("kv_probe", config.kv_probe), ("kv_value_norm", config.kv_value_norm)):
            if asked and not adds_up:
                hint = "average-attention, h2o, decay, roco, window, tova and r-kv do"
                raise UsageError(f"{name} needs a policy that looks at attention, unlike {config.kv_policy}", hint=hint)
        if isinstance(config.kv_budget, str):
            raise UsageError(
                "kv_budget auto is for runs of the command line", hint="give a number, or a share like 25%"
            )
        return cls(
            scorer=scorer,
            budget=Budget.of(config.kv_budget, config.kv_sink + config.kv_recent, config.kv_layer_budgets),
            sink=config.kv_sink,
            recent=config.kv_recent,
            value_norm=config.kv_value_norm,
            probe=config.kv_probe_weight if config.kv_probe else 0.0,
            format=config.kv_format,
            protects=config.kv_protect != "none" and scorer is not None,
        )

    def rows_needed(self, prompt_tokens: int, max_tokens: int) -> int:
        """Rows of a slot that a sequence of so many tokens needs, in the layer that keeps most."""
        return prompt_tokens + max_tokens if self.scorer is None else self.budget.rows(prompt_tokens, max_tokens)

    def least_rows(self, prompt_tokens: int, max_tokens: int) -> int:
        """Rows that such a sequence has in the layer that keeps least."""
        return prompt_tokens + max_tokens if self.scorer is None else self.budget.least(prompt_tokens, max_tokens)

    def evicts(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether such a sequence will ever evict, in any layer."""
        return self.least_rows(prompt_tokens, max_tokens) < prompt_tokens + max_tokens

    def layout(self, spec: ModelSpec, capacity: int) -> KVLayout:
        """A slot of ``capacity`` rows; sliding-window layers hold no more than their window."""
        return KVLayout(tuple(self._layer(spec, layer, capacity) for layer in spec.layers))

    def _layer(self, spec: ModelSpec, layer: LayerSpec, capacity: int) -> LayerLayout:
        rows = capacity
        if self.scorer is not None and self.budget.share is None:
            rows = min(capacity, self.budget.layer(layer.owner, len(spec.layers)))
        by_age = layer.window is not None and (layer.window <= rows or self.budget.share is not None)
        rows = min(rows, layer.window or rows)
        by_channel = self.format in ("int8", "int4") and self.scorer is None and layer.window is None
        return LayerLayout(
            capacity=rows,
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            itemsize=spec.itemsize,
            window=layer.window,
            owner=layer.owner,
            last_reader=spec.last_reader(layer.owner),
            by_age=by_age,
            format=self.format,
            exact=0 if self.format == "auto" else KEY_GROUP if by_channel else min(self.recent, rows),
            by_channel=by_channel,
            row_stats=() if by_age or self.scorer is None else self._row_stats,
        )

    @property
    def needs(self) -> Needs:
        """What must be seen to rank pairs."""
        needs = Needs.NOTHING if self.scorer is None else self.scorer.needs
        return needs | (Needs.VALUES if self.value_norm else needs) | (Needs.PROBE if self.probe else needs)

    @property
    def every(self) -> int:
        """Decoding tokens between two rankings; 0 if there is none."""
        every = 1 if self.scorer is None else self.scorer.every
        return RANK_EVERY if every == 1 and self.needs & TENSORS else every

    @property
    def sums(self) -> tuple[str, ...]:
        """The notes that are sums of attention, in the order in which kernels give them."""
        named = (("mass", Needs.ATTENTION_MASS), ("probe", Needs.PROBE), ("squares", Needs.SQUARES))
        return tuple(name for name, need in named if need in self.needs)

    @property
    def _row_stats(self) -> tuple[str, ...]:
        return self.sums + (() if self.every == 1 else ("rank",))

    def ranking(self, layout: LayerLayout) -> EvictionOrder | None:
        """How a layer's pairs are ranked, if it is so simple that a kernel can do it by itself; else None."""
        by = "age" if layout.by_age else _simply_by(self.scorer)
        if by != "age" and (layout.row_stats != ("mass",) or self.value_norm):
            return None
        return EvictionOrder(by=by, sink=self.sink, recent=self.recent, window=layout.window) if by else None

    def decay_over(self, queries: int) -> float:
        """What is left of the attention added up before, once that of so many queries comes on top."""
        return 1.0 if self.scorer is None else self.scorer.query_weights.decay_over(queries)

    @property
    def weights_queries(self) -> bool:
        """Whether the attention of some queries counts for more than that of others."""
        scorer = self.scorer
        return scorer is not None and Needs.ATTENTION_MASS in scorer.needs and scorer.query_weights != QueryWeights()

    def query_weights(self, queries: int, probes: int) -> list[list[float]]:
        """The weight of each query in each way of adding up attention [M][T + probes]; squares are extra."""
        scorer = self.scorer
        if scorer is None or Needs.ATTENTION_MASS not in scorer.needs:
            return []
        mass = scorer.query_weights.weights(queries) + [0.0] * probes
        return [mass, [0.0] * queries + [1.0] * probes] if self.probe else [mass]

    def _score(self, seen: Seen) -> Tensor:
        """The scorer's scores with what is mixed into them [..., K, R]."""
        scores = self.scorer(seen)  # type: ignore[misc]
        if self.value_norm:
            scores = scores * seen.values.abs().sum(-1)
        if self.probe:
            voted = seen.probe >= 0
            of_probe = _by_mean(seen.probe.clamp(min=0), voted)
            scores = _by_mean(scores, seen.valid)
            scores = scores.where(~voted, (1 - self.probe) * scores + self.probe * of_probe)
        return scores

    def protected(self, layout: LayerLayout, scores: Tensor, positions: Tensor, now: Tensor | int) -> Tensor:
        """Scores in which none is finite of those that nothing is to be asked about.

        Args:
            scores: [..., K, R]; positions [..., K, R], -1 for an empty row.
            now: tokens of the sequence seen so far, a number or [..., 1, 1].

        Returns:
            [..., K, R]: +inf for sink and recent tokens; -inf for empty rows and for tokens that no later query can
            see through the layer's window; else the scores, those of unranked tokens above all others.
        """
        if "rank" in layout.row_stats:
            scores = scores.where(scores != float("inf"), UNRANKED * (1 + positions / POSITIONS))
        scores = scores.masked_fill((positions < self.sink) | (positions >= now - self.recent), float("inf"))
        gone = positions < 0
        if layout.window is not None:
            gone = gone | (positions <= now - layout.window)
        return scores.masked_fill(gone, float("-inf"))

    def compress(self, part: LayerSlots, new: PrefillChunk) -> None:
        """After a chunk has attended: note what it saw of the slot's rows, keep the best, drop the rest."""
        import torch  # here, since plans are made with policies and without torch

        capacity, tokens = min(new.row_limit, part.layout.capacity), new.key.shape[0]
        used, now = min(new.start, capacity), new.start + tokens
        positions = torch.arange(new.start, now, device=new.key.device)
        row_stats = self._add_up(part, new, used)
        if used + tokens <= capacity:
            part.append(new.slot, used, new.key, new.value, positions, row_stats)
            return
        heads = new.key.shape[1]
        candidates = torch.cat([part.positions[new.slot, :, :used], positions.expand(heads, -1)], dim=1)  # [K, P+T]
        scores = self._scores_of_chunk(part, new, used, candidates, row_stats)
        if "rank" in row_stats:
            part.row_stats["rank"][new.slot, :, :used] = scores[:, :used]
            row_stats["rank"] = scores[:, used:]
        scores = self.protected(part.layout, scores, candidates, now)
        for start, stop in new.spans:
            scores = scores.masked_fill((candidates >= start) & (candidates < stop), float("inf"))
        best = scores.topk(capacity, dim=-1).indices
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        free = keep.new_zeros(heads, capacity - used)  # rows that nothing was in are nothing to keep
        keep = torch.cat([keep[:, :used], free, keep[:, used:]], dim=1)
        part.replace(new.slot, keep, new.key, new.value, positions, row_stats)

    def _add_up(self, part: LayerSlots, new: PrefillChunk, used: int) -> dict[str, Tensor]:
        """Add a chunk's attention to the notes of the rows in use; returns the notes of the chunk itself, [K, T]."""
        tokens, heads = new.key.shape[:2]
        own = {
            name: new.key.new_full((heads, tokens), ROW_STATS[name], dtype=stat.dtype)
            for name, stat in part.row_stats.items()
        }
        if new.sums is None or not part.row_stats:
            return own
        old = self.scorer.query_weights.decay_over(tokens)  # type: ignore[union-attr]
        for name, seen in zip(self.sums, new.sums, strict=True):
            row = part.row_stats[name][new.slot, :, :used]
            row.mul_(0.0 if name == "probe" else old).add_(seen[:, :used])
            own[name] = seen[:, used:]
        return own

    def _scores_of_chunk(
        self, part: LayerSlots, new: PrefillChunk, used: int, candidates: Tensor, row_stats: Mapping[str, Tensor]
    ) -> Tensor:
        """Scores [K, P + T] of the rows in use and the chunk's tokens."""
        import torch

        if part.layout.by_age or self.scorer is None:
            return candidates.float()
        old = {name: part.row_stats[name][new.slot, :, :used] for name in self.sums}
        shown = {name: torch.cat([old[name], row_stats[name]], dim=1) for name in self.sums}
        if self.needs & (Needs.KEYS | Needs.VALUES):
            keys, values = part.read(new.slot, used)
            shown["keys"] = torch.cat([keys, new.key.transpose(0, 1)], dim=1)
            shown["values"] = torch.cat([values, new.value.transpose(0, 1)], dim=1)
        if Needs.QUERIES in self.needs:
            shown["queries"] = new.queries
        now, surplus = new.start + new.key.shape[0], candidates.shape[1] - min(new.row_limit, part.layout.capacity)
        window = part.layout.window
        return self._score(
            Seen(positions=candidates, now=now, shown=shown, surplus=surplus, window=window, scale=new.scale)
        )

    def victims(self, part: LayerSlots, going: EvictionRequest) -> Tensor:
        """The row that each decoding slot and head gives up for its next token: the lowest-ranked unprotected one.

        What it says of a slot that is not full yet means nothing.

        Returns:
            [B, K] rows.
        """
        positions, now = part.positions[going.slots], going.positions.view(-1, 1, 1)
        if part.layout.by_age:
            scores = positions.float()
        elif self.every == 1:
            row_stats = {name: part.row_stats[name][going.slots] for name in self.sums}
            scores = self._score(Seen(positions=positions, now=now, shown=row_stats, window=part.layout.window))
        else:
            self._rank_again(part, going)
            scores = part.row_stats["rank"][going.slots]
        scores = self.protected(part.layout, scores, positions, now)
        if going.spans is not None:
            first, stop = going.spans.unbind(-1)  # [B, N]
            inside = (positions.unsqueeze(-1) >= first[:, None, None]) & (positions.unsqueeze(-1) < stop[:, None, None])
            scores = scores.masked_fill(inside.any(-1), float("inf"))
        if going.row_limits is not None:
            beyond = _rows(scores) >= going.row_limits.view(-1, 1, 1)
            scores = scores.masked_fill(beyond, float("inf"))
        return scores.argmin(-1)

    def _rank_again(self, part: LayerSlots, going: EvictionRequest) -> None:
        """Rank the pairs of the slots whose turn it is: when they have become full, and each so many tokens after."""
        if not self.every:
            return
        for slot, now, limit in zip(going.slots_host, going.positions_host, going.row_limits_host, strict=True):
            rows = min(limit, part.layout.capacity)
            if now < rows or (now - rows) % self.every:
                continue
            shown = {name: part.row_stats[name][slot, :, :rows] for name in self.sums}
            if self.needs & (Needs.KEYS | Needs.VALUES):
                shown["keys"], shown["values"] = part.read(slot, rows)
            seen = Seen(positions=part.positions[slot, :, :rows], now=now, shown=shown, window=part.layout.window)
            part.row_stats["rank"][slot, :, :rows] = self._score(seen)

    def observe(self, part: LayerSlots, slots: Tensor, sums: Tensor, first: bool) -> None:
        """Add what decoding tokens have attended to.

        Args:
            slots: [B]; sums [M, B, K, C], without the probe's.
            first: whether this layer is the first that reads these rows: what was before fades once for each token.
        """
        old = self.scorer.query_weights.decay_over(1) if first else 1.0  # type: ignore[union-attr]
        for name, seen in zip((name for name in self.sums if name != "probe"), sums, strict=True):
            stat = part.row_stats[name]
            if old == 1:
                stat.index_add_(0, slots, seen)
            else:
                stat[slots] = stat[slots] * old + seen


def left_to_kernels(config: EngineConfig) -> bool:
    """Whether kernels can do all that this configuration asks of them, in layers that share nothing."""
    more = config.kv_value_norm or config.kv_probe or config.kv_share_layers or config.kv_protect != "none"
    return bool(_simply_by(scorer_named(config.kv_policy))) and not more and config.kv_format == "auto"


def _simply_by(scorer: Scorer | None) -> str:
    """What a ``EvictionOrder`` calls the way of a scorer; nothing if it has no word for it."""
    if isinstance(scorer, AttentionMass):
        return "mass"
    if isinstance(scorer, AverageAttention):
        return "average"
    return "age" if scorer is None or isinstance(scorer, Recency) else ""


def _rows(scores: Tensor) -> Tensor:
    import torch

    return torch.arange(scores.shape[-1], device=scores.device)


def _by_mean(scores: Tensor, counted: Tensor) -> Tensor:
    """Scores divided by the mean of those that count, for each head."""
    counts = counted.sum(-1, keepdim=True).clamp(min=1)
    return scores * counts / (scores * counted).sum(-1, keepdim=True).clamp(min=1e-20)
