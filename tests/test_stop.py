"""A run that is told to stop, or to give up a row, does so between steps and spoils no other row's answer."""

from __future__ import annotations

import json
import signal

import pytest
from conftest import answers, as_requests, random_prompts, tiny_engine

from bmx.job.job import run as run_job
from bmx.request import Request, SamplingParams
from bmx.run_config import RunConfig, given_settings
from bmx.shutdown import Interrupted, Stop
from bmx.terminal.display import Display

PROMPTS = random_prompts((5, 30, 17, 23, 9, 12))


def requested(within: float) -> Stop:
    """A stop that was asked for just now."""
    stop = Stop(within)
    with stop.graceful():
        stop.request(signal.SIGTERM)
    return stop


def test_what_is_in_flight_is_finished_and_nothing_is_begun():
    requests = as_requests(PROMPTS, max_tokens=6)
    expected = answers(tiny_engine("llama"), requests)
    stop, found = Stop(1e9), {}
    for result in tiny_engine("llama", max_num_seqs=2).run(requests, stop=stop):
        found[result.id] = result.token_ids
        if not stop.requested:
            with stop.graceful():
                stop.request(signal.SIGINT)
    assert 1 <= len(found) <= 3  # the first, the other that was in flight, and one in the slot that was free already
    assert found == {name: expected[name] for name in found}


def test_what_is_in_flight_is_dropped_when_the_time_is_over():
    engine = tiny_engine("llama", max_num_seqs=2)
    assert list(engine.run(as_requests(PROMPTS, max_tokens=6), stop=requested(0.0))) == []
    assert len(answers(engine, as_requests(PROMPTS, max_tokens=2))) == len(PROMPTS)


def test_a_stop_before_the_first_step_begins_nothing():
    assert list(tiny_engine("llama").run(as_requests(PROMPTS, max_tokens=6), stop=requested(1e9))) == []


def test_a_row_that_takes_too_long_is_an_error_and_the_others_are_as_without_it():
    endless = Request(
        id="endless", prompt="w3 w4", params=SamplingParams(max_tokens=100, ignore_eos=True, stop_token_ids=())
    )
    requests = as_requests(PROMPTS, max_tokens=3)
    expected = answers(tiny_engine("llama"), requests)
    engine = tiny_engine("llama", max_num_seqs=3)
    plan = engine.plan(engine.measure([endless, *requests]))
    found = {result.id: result for result in engine.run([endless, *requests], plan, row_timeout=1e9)}
    assert len(found["endless"].token_ids) == 100
    found = {result.id: result for result in engine.run([endless], plan, row_timeout=1e-9)}
    assert found["endless"].error.code == "timeout"
    assert "--row-timeout" in found["endless"].error.message
    assert {r.id: r.token_ids for r in engine.run(requests, plan, row_timeout=1e9)} == expected


def test_a_source_that_has_nothing_for_now_is_asked_again():
    requests = as_requests(PROMPTS, max_tokens=3)
    expected = answers(tiny_engine("llama"), requests)
    engine = tiny_engine("llama", max_num_seqs=2)
    plan = engine.plan(engine.measure(requests))
    hesitant = (item for request in requests for item in (None, request, None, None))
    assert {r.id: r.token_ids for r in engine.run(hesitant, plan)} == expected


def test_the_first_signal_is_taken_down_and_the_second_ends_it():
    stop = Stop(1e9)
    with stop.install_handlers(), stop.graceful():
        signal.raise_signal(signal.SIGHUP)
        assert stop.requested
        assert not stop.overdue
        with pytest.raises(Interrupted) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.exit_code == 143


def test_a_signal_when_nothing_is_in_flight_ends_it_at_once():
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with Stop().install_handlers(), pytest.raises(Interrupted) as ended:
            signal.raise_signal(number)
        assert ended.value.exit_code == code


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop().install_handlers():
            signal.raise_signal(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGHUP) == before


class AfterSomeSteps(Stop):
    """A SIGTERM that comes in the middle of a run, and a time that is over at once."""

    looked = 0

    @property
    def requested(self) -> bool:
        self.looked += 1
        self.signal = signal.SIGTERM if self.looked > 200 else None
        return self.signal is not None

    @property
    def overdue(self) -> bool:
        return self.requested


def test_finished_rows_that_wait_for_their_turn_when_a_run_is_stopped_are_told_of(tmp_path, capfd):
    source = tmp_path / "in.jsonl"
    first = {"id": "endless", "prompt": "w", "ignore_eos": True, "max_tokens": 10**6}
    rows = [first, *({"id": i, "prompt": f"w {i}"} for i in range(3))]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RunConfig.of((str(source),), given_settings({"model": "fake", "order": "input"}))
    with pytest.raises(Interrupted):
        run_job(config, Display("plain"), AfterSomeSteps())
    assert "0 of 4 rows have their records, 3 finished ones waited for their turn" in capfd.readouterr().err
    assert (tmp_path / "in.out.jsonl").read_text() == ""
