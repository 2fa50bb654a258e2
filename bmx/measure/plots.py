"""Plots of saved measurements, drawn by matplotlib if it is installed.

Knows the records of calibrations and benches; measures nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bmx.errors import UsageError
from bmx.terminal.tables import BENCH_NAMES, budget_text, candidate_words, counted

MARKERS = {"model": "o", "fp8": "^", "int8": "s", "int8/int4": "P", "int4": "D"}  # by KV format
OTHER_MARKER = "x"
METADATA = ("Software", "Creator")  # the entries of PNG and SVG files that name the program
DRAWN_BY = "bmx, a plot of measurements"
CHOOSE_ANOTHER = "move it away, or name another file with -o"
BEGINNING = 2000  # bytes in which a plot says who has drawn it


def plot_calibration(record: dict[str, Any], beside: Path) -> list[Path]:
    """Plot agreement against bytes: a line for each group of candidates that differ in budgets alone, and the frontier.

    Args:
        record: the calibration's.
        beside: the calibration's file; the plots are PNG and SVG files of the same name.

    Returns:
        The files; none if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    figure, axes = _canvas()
    full = record["full_cache"]["kv_bytes_per_sequence"] or 1
    candidates = sorted(record["candidates"], key=lambda candidate: float(candidate["kv_bytes_per_sequence"]))
    points = [_point(candidate, full) for candidate in candidates if candidate.get("on_frontier")]
    axes.plot(*zip(*points, (100.0, 100.0), strict=True), color="0.85", linewidth=6, label="best at its bytes")
    for number, (name, group) in enumerate(_lines(candidates).items()):
        sizes, shares = zip(*(_point(candidate, full) for candidate in group), strict=True)
        errors = [100 * candidate["top1_standard_error"] for candidate in group]
        marker = MARKERS.get(group[0]["settings"]["kv_format"], OTHER_MARKER)
        axes.errorbar(sizes, shares, errors, label=name, marker=marker, capsize=2, color=f"C{number % 10}")
    for candidate in candidates:
        if candidate["settings"] == record["recommended"]:
            _label(axes, _point(candidate, full), f"recommended: {candidate_words(candidate['settings'])}")
    axes.plot(100.0, 100.0, marker="*", markersize=12, color="0.4", linestyle="none", label="full cache")
    axes.axhline(100 * record["min_agreement"], color="0.6", linestyle="--", label="least agreement")
    axes.set_xlabel("bytes of a row's KV cache (% of the full cache's, mean)")
    axes.set_ylabel("next tokens equal to the full cache's (%)")
    axes.set_title(f"{record['model']}: {counted(record['full_cache']['rows'], 'prompt')}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="small", loc="lower right")
    return _saved(figure, beside)


def _point(candidate: dict[str, Any], full: int) -> tuple[float, float]:
    """Bytes in percent of the full cache's, and agreement in percent."""
    return 100 * candidate["kv_bytes_per_sequence"] / full, 100 * candidate["top1_agreement"]


def _label(axes: Any, point: tuple[float, float], text: str) -> None:
    """A ring around a point, and a text beside it."""
    axes.plot(*point, marker="o", markersize=14, markerfacecolor="none", markeredgecolor="black", linestyle="none")
    arrow = {"arrowstyle": "-", "color": "black"}
    axes.annotate(text, point, (0.02, 0.94), textcoords="axes fraction", arrowprops=arrow, fontsize="small")


def plot_bench(record: dict[str, Any], beside: Path) -> list[Path]:
    """Plot generated tokens a second, with a group of bars for each cell.

    Args:
        record: the bench's.
        beside: the bench's file; the plots are PNG and SVG files of the same name.

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
    ratios = [cell["ratios"]["decode_only"] for cell in cells]
    axes.bar_label(bars, [f"{ratio:.2f} x" if ratio else "" for ratio in ratios], fontsize="small", padding=2)
    names = [f"{cell['input_tokens']:,.0f} in\n{cell['output_tokens']:,} out" for cell in cells]
    axes.set_xticks(range(len(cells)), names)
    axes.set_ylabel("generated tokens a second")
    axes.set_title(f"{record['model']['name']}; above batch-max: times decode-only")
    axes.legend(fontsize="small")
    return _saved(figure, beside)


def plots_note(files: list[Path]) -> str:
    """Says which plots were drawn, or how to get them drawn."""
    return f"plots: {', '.join(map(str, files))}" if files else "no plots were drawn: pip install matplotlib"


def plot_paths(beside: Path) -> list[Path]:
    """The PNG and the SVG file that plots of a file of measurements are drawn to."""
    return [beside.with_suffix(f".{kind}") for kind in ("png", "svg")]


def check_plots(beside: Path) -> None:
    """Refuse to draw plots over files that are not plots of bmx.

    Args:
        beside: the file of the measurements.

    Raises:
        UsageError: names the file.
    """
    for path in plot_paths(beside) if find_spec("matplotlib") else ():
        if not is_plot(path):
            raise UsageError(f"{path} exists, and a plot would replace it", hint=CHOOSE_ANOTHER)


def is_plot(path: Path) -> bool:
    """Whether a file may be replaced by a plot: it is missing, empty, or was drawn by bmx."""
    if not path.exists():
        return True
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(BEGINNING)
    return not beginning or DRAWN_BY.encode() in beginning


def _canvas() -> tuple[Any, Any]:
    """A figure with one pair of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _saved(figure: Any, beside: Path) -> list[Path]:
    paths = plot_paths(beside)
    for path, name in zip(paths, METADATA, strict=True):
        figure.savefig(path, dpi=150, metadata={name: DRAWN_BY})
    return paths


def _lines(candidates: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Candidates grouped by their names without the budget."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for candidate in candidates:
        settings = candidate["settings"]
        name = candidate_words(settings).replace(f" {budget_text(settings['kv_budget'])}", "", 1)
        lines.setdefault(name, []).append(candidate)
    return lines
