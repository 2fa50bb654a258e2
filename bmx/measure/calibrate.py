"""``bmx calibrate``: how far compressed caches are from the full one on the user's own prompts, and what to run with.

Knows the order of things: the full cache answers first, then every candidate is measured against it; each is kept as
soon as it is finished, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bmx.compress.policy import CompressionPolicy
from bmx.config import FAKE, EngineConfig
from bmx.engine.engine import Engine
from bmx.engine.open import check_cache
from bmx.errors import UsageError
from bmx.job.durable_files import locked
from bmx.job.fingerprint import differences, fingerprint
from bmx.job.input_rows import Reader, input_reader
from bmx.job.journal import Ledger, Todo
from bmx.job.manifest import write_json
from bmx.job.paths import input_paths
from bmx.kv.layout import FormatName
from bmx.measure.calibration_file import CALIBRATED, FORMAT, default_path, read_calibration
from bmx.measure.plan_batch import build_query
from bmx.measure.plots import plot_calibration, plots_note
from bmx.plan.machine import machine
from bmx.plan.scenarios import PlanQuery
from bmx.request import Request
from bmx.run_config import RunConfig
from bmx.shutdown import Interrupted, Stop
from bmx.stats import Stats
from bmx.terminal.display import Display
from bmx.terminal.tables import candidate_words
from bmx.units import now

if TYPE_CHECKING:
    from bmx.measure.teacher import Teacher

ROWS = 16  # prompts of the sample
BUDGETS = (256, 512, 1024, 2048)  # that are tried where none are asked for and prompts are longer
HALTING_ROWS = 4  # prompts of the sample that the halting test reads whole
TOLERANCE = 0.05  # share of the norm of attention that it lets go
SHORT = 400  # characters of a prompt that layers are compared on
LEAST_ALIKE = 0.5  # cosine that sharing layers must leave: KVSharer's own
MEASURED = "measured"  # layer budgets from the halting test


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What the command was asked beside its settings.

    Attributes:
        policies, budgets, formats, layers: settings to combine, each with each; no budgets: those that make sense.
        min_agreement: top-1 agreement that a recommendation must hold.
        rows: prompts of the sample.
        share_layers: how many layers may read another's keys and values.
    """

    policies: tuple[str, ...] = ()
    budgets: tuple[int | float, ...] = ()
    formats: tuple[FormatName, ...] = ()
    layers: tuple[str, ...] = ()
    min_agreement: float = 0.95
    rows: int = ROWS
    share_layers: int = 0


def calibrate(config: RunConfig, asked: CalibrateOptions, display: Display, stop: Stop) -> bool:
    """Measure every candidate and write down which one is recommended.

    Returns:
        Whether any was good enough.

    Raises:
        BmxError: it cannot start or go on.
        Interrupted: it was told to stop; what is finished is kept.
    """
    if asked.rows < 1:
        raise UsageError(f"rows must be above 0: {asked.rows}", hint=f"{ROWS} is a good number")
    if not 0 < asked.min_agreement <= 1:
        raise UsageError(f"min_agreement must be above 0 and at most 1: {asked.min_agreement}", hint="0.95 is 95%")
    if config.engine.model == FAKE:
        raise UsageError("the fake model has no cache to calibrate", hint="name a real one with --model")
    if not config.job.output_file and config.inputs == ("-",):
        raise UsageError("rows from standard input have no file to name the calibration after", hint="give one with -o")
    output = Path(config.job.output_file or default_path(config.inputs[0]))
    if not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist", hint="create it, or name another with -o")
    with locked(Path(f"{output}.lock"), config.job.lock_wait), input_paths(config.inputs) as paths:
        reader = input_reader(config, paths)
        with closing(Ledger()) as ledger:
            ledger.read(reader, config.job.limit)
            todo = ledger.todo(config.job.share)
        rows = sample(reader, todo, asked.rows)
        requests = [request for request, _ in rows]
        if not requests:
            raise UsageError(
                "there is no row to calibrate on", hint="`bmx run` says what is wrong with the input's rows"
            )
        record = begun(config, output, requests)
        question = build_query(
            replace(config, engine=reference(config.engine)), machine(config.engine, None, None), None, reader, todo
        )
        references = {place: good for place, (_, good) in enumerate(rows)}
        _Calibration(config, asked, display, stop, requests, references, question, output, record).run()
        return record["recommended"] is not None


