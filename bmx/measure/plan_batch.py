"""``bmx plan-batch``: the question, from an input or imagined, and its answer; no weights are loaded.

Knows the order of things; what fits is worked out in ``options``, and shown by the display.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from bmx.compress.policy import CompressionPolicy
from bmx.engine.prefix_cache import Reuse
from bmx.engine.prompt_lengths import PromptMeasurer, max_length, sampling_step
from bmx.errors import MemoryLimitError, UsageError
from bmx.job.input_rows import Reader, input_reader
from bmx.job.journal import Todo, unanswered_rows
from bmx.job.paths import input_paths
from bmx.model.loader import load_tokenizer
from bmx.model.preview import locate_files, preview_spec
from bmx.model.prompt_encoder import PromptEncoder
from bmx.model.spec import share_layers
from bmx.plan.machine import Machine, machine
from bmx.plan.planner import Length, plan_record
from bmx.plan.scenarios import PlanQuery, Scenario, device_of
from bmx.run_config import RunConfig
from bmx.terminal.display import Display
from bmx.terminal.reports import profile_lines, scenario_lines

CHARACTERS_OF_A_TOKEN = 3  # or more, in a probe that no tokenizer has seen yet
IMAGINED_ROWS = 1000  # of one length, where there is no input to read


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanBatchOptions:
    """What the command was asked beside its settings.

    Attributes:
        budgets: to compare.
        max_input: prompt tokens of imagined rows, instead of an input.
        gpu, gpu_memory: a card that is not here.
        check: whether not to fit is a failure; ``measure``: whether to load the model and run the largest step.
        as_json: whether a program reads the answer.
    """

    budgets: tuple[int | float | str, ...]
    max_input: int | None = None
    gpu: str | None = None
    gpu_memory: int | None = None
    check: bool = False
    measure: bool = False
    as_json: bool = False


def plan_batch(config: RunConfig, asked: PlanBatchOptions, display: Display) -> bool:
    """Answer on standard output.

    Returns:
        Whether every row fits with the first budget (or the full cache, if that is the policy).

    Raises:
        BmxError: there is no answer.
    """
    if bool(config.inputs) == (asked.max_input is not None):
        raise UsageError(
            "plan-batch takes an INPUT or --max-input", hint="bmx plan-batch prompts.jsonl, or --max-input 4k"
        )
    where = machine(config.engine, asked.gpu, asked.gpu_memory)
    with input_paths(config.inputs) as paths:
        reader = input_reader(config, paths) if paths else None
        todo = _rows(config, reader) if reader else None
        question = build_query(config, where, asked.max_input, reader, todo)
        options = list(question.options(asked.budgets))
        chosen = next(o for o in options if (o.name == "full cache") == (config.engine.kv_policy == "none"))
        measured = _measure(config, asked, reader, todo, question) if asked.measure else None
    remedies = question.remedies() if not chosen.fits else []
    if asked.as_json:
        answer = record(question, options) | {"fits": chosen.fits, "remedies": remedies}
        display.data(json.dumps(answer | ({"measured": measured} if measured else {}), indent=2))
        return chosen.fits
    display.data(*scenario_lines(question, options))
    if measured:
        display.data(*profile_lines(measured))
    if chosen.problem:
        display.error(chosen.problem.message)
    for remedy in remedies:
        display.data(f"would make it fit: {remedy}")
    return chosen.fits


def _rows(config: RunConfig, reader: Reader) -> Todo:
    """The rows of an input.

    Raises:
        InputFileError: it cannot be read, or two rows have the same id.
        UsageError: it has none.
    """
    todo = unanswered_rows(reader, config.job.limit, config.job.share)
    if not todo.left:
        raise UsageError("the input has no rows: there is nothing to plan")
    return todo


def _measure(
    config: RunConfig, asked: PlanBatchOptions, reader: Reader | None, todo: Todo | None, question: PlanQuery
) -> dict[str, int]:
    """Load the model, plan for real, run the largest step: bytes without the slots, as predicted and as measured.

    Raises:
        UsageError: the question is about another machine.
    """
    from bmx.engine.engine import Engine

    if asked.gpu or asked.gpu_memory:
        raise UsageError("--measure runs on this machine: it cannot be combined with --gpu or --gpu-memory")
    engine = Engine.open(config.engine, config.prompt)
    lengths = engine.measure(todo.sample(reader, question.every)) if reader and todo else question.lengths
    step = engine.plan(lengths).profiled
    if step is None or step.measured is None:
        raise MemoryLimitError("this system does not tell what a step takes", hint="Linux and CUDA do")
    foreseen = next(o for o in question.options([config.engine.kv_budget]) if o.plan).plan
    return {
        "before_loading_bytes": foreseen.memory.step if foreseen else 0,
        "predicted_bytes": step.predicted,
        "measured_bytes": step.measured,
    }


def build_query(
    config: RunConfig, where: Machine, max_input: int | None, reader: Reader | None, todo: Todo | None
) -> PlanQuery:
    """What is asked: the lengths of an input's rows, or of imagined ones.

    Args:
        max_input: prompt tokens of imagined rows.
        reader: the input, if there is one, and ``todo`` its rows.
    """
    spec = share_layers(preview_spec(config.engine, where.kind), config.engine.kv_share_layers)
    policy = CompressionPolicy.from_config(config.engine)
    longest = max_length(config.engine, spec)
    asked = partial(
        PlanQuery, config=config.engine, spec=spec, machine=where, device=device_of(where, spec, config.engine)
    )
    if reader is None or todo is None:
        prompt = max_input or 1
        answer = min(config.sampling.max_tokens, longest - prompt)
        if answer < 1:
            raise UsageError(f"--max-input {prompt} leaves no room for an answer: {spec.name} takes {longest} tokens")
        lengths = [Length.of(policy, prompt, answer)]
        probe = len(config.engine.kv_probe or "") // CHARACTERS_OF_A_TOKEN
        return asked(lengths=tuple(lengths * IMAGINED_ROWS), rows=IMAGINED_ROWS, probe=probe)
    source, gguf = locate_files(config.engine)
    encoder = PromptEncoder(load_tokenizer(source, config.engine, gguf), config.prompt)
    every = sampling_step(todo.left)
    reuse = None
    if config.engine.prefix_reuse:
        reuse = Reuse(spec=spec, policy=policy, chunk_size=config.engine.eviction_chunk_size)
    lengths = PromptMeasurer(encoder, policy, longest, reuse).measure(todo.sample(reader, every))
    probe = len(encoder.probe(config.engine.kv_probe))
    return asked(lengths=tuple(lengths), rows=todo.left, every=every, probe=probe)


def record(asked: PlanQuery, options: Sequence[Scenario]) -> dict[str, Any]:
    """The answers as JSON."""
    machine = asked.machine
    rates = machine.rates()
    return {
        "model": asked.config.model,
        "architecture": asked.spec.name,
        "machine": {
            "kind": machine.kind,
            "name": machine.name,
            "free_bytes": machine.memory.free,
            "total_bytes": machine.memory.total,
            "source": machine.memory.source,
            "rates": asdict(rates) if rates else None,
        },
        "rows": asked.rows,
        "measured_rows": len(asked.lengths),
        "prompt_tokens": sum(length.prompt_tokens for length in asked.lengths) * asked.every,
        "options": [_scenario_record(option) for option in options],
    }


def _scenario_record(option: Scenario) -> dict[str, Any]:
    found: dict[str, Any] = {"cache": option.name, "kv_budget": option.budget, "fits": option.fits}
    if option.problem:
        found["problem"] = option.problem.message
    if option.plan:
        found |= plan_record(option.plan)
    if option.forecast:
        found["forecast"] = asdict(option.forecast)
    return found
