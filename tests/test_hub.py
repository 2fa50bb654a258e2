"""Models of the hub: one that cannot be had is one line, without passwords; a cached one runs without a network."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from bmx.errors import ModelError
from bmx.model import hub
from bmx.model.loader import loading_errors

COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers every request with the status of its server; 404 and 403 as the hub does."""

    def do_HEAD(self) -> None:
        status = self.server.statuses.pop(0) if len(self.server.statuses) > 1 else self.server.statuses[0]
        self.send_response(status)
        if status >= 400:
            self.send_header("X-Error-Code", {404: "RepoNotFound", 403: "GatedRepo"}.get(status, "other"))
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.server.asked += 1

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A function that says at which address the hub is; its cache is empty."""
    hub.reach_model.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "BUSY_WAITS", (0.0, 0.0))

    def at(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

    yield at
    hub.reach_model.cache_clear()


@pytest.fixture
def server(online) -> Iterator[ThreadingHTTPServer]:
    """A hub on this machine, whose address has a password; ``statuses`` are what it answers, the last one for ever."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.statuses, server.asked = [404], 0
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        online(f"http://me:s3cr3t@127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def closed(online) -> str:
    """The address, with a password, of a hub that nobody serves."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://me:s3cr3t@127.0.0.1:{taken.getsockname()[1]}"
    online(address)
    return address


@pytest.fixture
def run(bmx):
    """``bmx run`` of one row with a model of the hub."""

    def call(*args: str, model: str = "org/tiny"):
        Path("in.jsonl").write_text('{"id": 1, "prompt": "w3 w4", "max_tokens": 2}\n')
        return bmx("run", "in.jsonl", "-m", model, *args)

    return call


@pytest.fixture
def cached(model, online) -> None:
    """The tiny model, as the hub's cache keeps the model org/tiny."""
    folder = Path(constants.HF_HUB_CACHE) / "models--org--tiny"
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def test_b3_e1_without_network_an_unknown_model_is_one_line_without_the_password(run, closed):
    ended = run()
    assert ended.code == 1
    assert "is not in the cache" in ended.complaint[0]
    assert "cannot be reached" in ended.complaint[0]
    assert "://***@127.0.0.1" in ended.complaint[0]
    assert "s3cr3t" not in ended.err
    assert not Path("in.out.jsonl").exists()


def test_e1_quiet_and_json_logs_have_the_error_alone(run, closed):
    ended = run("-q", "--log-format", "json")
    [error] = map(json.loads, ended.err.splitlines())
    assert error["level"] == "error"
    assert error["hint"]
    assert "s3cr3t" not in ended.err


@pytest.mark.parametrize(
    ("status", "said", "asked"),
    [
        (404, "has no such model: org/tiny", 1),
        (403, "its terms must be accepted", 1),
        (407, "answers 407", 1),
        (503, "answers 503", 3),
        (429, "answers 429", 3),
    ],
)
def test_e1_what_the_hub_answers_is_the_cause(run, server, status, said, asked):
    server.statuses = [status]
    ended = run()
    assert ended.code == 1
    assert said in ended.complaint[0]
    assert "s3cr3t" not in ended.err
    assert server.asked in (asked, asked + 1)  # some releases ask for something else first


def test_e1_a_hub_that_is_busy_for_a_moment_is_asked_again(server):
    server.statuses = [503, 503, 200]
    hub.reach_model("org/tiny", None)
    assert not constants.HF_HUB_OFFLINE


def test_e1_a_name_that_no_model_can_have_is_not_asked_for(run, server):
    ended = run(model="a/b/c")
    assert ended.code == 1
    assert "cannot be a hub id" in ended.complaint[0]


def test_e1_without_network_a_cached_model_runs_and_a_warning_says_so(run, closed, cached):
    ended = run("-q")
    assert ended.code == 0
    [warning] = ended.log
    assert warning.startswith("warning: http://***@127.0.0.1")
    assert "model org/tiny is taken from the cache" in warning
    assert json.loads(Path("in.out.jsonl.run.json").read_text())["model"]["commit"] == COMMIT


def test_e1_offline_by_variable_says_so_and_needs_no_warning(run, closed, monkeypatch, cached):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("-q").err == ""
    ended = run("--overwrite", model="org/other")
    assert "HF_HUB_OFFLINE" in ended.complaint[0]


def test_e2_a_full_cache_of_the_hub_is_named_with_its_variable():
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        with pytest.raises(ModelError, match="cannot be kept in the cache") as refused, loading_errors("org/tiny"):
            raise OSError(number, os.strerror(number))
        assert os.strerror(number) in refused.value.message
        assert "HF_HOME" in refused.value.hint


def test_e2_a_place_of_the_hub_that_cannot_be_read_is_no_matter_of_the_network(run, server, monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/dev/null/token")
    ended = run()
    assert "cannot read /dev/null/token: Not a directory" in ended.complaint[0]
    assert "HF_HOME" in ended.complaint[1]


@pytest.mark.parametrize(
    ("file", "said"),
    [("model.safetensors", "damaged"), ("config.json", "damaged"), ("tokenizer.json", "no tokenizer")],
)
def test_e2_a_damaged_file_in_the_hubs_cache_is_named_with_the_way_out(run, closed, cached, file, said):
    path = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "snapshots" / COMMIT / file
    if file == "tokenizer.json":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    ended = run("--log-format", "json")
    [*_, error] = map(json.loads, ended.err.splitlines())
    assert ended.code == 1
    assert said in error["message"]
    assert error["hint"].startswith(f"delete {constants.HF_HUB_CACHE}/models--org--tiny:")


def test_m10_packed_weights_of_a_hub_model_are_refused_as_those_of_a_folder(run, closed, cached):
    path = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    save_file(weights | {name: (weights[name] * 100).to(torch.int8)}, path, metadata={"format": "pt"})
    ended = run()
    assert ended.code == 1
    assert f"numbers of type I8 ({name})" in ended.err
