"""The compression policy: scorer, budget, format and protected tokens as one value, which chooses what to evict.

Knows scores and rows; knows nothing of memory, steps or models beyond their spec. Plans use it without torch.

Shapes: K kv heads, G query heads of each, C rows of a slot, P rows in use, R rows ranked, T chunk tokens, M sums of
attention, B decoding slots, N spans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bmx.compress.budgets import Budget
from bmx.compress.kernel_orders import kernel_order, scales_by_channel
from bmx.compress.recall import Recall
from bmx.compress.requests import EvictionRequest, PrefillChunk
from bmx.compress.scorer_api import RANK_EVERY, TENSORS, Needs, QueryWeights, Scorer, Seen
from bmx.compress.scorers import attention_policies, scorer_named
from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.kernels.formats import MODEL
from bmx.kernels.ranking import POSITIONS, UNRANKED, EvictionOrder
from bmx.kv.layout import ROW_STATS, KVLayout, LayerLayout
from bmx.kv_formats import format_name, format_of_key_rows, formats_of
from bmx.model.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from bmx.kv.pool import LayerSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionPolicy:
    """Which KV pairs a sequence keeps, how many, and how they are stored.

    Attributes:
        scorer: ranks the pairs; None keeps all of them.
        budget: how many pairs each layer and head may keep (unused without a scorer).
        sink: number of first tokens that are never evicted.
        recent: number of newest tokens that are never evicted.
        value_norm: scores are multiplied by the L1 norm of the pair's value (VATP, arXiv 2406.12335, section 3).
        probe: the share of the probe's attention in the scores; 0 without a probe.
        key_format: how keys are stored: ``model`` (in the model's dtype) or a name in ``FORMATS``.
        value_format: how values are stored.
        protects: whether the job's instructions are never evicted.
        archive: how every pair is kept on which the answer is written, where this policy is for reading alone; None
            where a sequence keeps one slot for both.
        recall: which rows a token of the answer reads; None where it reads all.
    """

    scorer: Scorer | None
    budget: Budget
    sink: int
    recent: int
    value_norm: bool = False
    probe: float = 0.0
    key_format: str = MODEL
    value_format: str = MODEL
    protects: bool = False
    archive: CompressionPolicy | None = None
    recall: Recall | None = None

    @classmethod
    def from_config(cls, config: EngineConfig, spec: ModelSpec | None = None) -> CompressionPolicy:
        """The policy that the configuration names.

        Args:
            config: the settings.
            spec: of the model, whose sizes turn a budget in bytes into pairs; not needed to check settings.

        Raises:
            UsageError: there is no such policy, or it cannot be combined with the other settings.
        """
        scorer = scorer_named(config.kv_policy)
        sums_attention = scorer is not None and Needs.ATTENTION_MASS in scorer.needs
        for name, value in (("kv_probe", config.kv_probe), ("kv_value_norm", config.kv_value_norm)):
            if value and not sums_attention:
                *names, last = attention_policies()
                hint = f"{', '.join(names)} and {last} do"
                raise UsageError(f"{name} needs a policy that looks at attention, unlike {config.kv_policy}", hint=hint)
        if config.kv_budget == "auto":
            raise UsageError(
                "kv_budget auto is for runs of the command line", hint="give a number, or a share like 25%"
            )
        key_format, value_format = config.pair_formats
        policy = cls(
            scorer=scorer,
            budget=Budget.of(config.kv_budget, config.kv_sink + config.kv_recent, config.kv_layer_budgets),
            sink=config.kv_sink,
            recent=config.kv_recent,
            value_norm=config.kv_value_norm,
            probe=config.kv_probe_weight if config.kv_probe else 0.0,
            key_format=key_format,
            value_format=value_format,
            protects=config.kv_protect != "none" and scorer is not None,
            archive=_archive(config) if config.archives else None,
            recall=None if config.archives else Recall.from_config(config),
        )
        return replace(policy, budget=policy.budget.in_pairs(policy.layout(spec, 1))) if spec else policy

    @property
    def answering(self) -> CompressionPolicy:
        """The policy of the slots on which answers are written: the archive's, or this one."""
        return self.archive or self

    def rows_needed(self, prompt_tokens: int, max_tokens: int) -> int:
        """Rows of the slot on which a sequence's answer is written, in the layer and head that keeps most."""
        everything = self.answering.scorer is None
        return prompt_tokens + max_tokens if everything else self.budget.rows(prompt_tokens, max_tokens)

    def reading_rows(self, prompt_tokens: int) -> int:
        """Rows of the slot in which a prompt is read before it is archived; 0 where nothing is archived."""
        return self.budget.rows(prompt_tokens, 0) if self.archive else 0

    def least_rows(self, prompt_tokens: int, max_tokens: int) -> int:
        """Rows of a slot that a sequence needs in the layer and head that keeps least."""
        return prompt_tokens + max_tokens if self.scorer is None else self.budget.least(prompt_tokens, max_tokens)

    def evicts(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a sequence of these lengths ever evicts a pair, in any layer."""
        return self.least_rows(prompt_tokens, max_tokens) < prompt_tokens + max_tokens

    def layout(self, spec: ModelSpec, capacity: int) -> KVLayout:
        """A slot of ``capacity`` rows; sliding-window layers hold no more than their window.

        The slot on which an answer is written also holds the states of layers without attention.
        """
        layers = tuple(self._layer(spec, layer, capacity) for layer in spec.layers)
        return KVLayout(layers, () if self.archive else spec.states)

    def _layer(self, spec: ModelSpec, layer: LayerSpec, capacity: int) -> LayerLayout:
        heads, last_reader = (capacity,) * layer.kv_heads, spec.last_reader(layer.owner)
        if self.scorer is not None and self.budget.share is None:
            alike = layer.window is not None or last_reader != layer.owner
            budgets = self.budget.heads(layer.owner, len(spec.layers), layer.kv_heads, alike)
            heads = tuple(min(capacity, budget) for budget in budgets)
        by_age = layer.window is not None and (layer.window <= max(heads) or self.budget.share is not None)
        heads = tuple(min(pairs, layer.window or pairs) for pairs in heads)
        recall = None
        if self.recall is not None and self.scorer is None and layer.window is None:
            recall = self.recall.layout(max(heads), shared=last_reader != layer.owner)
        by_channel = layer.window is None and scales_by_channel(self.scorer, self.key_format)
        return LayerLayout(
            capacity=max(heads),
            capacities=heads,
            kv_heads=layer.kv_heads,
            key_dim=layer.key_dim,
            value_dim=layer.value_dim,
            itemsize=spec.itemsize,
            window=layer.window,
            owner=layer.owner,
            last_reader=last_reader,
            by_age=by_age,
            key_format=self.key_format if by_channel else format_of_key_rows(self.key_format),
            value_format=self.value_format,
            by_channel=by_channel,
            row_stats=() if by_age or self.scorer is None else self._row_stats,
            recall=recall,
        )

    @property
    def format(self) -> str:
        """The formats of keys and values as ``kv_format`` names them."""
        return format_name(self.key_format, self.value_format)

    @property
    def needs(self) -> Needs:
        """The inputs that ranking needs."""
        needs = Needs.NOTHING if self.scorer is None else self.scorer.needs
        if self.value_norm:
            needs |= Needs.VALUES
        if self.probe:
            needs |= Needs.PROBE
        return needs

    @property
    def every(self) -> int:
        """Decoding tokens between two rankings; 0 for no ranking in decoding."""
        if self.scorer is None:
            return 1
        if self.scorer.every == 1 and self.needs & TENSORS:
            return RANK_EVERY
        return self.scorer.every

    @property
    def attention_stats(self) -> tuple[str, ...]:
        """Names of the row statistics that are sums of attention, in the order in which kernels return them."""
        named = (("mass", Needs.ATTENTION_MASS), ("probe", Needs.PROBE), ("squares", Needs.SQUARES))
        return tuple(name for name, need in named if need in self.needs)

    @property
    def _row_stats(self) -> tuple[str, ...]:
        return self.attention_stats + (() if self.every == 1 else ("rank",))

    def eviction_order(self, layout: LayerLayout) -> EvictionOrder | None:
        """How a layer's pairs are ranked, if kernels can do it by themselves; else None."""
        by = "age" if layout.by_age else kernel_order(self.scorer)
        known = {"mass", "rank"}.issuperset(layout.row_stats) and ("rank" in layout.row_stats) == (by == "rank")
        if not by or (by != "age" and (self.value_norm or not known)):
            return None
        return EvictionOrder(
            by=by,
            sink=self.sink,
            recent=self.recent,
            window=layout.window,
            distance=self.distance,
            power=self.summed.power,
        )

    @property
    def summed(self) -> QueryWeights:
        """How attention is summed over queries."""
        return QueryWeights() if self.scorer is None else self.scorer.query_weights

    @property
    def distance(self) -> int:
        """How many tokens after a key queries begin to count for it."""
        return self.recent if self.summed.far else 0

    def decay(self, queries: int) -> float:
        """The factor on the attention that was summed before, as the attention of ``queries`` more is added."""
        return self.summed.decay_over(queries)

    @property
    def weighs_queries(self) -> bool:
        """Whether the attention of some queries counts for more than that of others, whatever the key."""
        scorer, weights = self.scorer, self.summed
        alike = weights.decay == 1 and weights.window is None
        return scorer is not None and Needs.ATTENTION_MASS in scorer.needs and not alike

    def query_weights(self, queries: int, probes: int) -> list[list[float]]:
        """The weight of each query in each sum of attention [M][T + probes]; the sum of squares is not among them.

        Args:
            queries: of the chunk (T).
            probes: of the probe, behind the chunk.
        """
        scorer = self.scorer
        if scorer is None or Needs.ATTENTION_MASS not in scorer.needs:
            return []
        mass = scorer.query_weights.weights(queries) + [0.0] * probes
        return [mass, [0.0] * queries + [1.0] * probes] if self.probe else [mass]

    def score(self, seen: Seen) -> Tensor:
        """The scorer's scores [..., K, R], combined with the values' norms and the probe's attention.

        Raises:
            RuntimeError: there is no scorer.
        """
        if self.scorer is None:
            raise RuntimeError("a policy without a scorer ranks nothing")
        scores = self.scorer(seen)
        if self.value_norm:
            scores = scores * seen.values.abs().sum(-1)
        if self.probe:
            probed = seen.probe >= 0
            of_probe = _by_mean(seen.probe.clamp(min=0).pow(1 / self.summed.power), probed)
            scores = _by_mean(scores, seen.valid)
            scores = scores.where(~probed, (1 - self.probe) * scores + self.probe * of_probe)
        return scores

    def protected(self, layout: LayerLayout, scores: Tensor, positions: Tensor, now: Tensor | int) -> Tensor:
        """Replace the scores of pairs that do not compete.

        Args:
            layout: of the layer.
            scores: [..., K, R].
            positions: [..., K, R], -1 for an empty row.
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

    def compress(self, part: LayerSlots, chunk: PrefillChunk) -> None:
        """Store a chunk whose attention is computed: update the row statistics, keep the best pairs, drop the others.

        Args:
            part: the layer's slots; written.
            chunk: what is to be stored.
        """
        import torch  # here, since plans are made with policies and without torch

        capacity, tokens = min(chunk.row_limit, part.layout.capacity), chunk.key.shape[0]
        used, now = min(chunk.start - chunk.elsewhere, capacity), chunk.start + tokens
        positions = torch.arange(chunk.start, now, device=chunk.key.device)
        row_stats = self._add_attention(part, chunk, used)
        if used + tokens <= capacity:
            part.append(chunk.slot, used, chunk.key, chunk.value, positions, row_stats)
            return
        heads = chunk.key.shape[1]
        candidates = torch.cat([part.positions[chunk.slot, :, :used], positions.expand(heads, -1)], dim=1)  # [K, P+T]
        scores = self._scores_of_chunk(part, chunk, used, candidates, row_stats)
        if "rank" in row_stats:
            part.row_stats["rank"][chunk.slot, :, :used] = scores[:, :used]
            row_stats["rank"] = scores[:, used:]
        scores = self.protected(part.layout, scores, candidates, now)
        for start, stop in chunk.spans:
            scores = scores.masked_fill((candidates >= start) & (candidates < stop), float("inf"))
        best = scores.topk(capacity, dim=-1).indices
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        empty = keep.new_zeros(heads, capacity - used)  # rows that are not in use have no pair to keep
        keep = torch.cat([keep[:, :used], empty, keep[:, used:]], dim=1)
        part.replace(chunk.slot, keep, chunk.key, chunk.value, positions, row_stats)

    def _add_attention(self, part: LayerSlots, chunk: PrefillChunk, used: int) -> dict[str, Tensor]:
        """Add a chunk's attention to the statistics of the rows in use; returns those of the chunk's tokens, [K, T]."""
        tokens, heads = chunk.key.shape[:2]
        own = {
            name: chunk.key.new_full((heads, tokens), ROW_STATS[name], dtype=stat.dtype)
            for name, stat in part.row_stats.items()
        }
        if chunk.sums is None or not part.row_stats:
            return own
        decay = self.decay(tokens)
        for name, received in zip(self.attention_stats, chunk.sums, strict=True):
            row = part.row_stats[name][chunk.slot, :, :used]
            row.mul_(0.0 if name == "probe" else decay).add_(received[:, :used])
            own[name] = received[:, used:]
        return own

    def _scores_of_chunk(
        self, part: LayerSlots, chunk: PrefillChunk, used: int, candidates: Tensor, row_stats: Mapping[str, Tensor]
    ) -> Tensor:
        """Scores [K, P + T] of the rows in use and the chunk's tokens."""
        import torch

        if part.layout.by_age or self.scorer is None:
            return candidates.float()
        inputs = {
            name: torch.cat([part.row_stats[name][chunk.slot, :, :used], row_stats[name]], dim=1)
            for name in self.attention_stats
        }
        if self.needs & (Needs.KEYS | Needs.VALUES):
            keys, values = part.read(chunk.slot, used)
            inputs["keys"] = torch.cat([keys, chunk.key.transpose(0, 1)], dim=1)
            inputs["values"] = torch.cat([values, chunk.value.transpose(0, 1)], dim=1)
        if Needs.QUERIES in self.needs:
            inputs["queries"] = chunk.queries
        seen = Seen(
            positions=candidates,
            now=chunk.start + chunk.key.shape[0],
            inputs=inputs,
            surplus=candidates.shape[1] - min(chunk.row_limit, part.layout.capacity),
            window=part.layout.window,
            distance=self.distance,
            scale=chunk.scale,
        )
        return self.score(seen)

    def victims(self, part: LayerSlots, request: EvictionRequest) -> Tensor:
        """The row that each decoding slot gives up for its next token: in each head, that of the lowest score.

        For a slot that is not full yet the result has no meaning.

        Args:
            part: the layer's slots; only their ranks may be written.
            request: the slots and their tokens.

        Returns:
            [B, K] rows.
        """
        positions, now = part.positions[request.slots], request.positions.view(-1, 1, 1)
        scores = self.protected(part.layout, self._scores_of_rows(part, request, positions, now), positions, now)
        if request.spans is not None:
            first, stop = request.spans.unbind(-1)  # [B, N]
            inside = (positions.unsqueeze(-1) >= first[:, None, None]) & (positions.unsqueeze(-1) < stop[:, None, None])
            scores = scores.masked_fill(inside.any(-1), float("inf"))
        if request.row_limits is not None:
            beyond = _rows(scores) >= request.row_limits.view(-1, 1, 1)
            scores = scores.masked_fill(beyond, float("inf"))
        return scores.argmin(-1)

    def _scores_of_rows(self, part: LayerSlots, request: EvictionRequest, positions: Tensor, now: Tensor) -> Tensor:
        """Scores [B, K, C] of the rows of decoding slots."""
        if part.layout.by_age or self.scorer is None:
            return positions.float()
        if self.every == 1:
            inputs = {name: part.row_stats[name][request.slots] for name in self.attention_stats}
            return self.score(self._seen(part, positions, now, inputs))
        if self.every:
            self._rank_again(part, request)
        return part.row_stats["rank"][request.slots]

    def _rank_again(self, part: LayerSlots, request: EvictionRequest) -> None:
        """Rank the pairs of slots that have just become full, or have had ``every`` tokens since their last ranking."""
        tokens = zip(request.slots_host, request.positions_host, request.row_limits_host, strict=True)
        for slot, now, row_limit in tokens:
            rows = min(row_limit, part.layout.capacity)
            if now < rows or (now - rows) % self.every:
                continue
            inputs = {name: part.row_stats[name][slot, :, :rows] for name in self.attention_stats}
            if self.needs & (Needs.KEYS | Needs.VALUES):
                inputs["keys"], inputs["values"] = part.read(slot, rows)
            seen = self._seen(part, part.positions[slot, :, :rows], now, inputs)
            part.row_stats["rank"][slot, :, :rows] = self.score(seen)

    def _seen(self, part: LayerSlots, positions: Tensor, now: Tensor | int, inputs: Mapping[str, Tensor]) -> Seen:
        """What the scorer is given of rows of slots."""
        window, distance = part.layout.window, self.distance
        return Seen(positions=positions, now=now, inputs=inputs, window=window, distance=distance)

    def observe(self, part: LayerSlots, slots: Tensor, sums: Tensor, first: bool) -> None:
        """Add what decoding tokens have attended to.

        Args:
            part: the layer's slots; their statistics are written.
            slots: [B].
            sums: [M, B, K, C], without the probe's.
            first: whether this layer is the first to read these rows: earlier attention decays once per token.
        """
        decay = self.decay(1) if first else 1.0
        names = [name for name in self.attention_stats if name != "probe"]
        for name, received in zip(names, sums, strict=True):
            stat = part.row_stats[name]
            if decay == 1:
                stat.index_add_(0, slots, received)
            else:
                stat[slots] = stat[slots] * decay + received


def _archive(config: EngineConfig) -> CompressionPolicy:
    """The policy that keeps every pair in the archive's format."""
    (keys, values), sink, recent = formats_of(config.kv_archive), config.kv_sink, config.kv_recent
    unused, recall = Budget.of(sink + recent + 1, sink + recent, "uniform"), Recall.from_config(config)
    plain = CompressionPolicy(scorer=None, budget=unused, sink=sink, recent=recent, recall=recall)
    return replace(plain, key_format=keys, value_format=values)


def _rows(scores: Tensor) -> Tensor:
    import torch

    return torch.arange(scores.shape[-1], device=scores.device)


def _by_mean(scores: Tensor, counted: Tensor) -> Tensor:
    """Scores [..., K, R] divided by each head's mean score, taken over the rows that are counted [..., K, R]."""
    counts = counted.sum(-1, keepdim=True).clamp(min=1)
    return scores * counts / (scores * counted).sum(-1, keepdim=True).clamp(min=1e-20)
