"""What kernels can do of a policy: the scorers whose formulas they know, and the formats of pairs that they read.

Knows names; loads no torch.
"""

from __future__ import annotations

from bmx.compress.attention_scorers import AttentionMass, AverageAttention, FarAttention, Recency
from bmx.compress.scorer_api import Scorer
from bmx.compress.scorers import scorer_named
from bmx.config import EngineConfig
from bmx.kernels.contract import Capabilities
from bmx.kernels.formats import FORMATS
from bmx.kv_formats import formats_of

_KERNEL_ORDERS = {  # the formulas that kernels know, and what ``EvictionOrder`` calls them
    Recency.__call__: "age",
    AttentionMass.__call__: "mass",
    AverageAttention.__call__: "average",
    FarAttention.__call__: "average",
}


def left_to_kernels(config: EngineConfig, capabilities: Capabilities) -> bool:
    """Whether kernels can do whole steps under this configuration, in layers that share nothing."""
    beyond_kernels = config.kv_value_norm or config.kv_probe or config.kv_share_layers or config.kv_protect != "none"
    beyond_kernels = beyond_kernels or config.kv_recall != "all"
    if not (config.archives and capabilities.profile.reads_by_channel):
        beyond_kernels = beyond_kernels or answers_by_channel(config)
    known = bool(kernel_order(scorer_named(config.kv_policy)))
    return known and not beyond_kernels and capabilities.fuses(*config.pair_formats)


def answers_by_channel(config: EngineConfig) -> bool:
    """Whether the keys on which answers are written are scaled by channel, in layers without a window."""
    if config.archives:
        return scales_by_channel(None, formats_of(config.kv_archive)[0])
    return scales_by_channel(scorer_named(config.kv_policy), config.pair_formats[0])


def scales_by_channel(scorer: Scorer | None, key_format: str) -> bool:
    """Whether keys are scaled by channel in layers without a window: they can be, and nothing is evicted."""
    return scorer is None and key_format in FORMATS and FORMATS[key_format].by_channel


def kernel_order(scorer: Scorer | None) -> str:
    """What ``EvictionOrder`` calls a scorer's formula; empty if kernels do not know it.

    A subclass that overrides ``__call__`` has a formula of its own, so kernels do not rank for it.
    """
    return "age" if scorer is None else _KERNEL_ORDERS.get(type(scorer).__call__, "")
