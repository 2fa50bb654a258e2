"""Shared by all tests: engines around tiny models, and transformers' `generate` as the reference."""

from __future__ import annotations

import gc
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cache
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: more threads than cores wait for each other
os.environ.setdefault("TEST_FAMILIES", str(date.today().toordinal()))  # whose turn it is; processes of tests inherit it

import pytest
import torch
import typer.main

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: what is written for GPUs runs here too

from families import VOCAB, tiny_model, word_tokenizer, words

from bmx import Engine, EngineConfig, PromptConfig, Request, SamplingParams
from bmx.cli.commands import main
from bmx.engine.backend import ModelBackend
from bmx.engine.scheduler import Step
from bmx.model.loader import LoadedModel, prepare

typer.main.get_command = cache(typer.main.get_command)  # the command line is put together once, not for each call


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Prompts of random token ids, one for each length in tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def as_requests(prompts: Sequence[Sequence[int]], **params: Any) -> list[Request]:
    """One request for each prompt; their ids are "0", "1" and so on."""
    return [
        Request(id=str(i), prompt=words(prompt), params=SamplingParams(**params)) for i, prompt in enumerate(prompts)
    ]


@cache
def tiny_loaded(family: str) -> LoadedModel:
    """A family's tiny model, ready for an engine. All tests share it: a test that changes a model builds its own."""
    return prepare(tiny_model(family))


def tiny_engine(model: Any, **config: Any) -> Engine:
    """An engine around a tiny model.

    Args:
        model: the model itself, or the name of its family.
        config: settings of EngineConfig; pairs are stored in the model's own type if they do not say how.
    """
    loaded = tiny_loaded(model) if isinstance(model, str) else prepare(model)
    config = {"kv_format": "model"} | config
    return Engine(EngineConfig(**config), PromptConfig(), word_tokenizer(), ModelBackend(loaded))


StepHook = Callable[[Any, Step], None]  # of a runner and a step


class WatchedRunner:
    """A runner that shows each step before and after it is launched; all else as it is."""

    def __init__(self, inner: Any, before: StepHook, after: StepHook) -> None:
        self._inner, self._before, self._after = inner, before, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def run(self, step: Step) -> Any:
        self._before(self._inner, step)
        sampled = self._inner.run(step)
        self._after(self._inner, step)
        return sampled


class WatchedBackend:
    """A backend with such runners; all else as it is."""

    def __init__(self, inner: Any, before: StepHook, after: StepHook) -> None:
        self._inner, self._before, self._after = inner, before, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def runner(self, *args: Any, **kwargs: Any) -> Iterator[WatchedRunner]:
        with self._inner.runner(*args, **kwargs) as runner:
            yield WatchedRunner(runner, self._before, self._after)


def _nothing(runner: Any, step: Step) -> None:
    pass


def watched(engine: Engine, before: StepHook = _nothing, after: StepHook = _nothing) -> Engine:
    """The same engine, whose steps are shown before and after they are launched."""
    return engine.with_backend(WatchedBackend(engine.backend, before, after))


def one_first(requests: Sequence[Request]) -> tuple[Iterator[Request], Callable[[], bool]]:
    """Requests, and whether reading is paused: once, after the first of them."""
    source, read = iter(requests), []

    def reading() -> Iterator[Request]:
        for request in source:
            read.append(request)
            yield request

    pauses = iter([True])
    return reading(), lambda: len(read) == 1 and next(pauses, False)


def answers(engine: Engine, requests: Sequence[Request], **options: Any) -> dict[str, tuple[int, ...]]:
    """Token ids by request id; fails if a row failed. Options are those of ``Engine.run``."""
    results = list(engine.run(requests, **options))
    assert [r.error for r in results if r.error] == []
    assert sorted(r.id for r in results) == sorted(r.id for r in requests)
    return {r.id: r.token_ids for r in results}


def reference_answers(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, tuple[int, ...]]:
    """Greedy token ids of transformers' ``generate`` by request id: one prompt at a time, with its full cache."""
    answers = {}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, use_cache=True
        )
        answers[str(i)] = tuple(output[0, len(prompt) :].tolist())
    return answers


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How to compare the same families with ``generate`` again, or all of them."""
    ran = (report for reports in terminalreporter.stats.values() for report in reports)
    if any("test_exactness" in getattr(report, "nodeid", "") for report in ran):
        turn = os.environ["TEST_FAMILIES"]
        terminalreporter.write_line(f"families of TEST_FAMILIES={turn}; TEST_FAMILIES=all compares all with generate")


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> None:
    """Triton's interpreter replaces the functions of its language once a launch, not at each call within a kernel.

    Nor does it compute whether a sum overflows, since it looks at that only when it debugs.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    replaced: set[tuple[bool, ...]] = set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            replaced.clear()

    def replace_once(function: Any) -> Any:
        modules = [module for module in function.__globals__.values() if isinstance(module, ModuleType)]
        seen = tuple(any(module is language for module in modules) for language in languages)
        if seen in replaced:
            return interpreter._LangPatchScope()
        replaced.add(seen)
        return replace(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, replace_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


@pytest.fixture(scope="session", autouse=True)
def last_garbage_collection() -> Iterator[None]:
    """The last garbage collection skips nothing."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def fast_garbage_collection(last_garbage_collection: None) -> None:
    """Garbage collections skip the objects that exist before a file's tests: torch and transformers hold many."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that chooses the kernels by their name."""

    def choose(name: str) -> None:
        monkeypatch.setenv("BMX_KERNELS", name)

    return choose


TIMED = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a command that has ended."""

    code: int
    out: str
    err: str

    @property
    def log(self) -> list[str]:
        """The lines of the log without their times; each line must begin with one."""
        lines = self.err.splitlines()
        assert [line for line in lines if not TIMED.match(line)] == []
        return [TIMED.sub("", line) for line in lines]

    @property
    def complaint(self) -> list[str]:
        """The error and its hint, which must be the only lines beside those that report progress."""
        lines = [line for line in self.log if not line.endswith(" ...")]
        assert [line.split(":")[0] for line in lines] == ["error", "hint"], self.err
        return lines


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A folder with a tiny Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bmx(tmp_path, monkeypatch, capfd):
    """A function that runs the command in this process, in an empty folder."""
    for name in os.environ:
        if name.startswith("BMX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that the command leaves torch's threads alone
    monkeypatch.chdir(tmp_path)

    def call(*args: Any, stdin: bytes = b"") -> Ended:
        monkeypatch.setattr(sys, "argv", ["bmx", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, *capfd.readouterr())

    return call
