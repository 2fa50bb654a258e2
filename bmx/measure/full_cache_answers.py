"""The full cache's answers to a sample, and how closely another cache follows them (teacher forcing).

Knows logits and token ids; knows nothing of policies or of the calibration file.

Shapes: V vocabulary, N tokens of an answer, L likeliest tokens that are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from bmx.engine.engine import Engine
from bmx.engine.runner import Watch
from bmx.errors import BmxError
from bmx.job.durable_files import replace_file
from bmx.measure.calibration_file import ANSWERS_KEY
from bmx.measure.metrics import Agreement
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

LIKELIEST = 256  # tokens whose probabilities are kept; the rest of the vocabulary counts as one token
FORCED, FREE = "forced", "free"  # how another cache answers: it reads the full cache's answer, or generates its own


@dataclass(slots=True)
class FullCacheAnswer:
    """One request and the full cache's answer to it.

    Attributes:
        request: what was asked.
        result: the answer.
        ids: [N, L] the likeliest tokens at each place of the answer, the likeliest first.
        log_probs: [N, L] their log-probabilities.
    """

    request: Request
    result: Result
    ids: Tensor
    log_probs: Tensor

    def compare_token(self, place: int, logits: Tensor) -> tuple[bool, float]:
        """Compare another cache's token at a place of the answer with this one's.

        Tokens that are equally likely are in no order: if the answer has one of the likeliest, that one counts.

        Args:
            place: of the answer.
            logits: [V] of the other cache.

        Returns:
            Whether the likeliest token is the same, and KL(full cache || other cache) in nats.
        """
        ids, log_probs, own = self.ids[place], self.log_probs[place], self.result.token_ids[place]
        best = ids[log_probs == log_probs[0]].tolist()
        likeliest = own if own in best else best[0]
        return int(logits.argmax()) == likeliest, divergence(logits, ids, log_probs)


@dataclass(slots=True)
class FullCacheAnswers:
    """The full cache's answers to a sample.

    Attributes:
        answers: by the request's place in the sample.
        failed: error messages of requests without an answer, by their places.
    """

    answers: dict[int, FullCacheAnswer] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @classmethod
    def generate(
        cls, engine: Engine, requests: list[Request], stop: Stop, stats: Stats | None = None
    ) -> FullCacheAnswers:
        """Let the full cache answer, and keep the probabilities of the likeliest tokens.

        Args:
            engine: with the full cache.
            requests: the sample.
            stop: says whether to end early.
            stats: counts what is done.
        """
        likeliest: dict[str | int, list[tuple[Tensor, Tensor]]] = {}

        def keep_likeliest(request: Request, place: int, logits: Tensor) -> None:
            top = logits.float().log_softmax(-1).topk(min(LIKELIEST, len(logits)))
            tokens = likeliest.setdefault(request.id, [])
            del tokens[place:]  # the row was restarted
            tokens.append((top.indices.cpu(), top.values.cpu()))

        full = cls()
        numbered = [replace(request, id=place) for place, request in enumerate(requests)]
        for result in _answer(engine, numbered, stop, keep_likeliest, stats=stats):
            place = int(result.id)
            if result.error:
                full.failed[place] = result.error.message
                continue
            ids, log_probs = (torch.stack(part) for part in zip(*likeliest.pop(result.id), strict=True))
            full.answers[place] = FullCacheAnswer(requests[place], result, ids, log_probs)
        return full

    def compare(
        self,
        engine: Engine,
        stop: Stop,
        references: Mapping[int, tuple[str, ...]] | None = None,
        *,
        freely: bool = True,
        stats: Stats | None = None,
    ) -> Agreement:
        """Let another cache read these answers token by token and, if wanted, generate its own.

        Args:
            engine: with the other cache.
            stop: says whether to end early.
            references: good answers from the input, by the request's place in the sample.
            freely: whether the other cache also generates answers of its own.
            stats: counts what is done.

        Raises:
            BmxError: not every request came back, although no stop was requested.
        """
        agreement, references = Agreement(), references or {}
        requests: list[Request] = []
        forced_tokens: dict[str | int, tuple[int, ...]] = {}
        for place, answer in self.answers.items():
            forced = replace(_full_length(answer), id=f"{place}/{FORCED}")
            requests.append(forced)
            forced_tokens[forced.id] = answer.result.token_ids
            if freely:
                requests.append(replace(answer.request, id=f"{place}/{FREE}"))

        def count_token(request: Request, place: int, logits: Tensor) -> None:
            sample_place, kind = _parse_id(request.id)
            answer = self.answers[sample_place]
            if kind == FORCED and place < len(answer.ids):
                agreement.count_token(*answer.compare_token(place, logits))

        results = 0
        for result in _answer(engine, requests, stop, count_token, forced_tokens, stats):
            results += 1
            place, kind = _parse_id(result.id)
            if result.error:
                agreement.failed += kind == FORCED
            elif kind == FREE:
                agreement.count_answer(result, self.answers[place].result, references.get(place, ()))
        if results < len(requests) and not stop.requested:
            raise BmxError(f"only {results} of {len(requests)} answers were compared")
        return agreement

    def save(self, path: Path, made_by: Mapping[str, Any]) -> None:
        """Write the answers to a file for a later call, whole or not at all.

        Args:
            path: the file, of the safetensors format.
            made_by: what decided the answers, for JSON.

        Raises:
            OutputError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        answers: dict[int, dict[str, Any]] = {}
        for place, answer in self.answers.items():
            tensors |= {f"ids.{place}": answer.ids.int(), f"log_probs.{place}": answer.log_probs.float()}
            result = answer.result
            answers[place] = {
                "token_ids": list(result.token_ids),
                "text": result.text,
                "reasoning": result.reasoning,
                "finish_reason": result.finish_reason,
            }
        metadata = json.dumps({"made_by": made_by, "answers": answers, "failed": self.failed})
        replace_file(path, save(tensors, {ANSWERS_KEY: metadata}))

    @classmethod
    def load(
        cls, path: Path, requests: list[Request], made_by: Mapping[str, Any], vocab: int
    ) -> FullCacheAnswers | None:
        """The answers that an earlier call saved; None if the file is damaged, or something else decided them.

        Args:
            path: the file.
            requests: the sample.
            made_by: as it was saved.
            vocab: number of tokens that the model knows.
        """
        try:
            with safe_open(path, "pt") as file:
                saved = json.loads(file.metadata()[ANSWERS_KEY])
                if saved["made_by"] != made_by:
                    return None
                failed = {int(place): str(reason) for place, reason in saved["failed"].items()}
                answers = {
                    int(place): _from_saved(file, int(place), entry, requests[int(place)])
                    for place, entry in saved["answers"].items()
                }
        except Exception:  # a damaged file may fail in any way: the answers are made again
            return None
        usable = all(_is_usable(answer, vocab) for answer in answers.values())
        return cls(answers, failed) if usable and {*answers, *failed} == set(range(len(requests))) else None


