"""``bmx calibrate``: measures on the user's own prompts how close compressed caches come to the full cache.

Knows the order of things: the full cache answers first, then every candidate is compared with it, and one is
recommended. Each measurement is saved as soon as it is finished, so that the same command resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from bmx.compress.policy import CompressionPolicy
from bmx.config import FAKE, EngineConfig
from bmx.engine.engine import Engine
from bmx.engine.grammar import check_format
from bmx.engine.memory_meter import release
from bmx.engine.open import check_cache
from bmx.errors import UsageError
from bmx.job.field_names import check_field_names
from bmx.job.input_rows import Reader, input_reader
from bmx.job.ledger import Todo, unanswered_rows
from bmx.job.locks import locked
from bmx.job.manifest import write_json
from bmx.job.paths import find_record_path, input_paths
from bmx.measure.calibration_file import (
    answers_path,
    default_path,
    is_answers_file,
    is_calibration_file,
    saved_or_new_record,
)
from bmx.measure.candidates import MEASURED, Axes, full_cache_config, settings_of
from bmx.measure.metrics import on_frontier
from bmx.measure.plan_query import query_for_rows
from bmx.measure.plots import CHOOSE_ANOTHER, check_plots, plot_calibration, plots_note
from bmx.model.loader import check_quantization
from bmx.model.spec_settings import under_settings
from bmx.plan.machine import machine
from bmx.plan.scenarios import PlanQuery
from bmx.request import Request
from bmx.run_config import RunConfig, setting_named
from bmx.shutdown import Interrupted, Stop
from bmx.stats import Stats
from bmx.terminal.display import Display
from bmx.terminal.reports import calibration_lines, failed_lines
from bmx.terminal.tables import candidate_words, counted, duration
from bmx.units import layers_text, now

if TYPE_CHECKING:
    from bmx.measure.full_cache_answers import FullCacheAnswers

ROWS = 16  # prompts of the sample
LAYER_ROWS = 4  # prompts of the sample on which layers compete for pairs
LAYER_SHARE = 0.25  # of their pairs: what they compete for
SHORT = 400  # characters of a prompt on which layers are compared
LEAST_COSINE = 0.5  # similarity that sharing layers must leave: KVSharer's own
READINGS = 2  # of each prompt, for a candidate: it reads the full cache's answer, and generates its own


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """Options of the command that are not settings.

    Attributes:
        axes: what to try.
        min_agreement: least top-1 agreement of a recommended candidate, from 0 to 1.
        rows: prompts of the sample.
        share_layers: number of layers that may read another layer's keys and values.
    """

    axes: Axes
    min_agreement: float = 0.95
    rows: int = ROWS
    share_layers: int = 0


def calibrate(config: RunConfig, options: CalibrateOptions, display: Display, stop: Stop) -> bool:
    """Measure every candidate, and save which one is recommended.

    Args:
        config: the settings.
        options: options of the command.
        display: shows measurements and progress.
        stop: says whether to end early.

    Returns:
        Whether any candidate is good enough.

    Raises:
        BmxError: it cannot start or continue.
        Interrupted: a stop was requested; finished measurements are saved.
    """
    _check(config, options)
    check_format(config.sampling)
    output = Path(config.job.output_file or default_path(config.inputs[0]))
    if not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist", hint="create it, or name another with -o")
    output, lock = find_record_path(config, "calibrate", str(output))
    _check_files(output)
    with locked(lock, config.job.lock_wait), input_paths(config.inputs) as paths:
        reader = input_reader(config, paths)
        check_field_names(config, reader)
        todo = unanswered_rows(reader, config.job.limit, config.job.share)
        sample = read_sample(reader, todo, options.rows)
        if not sample.requests:
            raise UsageError(
                "there is no row to calibrate on", hint="`bmx run` says what is wrong with the input's rows"
            )
        record = saved_or_new_record(config, output, sample.keys)
        full_config = replace(config, engine=full_cache_config(config.engine))
        query = query_for_rows(full_config, machine(config.engine, None, None), reader, todo)
        if not query.lengths:
            raise UsageError(f"there is no row to calibrate on: {'; '.join(failed_lines(query))}")
        _Calibration(
            config=config,
            options=options,
            display=display,
            stop=stop,
            sample=sample,
            query=query,
            output=output,
            record=record,
        ).run()
        return record["recommended"] is not None


def _check(config: RunConfig, options: CalibrateOptions) -> None:
    """Refuse options before anything is read.

    Raises:
        UsageError: an option is out of range, or does not fit the settings.
    """
    if options.rows < 1:
        raise UsageError(f"rows must be above 0: {options.rows}", hint=f"{ROWS} is a good number")
    if not 0 < options.min_agreement <= 1:
        raise UsageError(f"min_agreement must be above 0 and at most 1: {options.min_agreement}", hint="0.95 is 95%")
    if config.engine.model == FAKE:
        raise UsageError("the fake model has no cache to calibrate", hint="name a real one with --model")
    axes = options.axes
    if set(axes.layers) != {"uniform"} and not any(isinstance(budget, int) for budget in axes.budgets):
        raise UsageError("kv_layer_budgets needs a budget in KV pairs, not a share", hint="--kv-budget 512,1024")
    if not config.job.output_file and config.inputs == ("-",):
        raise UsageError("rows from standard input have no file to name the calibration after", hint="give one with -o")


def _check_files(output: Path) -> None:
    """Refuse to replace a file that is not of a calibration, whatever ``--overwrite`` says.

    Raises:
        UsageError: names the file.
    """
    if not is_calibration_file(output):
        raise UsageError(f"{output} exists and is not a calibration file", hint="choose another with -o")
    if not is_answers_file(answers_path(output)):
        raise UsageError(f"{answers_path(output)} exists and would be replaced", hint=CHOOSE_ANOTHER)
    check_plots(output)


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows of the input that candidates are measured on.

    Attributes:
        requests: their requests, to be answered greedily.
        references: good answers from the input, by the request's place in the sample.
        keys: a hash of each row's line, by the row's id.
    """

    requests: list[Request]
    references: dict[int, tuple[str, ...]]
    keys: dict[str, str]


