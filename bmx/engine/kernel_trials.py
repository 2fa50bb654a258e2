"""Which kernels a loaded model needs under a policy, and whether they compute it on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.kernels import Kernels, trial
from bmx.kernels.contract import Capabilities
from bmx.kernels.formats import MODEL
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.trial import Attention
from bmx.model.fp8_modules import Fp8Linear
from bmx.model.spec import ModelSpec


def tried(kernels: Kernels, model: Any, spec: ModelSpec, policy: CompressionPolicy) -> Kernels:
    """The kernels, with plain torch in place of those that fail on this model under this policy.

    Args:
        kernels: as chosen.
        model: the torch module.
        spec: the model's sizes.
        policy: which KV pairs stay in a slot.

    Raises:
        DeviceError: after a trial the GPU refuses every call.
    """
    return trial.tried(kernels, _layers(model, spec, policy, kernels.capabilities), model.dtype, model.device)


def _layers(model: Any, spec: ModelSpec, policy: CompressionPolicy, capabilities: Capabilities) -> Iterator[Attention]:
    """What kernels are compiled for, layer by layer, in the smallest slot and in the largest."""
    softcap = getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    float8 = any(isinstance(module, Fp8Linear) for module in model.modules())
    for part in filter(None, (policy, policy.archive)):
        for capacity in (1, spec.max_length):
            for layer, layout in zip(spec.layers, part.layout(spec, capacity).layers, strict=True):
                order = part.eviction_order(layout)
                fused = order is not None and not layout.by_channel and capabilities.fuses(order.by, *layout.formats)
                yield Attention(
                    heads=layer.query_heads,
                    kv_heads=layer.kv_heads,
                    key_dim=layer.key_dim,
                    value_dim=layer.value_dim,
                    formats=layout.formats if fused else (MODEL, MODEL),
                    order=order or EvictionOrder(by="age", sink=0, recent=0, window=layer.window),
                    mass="mass" in layout.row_stats,
                    decays=part.weighs_queries,
                    softcap=softcap,
                    sinks=sinks,
                    fused=fused,
                    channel_formats=layout.formats if layout.by_channel else None,
                    float8=float8,
                )
