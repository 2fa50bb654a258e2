"""A run that is told to stop, or to give up a row, does so between steps and spoils no other row's answer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest
from conftest import answers, as_requests, random_prompts, tiny_engine

from bmx.__main__ import show_unraisable
from bmx.job.job import run as run_job
from bmx.request import Request, SamplingParams
from bmx.run_config import RunConfig, given_settings
from bmx.shutdown import Interrupted, Stop
from bmx.terminal.display import Display
from bmx.terminal.reports import stopping_line

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


STARTED = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom bmx.__main__ import main; main()"
)


@pytest.mark.parametrize(
    ("moment", "number"),
    [("typer", signal.SIGINT), ("bmx.run_config", signal.SIGTERM), ("bmx.engine.engine", signal.SIGINT)],
)
def test_t9_a_signal_while_modules_are_loaded_ends_without_a_traceback(tmp_path, moment, number):
    """The signal comes when a module begins to be loaded."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    told = f"""
import os, sys
class Signal:
    def find_spec(self, name, path=None, target=None):
        if name == {moment!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Signal())
sys.argv = ["bmx", "run", "in.jsonl", "-m", "fake"]
{STARTED}"""
    ended = subprocess.run([sys.executable, "-c", told], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + number
    assert "Traceback" not in ended.stderr
    assert f"error: interrupted by {number.name}" in ended.stderr


def test_t9_a_recorded_signal_is_acknowledged_by_a_thread_that_may_take_locks():
    stop, lock, said = Stop(1e9), threading.Lock(), []

    def acknowledge(number: int) -> None:
        with lock:
            said.append(number)

    stop.acknowledge = acknowledge
    with stop.install_handlers(), stop.graceful():
        with lock:  # held by what the signal interrupts
            signal.raise_signal(signal.SIGINT)
        assert stop.requested
    assert said == [signal.SIGINT]


@pytest.mark.parametrize(
    ("number", "within", "said"),
    [
        (signal.SIGINT, 10.0, "finishing the rows in flight, up to 10 s; press Ctrl-C again to stop now"),
        (signal.SIGINT, 0.0, "dropping the rows in flight; press Ctrl-C again to stop now"),
        (
            signal.SIGTERM,
            90.0,
            "SIGTERM: finishing the rows in flight, up to 1 min 30 s; a second signal stops at once",
        ),
    ],
)
def test_t9_a_signal_is_answered_in_words(number, within, said):
    assert stopping_line(number, within).text == said


def test_t9_ctrl_c_is_acknowledged_while_rows_are_in_flight(tmp_path):
    rows = "".join(f'{{"id": {i}, "prompt": "x", "max_tokens": 1000000, "ignore_eos": true}}\n' for i in range(3))
    (tmp_path / "in.jsonl").write_text(rows)
    command = [sys.executable, "-c", STARTED, "run", "in.jsonl", "-m", "fake", "--shutdown-timeout", "1m"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        assert any("memory:" in line for line in lines)
        process.send_signal(signal.SIGINT)
        found = next(lines)  # or it came before the first step
        assert "finishing the rows in flight, up to 1 min" in found or "interrupted" in found
        process.send_signal(signal.SIGINT)
        rest = "".join(lines)
    assert process.returncode == 130
    assert "Traceback" not in rest, rest


class Finalized:
    """An object that is finalized in the very moment of a second Ctrl-C."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_t9_a_signal_that_a_finalizer_swallows_ends_the_run_at_its_next_check(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", show_unraisable)
    stop = Stop(1e9)
    with stop.install_handlers(), stop.graceful():
        signal.raise_signal(signal.SIGINT)
        assert not stop.overdue
        Finalized()
        assert stop.overdue
