"""Rows of tables, and numbers as people read them.

Knows plans, scenarios and measurements; prints nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmx.plan.memory import Memory
    from bmx.plan.scenarios import Scenario

CALIBRATION_COLUMNS = (
    "  cache", "KV of a row", "of full", "slots", "tok/s (predicted)", "top-1", "KL", "same answer", "ROUGE-L full",
    "ROUGE-L ref", "length",
)  # fmt: skip
BEST_MARK, RECOMMENDED_MARK = "*", ">"  # of candidates that nothing dominates, and of the recommended one
BENCH_COLUMNS = (
    "cache", "slots", "KV cache", "planned", "peak", "generated tok/s", "in+out tok/s", "prompts/min",
    "prefill tok/s", "MFU", "decode tok/s", "bandwidth", "batch-max is",
)  # fmt: skip
BENCH_NAMES = {"full_cache": "full cache", "decode_only": "decode-only", "batch_max": "batch-max"}
SCENARIO_COLUMNS = (
    "cache", "budget", "slots", "KV cache", "states", "weights", "activations", "runtime", "total", "KV used",
    "prefill tok/s", "decode tok/s", "generated tok/s", "time",
)  # fmt: skip


def budget_text(budget: float | str) -> str:
    """A budget for people, such as 1,024 (pairs) or 25% (of the prompt)."""
    return budget if isinstance(budget, str) else f"{budget:.0%}" if budget < 1 else f"{budget:,}"


def candidate_words(settings: Mapping[str, Any]) -> str:
    """The settings of a candidate in a few words."""
    words, weights = [settings["kv_policy"]], settings.get("quantization", "none")
    words += [] if weights == "none" else [f"{weights} weights"]
    if settings["kv_policy"] != "none":
        words.append(budget_text(settings["kv_budget"]))
    if settings["kv_format"] != "model":
        words.append(settings["kv_format"])
    if settings.get("kv_archive", "none") != "none":
        words.append(f"archive {settings['kv_archive']}")
    if settings.get("kv_recall", "all") != "all":
        every = f" every {settings['kv_recall_every']}" if settings["kv_recall_every"] > 1 else ""
        words.append(f"{settings['kv_recall_pairs']} by {settings['kv_recall']}{every}")
    if settings["kv_layer_budgets"] != "uniform":
        words.append("pyramid" if settings["kv_layer_budgets"] == "pyramid" else "measured layers")
    if settings.get("state_format", "float32") != "float32":
        words.append(f"{settings['state_format']} states")
    for name, word in (("kv_probe", "probe"), ("kv_value_norm", "value norm"), ("kv_share_layers", "shared layers")):
        words += [word] if settings[name] else []
    return " ".join(words)


def full_cache_row(full: Mapping[str, Any]) -> tuple[str, ...]:
    """The row of the full cache in a calibration's table."""
    return ("  full cache", *_candidate_sizes(full, full), *["-"] * (len(CALIBRATION_COLUMNS) - 5))


def candidate_row(measured: Mapping[str, Any], full: Mapping[str, Any], recommended: Any) -> tuple[str, ...]:
    """The row of a candidate in a calibration's table.

    Args:
        measured: the candidate, as the calibration file has it.
        full: the full cache.
        recommended: the settings that are recommended, or None.
    """
    mark = BEST_MARK if measured.get("on_frontier") else " "
    mark = RECOMMENDED_MARK if measured["settings"] == recommended else mark
    reference = measured.get("rouge_l_reference")
    return (
        f"{mark} {candidate_words(measured['settings'])}",
        *_candidate_sizes(measured, full),
        f"{measured['top1_agreement']:.1%} ± {measured['top1_standard_error']:.1%}",
        f"{measured['kl_divergence']:.3f}",
        f"{measured['exact_match']:.0%}",
        f"{measured['rouge_l_full_cache']:.3f}",
        "-" if reference is None else f"{reference:.3f} of {measured['rouge_l_reference_of_full_cache']:.3f}",
        f"{measured['length_ratio']:.2f}",
    )


def _candidate_sizes(measured: Mapping[str, Any], full: Mapping[str, Any]) -> tuple[str, ...]:
    size, speed = measured["kv_bytes_per_sequence"], measured.get("predicted_tokens_per_second")
    share = size / (full["kv_bytes_per_sequence"] or 1)
    return (f"{size / 1e6:,.2f} MB", f"{share:.1%}", f"{measured['slots']:,}", f"{speed:,.1f}" if speed else "-")


