"""What is said about plans, runs and measurements, as lines of text.

Knows plans, counters, scenarios and records of measurements; prints nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bmx.terminal.tables import (
    BEST_MARK,
    CALIBRATION_COLUMNS,
    RECOMMENDED_MARK,
    aligned,
    budget_text,
    candidate_row,
    candidate_words,
    counted,
    duration,
    full_cache_row,
    megabytes,
    memory_items,
    scenario_table,
)

if TYPE_CHECKING:
    from pathlib import Path

    from bmx.compress.budgets import Budget
    from bmx.plan.memory import SlotGroup
    from bmx.plan.planner import Length, Plan
    from bmx.plan.scenarios import PlanQuery, Scenario
    from bmx.request import Result
    from bmx.stats import Stats

ENDED_EARLY = {  # reasons of answers that are not whole, and what each means
    "length": "cut by max_tokens, or by the model's own length",
    "repetition": "ended for repeating one stretch of tokens",
}


class Line(NamedTuple):
    """A line for people.

    Attributes:
        text: what it says.
        level: ``info``, or ``warning`` for what ``--quiet`` does not silence.
        numbers: for programs that read the log.
    """

    text: str
    level: str = "info"
    numbers: Mapping[str, Any] | None = None


def plan_lines(
    model: Mapping[str, Any], plan: Plan, lengths: Sequence[Length], rows: int, every: int, budget: Budget | None
) -> Iterator[Line]:
    """What was decided, with the sum that says why it fits.

    Args:
        model: what computes the answers, as ``Engine.describe`` says it.
        plan: the decision.
        lengths: those of the measured prompts.
        rows: number of rows to answer.
        every: one in this many rows was measured.
        budget: how many pairs a sequence may keep; None for all.
    """
    tokens = every * sum(length.prompt_tokens for length in lengths)
    count = f"{counted(len(lengths), 'prompt')} of {counted(tokens, 'token')} in all"
    if every > 1:
        count = f"{rows:,} rows of about {tokens:,} prompt tokens in all (one in {every} was measured)"
    yield Line(f"{model['architecture']}, {count}, attention: {model['attention']}")
    if devices := model.get("tensor_parallel_size"):
        yield Line(f"split over {devices} devices: what follows of memory is that of each")
    if budget and budget.of_bytes:
        share, pairs = f"{100 * budget.of_bytes:g}%", f"{min(1.0, budget.share or 0.0):.1%}"
        yield Line(f"budget: {share} of the full cache's bytes hold {pairs} of each prompt's KV pairs")
    form = plan.layouts[0].format
    stored = "" if form == "model" else f" in {form}"
    if plan.reading:
        stored = f", archived{stored}"
    prefixes = f", {plan_range(plan.prefix_slots)} for shared text" if plan.prefix_slots else ""
    yield Line(
        f"slots: {plan_range(plan.groups)}{stored} ({plan.fill:.0%} of them used){prefixes}{_read_in(plan)}; "
        f"steps of up to {counted(plan.step.max_num_batched_tokens, 'token')}, chunks of {plan.step.chunk_size:,}"
    )
    if plan.shared_slots:
        yield Line(_read_in_place(plan))
    if plan.too_large:
        rows_too_large = counted(plan.too_large * every, "row")
        yield Line(f"{rows_too_large} of the input would need more memory than may be used, and will be errors")
    items = " + ".join(f"{name} {megabytes(size)}" for name, size in memory_items(plan.memory) if size)
    total = f"{megabytes(plan.memory.total)} of {megabytes(plan.limits.total)} ({plan.limits.source})"
    yield Line(f"memory: {items} = {total}")
    if plan.memory.elsewhere:
        yield Line(f"archive: {_away(plan)}")


def _read_in_place(plan: Plan) -> str:
    """How many rows are read in shared slots, in a line."""
    shared = max(group.shared for group in plan.groups)
    of_all = max(group.capacity + group.shared for group in plan.groups if group.shared)
    slots = sum(group.slots for group in plan.shared_slots)
    return (
        f"shared text: up to {shared:,} of {of_all:,} KV pairs of a prompt are read in {counted(slots, 'shared slot')}"
    )


def _away(plan: Plan) -> str:
    """How much of the archive is not in the device's memory, and where."""
    room = "" if plan.limits.room is None else f" of {megabytes(plan.limits.room)} that may be used there"
    return f"{megabytes(plan.memory.elsewhere)} in {place_words(plan)}{room}"


