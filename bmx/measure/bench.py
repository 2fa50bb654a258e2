"""``bmx bench``: full cache, decode-only compression and Batch-Max side by side, on the same prompts and memory.

A bench is a grid of cells, one for each prompt length and answer length. Knows the order of things: the three sides of
a cell are measured one after the other, and the machine's rates before and after them; each cell is saved as soon as it
is finished. How a side is measured is the business of ``bench_sides``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bmx import hardware
from bmx.compress.policy import CompressionPolicy
from bmx.config import FAKE, EngineConfig
from bmx.engine.backend import ModelBackend
from bmx.engine.engine import Engine
from bmx.engine.memory_meter import bound_kernel_caches, is_out_of_memory
from bmx.engine.open import check_memory, use_all_cores
from bmx.engine.prompt_lengths import max_length
from bmx.errors import MemoryLimitError, RowError, UsageError
from bmx.job.input_rows import input_reader
from bmx.job.ledger import unanswered_rows
from bmx.job.locks import locked
from bmx.job.manifest import run_started, write_json
from bmx.job.paths import find_record_path, input_paths
from bmx.measure.bench_sides import (
    SideMeasurement,
    Workload,
    measure_cache,
    measure_decode_only,
    plan_lengths,
    plan_workload,
)
from bmx.measure.calibration_file import may_replace
from bmx.measure.plots import check_plots, plot_bench, plots_note
from bmx.model.number_type import dtype_name
from bmx.model.random_models import SHAPES, IdTokenizer, make_random_model, preview_random_model
from bmx.plan.machine_speed import Rates, measure
from bmx.plan.memory import limits
from bmx.plan.planner import Length, Plan
from bmx.prompt_config import PromptConfig
from bmx.run_config import RunConfig
from bmx.terminal.display import Display
from bmx.terminal.tables import BENCH_NAMES, bench_lines, bench_summary, counted
from bmx.units import now

FORMAT = 1
OUTPUT = "bench.json"
INPUT_TOKENS, OUTPUT_TOKENS = (2000,), (128,)
PAPER_INPUT_TOKENS, PAPER_OUTPUT_TOKENS = (1000, 2000, 4000), (128, 256)
PAPER_SHARE = 4  # the paper's setting: KV pairs take a quarter of the weights' bytes, a budget a quarter of a prompt
LEAST_PROMPTS, ROUNDS = 8, 2  # random prompts of a cell: at least 8, and twice as many as Batch-Max has slots
MOST_PROMPTS = 4096
OTHERS = ("full_cache", "decode_only")  # the sides that Batch-Max is compared with
Side = SideMeasurement | MemoryLimitError  # the error says that the side does not fit
T = TypeVar("T")
DECODE_ONLY = (
    "decode-only is an upper bound that nobody implements: as many rows at once as fit with their whole prompts, cut "
    "to the budget at once and for free when all are read, then decoded in slots of that size that never evict"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """Options of the command that are not settings.

    Attributes:
        shape: shape of a model with random weights, by its name in ``SHAPES``; None for the configured model.
        input_tokens: lengths of random prompts; empty for the default, or if an input has prompts.
        output_tokens: lengths of answers; empty for the default.
        prompts: most prompts of a cell; None for twice as many as Batch-Max has slots.
        paper: whether to take the paper's setting: its lengths, and a quarter of the weights' bytes for KV pairs.
        quarter: whether the budget is a quarter of each prompt length, in place of the configured one.
    """

    shape: str | None = None
    input_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    prompts: int | None = None
    paper: bool = False
    quarter: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """Lengths of random prompts, in tokens."""
        return self.input_tokens or (PAPER_INPUT_TOKENS if self.paper else INPUT_TOKENS)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Lengths of answers, in tokens."""
        return self.output_tokens or (PAPER_OUTPUT_TOKENS if self.paper else OUTPUT_TOKENS)


