"""Rows of tables, and numbers as people read them.

Knows plans, options and measurements; prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmx.options import Option
    from bmx.planner import Memory

CALIBRATION_COLUMNS = (
    "cache", "KV of a row", "slots", "tok/s (predicted)", "top-1", "KL", "same answer", "ROUGE-L full", "ROUGE-L ref",
    "length",
)  # fmt: skip
OPTION_COLUMNS = (
    "cache", "budget", "slots", "KV cache", "weights", "activations", "runtime", "total", "KV used",
    "prefill tok/s", "decode tok/s", "time",
)  # fmt: skip


def budget_text(budget: float | str) -> str:
    """A budget for people: 1,024 pairs, or 25% of the prompt."""
    return budget if isinstance(budget, str) else f"{budget:.0%}" if budget < 1 else f"{budget:,}"


def candidate_words(settings: Mapping[str, Any]) -> str:
    """The settings of a candidate, in few words."""
    words = [settings["kv_policy"]]
    if settings["kv_policy"] != "none":
        words.append(budget_text(settings["kv_budget"]))
    if settings["kv_format"] != "auto":
        words.append(settings["kv_format"])
    if settings["kv_layer_budgets"] != "uniform":
        words.append("pyramid" if settings["kv_layer_budgets"] == "pyramid" else "measured layers")
    for name, told in (("kv_probe", "probe"), ("kv_value_norm", "value norm"), ("kv_share_layers", "shared layers")):
        words += [told] if settings[name] else []
    return " ".join(words)


def candidate_row(name: str | None, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of a calibration's table: the full cache by that name, or a candidate."""
    speed = found["predicted_tokens_per_second"]
    sizes = (
        f"{found['kv_bytes_per_sequence'] / 1e6:,.2f} MB",
        f"{found['slots']:,}",
        f"{speed:,.1f}" if speed else "-",
    )
    if name:
        return (name, *sizes, *["-"] * (len(CALIBRATION_COLUMNS) - 4))
    reference = found.get("rouge_l_reference")
    return (
        candidate_words(found["settings"]),
        *sizes,
        f"{found['top1_agreement']:.1%} ± {found['top1_standard_error']:.1%}",
        f"{found['kl_divergence']:.3f}",
        f"{found['exact_match']:.0%}",
        f"{found['rouge_l_full_cache']:.3f}",
        "-" if reference is None else f"{reference:.3f} of {found['rouge_l_reference_of_full_cache']:.3f}",
        f"{found['length_ratio']:.2f}",
    )


def option_row(option: Option) -> tuple[str, ...]:
    """A line of a plan's table."""
    budget = budget_text(option.budget) if option.budget else "-"
    if option.plan is None:
        return (option.name, budget, "0", *["-"] * (len(OPTION_COLUMNS) - 3))
    plan, made = option.plan, option.forecast
    sizes = {name: megabytes(size) for name, size in memory_items(plan.memory)}
    speed = ("-", "-", "-")
    if made:
        speed = (f"{made.prefill_rate:,.0f}", f"{made.decode_rate:,.0f}", duration(made.seconds))
    slots = f"{plan.slots:,}" + (f" (not {plan.too_large:,} rows)" if plan.too_large else "")
    memory = (sizes["KV cache"], sizes["weights"], sizes["activations"], sizes["runtime"], megabytes(plan.memory.total))
    return (option.name, budget, slots, *memory, f"{plan.fill:.0%}", *speed)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text as lines of columns: the first to the left, the rest to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return ["  ".join(row) for row in padded]


def memory_items(memory: Memory) -> tuple[tuple[str, int], ...]:
    """The memory of a plan in the few items that people ask for."""
    return (
        ("runtime", memory.runtime),
        ("weights", memory.weights),
        ("activations", memory.activations + memory.logits + memory.slack),
        ("KV cache", memory.pool),
    )


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def megabytes(size: float) -> str:
    """Bytes for people: powers of ten, as the limits are given."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
