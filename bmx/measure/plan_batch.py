"""``bmx plan-batch``: what of a job would fit, and how long it would take; no weights are loaded.

Knows the order of things. What is asked is the business of ``plan_query``, what fits that of ``scenarios``, and how it
is shown that of the display.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bmx import hardware
from bmx.errors import InputFileError, MemoryLimitError, UsageError
from bmx.job.field_names import check_field_names
from bmx.job.input_rows import Reader, input_reader
from bmx.job.ledger import Todo, unanswered_rows
from bmx.job.paths import input_paths
from bmx.kv.places import check_place
from bmx.measure.plan_query import query_for_length, query_for_rows
from bmx.model.random_models import SHAPES
from bmx.plan.machine import Machine, machine, shared_machine
from bmx.plan.planner import plan_record
from bmx.plan.scenarios import FailedRows, PlanQuery, Scenario
from bmx.request import Request
from bmx.run_config import RunConfig
from bmx.terminal.display import Display
from bmx.terminal.reports import failed_lines, profile_lines, scenario_lines
from bmx.terminal.tables import counted

CUT = "--on-too-long truncate-middle"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBatchOptions:
    """Options of the command that are not settings.

    Attributes:
        budgets: KV budgets to compare.
        max_input: prompt tokens of imagined rows, in place of an input.
        shape: shape of a model with random weights, by its name in ``SHAPES``; None for the configured model.
        gpu: name of a GPU to plan for, which need not be in this machine.
        gpu_memory: bytes of memory of that GPU.
        check: whether rows that do not fit are a failure.
        measure: whether to load the model and run the largest step.
        as_json: whether to answer in JSON.
    """

    budgets: tuple[int | float | str, ...]
    max_input: int | None = None
    shape: str | None = None
    gpu: str | None = None
    gpu_memory: int | None = None
    check: bool = False
    measure: bool = False
    as_json: bool = False


def plan_batch(config: RunConfig, options: PlanBatchOptions, display: Display) -> bool:
    """Show what would fit on standard output.

    Args:
        config: the settings.
        options: options of the command.
        display: shows the answer.

    Returns:
        Whether every row fits with the first budget, or with the full cache if that is the policy. Rows that cannot
        be answered for another reason than their length do not count.

    Raises:
        InputFileError: no row of the input can be answered, for other reasons than its length.
        BmxError: the input, the model or the machine cannot be read.
    """
    _check(config, options)
    config = replace(config, engine=replace(config.engine, model=options.shape or config.engine.model))
    target = _target(config, options)
    if config.engine.archives and not (options.gpu or options.gpu_memory):
        check_place(config.engine.kv_archive_place, target.kind)
    with input_paths(config.inputs) as paths:
        if paths:
            reader = input_reader(config, paths)
            check_field_names(config, reader)
            todo = _rows_to_plan(config, reader)
            query = query_for_rows(config, target, reader, todo)
            sample: Iterable[Request] | None = todo.sample(reader, query.every)
        else:
            query, sample = query_for_length(config, target, options.max_input or 1, options.shape), None
        if not query.lengths and not query.too_long:
            raise InputFileError(f"there is nothing to plan: {'; '.join(failed_lines(query))}")
        scenarios = list(query.options(options.budgets)) if query.lengths else []
        fits = bool(scenarios) and _chosen(query, scenarios).fits and not query.too_long
        remedies = query.remedies() if not fits and not query.too_long else []
        if query.too_long:
            remedies = _remedies_by_cutting(query_for_rows(_cutting(config), target, reader, todo))
        measured = _measure_step(config, options, query, sample) if options.measure and scenarios else None
    if options.as_json:
        answer = record(query, scenarios) | {"fits": fits, "remedies": remedies}
        display.data(json.dumps(answer | ({"measured": measured} if measured else {}), indent=2))
        return fits
    display.data(*scenario_lines(query, scenarios))
    if measured:
        display.data(*profile_lines(measured))
    if options.check and not fits:
        problem = _chosen(query, scenarios).problem if scenarios else None
        display.error(problem.message if problem else "some rows are longer than the model takes")
    for remedy in remedies:
        display.data(f"would make it fit: {remedy}")
    return fits


def _target(config: RunConfig, options: PlanBatchOptions) -> Machine:
    """The machine of each worker, or of each of its devices.

    Raises:
        UsageError: this machine has fewer GPUs.
    """
    workers, named = config.cluster.count, bool(options.gpu or options.gpu_memory)
    of_each = config.engine.tensor_parallel_size
    devices, needed = workers * of_each, "a GPU" if of_each == 1 else f"{of_each} GPUs"
    target = machine(config.engine, options.gpu, options.gpu_memory)
    if target.kind == "cuda" and not named and (gpus := len(hardware.visible_gpus())) < devices:
        message = f"{counted(workers, 'worker')} need {needed} each, and this machine has {gpus}"
        raise UsageError(message, hint="name the GPU that they would have: --gpu H100")
    return shared_machine(target, devices)


def _chosen(query: PlanQuery, scenarios: Sequence[Scenario]) -> Scenario:
    """The scenario of the first budget, or of the full cache if that is the policy."""
    full_cache = query.config.kv_policy == "none"
    return next(scenario for scenario in scenarios if (scenario.name == "full cache") == full_cache)


def _cutting(config: RunConfig) -> RunConfig:
    """The settings with prompts cut that are longer than the model takes."""
    return replace(config, prompt=replace(config.prompt, on_too_long="truncate-middle"))


def _remedies_by_cutting(query: PlanQuery) -> list[str]:
    """What would make every row fit where some are longer than the model takes.

    Args:
        query: the job with such rows cut.
    """
    if not query.lengths or query.too_long:
        return []
    if _chosen(query, list(query.options([query.config.kv_budget]))).fits:
        return [CUT]
    return [f"{remedy}{' ' if remedy.startswith('--') else ', with '}{CUT}" for remedy in query.remedies()]


def _check(config: RunConfig, options: PlanBatchOptions) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: names them.
    """
    if bool(config.inputs) == (options.max_input is not None):
        raise UsageError(
            "plan-batch takes an INPUT or --max-input", hint="bmx plan-batch prompts.jsonl, or --max-input 4k"
        )
    if options.shape and options.shape not in SHAPES:
        raise UsageError(f"no shape is called {options.shape}", hint=f"the shapes are {', '.join(SHAPES)}")
    if options.shape and config.inputs:
        raise UsageError("a --shape has no tokenizer for the prompts of an INPUT", hint="give --max-input 4k instead")
    if options.measure and config.cluster.count > 1:
        raise UsageError("--measure runs one model: it cannot be combined with --workers")
    if options.shape and config.engine.tensor_parallel_size > 1:
        raise UsageError("a --shape is planned for one device", hint="name the model: --model FOLDER")
    if options.shape and options.measure:
        raise UsageError("--measure loads a model: it cannot be combined with --shape", hint="bmx bench takes shapes")


