"""Several workers answer as one engine does, and what happens to one of them changes no answer."""

from __future__ import annotations

import pytest

from bmx import Engine
from bmx.cluster.fleet import Fleet
from bmx.request import Request, SamplingParams
from bmx.run_config import RunConfig
from bmx.shutdown import Stop
from bmx.stats import Stats


def rows(count: int) -> list[Request]:
    """Rows of a few words, whose answers differ in length."""
    return [Request(id=i, prompt=f"row {i}", params=SamplingParams(max_tokens=40)) for i in range(count)]


@pytest.fixture(scope="module")
def fleet():
    """Three workers with the fake model."""
    with Fleet.open(RunConfig.of(("x",), {"model": "fake", "workers": 3}), print) as fleet:
        yield fleet


def test_three_workers_answer_as_one_engine_does(fleet):
    requests, stats = rows(900), Stats()
    expected = {result.id: result.text for result in Engine.open("fake").run(requests)}
    assert len(fleet.plan(fleet.measure(requests))) == 3
    results = list(fleet.run(iter(requests), stats=stats, stop=Stop()))
    assert {result.id: result.text for result in results} == expected
    assert len(results) == len(requests)
    assert stats.finish_reasons.total() == len(requests)
    assert stats.generated_tokens == sum(len(result.token_ids) for result in results)
