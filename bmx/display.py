"""Everything the terminal shows. Reads counters; what is not an answer itself goes to standard error.

On a terminal the progress is live; elsewhere it is a plain line now and then. Text from files is never markup.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bmx import hardware

if TYPE_CHECKING:
    from rich.console import Console, Group

    from bmx.kernels import Kernels
    from bmx.model.spec import ModelSpec
    from bmx.options import Option, Question
    from bmx.planner import Length, Memory, Plan
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

    def plan(
        self, spec: ModelSpec, kernels: Kernels, plan: Plan, lengths: Sequence[Length], rows: int, every: int
    ) -> None:
        """What was decided, with the sum that says why it fits.

        Args:
            rows: of the input; every so many-th of them was measured.
        """
        tokens = every * sum(length.prompt_tokens for length in lengths)
        groups = " + ".join(f"{group.slots} x {group.capacity:,}" for group in plan.groups)
        count = f"{len(lengths):,} prompts of {tokens:,} tokens in all"
        if every > 1:
            count = f"{rows:,} rows of about {tokens:,} prompt tokens in all (every {every}th was measured)"
        self.note(f"{spec.name}, {count}, attention: {kernels.name}")
        self.note(
            f"slots: {plan.slots} at once ({groups} KV pairs, {plan.fill:.0%} of them used), "
            f"chunks of {plan.step.chunk_size}, up to {plan.step.max_num_batched_tokens:,} tokens a step"
        )
        if plan.too_large:
            self.note(f"{plan.too_large * every:,} rows need more memory than may be used and will be errors")
        items = " + ".join(f"{name} {megabytes(size)}" for name, size in memory_items(plan.memory))
        total = f"{megabytes(plan.memory.total)} of {megabytes(plan.limits.total)} ({plan.limits.source})"
        self.note(f"memory: {items} = {total}")

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

    def summary(self, stats: Stats, plan: Plan, output: str | None) -> None:
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
        planned, seen = plan.memory.total, stats.peak_memory_bytes
        self.note(f"memory planned {megabytes(planned)}, most seen {megabytes(seen)} ({seen / planned - 1:+.1%})")
        if stats.shrunk_to:
            slots, tokens = stats.shrunk_to[-1]
            times = len(stats.shrunk_to)
            self.note(f"memory ran out {times} times: went on with {slots} slots, {tokens} tokens a step")
        if output:
            self.note(f"answers are in {output}")

    def data(self, text: str) -> None:
        """A line of the answer itself, on standard output."""
        sys.stdout.write(text + "\n")

    def options(self, question: Question, options: Sequence[Option]) -> None:
        """A table of what fits, on standard output."""
        machine, lengths = question.machine, question.lengths
        tokens = question.every * sum(length.prompt_tokens for length in lengths)
        sampled = f" (every {question.every}th measured)" if question.every > 1 else ""
        self.data(f"{question.spec.name}: {question.rows:,} prompts{sampled}, {tokens:,} tokens in all")
        made = [option.plan for option in options if option.plan]
        memory, limit = machine.memory, made[0].limits if made else None
        allowed = f"{megabytes(limit.total)} may be used ({limit.source})" if limit else f"free by {memory.source}"
        self.data(f"on {machine.name}, {megabytes(memory.free)} free: {allowed}")
        rates = machine.rates()
        if rates:
            self.data(f"at {rates.flops / 1e12:,.2f} TFLOP/s and {rates.bandwidth / 1e9:,.0f} GB/s ({rates.source})")
        self.data("")
        for line in aligned([OPTION_COLUMNS, *map(_option_row, options)]):
            self.data(line)
        self.data("")
        for option in options:
            if option.problem:
                self.data(f"{option.name}: {option.problem.message}")

    def rehearsal(self, measured: Mapping[str, int]) -> None:
        """What the largest step took, against what was predicted, on standard output."""
        before, planned, seen = (measured[f"{name}_bytes"] for name in ("before_loading", "predicted", "measured"))
        self.data(f"the largest step, slots left out: {megabytes(seen)} measured")
        self.data(f"  {megabytes(before)} predicted from the config alone: {before / seen - 1:+.1%}")
        self.data(f"  {megabytes(planned)} predicted once the weights were loaded: {planned / seen - 1:+.1%}")

    def error(self, message: str, hint: str | None = None) -> None:
        """What went wrong, and what to do: shown whatever was asked for."""
        self._print(f"error: {message}" + (f"\nhint: {hint}" if hint else ""))


OPTION_COLUMNS = (
    "cache", "budget", "slots", "KV cache", "weights", "activations", "runtime", "total", "KV used",
    "prefill tok/s", "decode tok/s", "time",
)  # fmt: skip


def _option_row(option: Option) -> tuple[str, ...]:
    budget = f"{option.budget:,}" if option.budget else "-"
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
    rows += [("gpu (NVML)", _gpu(gpu)) for gpu in hardware.gpus()]
    if torch.cuda.is_available():
        rows.append(("gpu (CUDA)", f"{torch.cuda.get_device_name()}, {_free(hardware.free_gpu_memory())}"))
    chosen = kernels.choose("cuda" if torch.cuda.is_available() else "cpu")
    rows.append(("attention", f"{chosen.name}: {chosen.why}"))
    rows.append(("demo model", _demo()))
    return rows


def _free(memory: Any) -> str:
    return f"{megabytes(memory.free)} free of {megabytes(memory.total)} ({memory.source})"


def _gpu(gpu: hardware.Gpu) -> str:
    if gpu.mig:
        memory = "cut into MIG slices"
    elif gpu.unified:
        memory = "uses the host's memory"
    elif gpu.free is None or gpu.total is None:
        memory = "NVML may not say what is free"
    else:
        memory = f"{megabytes(gpu.free)} free of {megabytes(gpu.total)}"
    others = hardware.holders(gpu)
    return f"{gpu.name} at {gpu.pci or '?'}, {memory}" + (f"; {others}" if others else "")


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