def bench_lines(cell: Mapping[str, Any]) -> list[str]:
    """One cell of a bench: its prompts, then a table of its sides."""
    tokens = counted(round(cell["input_tokens"]), "token")
    head = (
        f"{counted(cell['prompts'], 'prompt')} of {tokens}, {cell['output_tokens']:,} "
        f"generated for each, budget {budget_text(cell['kv_budget'])}; this machine: "
        f"{cell['flops_per_second'] / 1e12:,.3g} TFLOP/s, {cell['bytes_per_second'] / 1e9:,.3g} GB/s"
    )
    rows = [_bench_row(name, cell[side], cell["ratios"].get(side)) for side, name in BENCH_NAMES.items()]
    return [head, *aligned([BENCH_COLUMNS, *rows]), ""]


def _bench_row(name: str, side: Mapping[str, Any], ratio: float | None) -> tuple[str, ...]:
    if not side["fits"]:
        return (name, "does not fit", *["-"] * (len(BENCH_COLUMNS) - 2))
    name += " (as full cache)" if side["as_full_cache"] else ""
    sizes = tuple(megabytes(side[f"{what}_bytes"]) for what in ("kv", "planned", "peak"))
    rates = [side[f"{what}_per_second"] for what in ("generated_tokens", "tokens")] + [side["prompts_per_minute"]]
    speed = tuple(f"{rate:,.1f}" for rate in rates)
    phases = (
        _or_none(side["prefill_tokens_per_second"], ",.0f"),
        _or_none(side["mfu"], ".0%"),
        _or_none(side["decode_tokens_per_second"], ",.1f"),
        _or_none(side["bandwidth_share"], ".0%"),
    )
    return (name, f"{side['slots']:,}", *sizes, *speed, *phases, _times(ratio))


def bench_summary(record: Mapping[str, Any]) -> list[str]:
    """A bench in one line per cell, with the averages."""
    columns = ("in / out", "prompts", "budget", *(f"{name}, tok/s" for name in BENCH_NAMES.values()))
    rows = [
        (
            f"{cell['input_tokens']:,.0f} / {cell['output_tokens']:,}",
            f"{cell['prompts']:,}",
            budget_text(cell["kv_budget"]),
            *(_or_none(cell[side].get("generated_tokens_per_second"), ",.1f") for side in BENCH_NAMES),
            *(_times(cell["ratios"][side]) for side in ("full_cache", "decode_only")),
        )
        for cell in record["cells"]
    ]
    over = ("batch-max / full", "batch-max / decode-only")
    full, decode_only = (_times(record["mean_ratios"][side]) for side in ("full_cache", "decode_only"))
    mean = f"on average, batch-max is {decode_only} as fast as decode-only, and {full} as fast as the full cache"
    return [*aligned([(*columns, *over), *rows]), mean, record["decode_only"]]


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x"


def scenario_table(scenarios: Sequence[Scenario]) -> list[str]:
    """Scenarios as a table; states have a column where there are any."""
    rows = [SCENARIO_COLUMNS, *map(_scenario_row, scenarios)]
    if not any(scenario.plan and scenario.plan.memory.states for scenario in scenarios):
        at = SCENARIO_COLUMNS.index("states")
        rows = [(*row[:at], *row[at + 1 :]) for row in rows]
    return aligned(rows)


def _scenario_row(option: Scenario) -> tuple[str, ...]:
    budget = budget_text(option.budget) if option.budget else "-"
    if option.plan is None:
        return (option.name, budget, "0", *["-"] * (len(SCENARIO_COLUMNS) - 3))
    plan, forecast = option.plan, option.forecast
    sizes = {name: megabytes(size) for name, size in memory_items(plan.memory)}
    speed: tuple[str, ...] = ("-", "-", "-", "-")
    if forecast:
        rates = (forecast.prefill_rate, forecast.decode_rate, forecast.generated_rate)
        speed = (*(f"{rate:,.0f}" if rate else "-" for rate in rates), duration(forecast.seconds))
    slots = f"{plan.slots:,}" + (f" (not {counted(plan.too_large, 'row')})" if plan.too_large else "")
    memory = (sizes[name] for name in ("KV cache", "states", "weights", "activations", "runtime"))
    return (option.name, budget, slots, *memory, megabytes(plan.memory.total), f"{plan.fill:.0%}", *speed)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines; the first column is aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return ["  ".join(row) for row in padded]


def memory_items(memory: Memory) -> tuple[tuple[str, int], ...]:
    """The memory of a plan in five items."""
    return (
        ("runtime", memory.runtime + memory.window),
        ("weights", memory.weights),
        ("activations", memory.activations + memory.logits + memory.graphs + memory.slack),
        ("KV cache", memory.kv + memory.scores),
        ("states", memory.states),
    )


def counted(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def megabytes(size: float) -> str:
    """Bytes for people, in powers of ten like the limits."""
    if size < 1e6:
        return f"{size / 1e3:,.0f} kB"
    return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Seconds for people, such as ``12 s`` or ``3 min 05 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