def _rows_to_plan(config: RunConfig, reader: Reader) -> Todo:
    """The rows of an input.

    Raises:
        InputFileError: the input cannot be read, two rows have the same id, or there are no rows.
    """
    todo = unanswered_rows(reader, config.job.limit, config.job.share)
    if not todo.left:
        of_what = f"share {config.job.shard} of the input" if config.job.shard else "the input"
        raise InputFileError(f"{of_what} has no rows: there is nothing to plan")
    return todo


def _measure_step(
    config: RunConfig, options: PlanBatchOptions, query: PlanQuery, sample: Iterable[Request] | None
) -> dict[str, int]:
    """Load the model and run the largest step of the job's plan.

    Args:
        config: the settings.
        options: options of the command.
        query: the job.
        sample: the rows that the query measured; None for imagined ones.

    Returns:
        Bytes of the step without the slots: predicted before and after the model was loaded, and measured.

    Raises:
        UsageError: the query is about another machine.
        MemoryLimitError: the system does not tell how much memory a step takes.
    """
    from bmx.engine.engine import Engine

    if options.gpu or options.gpu_memory:
        raise UsageError("--measure runs on this machine: it cannot be combined with --gpu or --gpu-memory")
    engine = Engine.open(config.engine, config.prompt)
    lengths = query.lengths if sample is None else engine.measure(sample)
    step = engine.plan(lengths).profiled
    if step is None or step.measured is None:
        raise MemoryLimitError("this system does not tell how much memory a step takes", hint="Linux and CUDA do")
    predicted = next(scenario for scenario in query.options([config.engine.kv_budget]) if scenario.plan).plan
    return {
        "before_loading_bytes": predicted.memory.step if predicted else 0,
        "predicted_bytes": step.predicted,
        "measured_bytes": step.measured,
    }


def record(query: PlanQuery, scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """The answer for JSON."""
    target = query.machine
    rates = target.rates(query.spec.itemsize)
    return {
        "model": query.config.model,
        "architecture": query.spec.name,
        "machine": {
            "kind": target.kind,
            "name": target.name,
            "free_bytes": target.memory.free,
            "total_bytes": target.memory.total,
            "source": target.memory.source,
            "rates": asdict(rates) if rates else None,
        },
        "workers": query.workers,
        "rows": query.rows,
        "measured_rows": query.measured,
        "prompt_tokens": sum(length.prompt_tokens for length in query.lengths) * query.every,
        "unanswerable": list(map(_failed_record, query.failed)),
        "options": [_scenario_record(scenario, query.too_long) for scenario in scenarios],
    }


def _failed_record(failed: FailedRows) -> dict[str, Any]:
    examples = [{"id": name, "message": message} for name, message in failed.named]
    return {"code": failed.code, "rows": failed.count, "examples": examples}


def _scenario_record(scenario: Scenario, too_long: bool) -> dict[str, Any]:
    fits = scenario.fits and not too_long
    result: dict[str, Any] = {"cache": scenario.name, "kv_budget": scenario.budget, "fits": fits}
    if scenario.left_out:
        result["too_large_ids"] = list(scenario.left_out)
    if scenario.problem:
        result["problem"] = scenario.problem.message
    if scenario.plan:
        result |= plan_record(scenario.plan)
    if scenario.forecast:
        result["forecast"] = asdict(scenario.forecast)
    return result