def sample(reader: Reader, todo: Todo, count: int) -> list[tuple[Request, tuple[str, ...]]]:
    """Requests of ``count`` rows, evenly spread, to be answered greedily; each with its row's reference answers.

    Args:
        reader: reads the input.
        todo: which rows are left to do.
        count: most rows of the sample.
    """
    every = max(1, todo.left // count)
    found = ((row.request, row.references) for row in reader.rows(todo.skip, every) if row.request)
    return [
        (replace(r, params=replace(r.params, temperature=0.0, repetition_penalty=1.0)), references)
        for r, references in islice(found, count)
    ]


def reference(config: EngineConfig) -> EngineConfig:
    """The settings of what all is measured against: nothing evicted, nothing rounded, nothing shared."""
    return replace(
        config.full_cache, kv_format="auto", kv_share_layers=None, kv_layer_budgets="uniform", quantization="none"
    )


def begun(config: RunConfig, output: Path, requests: list[Request]) -> dict[str, Any]:
    """What an earlier call has left, or the beginning of a new file.

    Raises:
        UsageError: the file is about something else.
    """
    mark = {name: value for name, value in fingerprint(config).items() if name not in CALIBRATED}
    mark["rows"] = [str(request.id) for request in requests]
    found = None if config.job.overwrite else read_calibration(output)
    if found and found["fingerprint"] != mark:
        changed = differences(found["fingerprint"], mark)
        raise UsageError(
            f"{output} was made with other settings: {changed}",
            hint="--overwrite begins it anew, -o names another file",
        )
    fresh = {"calibration_format": FORMAT, "begun": now(), "model": config.engine.model, "fingerprint": mark}
    return found or fresh | {"candidates": [], "recommended": None}


class _Calibration:
    """One calibration in progress; ``record`` is what the file holds."""

    def __init__(
        self,
        config: RunConfig,
        asked: CalibrateOptions,
        display: Display,
        stop: Stop,
        requests: list[Request],
        references: dict[int, tuple[str, ...]],
        question: PlanQuery,
        output: Path,
        record: dict[str, Any],
    ) -> None:
        self._config, self._asked, self._display, self._stop = config, asked, display, stop
        self._requests, self._references = requests, references
        self._question, self._output, self._record = question, output, record

    def run(self) -> None:
        """Everything, in order."""
        for candidate in self._candidates([], ""):
            check_cache(candidate, self._config.prompt)
        with self._display.waiting(f"loading model {self._config.engine.model}"):
            full = Engine.open(reference(self._config.engine), self._config.prompt)
        factors, shared = self._measured_layers(full), self._shared_layers(full)
        candidates = self._candidates(factors, shared)
        waiting = [candidate for candidate in candidates if self._found(candidate) is None]
        if waiting or "full_cache" not in self._record:
            teacher = self._teacher(full)
            self._record["full_cache"] = self._sizes(full.config) | {"rows": len(teacher.lessons)}
            if waiting and self._config.engine.int8:
                full = self._quantised()
            for number, candidate in enumerate(waiting, 1):
                self._measure(
                    full, teacher, candidate, f"{number} of {len(waiting)}: {candidate_words(settings_of(candidate))}"
                )
        self._recommend()
        self._display.calibration(self._record, self._output)
        self._display.note(plots_note(plot_calibration(self._record, self._output)))

    def _quantised(self) -> Engine:
        """The model that answers with its linear layers in bytes, now that the one without has been heard."""
        with self._display.waiting(f"loading model {self._config.engine.model} with int8 weights"):
            return Engine.open(self._config.engine, self._config.prompt)

    def _candidates(self, factors: list[float], shared: str) -> list[EngineConfig]:
        """The settings to be measured, each once."""
        asked, engine = self._asked, self._config.engine
        longest = max(length.prompt_tokens for length in self._question.lengths)
        budgets = asked.budgets or tuple(b for b in BUDGETS if b < longest) or BUDGETS[:1]
        named = {MEASURED: tuple(factors)} if factors else {}
        layers = tuple(named.get(name, name) for name in asked.layers if name != MEASURED or factors)
        found = []
        for policy, budget, form, by_layer in product(asked.policies, budgets, asked.formats, layers):
            if budget < 1 and by_layer != "uniform":
                continue  # a share is the same for all layers
            one = replace(engine, kv_policy=policy, kv_budget=budget, kv_format=form, kv_layer_budgets=by_layer)
            one = replace(one.full_cache, kv_budget=BUDGETS[0], kv_layer_budgets="uniform") if policy == "none" else one
            found += [one, *([replace(one, kv_share_layers=shared)] if shared else [])]
        return [one for i, one in enumerate(found) if one not in found[:i] and one != reference(one)]

    def _teacher(self, full: Engine) -> Teacher:
        """What the full cache says: kept from an earlier call, or heard now."""
        from bmx.measure.teacher import Teacher

        path = self._output.with_suffix(".teacher.pt")
        found = (
            Teacher.load(path, self._requests) if self._record["candidates"] or "full_cache" in self._record else None
        )
        if found is None:
            with self._working(f"full cache: {len(self._requests)} prompts") as stats:
                found = Teacher.hear(full, self._requests, self._stop, stats)
            self._check_stop()
            found.save(path)
        for place, why in found.failed.items():
            self._display.warn(f"row {self._requests[place].id} cannot be answered, and is left out: {why}")
        if not found.lessons:
            raise UsageError("no row of the sample can be answered")
        return found

    def _measure(self, full: Engine, teacher: Teacher, candidate: EngineConfig, what: str) -> None:
        """Measure one candidate and keep what was found."""
        engine = full.with_config(candidate)
        with self._working(what) as stats:
            agreement = teacher.examine(engine, self._stop, self._references, stats=stats)
        self._check_stop()
        found = {"settings": settings_of(candidate)} | self._sizes(candidate) | agreement.record()
        self._record["candidates"].append(found)
        self._save()
        self._display.note(f"{candidate_words(settings_of(candidate))}: top-1 agreement {agreement.top1:.1%}")

    @contextmanager
    def _working(self, what: str) -> Iterator[Stats]:
        """Show what is being done, and how far it is by the counters that are handed out."""
        self._display.note(f"{what} ...")
        stats = Stats()
        with self._display.live(stats), self._stop.graceful():
            yield stats

    def _check_stop(self) -> None:
        if self._stop.signal is not None:
            raise Interrupted(self._stop.signal)

    def _found(self, candidate: EngineConfig) -> dict[str, Any] | None:
        wanted = settings_of(candidate)
        return next((one for one in self._record["candidates"] if one["settings"] == wanted), None)

    def _sizes(self, candidate: EngineConfig) -> dict[str, Any]:
        """What a candidate takes and how fast it would be, for all rows of the input."""
        policy, spec, lengths = CompressionPolicy.from_config(candidate), self._question.spec, self._question.lengths
        rows = [policy.rows_needed(length.prompt_tokens, length.max_tokens) for length in lengths]
        option = self._question.option("candidate", candidate)
        seconds = option.forecast.seconds if option.forecast else None
        answers = self._question.every * sum(length.max_tokens for length in lengths)
        return {
            "kv_bytes_per_sequence": sum(policy.layout(spec, count).nbytes for count in rows) // len(rows),
            "slots": option.plan.slots if option.plan else 0,
            "predicted_seconds": round(seconds, 1) if seconds else None,
            "predicted_tokens_per_second": round(answers / seconds, 1) if seconds else None,
        }

    def _measured_layers(self, full: Engine) -> list[float]:
        """Factors of layer budgets from the halting test, which also says what one budget for all would be."""
        from bmx.measure.layer_analysis import layer_factors, layer_needs

        if "halting_test" not in self._record:
            with self._working(f"what layers need: {min(HALTING_ROWS, len(self._requests))} prompts") as stats:
                needs = layer_needs(full, self._requests[:HALTING_ROWS], TOLERANCE, stats)
            self._check_stop()
            mean = round(sum(needs) / len(needs))
            self._record["halting_test"] = {
                "tolerance": TOLERANCE,
                "budget": mean,
                "layers": [round(need) for need in needs],
                "factors": list(layer_factors(needs)),
            }
            self._save()
        factors: list[float] = self._record["halting_test"]["factors"]
        return factors

    def _shared_layers(self, full: Engine) -> str:
        """Layers that could read another's keys and values, if any are asked for."""
        count = self._asked.share_layers
        if not count:
            return ""
        if self._record.get("shared_layers", {}).get("asked") != count:
            from bmx.measure.layer_analysis import shared_layers

            short = [Request(id=r.id, prompt=_beginning(r), raw=True) for r in self._requests]
            with self._working(f"which {count} of {len(full.spec.layers)} layers could share") as stats:
                pairs = shared_layers(full, short, count, LEAST_ALIKE, stats)
            self._check_stop()
            self._record["shared_layers"] = {"asked": count, "least_cosine": LEAST_ALIKE, "pairs": pairs}
            self._save()
        return str(self._record["shared_layers"]["pairs"])

    def _recommend(self) -> None:
        """The smallest of those that hold what is asked for."""
        least = self._asked.min_agreement
        good = [one for one in self._record["candidates"] if one["top1_agreement"] >= least and not one["failed_rows"]]
        best = min(good, key=lambda one: (one["kv_bytes_per_sequence"], -one["top1_agreement"]), default=None)
        self._record |= {"min_agreement": least, "recommended": best and best["settings"], "updated": now()}
        self._save()

    def _save(self) -> None:
        write_json(self._output, self._record)


def settings_of(candidate: EngineConfig) -> dict[str, Any]:
    """The settings that make a candidate, as flags and files write them."""
    found = {f.name: getattr(candidate, f.name) for f in fields(candidate) if f.name in CALIBRATED}
    by_layer = found["kv_layer_budgets"]
    if not isinstance(by_layer, str):
        found["kv_layer_budgets"] = ",".join(f"{factor:g}" for factor in by_layer)
    return found


def _beginning(request: Request) -> str:
    """The first characters of what a request says."""
    said = request.prompt or " ".join(str(message.get("content") or "") for message in request.messages or ())
    return said[:SHORT]
