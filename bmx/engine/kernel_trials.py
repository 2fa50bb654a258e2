"""Which kernels a loaded model needs under a policy, and whether they compute it on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, cast

from bmx.compress.policy import CompressionPolicy
from bmx.kernels import Kernels, trial
from bmx.kernels.contract import Capabilities
from bmx.kernels.formats import MODEL
from bmx.kernels.mixer_contract import MixerFunctions
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.trial_inputs import Attention
from bmx.kernels.trial_mixers import Mixer, Noting
from bmx.kv.states import dtype_of
from bmx.model.fp8_modules import Fp8Linear
from bmx.model.inspection import call_mixers
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
    layers: Iterator[Attention | Mixer] = chain(
        _layers(model, spec, policy, kernels.capabilities), needed_by_mixers(model, spec)
    )
    return trial.tried(kernels, layers, model.dtype, model.device)


def needed_by_mixers(model: Any, spec: ModelSpec) -> Iterator[Mixer]:
    """What the functions of a model's mixers are compiled for, with states as slots store them.

    Args:
        model: the torch module.
        spec: the model's sizes.
    """
    if not spec.states:
        return
    noting = Noting()
    call_mixers(model, cast("MixerFunctions", noting))
    stored = {state.shape: dtype_of(state, model.dtype) for state in spec.states}
    for mixer in noting.mixers:
        shape, dtype = mixer.state
        yield replace(mixer, state=(shape, stored.get(shape, dtype)))


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