def place_words(plan: Plan) -> str:
    """Where the archive's keys and values are, for people."""
    return f"a file in {plan.limits.place}" if plan.memory.file else "the host's memory"


def _read_in(plan: Plan) -> str:
    """How many slots prompts are read in before they are archived, in a few words; empty without an archive."""
    if plan.reading is None:
        return ""
    layout = plan.reading.layout
    stored = "" if layout.format == "model" else f" in {layout.format}"
    return f"; prompts are read in {plan.reading.slots:,} of {layout.capacity:,} KV pairs{stored}"


def plan_range(groups: Sequence[SlotGroup]) -> str:
    """Slots of some capacities in a few words, such as "8 of 256 to 1,024 KV pairs"."""
    capacities = sorted({group.capacity for group in groups})
    pairs = f"{capacities[0]:,} to {capacities[-1]:,}" if len(capacities) > 1 else f"{capacities[0]:,}"
    return f"{sum(group.slots for group in groups):,} of {pairs} KV pairs"


def status_line(stats: Stats) -> str:
    """The counters in a line."""
    rows, *time_left = rows_and_time(stats)
    return ", ".join((rows, *speeds(stats), *time_left))


def rows_and_time(stats: Stats) -> Iterator[str]:
    """What a person wants to know first, in parts, the most important one first."""
    failed = f" ({stats.rows_failed:,} failed)" if stats.rows_failed else ""
    yield f"{stats.rows_before + stats.rows_done:,}/{stats.rows_total:,} rows{failed}"
    left, reading = stats.seconds_left, stats.reading_seconds_left
    if left is not None:
        yield f"about {duration(left)} left"
    elif reading:
        yield f"at least {duration(reading)} left"


def speeds(stats: Stats) -> Iterator[str]:
    """What else the counters say, in parts, the most important one first."""
    if stats.is_unusually_quiet:
        yield f"no row finished for {duration(stats.quiet_seconds)}"
    if stats.prefill_rate:
        yield f"prompt {stats.prefill_rate:,.0f} tok/s"
    if stats.generated_rate:
        yield f"generated {stats.generated_rate:,.0f} tok/s"
    yield f"{duration(stats.elapsed)} elapsed"
    if stats.slots:
        yield f"{stats.active_slots}/{stats.slots} slots"
    if stats.memory_bytes:
        yield f"memory {megabytes(stats.memory_bytes)}"


def stopping_line(number: int, within: float) -> Line:
    """The answer to a signal while rows are in flight.

    Args:
        number: of the signal.
        within: seconds that the rows in flight have.
    """
    waiting = f"finishing the rows in flight, up to {duration(within)}" if within else "dropping the rows in flight"
    if number == signal.SIGINT:
        return Line(f"{waiting}; press Ctrl-C again to stop now", "warning")
    return Line(f"{signal.Signals(number).name}: {waiting}; a second signal stops at once", "warning")


def row_line(result: Result) -> str:
    """A finished row: its id, its lengths and how it ended; never what it says."""
    name = repr(result.id)[:80]
    if result.error or not result.usage:
        return f"row {name}: {result.error.code if result.error else result.finish_reason}"
    tokens = f"{result.usage.prompt_tokens:,} prompt tokens, {result.usage.completion_tokens:,} generated"
    return f"row {name}: {tokens}, {result.finish_reason}"


def nothing_left_lines(stats: Stats, errors: Path | None, table: Path | None = None) -> Iterator[Line]:
    """Why a run ends before it begins.

    Args:
        stats: its counters.
        errors: where the failed rows are; None for the same place.
        table: the table of the answers that was written all the same; None for none.
    """
    if stats.rows_total:
        yield Line(f"nothing to do: all rows have their records already ({stats.rows_total:,})")
        yield from _failure_lines(stats, errors)
    else:
        yield Line("the input has no rows")
    if table:
        yield Line(f"the answers were written to {table}")


