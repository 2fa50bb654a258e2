"""Workers by Ray answer as one engine does; a kill of any process changes no answer and leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from kill_workers import MEASURED, Killer, compared, disturbed, row

from bmx import Engine
from bmx.cluster.fleet import Fleet
from bmx.run_config import RunConfig
from bmx.shutdown import Stop
from bmx.stats import Stats

TIMEOUT = 3.0  # --worker-timeout of the workers that all tests share


@pytest.fixture(scope="module")
def fleet():
    """Three workers with the fake model."""
    config = RunConfig.of(("-",), {"model": "fake", "workers": 3, "worker_timeout": TIMEOUT})
    with Fleet.open(config, notes.append) as fleet:
        fleet.plan(fleet.measure(map(row, range(MEASURED))))
        yield fleet


notes: list[str] = []


def test_three_workers_answer_as_one_engine_does(fleet):
    requests, stats = [row(number) for number in range(900)], Stats()
    expected = {result.id: result.text for result in Engine.open("fake").run(requests)}
    assert [plan.slots > 0 for plan in fleet.plan(fleet.measure(requests))] == [True] * 3
    results = list(fleet.run(iter(requests), stats=stats, stop=Stop()))
    assert {result.id: result.text for result in results} == expected
    assert len(results) == len(requests)
    assert stats.finish_reasons.total() == len(requests)
    assert stats.generated_tokens == sum(len(result.token_ids) for result in results)


def test_w1_workers_are_killed_at_random_and_every_row_is_answered_once(fleet):
    killer = Killer(fleet, kills=4, within=0.5, random_numbers=random.Random(0))
    found, asked = disturbed(fleet, killer, least=200)
    assert compared("fake", found, asked) == ""


def test_w2_a_worker_that_hangs_is_ended_and_its_rows_go_to_others(fleet):
    """It is stopped as a process on a broken GPU is: nothing but the system ends it."""
    stopped = fleet.workers[2].machine.pid
    os.kill(stopped, signal.SIGSTOP)
    results = list(fleet.run(map(row, range(300)), stats=Stats(), stop=Stop()))
    assert Counter(result.id for result in results) == Counter(range(300))
    assert not any(result.error for result in results)
    assert any("--worker-timeout" in line for line in notes)
    until = time.monotonic() + 20
    while Path(f"/proc/{stopped}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{stopped}").exists()


def test_w8_without_ray_a_line_says_what_installs_it(bmx, monkeypatch, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setattr("bmx.cluster.fleet.find_spec", lambda _: None)
    ended = bmx("run", "in.jsonl", "-m", "fake", "--workers", 2)
    assert ended.code == 2
    assert "Ray" in ended.complaint[0]
    assert "pip install 'bmx-llm[ray]'" in ended.complaint[1]


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1 can be joined"), ("ray://here", "cannot be 'ray://here'")],
)
def test_w8_where_there_is_no_cluster_a_line_says_so(bmx, tmp_path, address, said):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    ended = bmx("run", "in.jsonl", "-m", "fake", "--ray-address", address)
    assert ended.code == 2
    assert said in ended.complaint[0]
    assert "ray://" in address or "RAY_AUTH_MODE=token" in ended.complaint[1]


class Command:
    """``bmx run`` with two workers that take a while; in a process group of its own, as in a shell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out.jsonl"
        self.temporary = tempfile.mkdtemp(prefix="bmx-")  # of its own, with a short name; what Ray leaves is seen there
        rows = ({"id": i, "prompt": f"row {i}", "max_tokens": 1500, "ignore_eos": True} for i in range(60))
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = ["run", "in.jsonl", "-o", str(self.output), "-m", "fake", "--max-num-seqs", "2", *flags]
        return subprocess.Popen(
            [sys.executable, "-m", "bmx", *command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env=os.environ | {"TMPDIR": self.temporary},
        )

    @property
    def done(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def wait_for(self, rows: int, process: subprocess.Popen[str]) -> None:
        while self.done < rows:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    @property
    def ray_folder(self) -> str:
        (path,) = Path(self.temporary).glob("bmx-ray-*")
        return str(path)

    def answers(self) -> list[tuple[object, object]]:
        records = map(json.loads, self.output.read_text().splitlines())
        return sorted((record["id"], record["text"]) for record in records)


def of_ray(folder: str) -> dict[int, list[str]]:
    """Processes with a file of Ray's folder open, and the sockets of each."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            links = [os.readlink(link) for link in (entry / "fd").iterdir()] if entry.name.isdigit() else []
        except OSError:
            continue
        if any(link.startswith(folder) for link in links):
            found[int(entry.name)] = [link for link in links if link.startswith("socket:")]
    return found


def listening(sockets: set[str]) -> set[str]:
    """The addresses, in the system's notation, at which these sockets listen."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].split(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def wait_until_gone(folder: str) -> None:
    until = time.monotonic() + 20
    while (of_ray(folder) or Path(folder).exists()) and time.monotonic() < until:
        time.sleep(0.1)
    assert of_ray(folder) == {}
    assert not Path(folder).exists()


def test_w6_ray_listens_here_alone_and_what_was_killed_is_resumed_with_nothing_left_behind(tmp_path):
    command = Command(tmp_path)
    killed = command.start("--workers", "2")
    command.wait_for(4, killed)
    folder = command.ray_folder
    mine = of_ray(folder)
    addresses = listening({socket for sockets in mine.values() for socket in sockets})
    assert addresses
    assert addresses <= LOOPBACK
    killed.kill()
    killed.communicate()
    wait_until_gone(folder)
    assert 4 <= command.done < 60

    interrupted = command.start("--workers", "2")
    command.wait_for(command.done + 4, interrupted)
    os.killpg(interrupted.pid, signal.SIGINT)  # as Ctrl-C does: to every process of the terminal
    out, err = interrupted.communicate()
    assert interrupted.returncode == 130, err
    assert out == ""
    assert "died" not in err
    assert os.listdir(command.temporary) == []
    assert command.done < 60

    ended = command.start()  # without workers: they are no part of what decides an answer
    assert "error" not in ended.communicate()[1]
    resumed = command.answers()
    command.output.unlink()
    alone = command.start("--overwrite")
    alone.communicate()
    assert alone.returncode == 0
    assert resumed == command.answers()
    os.rmdir(command.temporary)


def test_w7_when_ray_itself_ends_a_line_says_so(tmp_path):
    command = Command(tmp_path)
    process = command.start("--workers", "2")
    command.wait_for(2, process)
    folder = command.ray_folder
    raylets = [pid for pid in of_ray(folder) if "raylet" in Path(f"/proc/{pid}/comm").read_text()]
    os.kill(raylets[0], signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == 1, err
    assert re.search("error: Ray's raylet.* ended", err)
    assert "run the same command again" in err
    wait_until_gone(folder)
    os.rmdir(command.temporary)