def bench(config: RunConfig, options: BenchOptions, display: Display) -> None:
    """Measure every cell; show and save the measurements.

    Args:
        config: the settings.
        options: options of the command.
        display: shows measurements and progress.

    Raises:
        UsageError: options contradict each other, or a file would be replaced.
        MemoryLimitError: no side fits.
        BmxError: it cannot start or continue.
    """
    model = options.shape or config.engine.model
    config = replace(config, engine=replace(config.engine, prefix_reuse=False, model=model))
    _check(config, options)
    output, lock = find_record_path(config, "bench", OUTPUT)
    _check_files(output, config.job.overwrite)
    try:
        with locked(lock, config.job.lock_wait), input_paths(config.inputs) as paths:
            with display.waiting(f"loading model {model}"):
                engine, prompts = _open(config, options, paths, display)
            config = replace(config, engine=_with_fixed_memory(config.engine, options, engine, prompts))
            record = _new_record(config, options, engine)
            _Bench(
                config=config,
                options=options,
                display=display,
                engine=engine,
                prompts=prompts,
                output=output,
                record=record,
            ).run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError("memory ran out", hint="close other programs, or lower --memory-limit") from error


def _check(config: RunConfig, options: BenchOptions) -> None:
    """Refuse contradictions before anything is loaded.

    Raises:
        UsageError: options contradict each other or the settings.
    """
    engine = config.engine
    if options.shape and options.shape not in SHAPES:
        raise UsageError(f"no shape is called {options.shape}", hint=f"the shapes are {', '.join(SHAPES)}")
    if config.inputs and (options.shape or options.input_tokens):
        flag = "--shape" if options.shape else "--input-tokens"
        raise UsageError(f"an INPUT brings prompts of its own: it cannot be combined with {flag}")
    if engine.model == FAKE:
        raise UsageError("the fake model computes nothing that could be measured", hint="try --shape smollm2-135m")
    if engine.kv_policy == "none":
        raise UsageError("the full cache is measured anyway", hint="--kv-policy names what it is compared with")
    if engine.kv_probe or engine.kv_protect != "none":
        raise UsageError("kv_probe and kv_protect need text, and bench works on token ids", hint="leave them out")
    for tokens in (0,) if config.inputs else options.inputs:
        CompressionPolicy.from_config(_with_budget(engine, options, tokens))


def _check_files(output: Path, overwrite: bool) -> None:
    """Refuse to replace measurements unasked, and a file that is not of a bench in any case.

    Args:
        output: the file of the measurements.
        overwrite: whether measurements may be replaced.

    Raises:
        UsageError: names the file.
    """
    if not is_bench_file(output):
        raise UsageError(f"{output} exists and is not a file of bench", hint="choose another with -o")
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists", hint="--overwrite replaces it, -o names another file")
    check_plots(output)


def is_bench_file(path: Path) -> bool:
    """Whether a file may be replaced by a bench: it is missing, empty, or one already."""
    return may_replace(path, "bench_format")