def summary_lines(
    stats: Stats, plans: Sequence[Plan], output: Path | None, errors: Path | None, table: Path | None = None
) -> Iterator[Line]:
    """What a finished run did.

    Args:
        stats: its counters.
        plans: those of its models; none where no row needed a model.
        output: where the answers are; None for standard output.
        errors: where the failed rows are; None for the same place.
        table: where the answers are as a table, if they are.
    """
    earlier = f" ({stats.rows_before:,} had their records before)" if stats.rows_before else ""
    skipped = f", {stats.rows_skipped:,} skipped" if stats.rows_skipped else ""
    failed = f", {stats.rows_failed:,} failed" if stats.rows_failed else ""
    yield Line(
        f"done: {stats.rows_answered:,} of {counted(stats.rows_total, 'row')} answered{skipped}{failed} "
        f"in {duration(stats.elapsed)}{earlier}"
    )
    if plans:
        yield from _speed_lines(stats)
        yield from _memory_lines(stats, plans)
    for reason, why in ENDED_EARLY.items():
        if number := stats.finish_reasons[reason]:
            what = "answer was" if number == 1 else "answers were"
            yield Line(f"{number:,} {what} {why} (finish_reason {reason})")
    yield from _failure_lines(stats, errors)
    if output and stats.rows_answered:
        yield Line(f"answers are in {table}, and as lines of JSON in {output}" if table else f"answers are in {output}")


def _speed_lines(stats: Stats) -> Iterator[Line]:
    reused = f", {stats.reused_prompt_tokens:,} more reused" if stats.reused_prompt_tokens else ""
    alone = f", decode {stats.decode_rate:,.0f} tok/s where no prompt was read" if stats.decode_steps else ""
    yield Line(
        f"prefill {stats.prefill_rate:,.0f} tok/s ({counted(stats.prompt_tokens, 'token')}{reused}), "
        f"generated {stats.generated_rate:,.0f} tok/s ({stats.generated_tokens:,} tokens){alone}"
    )
    if stats.eager:
        yield Line(f"decoding was not replayed from CUDA graphs, but launched step by step: {stats.eager}")


def _memory_lines(stats: Stats, plans: Sequence[Plan]) -> Iterator[Line]:
    plan, planned = plans[0], sum(plan.memory.total for plan in plans)
    full, share = stats.full_cache_peak_bytes, ""
    if full > stats.kv_bytes:
        share = f", {stats.kv_bytes / full:.0%} of the {megabytes(full)} that full caches would have taken"
    if stats.kv_bytes:
        away = f", and {megabytes(plan.memory.elsewhere)} in {place_words(plan)}" if plan.memory.elsewhere else ""
        what = "KV cache and states" if plan.memory.states else "KV cache"
        yield Line(f"{what} {megabytes(stats.kv_bytes)} in {counted(stats.slots, 'slot')}{share}{away}")
    if peak := stats.peak_memory_bytes:
        yield Line(f"memory planned {megabytes(planned)}, peak {megabytes(peak)} ({peak / planned - 1:+.1%})")
    if stats.shrunk_to:
        slots, tokens = stats.shrunk_to[-1]
        times, left = counted(len(stats.shrunk_to), "time"), counted(slots, "slot")
        yield Line(f"memory ran out {times}: the run continued with {left} and {counted(tokens, 'token')} a step")


def _failure_lines(stats: Stats, errors: Path | None) -> Iterator[Line]:
    """One line for all failed rows: what went wrong is in the error file, row by row."""
    if stats.rows_failed:
        codes = ", ".join(f"{count:,} {code}" for code, count in stats.errors.most_common())
        where = f"; see {errors}" if errors else ""
        text = f"{counted(stats.rows_failed, 'row')} failed: {codes}{where}"
        yield Line(text, "warning", {"errors": dict(stats.errors)})


def scenario_lines(query: PlanQuery, scenarios: Sequence[Scenario]) -> Iterator[str]:
    """What fits, as a table, with what it was worked out for."""
    machine, lengths, limits = query.machine, query.lengths, query.limits
    tokens = query.every * sum(length.prompt_tokens for length in lengths)
    sampled = f" (one in {query.every} measured)" if query.every > 1 else ""
    whose = "those that can be answered" if query.failed else "all"
    yield f"{query.spec.name}: {counted(query.rows, 'prompt')}{sampled}, {counted(tokens, 'token')} in {whose}"
    yield from failed_lines(query)
    shares = ((query.config.tensor_parallel_size, "devices"), (query.workers, "workers"))
    each = "of ".join(f"each of {count:,} {what} " for count, what in shares if count > 1)
    yield (
        f"{each}on {machine.name}, {megabytes(machine.memory.free)} free: "
        f"{megabytes(limits.total)} may be used ({limits.source})"
    )
    rates = machine.rates(query.spec.itemsize)
    if rates:
        yield f"at {rates.flops / 1e12:,.2f} TFLOP/s and {rates.bandwidth / 1e9:,.0f} GB/s ({rates.source})"
    spec = query.spec
    if spec.states:
        tokens_of_cache = spec.state_bytes // spec.pair_bytes
        yield (
            f"each row holds {megabytes(spec.state_bytes)} of states beside its KV cache, whatever its length: "
            f"as much as {counted(tokens_of_cache, 'token')} of the full cache"
        )
    if not scenarios:
        return
    yield ""
    yield from scenario_table(scenarios)
    yield ""
    yield from _sum_lines(query.workers, scenarios)
    for scenario in scenarios:
        if scenario.plan and scenario.plan.shared_slots:
            budget = f" of {budget_text(scenario.budget)}" if scenario.budget else ""
            yield f"{scenario.name}{budget}: {_read_in_place(scenario.plan)}"
        if scenario.problem:
            yield f"{scenario.name}: {scenario.problem.message}"
        if scenario.plan and scenario.left_out:
            yield f"{scenario.name}: no slot for {_named(scenario.left_out, scenario.plan.too_large)}"
        if scenario.plan and scenario.plan.memory.elsewhere:
            yield f"{scenario.name}: {_away(scenario.plan)}"