def read_sample(reader: Reader, todo: Todo, count: int) -> Sample:
    """At most ``count`` rows of the input, evenly spread.

    Args:
        reader: reads the input.
        todo: the rows that are left to do.
        count: most rows of the sample.
    """
    every = max(1, todo.left // count)
    rows = list(islice((row for row in reader.rows(todo.skip, every) if row.request), count))
    return Sample(
        requests=[_greedy(row.request) for row in rows if row.request],
        references={place: row.references for place, row in enumerate(rows)},
        keys={str(row.id): row.key for row in rows},
    )


def _greedy(request: Request) -> Request:
    return replace(request, params=replace(request.params, temperature=0.0, repetition_penalty=1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Calibration:
    """A calibration in progress.

    Attributes:
        config: the settings.
        options: options of the command.
        display: shows measurements and progress.
        stop: says whether to end early.
        sample: what is measured on.
        query: the whole input and the full cache, for plans and forecasts.
        output: the file.
        record: its contents.
    """

    config: RunConfig
    options: CalibrateOptions
    display: Display
    stop: Stop
    sample: Sample
    query: PlanQuery
    output: Path
    record: dict[str, Any]

    def run(self) -> None:
        """Measure everything that is not measured yet, in order, and recommend a candidate."""
        axes = self.options.axes
        for candidate in axes.candidates(self.config.engine, {}, ""):
            check_cache(candidate, self.config.prompt)
        self._update_sizes()
        with self.display.waiting(f"loading model {self.config.engine.model}"):
            full = Engine.open(full_cache_config(self.config.engine), self.config.prompt)
        check_quantization(self.config.engine.quantization, full.backend.describe()["dtype"], full.backend.device_type)
        candidates = axes.candidates(self.config.engine, self._layer_factors(full), self._shared_layers(full))
        left = [candidate for candidate in candidates if not self._is_measured(candidate)]
        prompts = counted(len(self.sample.requests), "prompt")
        self.display.note(f"{counted(len(left), 'candidate')} to measure on {prompts}, beside the full cache")
        if left or "full_cache" not in self.record:
            full_answers = self._full_cache_answers(full)
            self.record["full_cache"] = self._sizes(full.config) | {"rows": len(full_answers.answers)}
            if left and self.config.engine.quantization != "none":
                del full
                release()  # a GPU may not hold both
                full = self._open_quantized()
            self._measure_all(full, full_answers, left)
        self._recommend()
        self.display.data(*calibration_lines(self.record, self.output))
        self.display.note(plots_note(plot_calibration(self.record, self.output)))

    def _open_quantized(self) -> Engine:
        """An engine with quantised weights, which replaces the full one once the full cache's answers are known."""
        model, how = self.config.engine.model, self.config.engine.quantization
        with self.display.waiting(f"loading model {model} with {how} weights"):
            return Engine.open(self.config.engine, self.config.prompt)

    def _full_cache_answers(self, full: Engine) -> FullCacheAnswers:
        """The full cache's answers: saved by an earlier call, or generated now.

        Raises:
            UsageError: no row of the sample can be answered.
        """
        from bmx.measure.full_cache_answers import FullCacheAnswers

        path, requests, made_by = answers_path(self.output), self.sample.requests, self.record["fingerprint"]
        resumed = self.record["candidates"] or "full_cache" in self.record
        full_answers = FullCacheAnswers.load(path, requests, made_by, full.spec.vocab) if resumed else None
        if full_answers is None:
            with self._measuring(f"full cache: {counted(len(requests), 'prompt')}") as stats:
                full_answers = FullCacheAnswers.generate(full, requests, self.stop, stats)
            self.record["full_cache_seconds"] = round(stats.elapsed, 1)
            full_answers.save(path, made_by)
            for warning in full.prompt_warnings():
                self.display.warn(warning)
        for place, reason in full_answers.failed.items():
            self.display.warn(f"row {requests[place].id} cannot be answered, and is left out: {reason}")
        if not full_answers.answers:
            raise UsageError("no row of the sample can be answered")
        return full_answers

    def _measure_all(self, full: Engine, full_answers: FullCacheAnswers, left: list[EngineConfig]) -> None:
        """Measure candidates one after the other, and say how long it may take.

        Args:
            full: an engine with the model.
            full_answers: what is compared with.
            left: the candidates.
        """
        each, begun = READINGS * self.record.get("full_cache_seconds", 0.0), monotonic()
        for number, candidate in enumerate(left):
            each = (monotonic() - begun) / number if number else each
            time_left = f", about {duration(each * (len(left) - number))} left" if each else ""
            self._measure(full, full_answers, candidate, f"{number + 1} of {len(left)}{time_left}")

    def _measure(self, full: Engine, full_answers: FullCacheAnswers, candidate: EngineConfig, number: str) -> None:
        """Compare one candidate with the full cache, and save the measurement.

        Args:
            full: an engine with the model.
            full_answers: what is compared with.
            candidate: the settings.
            number: of the candidate, for the display.
        """
        settings = settings_of(candidate)
        name = candidate_words(settings)
        with self._measuring(f"{number}: {name}") as stats:
            engine = full.with_config(candidate)
            agreement = full_answers.compare(engine, self.stop, self.sample.references, stats=stats)
        self.record["candidates"].append({"settings": settings} | self._sizes(candidate) | agreement.record())
        self._save()
        self.display.note(f"{name}: top-1 agreement {agreement.top1:.1%}")

    @contextmanager
    def _measuring(self, what: str) -> Iterator[Stats]:
        """Show what is measured and its progress, by the counters that it yields.

        Raises:
            Interrupted: a stop was requested meanwhile.
        """
        self.display.note(f"{what} ...")
        stats = Stats()
        with self.display.live(stats), self.stop.graceful():
            yield stats
        if self.stop.signal is not None:
            raise Interrupted(self.stop.signal)

    def _is_measured(self, candidate: EngineConfig) -> bool:
        settings = settings_of(candidate)
        return any(measured["settings"] == settings for measured in self.record["candidates"])

    def _sizes(self, candidate: EngineConfig) -> dict[str, Any]:
        """A candidate's memory, slots and predicted speed, for all rows of the input."""
        query = replace(self.query, spec=under_settings(self.query.spec, candidate))
        spec, lengths = query.spec, query.lengths
        policy = CompressionPolicy.from_config(candidate, spec)
        rows = [policy.rows_needed(length.prompt_tokens, length.max_tokens) for length in lengths]
        scenario = query.option("candidate", candidate)
        seconds = scenario.forecast.seconds if scenario.forecast else None
        answer_tokens = self.query.every * sum(length.max_tokens for length in lengths)
        return {
            "kv_bytes_per_sequence": sum(policy.answering.layout(spec, count).nbytes for count in rows) // len(rows),
            "slots": scenario.plan.slots if scenario.plan else 0,
            "predicted_seconds": round(seconds, 1) if seconds else None,
            "predicted_tokens_per_second": round(answer_tokens / seconds, 1) if seconds else None,
        }

    def _update_sizes(self) -> None:
        """Work out the sizes of what earlier calls measured anew: they are those of all rows of the input as it is."""
        for measured in self.record["candidates"]:
            settings = {name: setting_named(name).coerce(value) for name, value in measured["settings"].items()}
            measured.update(self._sizes(replace(self.config.engine, **settings)))
        if "full_cache" in self.record:
            self.record["full_cache"] |= self._sizes(full_cache_config(self.config.engine))

    def _layer_factors(self, full: Engine) -> dict[str, str]:
        """Factors of layers and heads for each policy that is tried, as flags write them, if wanted."""
        measured: dict[str, str] = self.record.get("layer_factors", {}).get("factors", {})
        axes = self.options.axes
        for policy in axes.policies:
            if MEASURED not in axes.layers or policy == "none" or policy in measured:
                continue
            from bmx.measure.layer_analysis import pooled_factors

            requests = self.sample.requests[:LAYER_ROWS]
            engine = full.with_config(replace(full.config, kv_policy=policy))
            with self._measuring(f"what layers need: {policy}, {counted(len(requests), 'prompt')}") as stats:
                measured[policy] = layers_text(pooled_factors(engine, requests, LAYER_SHARE, stats))
            self.record["layer_factors"] = {"share": LAYER_SHARE, "factors": measured}
            self._save()
        return measured

    def _shared_layers(self, full: Engine) -> str:
        """Layers that could read another's keys and values, as ``kv_share_layers`` takes them; empty if not wanted."""
        count = self.options.share_layers
        if not count:
            return ""
        if self.record.get("shared_layers", {}).get("asked") != count:
            from bmx.measure.layer_analysis import shared_layers

            requests = [Request(id=r.id, prompt=_beginning(r), raw=True) for r in self.sample.requests]
            with self._measuring(f"which {count} of {len(full.spec.layers)} layers could share") as stats:
                pairs = shared_layers(full, requests, count, LEAST_COSINE, stats)
            self.record["shared_layers"] = {"asked": count, "least_cosine": LEAST_COSINE, "pairs": pairs}
            self._save()
        return str(self.record["shared_layers"]["pairs"])

    def _recommend(self) -> None:
        """Mark the frontier, and recommend its candidate with the least memory of those that agree well enough."""
        least, candidates = self.options.min_agreement, self.record["candidates"]
        whole = [candidate for candidate in candidates if not candidate["failed_rows"]]
        points = [(c["kv_bytes_per_sequence"], (c["top1_agreement"], -c["kl_divergence"])) for c in whole]
        best = [candidate for candidate, on in zip(whole, on_frontier(points), strict=True) if on]
        for candidate in candidates:
            candidate["on_frontier"] = candidate in best
        good = [candidate for candidate in best if candidate["top1_agreement"] >= least]
        chosen = min(good, key=lambda candidate: candidate["kv_bytes_per_sequence"], default=None)
        self.record.update(min_agreement=least, recommended=chosen and chosen["settings"], updated=now())
        self._save()

    def _save(self) -> None:
        write_json(self.output, self.record)


def _beginning(request: Request) -> str:
    """The first characters of a request's text."""
    text = request.prompt or " ".join(str(message.get("content") or "") for message in request.messages or ())
    return text[:SHORT]
