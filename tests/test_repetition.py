"""Answers that repeat one stretch of tokens without end are ended and named; others are left alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import as_requests, tiny_engine
from families import tiny_model, word_tokenizer

from bmx import Request, SamplingParams
from bmx.engine.repetition import LONGEST_STRETCH
from bmx.engine.scheduler import Scheduler
from bmx.engine.sequence import Sequence
from bmx.job.output_records import as_record
from bmx.plan.memory import SlotGroup, StepSize
from bmx.request import Result, Usage


def spoken(said: list[int], forced: bool = False, **params: Any) -> tuple[int, str | None]:
    """How many of these tokens an answer has when it is finished, and why."""
    sequence = Sequence(
        request=Request(id="a", prompt="x", params=SamplingParams(**params)),
        prompt=[3],
        max_tokens=len(said),
        rows_needed=1,
        end_token_ids=frozenset({2}),
        tokenizer=word_tokenizer(),
        forced_answer=tuple(said) if forced else (),
    )
    for token in said:
        sequence.accept(token)
        if sequence.finish_reason:
            break
    return len(sequence.answer), sequence.finish_reason


def stretch(length: int) -> list[int]:
    """Tokens that do not repeat within themselves."""
    return list(range(3, 3 + length))


@pytest.mark.parametrize(
    ("begins", "length", "ended"),
    [(0, 1, 128), (0, 7, 128), (3, 1, 144), (0, 26, 144), (50, 40, 256), (0, LONGEST_STRETCH, 640), (1, 128, 656)],
)
def test_an_answer_that_repeats_a_stretch_of_tokens_is_ended(begins, length, ended):
    said = [500 + i for i in range(begins)] + stretch(length) * 1000
    assert spoken(said[:1000]) == (ended, "repetition")


@pytest.mark.parametrize(
    "said",
    [
        stretch(1) * 127,
        stretch(LONGEST_STRETCH + 1) * 8,
        stretch(50) * 4 + [9] * 40,
        [token for i in range(300) for token in (7, 8, 9, 10 + i)],
        ([5] * 100 + [6]) * 4,
    ],
    ids=["few tokens", "a long stretch", "few times", "numbers count up", "lines of dashes"],
)
def test_other_answers_are_not(said):
    assert spoken(said) == (len(said), "length")


def test_it_ends_only_what_a_model_goes_on_with_by_itself():
    said = [9] * 300
    assert spoken(said, stop_repetition=False) == (300, "length")
    assert spoken(said, ignore_eos=True) == (300, "length")
    assert spoken(said, forced=True) == (300, "length")
    assert spoken([9] * 127 + [2]) == (128, "stop")


@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_tokens_of_a_step_behind_the_repetition_are_dropped(rounds):
    sequence = Sequence(
        request=Request(id="a", prompt="x", params=SamplingParams(max_tokens=500)),
        prompt=[3],
        max_tokens=500,
        rows_needed=501,
        end_token_ids=frozenset(),
        tokenizer=word_tokenizer(),
    )
    scheduler = Scheduler((SlotGroup(501, 1),), StepSize(chunk_size=8, max_num_batched_tokens=8))
    scheduler.enqueue(sequence)
    scheduler.admit_waiting()
    while step := scheduler.schedule(rounds):
        scheduler.launched(step)
        scheduler.update(step, [9] * sum(chunk.samples for chunk in step.chunks))
    assert (len(sequence.answer), sequence.finish_reason) == (128, "repetition")


def looping_model() -> Any:
    """A Llama whose next token depends on the last one alone, so that its answers go round in a circle."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def test_a_model_that_loops_is_ended_at_the_same_token_alone_and_among_others():
    requests = as_requests([[5, 9, 14], [7] * 20], max_tokens=210)
    engine = tiny_engine(looping_model())
    results = {result.id: result for result in engine.stream(requests)}
    looping = [result for result in results.values() if result.finish_reason == "repetition"]
    assert looping
    assert engine.stats.finish_reasons["repetition"] == len(looping)
    for request in requests:
        [alone] = engine.stream([request])
        assert alone == results[request.id]
        whole = replace(request, params=replace(request.params, stop_repetition=False))
        [full] = engine.stream([whole])
        assert full.token_ids[: len(alone.token_ids)] == alone.token_ids
        assert full.finish_reason != "repetition"


def test_records_of_every_kind_name_it(bmx):
    looping_model().save_pretrained("looping")
    word_tokenizer().save_pretrained("looping")
    rows = [{"id": str(i), "prompt": f"w{i} w{i + 1}", "max_tokens": 210} for i in range(2)]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = bmx("run", "in.jsonl", "-m", "looping")
    reasons = [json.loads(line)["finish_reason"] for line in Path("in.out.jsonl").read_text().splitlines()]
    count = reasons.count("repetition")
    assert count
    assert f"{count} answer" in ended.err
    assert "for repeating one stretch of tokens" in ended.err
    result = Result(id="a", text="x", finish_reason="repetition", usage=Usage(prompt_tokens=1, completion_tokens=2))
    records = {
        dialect: json.dumps(as_record(result, "0" * 16, dialect))
        for dialect in ("chat.completion", "anthropic", "gemini")
    }
    assert '"finish_reason": "repetition"' in records["chat.completion"]
    assert '"stop_reason": "repetition"' in records["anthropic"]
    assert '"finishReason": "OTHER"' in records["gemini"]