def _sum_lines(workers: int, scenarios: Sequence[Scenario]) -> Iterator[str]:
    """What several workers have together; the table is about one of them, but for its times."""
    for plan, scenario in ((scenario.plan, scenario) for scenario in scenarios if workers > 1):
        if plan:
            budget = f" {budget_text(scenario.budget)}" if scenario.budget else ""
            nbytes = megabytes(workers * plan.memory.total)
            yield f"{scenario.name}{budget}, {workers:,} workers: {workers * plan.slots:,} slots, {nbytes} in all"


def failed_lines(query: PlanQuery) -> Iterator[str]:
    """Which rows cannot be answered, and why: a line for each error code."""
    for failed in query.failed:
        names = [name for name, _ in failed.named]
        of_all = counted(query.measured, "row") + (" that were read" if query.every > 1 else "")
        skipped = " and will be skipped" if query.skips_too_long and failed.code == "context_length_exceeded" else ""
        yield (
            f"{failed.count:,} of {of_all} cannot be answered{skipped} ({failed.code}): {_named(names, failed.count)}; "
            f"{failed.named[0][0][:80]!r}: {failed.named[0][1][:300]}"
        )


def _named(names: Sequence[str], count: int) -> str:
    """The first of some ids, and how many more there are."""
    more = f" and {count - len(names):,} more" if count > len(names) else ""
    return ", ".join(repr(name[:80]) for name in names) + more


def calibration_lines(record: Mapping[str, Any], path: Path) -> Iterator[str]:
    """What was measured, as a table in the order of bytes, and what is recommended.

    Args:
        record: what the calibration file holds.
        path: the calibration file.
    """
    full = record["full_cache"]
    yield f"{record['model']}: {counted(full['rows'], 'prompt')}, against the full cache"
    candidates = sorted(record["candidates"], key=lambda entry: -entry["kv_bytes_per_sequence"])
    rows = [full_cache_row(full), *(candidate_row(entry, full, record["recommended"]) for entry in candidates)]
    yield from aligned([CALIBRATION_COLUMNS, *rows])
    recommended = f"; {RECOMMENDED_MARK} recommended" if record["recommended"] else ""
    yield f"{BEST_MARK} nothing else agrees as often in as few bytes{recommended}"
    if record["recommended"] is None:
        best = max((entry["top1_agreement"] for entry in record["candidates"]), default=0.0)
        yield f"recommended: nothing; {record['min_agreement']:.0%} was asked for, {best:.1%} is the best"
        return
    words = candidate_words(record["recommended"])
    yield f"recommended: {words}, the least memory that holds {record['min_agreement']:.0%}"
    yield f"use it: bmx run ... --kv-budget auto --calibration {path}"


def profile_lines(measured: Mapping[str, int]) -> Iterator[str]:
    """What the largest step took, against what was predicted.

    Args:
        measured: bytes without the slots: predicted before loading, predicted after it, and measured.
    """
    before, planned, peak = (measured[f"{name}_bytes"] for name in ("before_loading", "predicted", "measured"))
    yield f"the largest step, slots left out: {megabytes(peak)} measured"
    yield f"  {megabytes(before)} predicted from the config alone: {before / peak - 1:+.1%}"
    yield f"  {megabytes(planned)} predicted once the weights were loaded: {planned / peak - 1:+.1%}"
