"""The candidates of ``bmx calibrate``: which settings of the cache are compared with the full cache.

Knows settings; measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from bmx.config import EngineConfig
from bmx.measure.calibration_checks import CALIBRATED
from bmx.units import layers_text, parse_layers

BUDGETS = ("50%bytes", "25%bytes", "12.5%bytes")  # default candidates, in each of these formats
FORMATS = ("model", "int8", "int8/int4", "int4")
NO_ARCHIVE = "none"
ARCHIVES = (NO_ARCHIVE, "int8/int4", "int4")  # of default candidates
READING_BUDGET, READING_FORMAT = "25%bytes", "model"  # of the slots in which their prompts are read
MEASURED = "measured"  # layer budgets by what each layer needs of the sample's prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The values to compare: candidates are all combinations of them.

    Attributes:
        policies: eviction policies.
        budgets: KV budgets; empty for the default ones.
        formats: KV formats; empty for the default ones.
        archives: formats of archives, and ``none``; empty for the default ones: ``none`` alone where budgets or formats
            are named.
        layers: layer budgets.
    """

    policies: tuple[str, ...]
    budgets: tuple[int | float | str, ...] = ()
    formats: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("uniform",)

    def candidates(self, config: EngineConfig, factors: Mapping[str, str], shared: str) -> list[EngineConfig]:
        """The settings to measure, each once.

        Args:
            config: the settings that all of them have.
            factors: measured layer budgets, by policy.
            shared: layers that could share, as ``kv_share_layers`` takes them; empty for none.
        """
        found = list(self._combinations(config, factors))
        if shared:
            found = [each for one in found for each in (one, replace(one, kv_share_layers=shared))]
        distinct = [candidate for i, candidate in enumerate(found) if candidate not in found[:i]]
        return [candidate for candidate in distinct if candidate != full_cache_config(candidate)]

    def _combinations(self, config: EngineConfig, factors: Mapping[str, str]) -> Iterator[EngineConfig]:
        for archive, policy in product(self._archives, self.policies):
            reads = archive != NO_ARCHIVE
            budgets = self.budgets or ((READING_BUDGET,) if reads else BUDGETS)
            formats = self.formats or ((READING_FORMAT,) if reads else FORMATS)
            evicting_slots_choose = config.kv_recall == "pages" and config.kv_recall_every == 1
            recall = config.kv_recall if reads or evicting_slots_choose else "all"
            for budget, kv_format, name in product(budgets, formats, self.layers):
                layers = parse_layers(factors.get(policy, "uniform")) if name == MEASURED else name
                if layers != "uniform" and not isinstance(budget, int):
                    continue  # a budget that is a share of the prompt is the same for all layers
                cache: dict[str, Any] = {"kv_budget": budget, "kv_layer_budgets": layers}
                cache |= {"kv_policy": policy, "kv_archive": archive, "kv_recall": recall}
                if policy == "none":
                    cache = {"kv_budget": EngineConfig().kv_budget, "kv_layer_budgets": "uniform"}
                base = config.full_cache if policy == "none" else config
                yield replace(base, kv_format=kv_format, **cache)

    @property
    def _archives(self) -> tuple[str, ...]:
        named = self.budgets or self.formats
        return self.archives or ((NO_ARCHIVE,) if named else ARCHIVES)


def full_cache_config(config: EngineConfig) -> EngineConfig:
    """The settings that candidates are compared with: nothing evicted, quantized, rounded or shared."""
    return replace(
        config.full_cache,
        kv_format="model",
        kv_share_layers=None,
        kv_layer_budgets="uniform",
        state_format="float32",
        quantization="none",
    )


def settings_of(candidate: EngineConfig) -> dict[str, Any]:
    """The settings in which candidates differ, as flags and files write them."""
    settings = {f.name: getattr(candidate, f.name) for f in fields(candidate) if f.name in CALIBRATED}
    settings["kv_layer_budgets"] = layers_text(settings["kv_layer_budgets"])
    return settings
