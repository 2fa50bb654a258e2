"""How a model's layers differ, measured on real prompts: how many tokens each needs, and which could share a cache.

Records what the attention kernels are called with; knows nothing of files or settings.

Shapes: H query heads, K kv heads, T chunk tokens, P rows in use, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from bmx.compress.budgets import halting_count
from bmx.engine.backend import ModelBackend
from bmx.engine.engine import Engine
from bmx.errors import BmxError
from bmx.kernels import Kernels
from bmx.kernels.contract import FUNCTIONS, Capabilities, KernelModule
from bmx.request import Request
from bmx.stats import Stats

FIRST = 4  # tokens at the start of a prompt that the halting test always keeps
LEAST_FACTOR = 0.25  # least layer budget, as a share of the mean


@dataclass(frozen=True, slots=True)
class ChunkAttention:
    """What one layer's attention was called with for one prompt chunk.

    Attributes:
        query: [H, D] float32, of the chunk's last token.
        keys: [K, P + T, D] of the slot and the chunk.
        values: [K, P + T, E] of the slot and the chunk.
        scale: factor of the scores.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    def last_weights(self) -> Tensor:
        """[H, P + T] attention of the chunk's last query."""
        grouped = self.query.view(len(self.keys), -1, self.query.shape[-1])
        return (grouped @ self.keys.float().transpose(-1, -2) * self.scale).softmax(-1).flatten(0, 1)

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
        return replace(self.inner.capabilities, fuses_steps=False)

    def _attend_chunk(
        self, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, **options: Any
    ) -> Any:
        """Record the call, and compute it."""
        keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)
        values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
        self.calls.append(ChunkAttention(query[-1].float(), keys, values, options["scale"]))
        return self.inner.module.attend_chunk(query, key, value, past_key, past_value, **options)


def recording(engine: Engine) -> tuple[Engine, list[ChunkAttention]]:
    """The same engine with kernels that record prompt attention, and the list of their calls.

    Raises:
        BmxError: the engine's backend is not a loaded model.
    """
    backend = engine.backend
    if not isinstance(backend, ModelBackend):
        raise BmxError("only the attention of a loaded model can be recorded")
    kernels, calls = backend.kernels, list[ChunkAttention]()
    recorder = RecordingKernels(kernels.name, kernels.why, kernels, calls)
    return engine.with_backend(backend.with_kernels(recorder)), calls


def layer_needs(engine: Engine, requests: list[Request], tolerance: float, stats: Stats | None = None) -> list[float]:
    """Tokens that each layer must keep of a prompt so that its last query hardly changes: the mean over prompts.

    The halting test of DBudgetKV (see ``halting_count``) on each prompt, read whole under the full cache.

    Args:
        engine: with the full cache.
        requests: prompts to measure on.
        tolerance: share of the norm of attention that may be lost.
        stats: counts what is read.
    """
    layers = len(engine.spec.layers)
    sums = [0.0] * layers
    for request in requests:
        recorder, calls = recording(engine)
        _read_prompt(recorder, request, stats)
        for layer, attention in enumerate(calls[-layers:]):
            sums[layer] += halting_count(attention.last_weights().tolist(), FIRST, tolerance)
    return [total / len(requests) for total in sums]


def layer_factors(needs: list[float]) -> tuple[float, ...]:
    """Factors of layer budgets in proportion to the layers' needs: their mean is 1, and none is far below 0.25."""
    mean = sum(needs) / len(needs)
    factors = [max(LEAST_FACTOR, need / mean) for need in needs]
    return tuple(round(factor * len(factors) / sum(factors), 4) for factor in factors)


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
