"""The full cache as a teacher: what it said, how sure it was of each token, and how far another cache is from that.

Knows logits and token ids; knows nothing of caches, policies or files.

Shapes: V vocabulary, N tokens of an answer, L likeliest tokens that are remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bmx.engine.engine import Engine
from bmx.engine.runner import Watch
from bmx.errors import BmxError
from bmx.measure.metrics import Agreement
from bmx.request import Request, Result
from bmx.shutdown import Stop
from bmx.stats import Stats

LIKELIEST = 256  # tokens whose probabilities are remembered; the rest of the vocabulary counts as one


@dataclass(slots=True)
class Lesson:
    """One request and what the full cache made of it.

    Attributes:
        result: its answer.
        ids: [N, L] the likeliest tokens at each place, the best first; logs [N, L] their log-probabilities.
    """

    request: Request
    result: Result
    ids: Tensor
    logs: Tensor


@dataclass(slots=True)
class Teacher:
    """Lessons by the request's place in the sample."""

    lessons: dict[int, Lesson] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @classmethod
    def hear(cls, engine: Engine, requests: list[Request], stop: Stop, stats: Stats | None = None) -> Teacher:
        """Let the full cache answer, and note how sure it was.

        Args:
            engine: with the full cache.
            requests: the sample.
            stop: says whether to end early.
            stats: counts what is done.
        """
        heard: dict[str | int, list[tuple[Tensor, Tensor]]] = {}

        def watch(request: Request, place: int, logits: Tensor) -> None:
            best = logits.float().log_softmax(-1).topk(min(LIKELIEST, len(logits)))
            said = heard.setdefault(request.id, [])
            del said[place:]  # a row that began again
            said.append((best.indices.cpu(), best.values.cpu()))

        teacher = cls()
        for result in answer(engine, [replace(r, id=i) for i, r in enumerate(requests)], stop, watch, stats=stats):
            place = int(result.id)
            if result.error:
                teacher.failed[place] = result.error.message
                continue
            ids, logs = (torch.stack(part) for part in zip(*heard.pop(result.id), strict=True))
            teacher.lessons[place] = Lesson(requests[place], result, ids, logs)
        return teacher

    def examine(
        self,
        engine: Engine,
        stop: Stop,
        references: Mapping[int, tuple[str, ...]] | None = None,
        *,
        freely: bool = True,
        stats: Stats | None = None,
    ) -> Agreement:
        """Let another cache read the full cache's answers and, unless only that is wanted, write its own.

        Args:
            engine: with the other cache.
            stop: says whether to end early.
            references: good answers by the request's place in the sample, where its row has some.
            freely: whether the other cache also writes its own answers.
            stats: counts what is done.

        Raises:
            BmxError: told to stop before all was answered.
        """
        found, references = Agreement(), references or {}
        forced, free = "forced", "free"

        def watch(request: Request, place: int, logits: Tensor) -> None:
            lesson = self.lessons[int(str(request.id).partition("/")[0])]
            if str(request.id).endswith(forced) and place < len(lesson.ids):
                found.count_token(*_distance(logits, lesson.ids[place], lesson.logs[place]))

        requests, told = [], {}
        for place, lesson in self.lessons.items():
            requests.append(replace(_told(lesson), id=f"{place}/{forced}"))
            told[requests[-1].id] = lesson.result.token_ids
            if freely:
                requests.append(replace(lesson.request, id=f"{place}/{free}"))
        seen = 0
        for result in answer(engine, requests, stop, watch, told, stats):
            row, _, kind = str(result.id).partition("/")
            seen += 1
            lesson = self.lessons[int(row)]
            if result.error:
                found.failed += kind == forced
            elif kind == free:
                found.count_answer(result, lesson.result, references.get(int(row), ()))
        if seen < len(requests) and not stop.requested:
            raise BmxError("not all was compared")
        return found

    def save(self, path: Path) -> None:
        """Keep it for another time."""
        torch.save(
            {
                place: {
                    "ids": lesson.ids.int(),
                    "logs": lesson.logs,
                    "token_ids": list(lesson.result.token_ids),
                    "text": lesson.result.text,
                    "reason": lesson.result.finish_reason,
                }
                for place, lesson in self.lessons.items()
            }
            | {"failed": self.failed},
            path,
        )

    @classmethod
    def load(cls, path: Path, requests: list[Request]) -> Teacher | None:
        """What was kept, or None if there is nothing that can be read."""
        try:
            kept: dict[Any, Any] = torch.load(path, weights_only=True)
            failed = kept.pop("failed")
            lessons = {place: _lesson(place, said, requests[place]) for place, said in kept.items()}
        except Exception:  # a file that was torn or is another's may fail in any way: it is made anew
            return None
        return cls(lessons, failed) if len(lessons) + len(failed) == len(requests) else None


def _lesson(place: int, said: dict[str, Any], request: Request) -> Lesson:
    result = Result(id=place, text=said["text"], token_ids=tuple(said["token_ids"]), finish_reason=said["reason"])
    return Lesson(request, result, said["ids"].long(), said["logs"])


def answer(
    engine: Engine,
    requests: list[Request],
    stop: Stop,
    watch: Watch,
    forced: Mapping[str | int, tuple[int, ...]] | None = None,
    stats: Stats | None = None,
) -> Iterable[Result]:
    """Results of requests, all of their logits shown to ``watch``.

    Args:
        engine: answers them.
        requests: what is asked.
        stop: says whether to end early.
        watch: is shown the logits of each token.
        forced: answers that are read instead of written, by the request's id.
        stats: counts what is done.
    """
    lengths = engine.measure(requests)
    plan, stats = engine.plan(lengths), stats or Stats()
    stats.rows_total, stats.work_total = len(requests), sum(one.prompt_tokens + one.max_tokens for one in lengths)
    for result in engine.run(requests, plan, stats=stats, stop=stop, watch=watch, forced=forced):
        stats.count_row(result.error.code if result.error else None)
        yield result


def _told(lesson: Lesson) -> Request:
    """The request of a forced answer: nothing may end it early."""
    ids = lesson.result.token_ids
    params = replace(lesson.request.params, max_tokens=len(ids), ignore_eos=True, stop=(), stop_token_ids=())
    return replace(lesson.request, params=params)


def _distance(logits: Tensor, ids: Tensor, logs: Tensor) -> tuple[bool, float]:
    """Whether the best token is the same, and KL(full cache || this one) in nats.

    All tokens beyond the remembered ones count as one, so that the divergence is a lower bound, and a near one.
    """
    mine = logits.float().log_softmax(-1).cpu()[ids].double()
    theirs = logs.double()
    rest = [(1 - part.exp().sum()).clamp(min=1e-12).log() for part in (theirs, mine)]
    spread = (theirs.exp() * (theirs - mine)).sum() + rest[0].exp() * (rest[0] - rest[1])
    return int(logits.argmax()) == int(ids[0]), max(0.0, float(spread))
