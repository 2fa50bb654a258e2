"""How a model's layers differ, measured on real prompts: how many pairs each needs, and which could share a cache.

Looks at the scores in the slots, and records what the attention kernels are called with; knows nothing of files.

Shapes: K kv heads, R rows, T chunk tokens, P rows in use, D key dim, E value dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bmx.compress.scorer_api import Seen
from bmx.engine.backend import ModelBackend, Runner
from bmx.engine.engine import Engine
from bmx.errors import BmxError
from bmx.kernels import Kernels
from bmx.kernels.contract import FUNCTIONS, Capabilities, KernelModule
from bmx.request import Request
from bmx.stats import Stats
from bmx.units import LayerFactors

if TYPE_CHECKING:
    from bmx.engine.runner import ModelRunner
    from bmx.kv.pool import KVPool

POOLED = 0.5  # part of all pairs that layers compete for; the rest is shared out evenly


@dataclass(frozen=True, slots=True)
class ChunkAttention:
    """What one layer's attention was called with for one prompt chunk.

    Attributes:
        keys: [K, P + T, D] of the slot and the chunk.
        values: [K, P + T, E] of the slot and the chunk.
    """

    keys: Tensor
    values: Tensor

    def mean_pair(self) -> Tensor:
        """[K * (D + E)] mean key and mean value over all tokens."""
        return torch.cat([vectors.float().mean(1).flatten() for vectors in (self.keys, self.values)])


@dataclass(frozen=True, slots=True)
class RecordingKernels(Kernels):
    """Kernels that record the attention of prompt chunks, layer after layer.

    Attributes:
        inner: the kernels that compute.
        calls: what attention was called with, in order.
    """

    inner: Kernels
    calls: list[ChunkAttention]

    @property
    def module(self) -> KernelModule:
        """The inner kernels' functions, except ``attend_chunk``, which records."""
        functions = {name: getattr(self.inner.module, name) for name in FUNCTIONS}
        return cast("KernelModule", SimpleNamespace(**functions | {"attend_chunk": self._attend_chunk}))

    @property
    def capabilities(self) -> Capabilities:
        """The inner kernels' capabilities without fused steps, so that every chunk calls ``attend_chunk``."""
        return replace(self.inner.capabilities, orders=())

    def _attend_chunk(
        self, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, **options: Any
    ) -> Any:
        """Record the call, and compute it."""
        keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)
        values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
        self.calls.append(ChunkAttention(keys, values))
        return self.inner.module.attend_chunk(query, key, value, past_key, past_value, **options)


def recording(engine: Engine) -> tuple[Engine, list[ChunkAttention]]:
    """The same engine with kernels that record prompt attention, and the list of their calls.

    Raises:
        BmxError: the engine's backend is not a loaded model.
    """
    backend = _backend_of(engine)
    kernels, calls = backend.kernels, list[ChunkAttention]()
    recorder = RecordingKernels(kernels.name, kernels.why, kernels, calls)
    return engine.with_backend(backend.with_kernels(recorder)), calls


def _backend_of(engine: Engine) -> ModelBackend:
    backend = engine.backend
    if not isinstance(backend, ModelBackend):
        raise BmxError("only the attention of a loaded model can be looked at")
    return backend


def pooled_factors(engine: Engine, requests: list[Request], share: float, stats: Stats | None = None) -> LayerFactors:
    """Factors of layers and heads: half of the pairs are shared out evenly, half to the heads with the best scores.

    Each prompt is read without evicting anything. The scores of all layers and heads then compete with each other for
    the pairs that an even budget would keep; what a head wins is its part of the second half.

    Args:
        engine: with a policy whose scores come from attention.
        requests: prompts to measure on.
        share: of a prompt's pairs, that compete for places.
        stats: counts what is read.

    Returns:
        A factor for each kv head of each layer, 1 on average: the mean over prompts. Layers that hold all that their
        window sees have 1.
    """
    sums: dict[int, Tensor] = {}
    for request in requests:
        scores = competing_scores(engine, request, stats)
        places = max(1, round(share * sum(layer.numel() for layer in scores.values())))
        least = torch.cat([layer.flatten() for layer in scores.values()]).topk(places).values[-1]
        won = {layer: (found >= least).float().mean(-1) for layer, found in scores.items()}  # [K]
        mean = torch.stack([shares.mean() for shares in won.values()]).mean()
        for layer, shares in won.items():
            sums[layer] = sums.get(layer, torch.zeros_like(shares)) + shares / mean
    return tuple(_factors(sums.get(layer.owner), len(requests)) for layer in engine.spec.layers)


def _factors(won: Tensor | None, prompts: int) -> float | tuple[float, ...]:
    """A layer's factors from what its heads won [K] of all prompts; 1 if it did not compete."""
    if won is None:
        return 1.0
    return tuple(round(1 - POOLED + POOLED * total / prompts, 4) for total in won.tolist())


