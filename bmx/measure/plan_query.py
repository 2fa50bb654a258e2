"""The job that a plan is asked for: its lengths, from the rows of an input or imagined, and a model known by its sizes.

Knows inputs and tokenizers; reads no weights. What fits is the business of ``scenarios``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.prefix_cache import Reuse
from bmx.engine.prompt_lengths import PromptMeasurer, max_length, sampling_step
from bmx.errors import RowError, UsageError
from bmx.job.input_rows import Reader
from bmx.job.ledger import Todo
from bmx.model.loader import load_tokenizer
from bmx.model.number_type import dtype_name
from bmx.model.preview import locate_files, preview_spec, with_quantized_weights
from bmx.model.prompt_encoder import PromptEncoder
from bmx.model.random_models import SHAPES, preview_random_model
from bmx.model.spec import ModelSpec
from bmx.model.spec_settings import under_settings
from bmx.plan.machine import Machine
from bmx.plan.planner import Length
from bmx.plan.scenarios import FailedRows, PlanQuery, device_of
from bmx.request import Request
from bmx.run_config import RunConfig

TOKEN_CHARACTERS = 3  # of a probe, for an estimate of its tokens without a tokenizer
IMAGINED_ROWS = 1000  # number of rows without an input and without --limit


def query_for_length(config: RunConfig, target: Machine, prompt_tokens: int, shape: str | None = None) -> PlanQuery:
    """The query about a job of imagined rows, all of one length.

    Args:
        config: the settings; ``limit`` and ``shard`` say how many rows.
        target: the machine to plan for.
        prompt_tokens: of each row.
        shape: of a model with random weights, which stands for the configured one.

    Raises:
        ModelError: the model cannot be found or read.
        UsageError: the model takes no more than the prompt, or the share has no rows.
    """
    engine, answer = config.engine, config.sampling.max_tokens
    if shape:
        spec = _spec_of_shape(engine, target.kind, shape, prompt_tokens + answer)
    else:
        spec = preview_spec(engine, target.kind)
    spec = under_settings(spec, engine)
    answer = min(answer, max_length(engine, spec) - prompt_tokens)
    if answer < 1:
        longest = max_length(engine, spec)
        raise UsageError(
            f"--max-input {prompt_tokens} leaves no room for an answer: {spec.name} takes {longest} tokens"
        )
    first, shares = config.job.share
    of_all = config.job.limit or IMAGINED_ROWS
    rows = ceil((of_all - first + 1) / shares)
    if rows < 1:
        raise UsageError(f"share {config.job.shard} of {of_all} rows has no rows", hint="give a larger --limit")
    length = Length.of(CompressionPolicy.from_config(engine, spec), prompt_tokens, answer)
    return PlanQuery(
        config=config.cluster.of_each_worker(engine, rows),
        spec=spec,
        machine=target,
        device=device_of(target, spec, engine, tokenizer=shape is None),
        lengths=(length,) * rows,
        rows=rows,
        probe=len(engine.kv_probe or "") // TOKEN_CHARACTERS,
        workers=config.cluster.count,
    )


def _spec_of_shape(engine: EngineConfig, kind: str, shape: str, longest: int) -> ModelSpec:
    """The sizes of a model with random weights.

    Args:
        engine: the settings.
        kind: of the device, ``cpu`` or ``cuda``.
        shape: the model's shape, by its name.
        longest: tokens of prompt and answer.
    """
    spec = preview_random_model(shape, longest, dtype_name(engine, kind, SHAPES[shape]))
    return spec if engine.quantization == "none" else with_quantized_weights(spec, engine, kind)


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
    spec = under_settings(preview_spec(engine, target.kind), engine)
    policy = CompressionPolicy.from_config(engine, spec)
    source, gguf = locate_files(engine)
    encoder = PromptEncoder(load_tokenizer(source, engine, gguf), config.prompt)
    every = sampling_step(todo.left)
    reuse = None
    if engine.prefix_reuse:
        reuse = Reuse(spec=spec, policy=policy, chunk_size=engine.eviction_chunk_size)
    measurer = PromptMeasurer(encoder, policy, max_length(engine, spec), reuse, spec.vocab)
    names: dict[str | int, None] = {}
    failed: dict[str, FailedRows] = {}

    def note_failure(name: str | int, error: RowError) -> None:
        names.pop(name, None)
        failed.setdefault(error.code, FailedRows(error.code)).add(name, error.message)

    def requests() -> Iterator[Request]:
        for row in reader.rows(todo.skip, every, todo.longest):
            if row.request:
                names[row.id] = None
                yield row.request
            elif row.error:
                note_failure(row.id, row.error)

    lengths = measurer.measure(requests(), lambda request, error: note_failure(request.id, error))
    return PlanQuery(
        config=config.cluster.of_each_worker(engine, todo.left),
        spec=spec,
        machine=target,
        device=device_of(target, spec, engine),
        lengths=tuple(lengths),
        rows=todo.left,
        every=every,
        probe=len(encoder.probe(engine.kv_probe)),
        names=tuple(map(str, names)),
        failed=tuple(failed.values()),
        skips_too_long=config.prompt.on_too_long == "skip",
        workers=config.cluster.count,
    )