def _from_saved(file: Any, place: int, entry: dict[str, Any], request: Request) -> FullCacheAnswer:
    result = Result(
        id=place,
        text=str(entry["text"]),
        reasoning=entry.get("reasoning"),
        token_ids=tuple(entry["token_ids"]),
        finish_reason=entry["finish_reason"],
    )
    return FullCacheAnswer(
        request, result, file.get_tensor(f"ids.{place}").long(), file.get_tensor(f"log_probs.{place}")
    )


def _is_usable(answer: FullCacheAnswer, vocab: int) -> bool:
    """Whether an answer's parts fit each other and the model."""
    ids, log_probs, token_ids = answer.ids, answer.log_probs, answer.result.token_ids
    if ids.dim() != 2 or ids.shape != log_probs.shape or len(ids) != len(token_ids):
        return False
    known = all(isinstance(token, int) and 0 <= token < vocab for token in token_ids)
    return known and bool(((ids >= 0) & (ids < vocab)).all()) and bool(log_probs.isfinite().all())


def _parse_id(request_id: str | int) -> tuple[int, str]:
    """The request's place in the sample, and how it is answered."""
    place, _, kind = str(request_id).partition("/")
    return int(place), kind


def _answer(
    engine: Engine,
    requests: list[Request],
    stop: Stop,
    watch: Watch,
    forced: Mapping[str | int, tuple[int, ...]] | None = None,
    stats: Stats | None = None,
) -> Iterator[Result]:
    """Results of requests.

    Args:
        engine: answers them.
        requests: what is asked.
        stop: says whether to end early.
        watch: is called with the logits of each token.
        forced: answers that are read instead of generated, by the request's id.
        stats: counts what is done.
    """
    lengths = engine.measure(requests)
    plan, stats = engine.plan(lengths), stats or Stats()
    stats.rows_total = len(requests)
    stats.prompt_work = sum(length.prompt_tokens for length in lengths)
    stats.answer_work = sum(length.max_tokens for length in lengths)
    for result in engine.run(requests, plan, stats=stats, stop=stop, watch=watch, forced=forced):
        stats.count_row(result.error.code if result.error else None)
        yield result


def _full_length(answer: FullCacheAnswer) -> Request:
    """The request without anything that could end its forced answer early."""
    params = replace(
        answer.request.params,
        max_tokens=len(answer.result.token_ids),
        ignore_eos=True,
        stop=(),
        stop_token_ids=(),
    )
    return replace(answer.request, params=params)


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor) -> float:
    """KL(full cache || other cache) of a next token, in nats.

    Tokens that are not kept count as one token, so it is a lower bound, and close to the exact one.

    Args:
        logits: [V] of the other cache.
        ids: [L] the full cache's likeliest tokens.
        log_probs: [L] their log-probabilities.
    """
    other = logits.float().log_softmax(-1).cpu()[ids].double()
    full = log_probs.double()
    full_rest, other_rest = ((1 - part.exp().sum()).clamp(min=1e-12).log() for part in (full, other))
    found = (full.exp() * (full - other)).sum() + full_rest.exp() * (full_rest - other_rest)
    return max(0.0, float(found))
