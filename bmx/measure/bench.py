"""``bmx bench``: full cache, compression in decoding only, and Batch-Max side by side, in one run and the same memory.

Knows the order of things: the sides of each cell are measured, and the machine's rates before and after it; each cell
is kept as soon as it is finished. How a side is measured is the business of ``sides``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from bmx import hardware
from bmx.compress.policy import CompressionPolicy
from bmx.config import FAKE, EngineConfig, PromptConfig
from bmx.engine.backend import ModelBackend
from bmx.engine.engine import Engine
from bmx.engine.memory_meter import bound_kernel_caches, is_out_of_memory
from bmx.engine.open import check_memory, use_all_cores
from bmx.engine.prompt_lengths import max_length
from bmx.errors import MemoryLimitError, RowError, UsageError
from bmx.job.durable_files import locked
from bmx.job.input_rows import input_reader
from bmx.job.journal import Ledger
from bmx.job.manifest import run_started, write_json
from bmx.job.paths import find_paths, input_paths
from bmx.measure.bench_sides import Cell, Measured, length_of, plan_for, planned, run_bound, run_side
from bmx.measure.plots import plot_bench, plots_note
from bmx.model.loader import dtype_name
from bmx.model.random_models import SHAPES, IdTokenizer, make_random_model, preview_random_model
from bmx.plan.machine_speed import Rates, measure
from bmx.plan.planner import Plan, limits
from bmx.run_config import RunConfig
from bmx.terminal.display import Display
from bmx.terminal.tables import BENCH_NAMES, bench_lines, bench_summary
from bmx.units import now

FORMAT = 1
OUTPUT = "bench.json"
INPUT_TOKENS, OUTPUT_TOKENS = (2000,), (128,)
PAPER_INPUT_TOKENS, PAPER_OUTPUT_TOKENS = (1000, 2000, 4000), (128, 256)
PAPER_SHARE = 4  # of the weights' bytes, one in so many for KV pairs; and of a prompt's pairs, so many are the budget
LEAST_PROMPTS, ROUNDS = 8, 2  # prompts of a cell: so many, and so often as Batch-Max has slots
MOST_PROMPTS = 4096
T = TypeVar("T")
OTHERS = ("full_cache", "decode_only")  # that Batch-Max is compared with
DECODE_ONLY = (
    "decode-only is an upper bound that nobody implements: as many rows at once as fit with their whole prompts, cut "
    "to the budget at once and for free when all are read, then decoded in slots of that size that never evict"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What the command was asked beside its settings.

    Attributes:
        shape: a model of random weights, by its name in ``SHAPES``; None for the configured one.
        input_tokens: lengths of random prompts; none for the default, or where an input has prompts.
        output_tokens: lengths of answers; none for the default.
        prompts: most prompts of a cell; None for as many as fill the slots of Batch-Max twice.
        paper: the setting of the paper: its lengths, and weights that fill most of the memory.
        quarter: a budget of a quarter of each prompt length, in place of the configured one.
    """

    shape: str | None = None
    input_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    prompts: int | None = None
    paper: bool = False
    quarter: bool = False

    @property
    def inputs(self) -> tuple[int, ...]:
        """Lengths of random prompts."""
        return self.input_tokens or (PAPER_INPUT_TOKENS if self.paper else INPUT_TOKENS)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Lengths of answers."""
        return self.output_tokens or (PAPER_OUTPUT_TOKENS if self.paper else OUTPUT_TOKENS)


def bench(config: RunConfig, asked: BenchOptions, display: Display) -> None:
    """Measure every cell, and show and keep what was measured.

    Raises:
        UsageError: settings that contradict each other, or a file that would be replaced.
        MemoryLimitError: nothing fits.
        BmxError: it cannot start or go on.
    """
    config = replace(
        config, engine=replace(config.engine, prefix_reuse=False, model=asked.shape or config.engine.model)
    )
    _check(config, asked)
    places = find_paths(replace(config, job=replace(config.job, output_file=config.job.output_file or OUTPUT)))
    output = places.output
    if output is None or not places.manifest:
        raise UsageError("bench keeps what it measures in a file", hint="-o bench.json")
    if output.exists() and not config.job.overwrite:
        raise UsageError(f"{output} exists", hint="--overwrite replaces it, -o names another file")
    try:
        with locked(places.locks[0], config.job.lock_wait), input_paths(config.inputs) as paths:
            with display.waiting(f"loading model {config.engine.model}"):
                engine, prompts = _opened(config, asked, paths, display)
            _Bench(config, asked, display, engine, prompts, output).run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryLimitError("memory ran out", hint="close other programs, or lower --memory-limit") from error


def _check(config: RunConfig, asked: BenchOptions) -> None:
    """Refuse what can be refused before anything is loaded.

    Raises:
        UsageError: it is.
    """
    engine = config.engine
    if asked.shape and asked.shape not in SHAPES:
        raise UsageError(f"no shape is called {asked.shape}", hint=f"known are {', '.join(SHAPES)}")
    if config.inputs and (asked.shape or asked.input_tokens):
        flag = "--shape" if asked.shape else "--input-tokens"
        raise UsageError(f"an INPUT brings prompts of its own: it cannot be combined with {flag}")
    if engine.model == FAKE:
        raise UsageError("the fake model computes nothing that could be measured", hint="try --shape smollm2-135m")
    if engine.kv_policy == "none":
        raise UsageError("the full cache is measured anyway", hint="--kv-policy names what it is compared with")
    if engine.kv_probe or engine.kv_protect != "none":
        raise UsageError(
            "kv_probe and kv_protect are about words, and bench knows token ids alone", hint="leave them out"
        )
    for tokens in (0,) if config.inputs else asked.inputs:
        CompressionPolicy.from_config(_with_budget(engine, asked, tokens))


def _with_budget(engine: EngineConfig, asked: BenchOptions, tokens: int) -> EngineConfig:
    """The settings for prompts of so many tokens (0: of any)."""
    quarter = tokens // PAPER_SHARE if tokens else 1 / PAPER_SHARE
    return replace(engine, kv_budget=quarter) if asked.quarter else engine


def _opened(
    config: RunConfig, asked: BenchOptions, paths: tuple[Path, ...], display: Display
) -> tuple[Engine, list[list[int]]]:
    """An engine that reads token ids, and the prompts of the input, if there is one.

    Raises:
        UsageError: prompts and answers are longer than the model takes, or there are none.
    """
    longest = max(asked.outputs) + (0 if paths else max(asked.inputs))
    if asked.shape:
        bound_kernel_caches()
        check_memory(
            config.engine, lambda kind: preview_random_model(str(asked.shape), longest, dtype_name(config.engine, kind))
        )
        use_all_cores()
        loaded = make_random_model(asked.shape, longest, config.engine)
        return Engine(config.engine, PromptConfig(), IdTokenizer(), ModelBackend(loaded)), []
    told = Engine.open(config.engine, config.prompt)
    most = max_length(config.engine, told.spec)
    if longest >= most:
        raise UsageError(f"{told.spec.name} takes {most:,} tokens, and {longest:,} are asked for")
    prompts = _read(config, told, paths, most - longest, display) if paths else []
    return Engine(config.engine, PromptConfig(), IdTokenizer(), told.backend), prompts[: asked.prompts]


def _read(config: RunConfig, engine: Engine, paths: tuple[Path, ...], most: int, display: Display) -> list[list[int]]:
    """Token ids of the input's rows; those without a prompt, or with one that is too long, are named and left out.

    Raises:
        UsageError: no row is left.
    """
    found = []
    with closing(Ledger()) as ledger:
        reader = input_reader(config, paths)
        ledger.read(reader, None)
        for row in reader.rows(ledger.todo((1, 1)).skip):
            try:
                ids = engine.encode(row.request) if row.request else []
            except RowError:
                ids = []
            if 0 < len(ids) <= most:
                found.append(ids)
            else:
                display.warn(f"row {row.id} has no prompt of at most {most:,} tokens, and is left out")
    if not found:
        raise UsageError("no row of the input can be answered", hint="`bmx run` says what is wrong with its rows")
    return found


class _Bench:
    """One bench in progress; ``record`` is what the file holds."""

    def __init__(
        self,
        config: RunConfig,
        asked: BenchOptions,
        display: Display,
        engine: Engine,
        prompts: list[list[int]],
        output: Path,
    ) -> None:
        self._asked, self._display, self._output = asked, display, output
        self._engine, self._given, self._seed = engine, prompts, config.sampling.seed
        self._config = self._limited(config.engine)
        self._record = self._begun(config)

    def _begun(self, config: RunConfig) -> dict[str, Any]:
        """The file before its first cell."""
        found = run_started(replace(config, engine=self._config), {})
        spec = self._engine.spec
        return {name: found[name] for name in ("host", "pid", "started", "settings", "inputs", "versions")} | {
            "bench_format": FORMAT,
            "state": "unfinished",
            "model": self._engine.describe() | {"name": config.engine.model, "weight_bytes": spec.weight_bytes},
            "cores": hardware.usable_cores(),
            "preset": "paper" if self._asked.paper else None,
            "decode_only": DECODE_ONLY,
            "cells": [],
        }

    def _limited(self, config: EngineConfig) -> EngineConfig:
        """The settings with a limit that stays the same for all sides, whatever is free later."""
        engine, spec = self._engine, self._engine.spec
        pool = config.kv_cache_memory
        if self._asked.paper and pool is None:
            longest = max(map(len, self._given), default=max(self._asked.inputs)) + max(self._asked.outputs)
            row = CompressionPolicy.from_config(config.full_cache).layout(spec, longest).nbytes
            pool = max(spec.weight_bytes // PAPER_SHARE, row)
        meter = engine.backend.meter
        total = limits(config, meter.free_memory(), meter.now).total
        return replace(config, memory_limit=total, kv_cache_memory=pool)

    def run(self) -> None:
        """Everything, in order.

        Raises:
            MemoryLimitError: nothing fits.
        """
        rates, least = self._rates(), None
        for tokens in (0,) if self._given else self._asked.inputs:
            for answer in self._asked.outputs:
                cell, sides = self._cell(tokens, answer)
                before, rates = rates, self._rates()
                self._keep(cell, sides, before, rates)
                least = sides["batch_max"]
        cells = self._record["cells"]
        if isinstance(least, MemoryLimitError) and not any(
            cell[side]["fits"] for cell in cells for side in BENCH_NAMES
        ):
            raise least
        self._record |= {"state": "finished", "finished": now(), "mean_ratios": mean_ratios(cells)}
        write_json(self._output, self._record)
        for line in bench_summary(self._record):
            self._display.data(line)
        plots = plot_bench(self._record, self._output)
        self._display.note(f"measurements: {self._output}; {plots_note(plots)}")

    def _rates(self) -> Rates:
        self._display.note("measuring the machine ...")
        return measure(self._engine.backend.device_type, self._engine.describe()["dtype"])

    def _cell(self, tokens: int, answer: int) -> tuple[Cell, dict[str, Measured | MemoryLimitError]]:
        """A cell, and each of its sides.

        Args:
            tokens: of a prompt; 0 for those of the input.
        """
        full = self._engine.with_config(self._config.full_cache)
        evicting = self._engine.with_config(_with_budget(self._config, self._asked, tokens))
        most = [tokens] * (self._asked.prompts or MOST_PROMPTS) if tokens else [len(ids) for ids in self._given]
        plan = _attempt(lambda: planned(evicting, [length_of(evicting.policy, count, answer) for count in most]))
        slots = plan.slots if isinstance(plan, Plan) else 0
        prompts = self._given or self._random(tokens, min(len(most), max(LEAST_PROMPTS, ROUNDS * slots)))
        cell = Cell(prompts=prompts, answer=answer)
        sides: dict[str, Measured | MemoryLimitError] = {}
        for name, measure_side in {
            "full_cache": lambda: run_side(full, plan_for(full, cell), cell, self._display),
            "decode_only": lambda: run_bound(full, evicting.policy, cell, sides["full_cache"], self._display),
            "batch_max": lambda: run_side(evicting, _or_raise(plan), cell, self._display),
        }.items():
            told = (
                f"{len(prompts):,} prompts of {cell.tokens / len(prompts):,.0f} tokens, {answer:,} generated for each"
            )
            self._display.note(f"{BENCH_NAMES[name]}: {told} ...")
            sides[name] = _attempt(measure_side)
        return cell, sides

    def _random(self, tokens: int, count: int) -> list[list[int]]:
        """So many prompts of random token ids, the same for the same seed."""
        import torch

        draw, vocab = torch.Generator().manual_seed(self._seed), self._engine.spec.vocab
        found: list[list[int]] = torch.randint(vocab, (count, tokens), generator=draw).tolist()
        return found

    def _keep(self, cell: Cell, sides: dict[str, Measured | MemoryLimitError], before: Rates, after: Rates) -> None:
        """Add a cell to the file, and show it."""
        flops, bandwidth = (before.flops + after.flops) / 2, (before.bandwidth + after.bandwidth) / 2
        budget = _with_budget(self._config, self._asked, 0 if self._given else len(cell.prompts[0])).kv_budget
        found: dict[str, Any] = {
            "input_tokens": cell.tokens / len(cell.prompts),
            "output_tokens": cell.answer,
            "prompts": len(cell.prompts),
            "kv_budget": budget,
            "flops_per_second": flops,
            "bytes_per_second": bandwidth,
        }
        for name, side in sides.items():
            if isinstance(side, MemoryLimitError):
                found[name] = {"fits": False, "problem": side.message}
                self._display.note(f"{BENCH_NAMES[name]}: {side.message}")
            else:
                found[name] = side.record(cell, flops, bandwidth)
        found["ratios"] = ratios(found)
        self._record["cells"].append(found)
        for line in bench_lines(found):
            self._display.data(line)
        if any(found[name]["fits"] for name in BENCH_NAMES):
            write_json(self._output, self._record)


def ratios(cell: dict[str, Any]) -> dict[str, float | None]:
    """How many times as fast Batch-Max is as each of the others; None where either does not fit."""
    return {
        name: cell[name]["seconds"] / cell["batch_max"]["seconds"]
        if cell[name]["fits"] and cell["batch_max"]["fits"]
        else None
        for name in OTHERS
    }


def mean_ratios(cells: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The mean over the cells that have such a ratio."""
    found = {name: [cell["ratios"][name] for cell in cells if cell["ratios"][name] is not None] for name in OTHERS}
    return {name: sum(values) / len(values) if values else None for name, values in found.items()}


def _attempt(work: Callable[[], T]) -> T | MemoryLimitError:
    """What comes of it, or that it does not fit."""
    try:
        return work()
    except MemoryLimitError as error:
        return error


def _or_raise(found: T | MemoryLimitError) -> T:
    if isinstance(found, MemoryLimitError):
        raise found
    return found
