"""Everything the terminal shows. Reads counters; what is not an answer itself goes to standard error.

On a terminal the progress is live; elsewhere it is a plain line now and then. Text from files is never markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bmx.errors import OutputError
from bmx.periodic import periodically
from bmx.terminal.tables import (
    CALIBRATION_COLUMNS,
    SCENARIO_COLUMNS,
    aligned,
    candidate_row,
    candidate_words,
    counted,
    duration,
    megabytes,
    memory_items,
    scenario_row,
)
from bmx.units import now

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console, Group

    from bmx.plan.planner import Length, Plan
    from bmx.plan.scenarios import PlanQuery, Scenario
    from bmx.request import Result
    from bmx.stats import Stats

PLAIN_SECONDS, SELDOM_SECONDS = 10.0, 60.0  # between lines off a terminal, at first and later
OFTEN_UNTIL = 120.0
QUIET_SECONDS = 30.0  # without a finished row, from which that is said
REFRESH_PER_SECOND = 2.0


class Display:
    """The terminal of a run.

    Args:
        progress: ``auto``, ``rich``, ``plain`` or ``none``.
        quiet: say nothing unless something failed.
        log_format: ``text``, or ``json``: each line an object with time, level and message.
    """

    def __init__(self, progress: str = "auto", *, quiet: bool = False, log_format: str = "text") -> None:
        live = progress == "rich" or (progress == "auto" and sys.stderr is not None and sys.stderr.isatty())
        self._json = log_format == "json"
        self._mode = "none" if progress == "none" or quiet else "rich" if live and not self._json else "plain"
        self._live = live and not self._json
        self._dead = sys.stderr is None
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

    def note(self, text: str, **numbers: Any) -> None:
        """A line for people; nothing if they asked for quiet. ``numbers`` are for programs that read the log."""
        if self._mode != "none":
            self._print(text, "info", numbers)

    def warn(self, text: str) -> None:
        """Something that a person should look at and that does not stop the run."""
        self._print(f"warning: {text}", "warning")

    def error(self, message: str, hint: str | None = None) -> None:
        """What went wrong, and what to do: shown whatever was asked for."""
        if self._json:
            self._print(message, "error", {"hint": hint})
            return
        self._print(f"error: {message}", "error")
        if hint:
            self._print(f"hint: {hint}", "error")

    def _print(self, text: str, level: str, numbers: Mapping[str, Any] | None = None) -> None:
        """A full log disk or a closed terminal must not stop the results: from then on, silence."""
        if self._dead:
            return
        text = printable(text)
        try:
            if self._live:
                self._console.print(text)
            elif self._json:
                line = {"time": now(), "level": level, "message": text, **(numbers or {})}
                self._line(json.dumps(line, allow_nan=False))
            else:
                self._line(f"{now()} {text}")
        except (OSError, ValueError):
            self._dead = True

    def _line(self, text: str) -> None:
        stream = sys.stderr
        stream.write(
            text.encode(stream.encoding or "utf-8", "backslashreplace").decode(stream.encoding or "utf-8") + "\n"
        )
        stream.flush()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something that takes a while and has no measure."""
        if self._mode != "rich":
            self.note(f"{what} ...")
            yield
            return
        from rich.text import Text

        with self._console.status(Text(printable(what))):
            yield

    def plan(self, model: Mapping[str, Any], plan: Plan, lengths: Sequence[Length], rows: int, every: int) -> None:
        """What was decided, with the sum that says why it fits.

        Args:
            model: what computes.
            rows: that are to be answered; every so many-th of them was measured.
        """
        tokens = every * sum(length.prompt_tokens for length in lengths)
        groups = " + ".join(f"{group.slots} x {group.capacity:,}" for group in plan.groups)
        spare = "".join(f"; {part.slots} x {part.capacity:,} for text that prompts share" for part in plan.prefix_slots)
        count = f"{len(lengths):,} prompts of {tokens:,} tokens in all"
        if every > 1:
            count = f"{rows:,} rows of about {tokens:,} prompt tokens in all (one in {every} was measured)"
        self.note(f"{model['architecture']}, {count}, attention: {model['attention']}")
        self.note(
            f"slots: {plan.slots} at once ({groups} KV pairs, {plan.fill:.0%} of them used{spare}), "
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
        def seconds() -> float:
            return PLAIN_SECONDS if stats.elapsed < OFTEN_UNTIL else SELDOM_SECONDS

        def show() -> None:
            self.note(status_line(stats), rows_done=stats.rows_before + stats.rows_done, rows_total=stats.rows_total)

        with periodically(seconds, show):
            yield

    def row(self, result: Result) -> None:
        """A finished row: who, how long, and how it ended; never what it says."""
        name = repr(result.id)[:80]
        if result.error:
            self.note(f"row {name}: {result.error.code}")
        elif result.usage:
            tokens = f"{result.usage.prompt_tokens:,} prompt tokens, {result.usage.completion_tokens:,} generated"
            self.note(f"row {name}: {tokens}, {result.finish_reason}")

    def nothing_left(self, stats: Stats, errors: Path | None) -> None:
        """Why a run ends before it begins."""
        if not stats.rows_total:
            self.note("the input has no rows")
            return
        self.note(f"nothing to do: all rows have their records already ({stats.rows_total:,})")
        self._failures(stats, errors)

    def summary(self, stats: Stats, plan: Plan, output: Path | None, errors: Path | None) -> None:
        """What a finished run did."""
        before = f" ({stats.rows_before:,} had their records before)" if stats.rows_before else ""
        skipped = f", {stats.rows_skipped:,} skipped" if stats.rows_skipped else ""
        failed = f", {stats.rows_failed:,} failed" if stats.rows_failed else ""
        self.note(
            f"done: {stats.rows_answered:,} of {stats.rows_total:,} rows answered{skipped}{failed} "
            f"in {duration(stats.elapsed)}{before}"
        )
        reused = f", {stats.reused_prompt_tokens:,} more reused" if stats.reused_prompt_tokens else ""
        self.note(
            f"prefill {stats.prefill_rate:,.0f} tok/s ({stats.prompt_tokens:,} tokens{reused}), "
            f"decode {stats.decode_rate:,.0f} tok/s ({stats.generated_tokens:,} generated)"
        )
        full = stats.full_cache_peak_bytes
        share = (
            f", {stats.kv_bytes / full:.0%} of the {megabytes(full)} that full caches would have taken" if full else ""
        )
        self.note(f"KV cache {megabytes(stats.kv_bytes)} in {stats.slots} slots{share}")
        planned, seen = plan.memory.total, stats.peak_memory_bytes
        if seen:
            self.note(f"memory planned {megabytes(planned)}, most seen {megabytes(seen)} ({seen / planned - 1:+.1%})")
        if stats.shrunk_to:
            slots, tokens = stats.shrunk_to[-1]
            times = len(stats.shrunk_to)
            self.note(f"memory ran out {times} times: went on with {slots} slots, {tokens} tokens a step")
        if stats.eager:
            self.note(f"decoding was not replayed from CUDA graphs, but launched step by step: {stats.eager}")
        self._failures(stats, errors)
        if output:
            self.note(f"answers are in {output}")

    def _failures(self, stats: Stats, errors: Path | None) -> None:
        """One line for all failed rows, however many: what went wrong is in the error file, row by row."""
        if stats.rows_failed:
            codes = ", ".join(f"{count:,} {code}" for code, count in stats.errors.most_common())
            where = f"; see {errors}" if errors else ""
            self._print(
                f"{counted(stats.rows_failed, 'row')} failed: {codes}{where}", "warning", {"errors": dict(stats.errors)}
            )

    def data(self, text: str) -> None:
        """A line of the answer itself, on standard output.

        Raises:
            OutputError: the disk is full.
        """
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write standard output: {error.strerror}") from None

    def options(self, question: PlanQuery, options: Sequence[Scenario]) -> None:
        """A table of what fits, on standard output."""
        machine, lengths = question.machine, question.lengths
        tokens = question.every * sum(length.prompt_tokens for length in lengths)
        sampled = f" (one in {question.every} measured)" if question.every > 1 else ""
        self.data(f"{question.spec.name}: {question.rows:,} prompts{sampled}, {tokens:,} tokens in all")
        made = [option.plan for option in options if option.plan]
        memory, limit = machine.memory, made[0].limits if made else None
        allowed = f"{megabytes(limit.total)} may be used ({limit.source})" if limit else f"free by {memory.source}"
        self.data(f"on {machine.name}, {megabytes(memory.free)} free: {allowed}")
        rates = machine.rates()
        if rates:
            self.data(f"at {rates.flops / 1e12:,.2f} TFLOP/s and {rates.bandwidth / 1e9:,.0f} GB/s ({rates.source})")
        self.data("")
        for line in aligned([SCENARIO_COLUMNS, *map(scenario_row, options)]):
            self.data(line)
        self.data("")
        for option in options:
            if option.problem:
                self.data(f"{option.name}: {option.problem.message}")

    def calibration(self, record: Mapping[str, Any], path: Path) -> None:
        """A table of what was measured, and what is recommended, on standard output."""
        full = record["full_cache"]
        self.data(f"{record['model']}: {full['rows']} prompts, against the full cache")
        rows = [candidate_row("full cache", full), *(candidate_row(None, one) for one in record["candidates"])]
        for line in aligned([CALIBRATION_COLUMNS, *rows]):
            self.data(line)
        halting = record["halting_test"]
        self.data(
            f"halting test: {halting['budget']:,} pairs a layer, on average, keep all but {halting['tolerance']:.0%} "
            "of the last query's attention (DBudgetKV)"
        )
        if record["recommended"] is None:
            best = max((one["top1_agreement"] for one in record["candidates"]), default=0.0)
            self.data(f"recommended: nothing; {record['min_agreement']:.0%} was asked for, {best:.1%} is the best")
            return
        words = candidate_words(record["recommended"])
        self.data(f"recommended: {words}, the least memory that holds {record['min_agreement']:.0%}")
        self.data(f"use it: bmx run ... --kv-budget auto --calibration {path}")

    def rehearsal(self, measured: Mapping[str, int]) -> None:
        """What the largest step took, against what was predicted, on standard output."""
        before, planned, seen = (measured[f"{name}_bytes"] for name in ("before_loading", "predicted", "measured"))
        self.data(f"the largest step, slots left out: {megabytes(seen)} measured")
        self.data(f"  {megabytes(before)} predicted from the config alone: {before / seen - 1:+.1%}")
        self.data(f"  {megabytes(planned)} predicted once the weights were loaded: {planned / seen - 1:+.1%}")


def status_line(stats: Stats) -> str:
    """The counters in a line."""
    left, quiet = stats.seconds_left, stats.quiet_seconds
    return (
        f"{stats.rows_before + stats.rows_done:,}/{stats.rows_total:,} rows"
        + (f" ({stats.rows_failed:,} failed)" if stats.rows_failed else "")
        + f", prompt {stats.prefill_rate:,.0f} tok/s, generated {stats.decode_rate:,.0f} tok/s"
        + f", {stats.active_slots}/{stats.slots} slots, memory {megabytes(stats.memory_bytes)}"
        + f", {duration(stats.elapsed)} gone"
        + (f", about {duration(left)} left" if left is not None else "")
        + (f", no row finished for {duration(quiet)}" if quiet >= QUIET_SECONDS else "")
    )


def _panel(stats: Stats) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    bar = ProgressBar(total=max(1, stats.work_total), completed=min(stats.work_done, stats.work_total), width=60)
    return Group(bar, Text(status_line(stats)))


def printable(text: str) -> str:
    """Text that does nothing to a terminal: control characters as escapes, line breaks too."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