def competing_scores(engine: Engine, request: Request, stats: Stats | None = None) -> dict[int, Tensor]:
    """The scores [K, R] of a prompt's pairs that are not protected, by layer, when all of it was read and nothing went.

    Args:
        engine: with a policy whose scores come from attention.
        request: the prompt.
        stats: counts what is read.

    Raises:
        BmxError: the prompt cannot be read, or leaves no pair that is not protected.
    """
    tokens = len(engine.encode(request))
    reader = engine.with_config(replace(engine.config, kv_budget=max(tokens, engine.policy.budget.fixed + 1)))
    backend = _PoolKeeper(_backend_of(engine))
    _read_prompt(reader.with_backend(backend), request, stats)
    policy, scores = reader.policy, dict[int, Tensor]()
    for owner in sorted({layer.owner for layer in engine.spec.layers}):
        part = backend.pools[-1].layer(0, owner)[0]
        if part.layout.by_age:
            continue
        positions = part.positions[0, :, :tokens]
        inputs = {name: part.row_stats[name][0, :, :tokens] for name in policy.attention_stats}
        inputs["keys"], inputs["values"] = part.read(0, tokens)
        seen = Seen(positions=positions, now=tokens, inputs=inputs, window=part.layout.window, distance=policy.distance)
        found = policy.protected(replace(part.layout, row_stats=()), policy.score(seen), positions, tokens)
        scores[owner] = found[found.isfinite()].view(len(found), -1)
    if not any(found.numel() for found in scores.values()):
        raise BmxError(f"row {request.id} is too short to compare layers: all of its pairs are protected")
    return scores


class _PoolKeeper(ModelBackend):
    """A model's backend that keeps the pools of its runners.

    Args:
        inner: the backend.
    """

    def __init__(self, inner: ModelBackend) -> None:
        super().__init__(inner.loaded, inner.kernels, inner.meter)
        self.pools: list[KVPool] = []

    def runner(self, *args: Any, **options: Any) -> AbstractContextManager[Runner]:
        """See ``Backend``."""
        made = super().runner(*args, **options)
        self.pools.append(cast("ModelRunner", made).pool)
        return made


def _read_prompt(engine: Engine, request: Request, stats: Stats | None) -> Tensor:
    """Read one prompt alone; returns the output head's input for its last token [hidden], float32.

    Raises:
        BmxError: the prompt cannot be read.
    """
    states: list[Tensor] = []

    def keep_state(_: Any, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel():  # chunks that sample nothing send no token
            states.append(inputs[0].flatten(0, -2)[-1].float())

    hook = engine.backend.model.get_output_embeddings().register_forward_pre_hook(keep_state)
    try:
        one_token = replace(request, params=replace(request.params, max_tokens=1))
        for result in engine.run([one_token], stats=stats):
            if result.error:
                raise BmxError(f"row {request.id} cannot be read: {result.error.message}")
    finally:
        hook.remove()
    return states[-1]


def shared_layers(engine: Engine, requests: list[Request], count: int, least: float, stats: Stats | None = None) -> str:
    """Layers that could read the keys and values of an earlier one: KVSharer (arXiv 2410.18517, section 3).

    Pairs of layers are tried from the most unlike caches to the most alike. A pair is kept if the last hidden state of
    the prompts stays similar.

    Args:
        engine: with the full cache.
        requests: short prompts, which are read again for each pair.
        count: number of layers that should read another's cache.
        least: least mean cosine between the last hidden states with and without sharing.
        stats: counts what is read.

    Returns:
        The pairs as ``kv_share_layers`` takes them; fewer than ``count`` if no more are similar enough.
    """
    states: list[Tensor] = []
    sums: list[Tensor] = []
    specs = engine.spec.layers
    layers = len(specs)
    for request in requests:
        recorder, calls = recording(engine)
        states.append(_read_prompt(recorder, request, stats))
        pairs_of_prompt = [attention.mean_pair() for attention in calls[-layers:]]
        sums = [a + b for a, b in zip(sums, pairs_of_prompt, strict=True)] if sums else pairs_of_prompt
    pairs = [(i, j) for i in range(layers) for j in range(i) if replace(specs[i], owner=j) == specs[j]]
    pairs.sort(key=lambda pair: -float((sums[pair[0]] - sums[pair[1]]).norm()))
    chosen: dict[int, int] = {}
    for reader, owner in pairs:
        if len(chosen) == count:
            break
        if reader in chosen or owner in chosen or reader in chosen.values() or _is_read(engine, reader):
            continue
        trial = chosen | {reader: owner}
        if _mean_cosine(engine, requests, states, trial, stats) >= least:
            chosen = trial
    return _setting(chosen)


def _is_read(engine: Engine, owner: int) -> bool:
    """Whether later layers of the model itself read this layer's cache."""
    return engine.spec.last_reader(owner) != owner


def _setting(owners: dict[int, int]) -> str:
    """Reader and owner of each pair, as ``kv_share_layers`` takes them."""
    return ",".join(f"{reader}:{owner}" for reader, owner in sorted(owners.items()))


def _mean_cosine(
    engine: Engine, requests: list[Request], states: list[Tensor], owners: dict[int, int], stats: Stats | None
) -> float:
    """Mean cosine between the last hidden states without and with shared layers.

    Args:
        engine: with the full cache.
        requests: the prompts.
        states: [hidden] of each prompt, without sharing.
        owners: by reader, the layer whose cache it reads.
        stats: counts what is read.
    """
    sharing = engine.with_config(replace(engine.config, kv_share_layers=_setting(owners)))
    shared_states = [_read_prompt(sharing, request, stats) for request in requests]
    cosines = [torch.cosine_similarity(a, b, dim=0) for a, b in zip(shared_states, states, strict=True)]
    return float(torch.stack(cosines).mean())
