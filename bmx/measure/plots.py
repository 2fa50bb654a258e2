"""Plots from saved measurements, drawn by matplotlib where it is installed.

Knows the measurements' files; measures nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bmx.terminal.tables import BENCH_NAMES, budget_text, candidate_words

MARKERS = {"auto": "o", "fp8": "^", "int8": "s", "int4": "D"}


def plot_calibration(record: dict[str, Any], beside: Path) -> list[Path]:
    """Agreement against memory, a line per policy, as PNG and SVG beside a calibration's file.

    Returns:
        The files; none if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    figure, axes = _canvas()
    for number, (name, points) in enumerate(_lines(record).items()):
        points.sort(key=lambda one: one["kv_bytes_per_sequence"])
        sizes = [one["kv_bytes_per_sequence"] / 1e6 for one in points]
        shares = [100 * one["top1_agreement"] for one in points]
        errors = [100 * one["top1_standard_error"] for one in points]
        marker = MARKERS[points[0]["settings"]["kv_format"]]
        axes.errorbar(sizes, shares, errors, label=name, marker=marker, capsize=2, color=f"C{number % 10}")
    full = record["full_cache"]["kv_bytes_per_sequence"] / 1e6
    axes.axvline(full, color="0.6", linestyle=":", label="full cache")
    axes.axhline(100 * record["min_agreement"], color="0.6", linestyle="--", label="asked for")
    axes.set_xlabel("memory of a sequence's KV cache (MB, mean)")
    axes.set_ylabel("next tokens equal to the full cache's (%)")
    axes.set_title(f"{record['model']}: {record['full_cache']['rows']} prompts")
    axes.set_xscale("log")
    axes.legend(fontsize="small")
    return _saved(figure, beside)


def plot_bench(record: dict[str, Any], beside: Path) -> list[Path]:
    """Generated tokens a second, a group of bars per cell, as PNG and SVG beside a bench's file.

    Returns:
        The files; none if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    figure, axes = _canvas()
    cells, width = record["cells"], 0.8 / len(BENCH_NAMES)
    for number, (side, name) in enumerate(BENCH_NAMES.items()):
        label = f"{name} (upper bound)" if side == "decode_only" else name
        heights = [cell[side].get("generated_tokens_per_second", 0.0) for cell in cells]
        places = [place + (number - 1) * width for place in range(len(cells))]
        bars = axes.bar(places, heights, width, label=label, color=f"C{number}")
    over = [cell["ratios"]["decode_only"] for cell in cells]
    axes.bar_label(bars, [f"{ratio:.2f} x" if ratio else "" for ratio in over], fontsize="small", padding=2)
    names = [f"{cell['input_tokens']:,.0f} in\n{cell['output_tokens']:,} out" for cell in cells]
    axes.set_xticks(range(len(cells)), names)
    axes.set_ylabel("generated tokens a second")
    axes.set_title(f"{record['model']['name']}; above batch-max: times decode-only")
    axes.legend(fontsize="small")
    return _saved(figure, beside)


def _canvas() -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _saved(figure: Any, beside: Path) -> list[Path]:
    paths = [beside.with_suffix(f".{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _lines(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Candidates that differ in their budgets alone, together."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for one in record["candidates"]:
        settings = one["settings"]
        words = candidate_words(settings).replace(f" {budget_text(settings['kv_budget'])}", "", 1)
        lines.setdefault(words, []).append(one)
    return lines
