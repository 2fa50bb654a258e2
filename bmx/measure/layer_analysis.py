"""What the layers of a model differ in, measured on real prompts: how much each must remember, and which could share.

Listens to attention by standing before its kernels; knows nothing of files or settings.

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

FIRST = 4
LEAST_FACTOR = 0.25  # of the even share, that any layer gets


@dataclass(frozen=True, slots=True)
class Listener(Kernels):
    """Kernels that note what they are asked about prompts before they answer.

    Attributes:
        inner: the kernels that answer.
        heard: of each layer and chunk, the last query, all keys and values, and the scale.
    """

    inner: Kernels
    heard: list[dict[str, Any]]

    @property
    def module(self) -> KernelModule:
        """The functions of the kernels that answer, but for ``attend_chunk``."""
        functions = {name: getattr(self.inner.module, name) for name in FUNCTIONS}
        return cast("KernelModule", SimpleNamespace(**functions | {"attend_chunk": self._attend_chunk}))

    @property
    def capabilities(self) -> Capabilities:
        """Those of the kernels that answer; chunks come one by one, so that each can be heard."""
        return replace(self.inner.capabilities, fuses_steps=False)

    def _attend_chunk(
        self, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, **options: Any
    ) -> Any:
        """As the kernel, and note the last query and all keys and values."""
        keys = torch.cat([past_key, key.transpose(0, 1)], dim=1)
        values = torch.cat([past_value, value.transpose(0, 1)], dim=1)
        self.heard.append({"query": query[-1].float(), "keys": keys, "values": values, "scale": options["scale"]})
        return self.inner.module.attend_chunk(query, key, value, past_key, past_value, **options)


def listening(engine: Engine) -> tuple[Engine, list[dict[str, Any]]]:
    """The same engine with kernels that are listened to, and what its attention is asked, in order."""
    backend = engine.backend
    if not isinstance(backend, ModelBackend):
        raise BmxError("only the attention of a loaded model can be listened to")
    kernels, heard = backend.kernels, list[dict[str, Any]]()
    listener = Listener(kernels.name, kernels.why, kernels, heard)
    return engine.with_backend(backend.with_kernels(listener)), heard


def layer_needs(engine: Engine, requests: list[Request], tolerance: float, stats: Stats | None = None) -> list[float]:
    """Tokens that each layer must remember of a prompt so that its last query hardly notices; on average.

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
        listened, heard = listening(engine)
        _read(listened, request, stats)
        for layer, asked in enumerate(heard[-layers:]):
            sums[layer] += halting_count(_last_attention(**asked).tolist(), FIRST, tolerance)
    return [total / len(requests) for total in sums]


def layer_factors(needs: list[float]) -> tuple[float, ...]:
    """Layer budgets in proportion to what layers need, none below a quarter of the even share; one on average."""
    mean = sum(needs) / len(needs)
    factors = [max(LEAST_FACTOR, need / mean) for need in needs]
    return tuple(round(factor * len(factors) / sum(factors), 4) for factor in factors)


def _last_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    """[H, P + T] of the last query."""
    kv_heads = len(keys)
    grouped = query.view(kv_heads, -1, query.shape[-1])
    return (grouped @ keys.float().transpose(-1, -2) * scale).softmax(-1).flatten(0, 1)


def _read(engine: Engine, request: Request, stats: Stats | None) -> Tensor:
    """Read one prompt alone; returns what enters the output head for its last token [hidden]."""
    entered: list[Tensor] = []

    def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel():  # a chunk that samples nothing sends nothing
            entered.append(inputs[0].flatten(0, -2)[-1].float())

    hook = engine.backend.model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        one = replace(request, params=replace(request.params, max_tokens=1))
        for result in engine.run([one], stats=stats):
            if result.error:
                raise BmxError(f"row {request.id} cannot be read: {result.error.message}")
    finally:
        hook.remove()
    return entered[-1]


def shared_layers(engine: Engine, requests: list[Request], count: int, least: float, stats: Stats | None = None) -> str:
    """Layers that could read the keys and values of an earlier one: KVSharer (arXiv 2410.18517, section 3).

    Pairs are tried from the most unlike caches to the most alike, and kept as long as what the model computes for
    the last tokens stays alike.

    Args:
        engine: with the full cache.
        requests: short ones, that are read again for each pair that is tried.
        count: how many layers are to be saved.
        least: cosine that must be left between what is computed with and without.
        stats: counts what is read.

    Returns:
        As ``kv_share_layers`` takes it; fewer pairs where no more can be had.
    """
    before: list[Tensor] = []
    means: list[Tensor] = []
    layers = len(engine.spec.layers)
    for request in requests:
        listened, heard = listening(engine)
        before.append(_read(listened, request, stats))
        parts = [torch.cat([_mean(asked["keys"]), _mean(asked["values"])]) for asked in heard[-layers:]]
        means = [a + b for a, b in zip(means, parts, strict=True)] if means else parts
    specs = engine.spec.layers
    pairs = [(i, j) for i in range(layers) for j in range(i) if replace(specs[i], owner=j) == specs[j]]
    pairs.sort(key=lambda pair: -float((means[pair[0]] - means[pair[1]]).norm()))
    chosen: dict[int, int] = {}
    for reader, owner in pairs:
        if len(chosen) == count:
            break
        if reader in chosen or owner in chosen or reader in chosen.values() or _is_read(engine, reader):
            continue
        trial = chosen | {reader: owner}
        if _alike(engine, requests, before, trial, stats) >= least:
            chosen = trial
    return _text(chosen)


def _mean(vectors: Tensor) -> Tensor:
    """[K, P + T, D] -> [K * D], over tokens."""
    return vectors.float().mean(1).flatten()


def _is_read(engine: Engine, owner: int) -> bool:
    """Whether later layers of the model itself read this one's."""
    return engine.spec.last_reader(owner) != owner


def _text(chosen: dict[int, int]) -> str:
    return ",".join(f"{reader}:{owner}" for reader, owner in sorted(chosen.items()))


def _alike(
    engine: Engine, requests: list[Request], before: list[Tensor], chosen: dict[int, int], stats: Stats | None
) -> float:
    """Mean cosine between what was computed before and what is computed with layers shared."""
    config = replace(engine.config, kv_share_layers=_text(chosen))
    other = engine.with_config(config)
    cosines = [torch.cosine_similarity(_read(other, r, stats), b, dim=0) for r, b in zip(requests, before, strict=True)]
    return float(torch.stack(cosines).mean())
