"""Everything the terminal shows. Reads counters, writes to standard error; knows nothing of how rows are answered.

On a terminal the progress is live; elsewhere it is a plain line now and then. Text from files is never markup.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bmx import hardware

if TYPE_CHECKING:
    from rich.console import Console, Group

    from bmx.engine.engine import Length
    from bmx.kernels import Kernels
    from bmx.model.spec import ModelSpec
    from bmx.planner import Plan
    from bmx.stats import Stats

PLAIN_SECONDS = 10.0
REFRESH_PER_SECOND = 2.0


class Display:
    """The terminal of a run.

    Args:
        progress: ``auto``, ``rich``, ``plain`` or ``none``.
    """

    def __init__(self, progress: str = "auto") -> None:
        live = progress == "rich" or (progress == "auto" and sys.stderr.isatty())
        self._mode = "none" if progress == "none" else "rich" if live else "plain"
        self._console_made: Console | None = None

    @property
    def _console(self) -> Console:
        from rich.console import Console

        if self._console_made is None:
            force = True if self._mode == "rich" else None
            self._console_made = Console(
                stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True, force_terminal=force
            )
        return self._console_made

    def note(self, text: str) -> None:
        """One line for people; nothing if they asked for quiet."""
        if self._mode != "none":
            self._print(text)

    def _print(self, text: str) -> None:
        """A full log disk or a closed terminal must not stop the results: from then on, silence."""
        try:
            self._console.print(text)
        except OSError:
            self._mode = "none"

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something that takes a while and has no measure."""
        if self._mode != "rich":
            self.note(f"{what} ...")
            yield
            return
        with self._console.status(what):
            yield

    def plan(self, spec: ModelSpec, kernels: Kernels, plan: Plan, lengths: Sequence[Length]) -> None:
        """What was decided, with the sum that says why it fits."""
        memory, tokens = plan.memory, sum(length.prompt_tokens for length in lengths)
        groups = " + ".join(f"{group.slots} x {group.capacity:,}" for group in plan.groups)
        self.note(f"{spec.name}, {len(lengths):,} prompts of {tokens:,} tokens in all, attention: {kernels.name}")
        self.note(f"slots: {plan.slots} at once ({groups} KV pairs), chunks of {plan.chunk_size}")
        if plan.too_large:
            self.note(f"{plan.too_large:,} rows need more memory than may be used and will be errors")
        items = (
            ("runtime", memory.runtime),
            ("weights", memory.weights),
            ("activations", memory.activations + memory.logits + memory.slack),
            ("KV cache", memory.pool),
        )
        total = " + ".join(f"{name} {megabytes(size)}" for name, size in items)
        self.note(
            f"memory: {total} = {megabytes(memory.total)} of {megabytes(plan.limits.total)} ({plan.limits.source})"
        )

    @contextmanager
    def live(self, stats: Stats) -> Iterator[None]:
        """Show the counters while the body runs."""
        if self._mode == "rich":
            with self._rich(stats):
                yield
        elif self._mode == "plain":
            with self._plain(stats):
                yield
        else:
            yield

    @contextmanager
    def _rich(self, stats: Stats) -> Iterator[None]:
        from rich.live import Live

        with Live(
            console=self._console,
            get_renderable=lambda: _panel(stats),
            refresh_per_second=REFRESH_PER_SECOND,
            transient=True,
        ):
            yield

    @contextmanager
    def _plain(self, stats: Stats) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            while not done.wait(PLAIN_SECONDS):
                self.note(status_line(stats))

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def summary(self, stats: Stats, output: str | None) -> None:
        """What a finished run did."""
        done = stats.rows_done - stats.rows_failed
        failed = f", {stats.rows_failed:,} failed" if stats.rows_failed else ""
        self.note(f"done: {done:,} of {stats.rows_done:,} rows answered{failed} in {duration(stats.elapsed)}")
        self.note(
            f"prefill {stats.prefill_rate:,.0f} tok/s ({stats.prompt_tokens:,} tokens), "
            f"decode {stats.decode_rate:,.0f} tok/s ({stats.generated_tokens:,} generated)"
        )
        full = stats.full_cache_peak_bytes
        share = (
            f", {stats.kv_bytes / full:.0%} of the {megabytes(full)} that full caches would have taken" if full else ""
        )
        self.note(f"KV cache {megabytes(stats.kv_bytes)} in {stats.slots} slots{share}")
        if output:
            self.note(f"answers are in {output}")

    def error(self, message: str, hint: str | None = None) -> None:
        """What went wrong, and what to do: shown whatever was asked for."""
        self._print(f"error: {message}" + (f"\nhint: {hint}" if hint else ""))


def status_line(stats: Stats) -> str:
    """The counters in a line."""
    left = stats.seconds_left
    return (
        f"{stats.rows_done:,}/{stats.rows_total:,} rows"
        + (f" ({stats.rows_failed:,} failed)" if stats.rows_failed else "")
        + f", prompt {stats.prefill_rate:,.0f} tok/s, generated {stats.decode_rate:,.0f} tok/s"
        + f", {stats.active_slots}/{stats.slots} slots, memory {megabytes(stats.memory_bytes)}"
        + f", {duration(stats.elapsed)} gone"
        + (f", about {duration(left)} left" if left is not None else "")
    )


def _panel(stats: Stats) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar = ProgressBar(total=max(1, stats.work_total), completed=min(stats.work_done, stats.work_total), width=60)
    return Group(bar, Text(status_line(stats)))


def environment() -> list[tuple[str, str]]:
    """What a bug report needs: versions, devices, memory, kernels and why."""
    from importlib.metadata import PackageNotFoundError, version
    from platform import platform, python_version

    import torch

    import bmx
    from bmx import kernels

    rows = [("bmx", bmx.__version__), ("python", f"{python_version()} on {platform()}")]
    for package in ("torch", "transformers", "tokenizers", "accelerate", "gguf", "triton", "nvidia-ml-py", "jsonlines"):
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            rows.append((package, "not installed"))
    bf16 = "bfloat16 in hardware" if hardware.fast_bfloat16_cpu() else "no bfloat16 in hardware"
    rows.append(("cpu", f"{hardware.cpu_name()}, {hardware.usable_cores()} cores, {bf16}"))
    rows.append(("memory", _free(hardware.free_host_memory())))
    rows += [
        ("gpu (NVML)", f"{gpu.name}, {megabytes(gpu.free)} free of {megabytes(gpu.total)}") for gpu in hardware.gpus()
    ]
    if torch.cuda.is_available():
        rows.append(("gpu (CUDA)", f"{torch.cuda.get_device_name()}, {_free(hardware.free_gpu_memory())}"))
    chosen = kernels.choose("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(("attention", f"{chosen.name}: {chosen.why}"))
    rows.append(("demo model", _demo()))
    return rows


def _free(memory: Any) -> str:
    return f"{megabytes(memory.free)} free of {megabytes(memory.total)} ({memory.source})"


def _demo() -> str:
    from bmx.errors import ModelError
    from bmx.model.demo import demo_model_path

    try:
        return demo_model_path().name
    except ModelError as error:
        return f"not installed: {error.hint}"


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
