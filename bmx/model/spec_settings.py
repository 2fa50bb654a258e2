"""What settings change of a model's spec: layers that read another layer's cache, and the format of states.

Knows sizes alone; loads no torch.
"""

from __future__ import annotations

from dataclasses import replace

from bmx.config import EngineConfig
from bmx.errors import UsageError
from bmx.kv.layout import STATE_BYTES
from bmx.model.spec import ModelSpec


def under_settings(spec: ModelSpec, config: EngineConfig) -> ModelSpec:
    """The spec under the settings that change what a slot holds: layers that share a cache, and how states are stored.

    Args:
        spec: of the model as it is.
        config: the settings.

    Raises:
        UsageError: layers that do not exist, or cannot share.
    """
    itemsize = STATE_BYTES[config.state_format]
    states = tuple(replace(state, itemsize=itemsize) if state.recurrent else state for state in spec.states)
    return share_layers(replace(spec, states=states), config.kv_share_layers)


def share_layers(spec: ModelSpec, pairs: str | None) -> ModelSpec:
    """The spec with some layers reading the keys and values of earlier ones (KVSharer, arXiv 2410.18517, section 3).

    Args:
        spec: of the model as it is.
        pairs: numbers of reader and owner, as in ``7:3,12:5``; None for no pair.

    Raises:
        UsageError: a layer does not exist, or the two of a pair differ in sizes or window.
    """
    layers = list(spec.layers)
    for pair in pairs.split(",") if pairs else ():
        reader, owner = map(int, pair.split(":"))
        if reader >= len(layers):
            raise UsageError(f"kv_share_layers names layer {reader}; {spec.name} has layers 0 to {len(layers) - 1}")
        sharing = replace(layers[reader], owner=layers[owner].owner)
        if sharing != replace(layers[owner], query_heads=sharing.query_heads):
            raise UsageError(f"kv_share_layers: layers {reader} and {owner} of {spec.name} have different caches")
        if any(layer.owner == reader for layer in layers[reader + 1 :]):
            raise UsageError(f"kv_share_layers: other layers already read the cache of layer {reader}")
        layers[reader] = sharing
    return replace(spec, layers=tuple(layers))
