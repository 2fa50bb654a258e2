"""``bmx plan-batch``: what of a job would fit, and how long it would take; no weights are loaded.

Builds the query, from an input's rows or from rows of an imagined length. What fits is the business of ``scenarios``,
and how it is shown that of the display.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.engine.prefix_cache import Reuse
from bmx.engine.prompt_lengths import PromptMeasurer, max_length, sampling_step
from bmx.errors import MemoryLimitError, UsageError
from bmx.job.input_rows import Reader, input_reader
from bmx.job.ledger import Todo, unanswered_rows
from bmx.job.paths import input_paths
from bmx.model.loader import load_tokenizer
from bmx.model.preview import locate_files, preview_spec
from bmx.model.prompt_encoder import PromptEncoder
from bmx.model.spec import share_layers
from bmx.plan.machine import Machine, machine
from bmx.plan.planner import Length, plan_record
from bmx.plan.scenarios import PlanQuery, Scenario, device_of
from bmx.request import Request
from bmx.run_config import RunConfig
from bmx.terminal.display import Display
from bmx.terminal.reports import profile_lines, scenario_lines

TOKEN_CHARACTERS = 3  # of a probe, for an estimate of its tokens without a tokenizer
IMAGINED_ROWS = 1000  # number of rows without an input


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBatchOptions:
    """Options of the command that are not settings.

    Attributes:
        budgets: KV budgets to compare.
        max_input: prompt tokens of imagined rows, in place of an input.
        gpu: name of a GPU to plan for, which need not be in this machine.
        gpu_memory: bytes of memory of that GPU.
        check: whether rows that do not fit are a failure.
        measure: whether to load the model and run the largest step.
        as_json: whether to answer in JSON.
    """

    budgets: tuple[int | float | str, ...]
    max_input: int | None = None
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
        Whether every row fits with the first budget, or with the full cache if that is the policy.

    Raises:
        BmxError: the input, the model or the machine cannot be read.
    """
    if bool(config.inputs) == (options.max_input is not None):
        raise UsageError(
            "plan-batch takes an INPUT or --max-input", hint="bmx plan-batch prompts.jsonl, or --max-input 4k"
        )
    target = machine(config.engine, options.gpu, options.gpu_memory)
    with input_paths(config.inputs) as paths:
        if paths:
            reader = input_reader(config, paths)
            todo = _rows_to_plan(config, reader)
            query = query_for_rows(config, target, reader, todo)
            sample: Iterable[Request] | None = todo.sample(reader, query.every)
        else:
            query, sample = query_for_length(config, target, options.max_input or 1), None
        scenarios = list(query.options(options.budgets))
        full_cache = config.engine.kv_policy == "none"
        chosen = next(scenario for scenario in scenarios if (scenario.name == "full cache") == full_cache)
        measured = _measure_step(config, options, query, sample) if options.measure else None
    remedies = query.remedies() if not chosen.fits else []
    if options.as_json:
        answer = record(query, scenarios) | {"fits": chosen.fits, "remedies": remedies}
        display.data(json.dumps(answer | ({"measured": measured} if measured else {}), indent=2))
        return chosen.fits
    display.data(*scenario_lines(query, scenarios))
    if measured:
        display.data(*profile_lines(measured))
    if chosen.problem:
        display.error(chosen.problem.message)
    for remedy in remedies:
        display.data(f"would make it fit: {remedy}")
    return chosen.fits


def _rows_to_plan(config: RunConfig, reader: Reader) -> Todo:
    """The rows of an input.

    Raises:
        InputFileError: the input cannot be read, or two rows have the same id.
        UsageError: the input has no rows.
    """
    todo = unanswered_rows(reader, config.job.limit, config.job.share)
    if not todo.left:
        raise UsageError("the input has no rows: there is nothing to plan")
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


def query_for_length(config: RunConfig, target: Machine, prompt_tokens: int) -> PlanQuery:
    """The query about a job of imagined rows, all of one length.

    Args:
        config: the settings.
        target: the machine to plan for.
        prompt_tokens: of each row.

    Raises:
        ModelError: the model cannot be found or read.
        UsageError: the model takes no more than the prompt.
    """
    engine = config.engine
    spec = share_layers(preview_spec(engine, target.kind), engine.kv_share_layers)
    policy = CompressionPolicy.from_config(engine)
    longest = max_length(engine, spec)
    answer = min(config.sampling.max_tokens, longest - prompt_tokens)
    if answer < 1:
        raise UsageError(
            f"--max-input {prompt_tokens} leaves no room for an answer: {spec.name} takes {longest} tokens"
        )
    length = Length.of(policy, prompt_tokens, answer)
    return PlanQuery(
        config=engine,
        spec=spec,
        machine=target,
        device=device_of(target, spec, engine),
        lengths=(length,) * IMAGINED_ROWS,
        rows=IMAGINED_ROWS,
        probe=len(engine.kv_probe or "") // TOKEN_CHARACTERS,
    )


def query_for_rows(config: RunConfig, target: Machine, reader: Reader, todo: Todo) -> PlanQuery:
    """The query about the rows of an input; of a large input, a sample is measured.

    Args:
        config: the settings.
        target: the machine to plan for.
        reader: reads the input.
        todo: its rows that are left to do.

    Raises:
        ModelError: the model cannot be found or read.
    """
    engine = config.engine
    spec = share_layers(preview_spec(engine, target.kind), engine.kv_share_layers)
    policy = CompressionPolicy.from_config(engine)
    source, gguf = locate_files(engine)
    encoder = PromptEncoder(load_tokenizer(source, engine, gguf), config.prompt)
    every = sampling_step(todo.left)
    reuse = None
    if engine.prefix_reuse:
        reuse = Reuse(spec=spec, policy=policy, chunk_size=engine.eviction_chunk_size)
    measurer = PromptMeasurer(encoder, policy, max_length(engine, spec), reuse)
    return PlanQuery(
        config=engine,
        spec=spec,
        machine=target,
        device=device_of(target, spec, engine),
        lengths=tuple(measurer.measure(todo.sample(reader, every))),
        rows=todo.left,
        every=every,
        probe=len(encoder.probe(engine.kv_probe)),
    )


def record(query: PlanQuery, scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """The answer for JSON."""
    target = query.machine
    rates = target.rates()
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
        "rows": query.rows,
        "measured_rows": len(query.lengths),
        "prompt_tokens": sum(length.prompt_tokens for length in query.lengths) * query.every,
        "options": [_scenario_record(scenario) for scenario in scenarios],
    }


def _scenario_record(scenario: Scenario) -> dict[str, Any]:
    result: dict[str, Any] = {"cache": scenario.name, "kv_budget": scenario.budget, "fits": scenario.fits}
    if scenario.problem:
        result["problem"] = scenario.problem.message
    if scenario.plan:
        result |= plan_record(scenario.plan)
    if scenario.forecast:
        result["forecast"] = asdict(scenario.forecast)
    return result
