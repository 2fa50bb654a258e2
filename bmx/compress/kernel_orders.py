"""What kernels can do of a policy: the scorers that they rank by, and the formats of pairs that they read.

Knows names; loads no torch.
"""

from __future__ import annotations

from bmx.compress.attention_scorers import RKV, AttentionMass, AverageAttention, FarAttention, Recency, Window
from bmx.compress.key_scorers import KeyDiff, KeyNorm
from bmx.compress.scorer_api import Needs, Scorer
from bmx.compress.scorers import scorer_named
from bmx.config import EngineConfig
from bmx.kernels.contract import Capabilities
from bmx.kernels.formats import FORMATS
from bmx.kv_formats import formats_of
from bmx.model.spec import ModelSpec

_KERNEL_ORDERS = {  # what ``EvictionOrder`` calls scorers' formulas; "rank": the engine ranks, kernels only evict
    Recency.__call__: "age",
    AttentionMass.__call__: "mass",
    AverageAttention.__call__: "average",
    FarAttention.__call__: "average",
    **dict.fromkeys((Window.__call__, RKV.__call__, KeyDiff.__call__, KeyNorm.__call__), "rank"),
}

RANKED_BYTES = 2**27  # of pairs that are ranked at once for kernels, unless one slot has more
UNKEYED = 64  # bytes of a pair that is ranked without its key: numbers, and their order
FLOAT32 = 4  # bytes
COPIES = 6  # of a key, as it is decoded and scored


def ranked_pair_bytes(needs: Needs, key_dim: int) -> int:
    """Bytes of a pair that is ranked, before a scorer makes anything of it."""
    return FLOAT32 * key_dim if Needs.KEYS in needs else UNKEYED


def ranking_bytes(config: EngineConfig, capabilities: Capabilities, spec: ModelSpec, pairs: int, slots: int) -> int:
    """Bytes that ranking holds beside steps in which kernels evict by rank; 0 if they do not.

    Args:
        config: the settings.
        capabilities: of the kernels.
        spec: the model's sizes.
        pairs: of a head, at most.
        slots: that may be ranked at once.
    """
    scorer = scorer_named(config.kv_policy)
    if scorer is None or kernel_order(scorer) != "rank" or not left_to_kernels(config, capabilities):
        return 0
    copies = COPIES if Needs.KEYS in scorer.needs else 1
    slot = pairs * max(layer.kv_heads * ranked_pair_bytes(scorer.needs, layer.key_dim) for layer in spec.layers)
    return copies * max(slot, min(slot * slots * len(spec.layers), RANKED_BYTES))


def left_to_kernels(config: EngineConfig, capabilities: Capabilities) -> bool:
    """Whether kernels can do whole steps under this configuration, in layers that share nothing."""
    if _beyond_kernels(config) or (answers_by_channel(config) and not _decodes_archives(config, capabilities)):
        return False
    return capabilities.fuses(kernel_order(scorer_named(config.kv_policy)), *config.pair_formats)


def rounds_left_to_kernels(config: EngineConfig, capabilities: Capabilities) -> bool:
    """Whether kernels can do whole steps in which all sequences decode, in layers that share nothing."""
    if left_to_kernels(config, capabilities):
        return True
    by_channel = not config.archives and answers_by_channel(config)
    return by_channel and not _beyond_kernels(config) and capabilities.decodes_by_channel(*config.pair_formats)


def _beyond_kernels(config: EngineConfig) -> bool:
    """Whether settings ask for what no kernel does."""
    others = config.kv_value_norm, config.kv_probe, config.kv_share_layers, config.kv_protect != "none"
    return any(others) or config.kv_recall != "all"


def _decodes_archives(config: EngineConfig, capabilities: Capabilities) -> bool:
    """Whether answers are written on archives that kernels read as they lie."""
    return config.archives and capabilities.decodes_by_channel(*formats_of(config.kv_archive))


def answers_by_channel(config: EngineConfig) -> bool:
    """Whether the keys on which answers are written are scaled by channel, in layers without a window."""
    if config.archives:
        return scales_by_channel(None, formats_of(config.kv_archive)[0])
    return scales_by_channel(scorer_named(config.kv_policy), config.pair_formats[0])


def scales_by_channel(scorer: Scorer | None, key_format: str) -> bool:
    """Whether keys are scaled by channel in layers without a window: they can be, and nothing is evicted."""
    return scorer is None and key_format in FORMATS and FORMATS[key_format].by_channel


def kernel_order(scorer: Scorer | None) -> str:
    """What ``EvictionOrder`` calls a scorer's formula; empty if kernels cannot rank by it.

    A subclass that overrides ``__call__`` has a formula of its own, so kernels do not rank for it.
    """
    return "age" if scorer is None else _KERNEL_ORDERS.get(type(scorer).__call__, "")