def _with_budget(engine: EngineConfig, options: BenchOptions, tokens: int) -> EngineConfig:
    """The settings with the budget for prompts of ``tokens`` tokens; 0 for prompts of different lengths."""
    if not options.quarter:
        return engine
    return replace(engine, kv_budget=tokens // PAPER_SHARE if tokens else 1 / PAPER_SHARE)


def _open(
    config: RunConfig, options: BenchOptions, paths: tuple[Path, ...], display: Display
) -> tuple[Engine, list[list[int]]]:
    """An engine that reads token ids, and the token ids of the input's prompts; no prompts without an input.

    Raises:
        UsageError: prompts and answers are longer than the model takes, or the input has no prompt.
    """
    longest = max(options.outputs) + (0 if paths else max(options.inputs))
    if options.shape:
        return _open_random_model(config.engine, options.shape, longest), []
    engine = Engine.open(config.engine, config.prompt)
    most = max_length(config.engine, engine.spec)
    if longest >= most:
        raise UsageError(f"{engine.spec.name} takes {most:,} tokens, and {longest:,} are asked for")
    prompts = _read_prompts(config, engine, paths, most - longest, display) if paths else []
    return Engine(config.engine, PromptConfig(), IdTokenizer(), engine.backend), prompts[: options.prompts]


def _open_random_model(config: EngineConfig, shape: str, longest: int) -> Engine:
    """An engine with a random model of a shape, for sequences of at most ``longest`` tokens."""
    bound_kernel_caches()
    check_memory(config, lambda device: preview_random_model(shape, longest, dtype_name(config, device, SHAPES[shape])))
    use_all_cores()
    loaded = make_random_model(shape, longest, config)
    return Engine(config, PromptConfig(), IdTokenizer(), ModelBackend(loaded))


def _read_prompts(
    config: RunConfig, engine: Engine, paths: tuple[Path, ...], most: int, display: Display
) -> list[list[int]]:
    """Token ids of the input's rows; a row without a prompt, or with one that is too long, is named and left out.

    Args:
        config: the settings.
        engine: encodes prompts.
        paths: the input's files.
        most: most tokens of a prompt.
        display: shows the rows that are left out.

    Raises:
        UsageError: no row is left.
    """
    prompts = []
    reader = input_reader(config, paths)
    for row in reader.rows(unanswered_rows(reader).skip):
        try:
            ids = engine.encode(row.request) if row.request else []
        except RowError:
            ids = []
        if 0 < len(ids) <= most:
            prompts.append(ids)
        else:
            display.warn(f"row {row.id} has no prompt of at most {most:,} tokens, and is left out")
    if not prompts:
        raise UsageError("no row of the input can be answered", hint="`bmx run` says what is wrong with its rows")
    return prompts


def _with_fixed_memory(
    config: EngineConfig, options: BenchOptions, engine: Engine, prompts: list[list[int]]
) -> EngineConfig:
    """The settings with a memory limit that stays the same for all sides, whatever is free later.

    Args:
        config: the settings.
        options: options of the command.
        engine: holds the model.
        prompts: of the input; empty for random ones.
    """
    spec, meter, pool = engine.spec, engine.backend.meter, config.kv_cache_memory
    if options.paper and pool is None:
        longest = max(map(len, prompts), default=max(options.inputs)) + max(options.outputs)
        row = CompressionPolicy.from_config(_full_cache(config)).layout(spec, longest).nbytes
        pool = max(spec.weight_bytes // PAPER_SHARE, row + spec.state_bytes)  # and the states of an idle row
    total = limits(config, meter.free_memory(), meter.held).total
    return replace(config, memory_limit=total, kv_cache_memory=pool)


def _full_cache(config: EngineConfig) -> EngineConfig:
    """The settings of the other sides while they read prompts: everything is kept, in the model's own type."""
    return replace(config.full_cache, kv_format="model")


def _new_record(config: RunConfig, options: BenchOptions, engine: Engine) -> dict[str, Any]:
    """The output file's contents before the first cell."""
    manifest = run_started(config, {})
    return {name: manifest[name] for name in ("host", "pid", "started", "settings", "inputs", "versions")} | {
        "bench_format": FORMAT,
        "state": "unfinished",
        "model": engine.describe() | {"name": config.engine.model, "weight_bytes": engine.spec.weight_bytes},
        "cores": hardware.usable_cores(),
        "preset": "paper" if options.paper else None,
        "decode_only": DECODE_ONLY,
        "cells": [],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """A bench in progress.

    Attributes:
        config: the settings, with a fixed memory limit.
        options: options of the command.
        display: shows measurements and progress.
        engine: reads token ids.
        prompts: of the input; empty for random ones.
        output: the file.
        record: its contents.
    """

    config: RunConfig
    options: BenchOptions
    display: Display
    engine: Engine
    prompts: list[list[int]]
    output: Path
    record: dict[str, Any]

    def run(self) -> None:
        """Measure all cells, in order, and show the summary.

        Raises:
            MemoryLimitError: no side of any cell fits.
        """
        cells, rates, batch_max = self.record["cells"], self._measure_machine(), None
        for tokens in (0,) if self.prompts else self.options.inputs:
            for answer_tokens in self.options.outputs:
                workload, sides = self._measure_cell(tokens, answer_tokens)
                rates_before, rates = rates, self._measure_machine()
                self._save_cell(workload, sides, rates_before, rates)
                batch_max = sides["batch_max"]
        if isinstance(batch_max, MemoryLimitError) and not any(map(_any_side_fits, cells)):
            raise batch_max
        self.record.update(state="finished", finished=now(), mean_ratios=mean_ratios(cells))
        write_json(self.output, self.record)
        self.display.data(*bench_summary(self.record))
        self.display.note(f"measurements: {self.output}; {plots_note(plot_bench(self.record, self.output))}")

    def _measure_machine(self) -> Rates:
        self.display.note("measuring the machine ...")
        return measure(self.engine.backend.device_type, self.engine.describe()["dtype"])

    def _measure_cell(self, tokens: int, answer_tokens: int) -> tuple[Workload, dict[str, Side]]:
        """Measure the three sides of a cell.

        Args:
            tokens: of a prompt; 0 for the input's prompts.
            answer_tokens: tokens that are generated for each prompt.
        """
        full = self.engine.with_config(_full_cache(self.config.engine))
        evicting = self.engine.with_config(_with_budget(self.config.engine, self.options, tokens))
        lengths = [tokens] * (self.options.prompts or MOST_PROMPTS) if tokens else [len(ids) for ids in self.prompts]
        plan = _attempt(
            lambda: plan_lengths(evicting, [Length.of(evicting.policy, length, answer_tokens) for length in lengths])
        )
        slots = plan.slots if isinstance(plan, Plan) else 0
        count = min(len(lengths), max(LEAST_PROMPTS, ROUNDS * slots))
        prompts = self.prompts or self._random_prompts(tokens, count)
        workload = Workload(prompts=prompts, answer_tokens=answer_tokens)
        self._announce("full_cache", workload)
        full_side = _attempt(lambda: measure_cache(full, plan_workload(full, workload), workload, self.display))
        self._announce("decode_only", workload)
        decode_only = _attempt(lambda: measure_decode_only(full, evicting.policy, workload, full_side, self.display))
        self._announce("batch_max", workload)
        batch_max = _attempt(lambda: measure_cache(evicting, _or_raise(plan), workload, self.display))
        return workload, {"full_cache": full_side, "decode_only": decode_only, "batch_max": batch_max}

    def _announce(self, side: str, workload: Workload) -> None:
        prompts, mean = len(workload.prompts), workload.prompt_tokens / len(workload.prompts)
        work = f"{counted(prompts, 'prompt')} of {counted(round(mean), 'token')}"
        self.display.note(f"{BENCH_NAMES[side]}: {work}, {workload.answer_tokens:,} generated for each ...")

    def _random_prompts(self, tokens: int, count: int) -> list[list[int]]:
        """``count`` prompts of ``tokens`` random token ids, the same for the same seed."""
        import torch

        draw, vocab = torch.Generator().manual_seed(self.config.sampling.seed), self.engine.spec.vocab
        prompts: list[list[int]] = torch.randint(vocab, (count, tokens), generator=draw).tolist()
        return prompts

    def _save_cell(self, workload: Workload, sides: dict[str, Side], before: Rates, after: Rates) -> None:
        """Add a cell to the file, and show it.

        Args:
            workload: of the cell.
            sides: what was measured, by name.
            before: the machine's rates before the sides.
            after: and after them.
        """
        flops, bandwidth = (before.flops + after.flops) / 2, (before.bandwidth + after.bandwidth) / 2
        tokens = 0 if self.prompts else len(workload.prompts[0])
        cell: dict[str, Any] = {
            "input_tokens": workload.prompt_tokens / len(workload.prompts),
            "output_tokens": workload.answer_tokens,
            "prompts": len(workload.prompts),
            "kv_budget": _with_budget(self.config.engine, self.options, tokens).kv_budget,
            "flops_per_second": flops,
            "bytes_per_second": bandwidth,
        }
        for name, side in sides.items():
            if isinstance(side, MemoryLimitError):
                cell[name] = {"fits": False, "problem": side.message}
                self.display.note(f"{BENCH_NAMES[name]}: {side.message}")
            else:
                cell[name] = side.record(workload, flops, bandwidth)
        cell["ratios"] = ratios(cell)
        self.record["cells"].append(cell)
        self.display.data(*bench_lines(cell))
        if _any_side_fits(cell):
            write_json(self.output, self.record)


def _any_side_fits(cell: dict[str, Any]) -> bool:
    return any(cell[side]["fits"] for side in BENCH_NAMES)


def ratios(cell: dict[str, Any]) -> dict[str, float | None]:
    """How many times as fast Batch-Max is as each of the other sides; None if either does not fit."""
    return {side: _speedup(cell[side], cell["batch_max"]) for side in OTHERS}


def _speedup(other: dict[str, Any], batch_max: dict[str, Any]) -> float | None:
    fit = other["fits"] and batch_max["fits"]
    return other["seconds"] / batch_max["seconds"] if fit else None


def mean_ratios(cells: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The mean of each ratio over the cells that have it; None if no cell has."""
    return {side: _mean([cell["ratios"][side] for cell in cells]) for side in OTHERS}


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None; None if all are."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _attempt(work: Callable[[], T]) -> T | MemoryLimitError:
    """The result of ``work``, or the error that says that it does not fit."""
    try:
        return work()
    except MemoryLimitError as error:
        return error


def _or_raise(result: T | MemoryLimitError) -> T:
    if isinstance(result, MemoryLimitError):
        raise result
    return result
