"""`bmx calibrate`: what is measured against the full cache, what is recommended, and what a run makes of it."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import as_requests, random_prompts, tiny_engine, words
from families import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from bmx.compress.budgets import halting_count
from bmx.measure import plots as report
from bmx.measure.full_cache_answers import FullCacheAnswers, compare_token
from bmx.measure.layer_analysis import layer_factors, layer_needs, shared_layers
from bmx.measure.metrics import Agreement, rouge_l
from bmx.request import Result
from bmx.shutdown import Stop

FILE = "in.calibration.json"
FLAGS = ("--max-tokens", 6, "--chunk-size", 16, "--kv-recent", 8, "--rows", 6, "--dtype", "float32")


@pytest.fixture
def given(bmx, model, monkeypatch):
    """The command on eight prompts of 40 to 90 tokens, two of which have a reference; without the plots."""
    monkeypatch.setattr(report, "find_spec", lambda _: None)  # to draw them takes longer than to measure
    rows = [
        {"id": f"r{i}", "prompt": words(prompt)} | ({"reference": words(prompt[:4])} if i < 2 else {})
        for i, prompt in enumerate(random_prompts(range(40, 96, 7), seed=5))
    ]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def calibrate(*args):
        return bmx("calibrate", "in.jsonl", "-m", model, *FLAGS, *args)

    return calibrate


def measured(path=FILE):
    return json.loads(Path(path).read_text())


# What is measured


def test_a_cache_that_keeps_everything_agrees_in_everything(given):
    ended = given("--kv-budget", "24,200")
    assert ended.code == 0
    candidates = {candidate["settings"]["kv_budget"]: candidate for candidate in measured()["candidates"]}
    assert (
        candidates[200]["top1_agreement"]
        == candidates[200]["exact_match"]
        == candidates[200]["rouge_l_full_cache"]
        == 1
    )
    assert candidates[200]["kl_divergence"] < 1e-5
    assert candidates[200]["length_ratio"] == 1
    assert candidates[24]["top1_agreement"] < 1
    assert candidates[24]["kl_divergence"] > candidates[200]["kl_divergence"]
    assert candidates[24]["kv_bytes_per_sequence"] < candidates[200]["kv_bytes_per_sequence"]
    assert {candidate["tokens"] for candidate in candidates.values()} == {6 * 6}


def test_every_combination_is_measured_once_and_stands_in_the_table(given):
    ended = given(
        *("--kv-policy", "average-attention,keydiff,none", "--kv-budget", "24,40%", "--kv-format", "auto,int8"),
        *("--kv-layer-budgets", "uniform,pyramid"),
    )
    settings = [candidate["settings"] for candidate in measured()["candidates"]]
    tried = [(s["kv_policy"], s["kv_budget"], s["kv_format"], s["kv_layer_budgets"]) for s in settings]
    assert len(set(tried)) == len(tried)
    evicting = {t for t in tried if t[0] != "none"}
    assert evicting == {
        (policy, budget, form, layers)
        for policy in ("average-attention", "keydiff")
        for form in ("auto", "int8")
        for budget, layers in ((24, "uniform"), (24, "pyramid"), (0.4, "uniform"))
    }
    assert [t[2] for t in tried if t[0] == "none"] == ["int8"]  # the full cache itself is what all is measured against
    for line in ("average-attention 24 int8 pyramid", "keydiff 40%", "none int8", "halting test", "recommended"):
        assert line in ended.out


def test_the_likelihoods_are_those_of_transformers():
    """Top-1 and KL of a policy against the full cache, from logits that transformers computes in one piece."""
    model = tiny_model("llama")
    requests = as_requests(random_prompts((30, 44), seed=2), max_tokens=5, temperature=0)
    full_answers = FullCacheAnswers.generate(tiny_engine(model, kv_policy="none"), requests, Stop())
    for place, answer in full_answers.answers.items():
        prompt = tiny_engine(model).encode(requests[place])
        ids = torch.tensor([[*prompt, *answer.result.token_ids]])
        with torch.inference_mode():
            logs = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert answer.ids[:, 0].tolist() == list(answer.result.token_ids) == logs.argmax(-1).tolist()
        torch.testing.assert_close(answer.log_probs, logs.gather(1, answer.ids), atol=1e-4, rtol=1e-4)


def test_divergence_is_that_of_the_whole_distributions():
    """A vocabulary that is kept in full gives the KL divergence itself; one that is kept in part, no more than that."""
    draw = torch.Generator().manual_seed(0)
    theirs, mine = torch.randn(64, generator=draw), torch.randn(64, generator=draw)
    exact = float((theirs.softmax(-1) * (theirs.log_softmax(-1) - mine.log_softmax(-1))).sum())
    for count, least in ((64, 0.9999), (32, 0.6)):
        best = theirs.log_softmax(-1).topk(count)
        same, divergence = compare_token(mine, best.indices, best.values)
        assert same == (int(mine.argmax()) == int(theirs.argmax()))
        assert least * exact < divergence <= exact * 1.0001


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("the cat sat", "the dog sat down", 2 * 2 / 7),
        ("a b c d", "d c b a", 2 * 1 / 8),
        ("a x b y c", "a b c", 2 * 3 / 8),
        ("", "", 1.0),
        ("", "word", 0.0),
    ],
)
def test_rouge_l_by_hand(text, reference, score):
    assert rouge_l(text, reference) == pytest.approx(score)


def test_lengths_and_references_are_counted():
    agreement = Agreement()
    short, long = Result(id=0, token_ids=(1, 2), text="a b"), Result(id=0, token_ids=(1, 2, 3), text="a b c")
    agreement.count_answer(long, short, ["a b c d"])
    agreement.count_answer(short, short, [])
    record = agreement.record()
    assert record["exact_match"] == 0.5
    assert record["length_ratio"] == 1.25
    assert record["much_longer"] == 0.5
    assert record["rouge_l_reference"] == pytest.approx(6 / 7, abs=1e-4)
    assert record["rouge_l_reference_of_full_cache"] == pytest.approx(4 / 6, abs=1e-4)


def test_references_are_read_from_the_rows(given):
    given("--kv-budget", "24")
    assert "rouge_l_reference" in measured()["candidates"][0]


# What is recommended


def test_the_least_memory_that_holds_is_recommended_and_a_run_takes_it(given, bmx, model):
    ended = given("--kv-budget", "24,60,200", "--min-agreement", 0.9)
    assert ended.code == 0
    good = [candidate for candidate in measured()["candidates"] if candidate["top1_agreement"] >= 0.9]
    least = min(good, key=lambda candidate: candidate["kv_bytes_per_sequence"])
    assert measured()["recommended"] == least["settings"]
    shown = bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--print-config").out
    assert f"kv_budget: {least['settings']['kv_budget']}\n" in shown
    assert "kv_recent: 8\n" in shown
    assert bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--max-tokens", 3).code == 0
    rows = [json.loads(line) for line in Path("in.out.jsonl").read_text().splitlines()]
    assert {row["kv"]["budget"] for row in rows} == {least["settings"]["kv_budget"]}


def test_without_a_good_candidate_it_says_so_and_no_run_starts_with_it(given, bmx, model):
    ended = given("--kv-budget", "24", "--min-agreement", 0.999)
    assert ended.code == 3
    assert "recommended: nothing" in ended.out
    assert measured()["recommended"] is None
    refused = bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto")
    assert refused.code == 2
    assert "recommends nothing" in refused.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "there is no calibration file"),
        (("--calibration", "in.jsonl"), "cannot read the calibration file"),
        (("--calibration", "other.json"), "is not a calibration file"),
    ],
)
def test_auto_without_a_calibration_is_refused(given, bmx, model, flags, says):
    Path("other.json").write_text("{}")
    ended = bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", *flags)
    assert ended.code == 2
    assert says in ended.complaint[0]


def test_a_config_file_that_says_auto_serves_the_calibration_as_well(given, bmx, model):
    Path("night.yaml").write_text("kv_budget: auto\nmax_tokens: 6\n")
    assert given("--config", "night.yaml", "--kv-budget", "200").code == 0
    ran = bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--config", "night.yaml")
    assert (ran.code, measured()["recommended"]["kv_budget"]) == (0, 200)


def test_auto_with_settings_that_contradict_the_calibration_is_refused(given, bmx, model):
    given("--kv-budget", "200")
    for flags, says in ((("--kv-policy", "keydiff"), "kv_policy is keydiff"), (("-m", "demo"), "not of demo")):
        ended = bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", *flags)
        assert ended.code == 2
        assert says in ended.complaint[0]
    agreeing = ("--kv-policy", "average-attention", "--kv-recent", 8)
    assert (
        bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", *agreeing, "--dry-run").code
        == 0
    )


# Resuming


def test_what_is_measured_is_kept_and_not_measured_again(given, monkeypatch):
    given("--kv-budget", "24")
    first = measured()["candidates"]
    compared, generated = [], []
    compare, generate = FullCacheAnswers.compare, FullCacheAnswers.generate
    monkeypatch.setattr(
        FullCacheAnswers,
        "compare",
        lambda self, engine, *args, **kwargs: (
            compared.append(engine.config.kv_budget) or compare(self, engine, *args, **kwargs)
        ),
    )
    monkeypatch.setattr(FullCacheAnswers, "generate", lambda *args: generated.append(1) or generate(*args))
    given("--kv-budget", "24,200")
    assert (compared, generated) == ([200], [])
    assert measured()["candidates"][:1] == first
    given("--kv-budget", "24,200", "--overwrite")
    assert (compared, generated) == ([200, 24, 200], [1])


def test_a_stopped_calibration_keeps_what_is_finished(given, monkeypatch):
    import signal

    compare = FullCacheAnswers.compare

    def stopped(self, engine, *args, **kwargs):
        if engine.config.kv_budget == 40:
            signal.raise_signal(signal.SIGINT)
        return compare(self, engine, *args, **kwargs)

    monkeypatch.setattr(FullCacheAnswers, "compare", stopped)
    assert given("--kv-budget", "24,40,200").code == 130
    assert [candidate["settings"]["kv_budget"] for candidate in measured()["candidates"]] == [24]
    monkeypatch.setattr(FullCacheAnswers, "compare", compare)
    assert given("--kv-budget", "24,40,200").code == 0
    assert [candidate["settings"]["kv_budget"] for candidate in measured()["candidates"]] == [24, 40, 200]


def test_another_job_may_not_resume_with_the_file(given):
    given("--kv-budget", "24")
    ended = given("--kv-budget", "24", "--seed", 5)
    assert ended.code == 2
    assert "seed was 0, is 5" in ended.complaint[0]


def test_a_torn_file_of_full_cache_answers_is_made_again(given):
    given("--kv-budget", "24")
    path = Path("in.calibration.teacher.pt")
    path.write_bytes(path.read_bytes()[:100])
    assert given("--kv-budget", "24,200").code == 0
    assert len(measured()["candidates"]) == 2


def test_an_empty_list_of_candidates_is_one_that_was_not_given(given):
    ended = given("--kv-policy", "", "--kv-budget", "", "--kv-format", "", "--kv-layer-budgets", "")
    assert ended.code == 0
    assert [entry["settings"]["kv_policy"] for entry in measured()["candidates"]] == ["average-attention"]


# Wrong things


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--kv-policy", "average-attention,magic"), "kv_policy cannot be 'magic'"),
        (("--kv-budget", "12"), "leaves no room"),
        (("--kv-format", "int3"), "kv_format cannot be 'int3'"),
        (("--kv-policy", "streaming", "--kv-probe", "w5"), "kv_probe needs a policy"),
        (("-o", "nowhere/c.json"), "the folder nowhere does not exist"),
        (("-m", "fake"), "the fake model has no cache"),
        (("--rows", 0), "rows must be above 0"),
        (("--min-agreement", 1.5), "min_agreement must be"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(given, flags, says):
    ended = given(*flags)
    assert ended.code == 2
    assert says in ended.complaint[0]
    assert not Path(FILE).exists()


@pytest.mark.parametrize("output", ["in.jsonl", "./in.jsonl", "link.jsonl"])
def test_an_input_is_never_the_output_even_when_it_may_be_replaced(given, output):
    before = Path("in.jsonl").read_bytes()
    Path("link.jsonl").symlink_to("in.jsonl")
    for flags in (("-o", output), ("-o", output, "--overwrite")):
        ended = given(*flags)
        assert ended.code == 2
        assert "is also an input" in ended.complaint[0]
        assert Path("in.jsonl").read_bytes() == before


def test_rows_that_cannot_be_answered_are_left_out_and_named(given):
    with Path("in.jsonl").open("a") as rows:
        rows.write('{"id": "bad", "messages": []}\n{"id": "long", "prompt": "' + "w5 " * 300 + '"}\n')
    ended = given("--kv-budget", "24", "--rows", 10)
    assert "row long cannot be answered, and is left out" in ended.err
    assert measured()["full_cache"]["rows"] == 8


# Layers


def test_the_halting_test_by_hand():
    assert halting_count([[0.5, 0.1, 0.1, 0.3]], first=1, tolerance=0.0) == 4
    kept = [0.5, 0.3]  # the first and the newest
    whole = math.sqrt(0.25 + 0.01 + 0.01 + 0.09)
    assert halting_count([[0.5, 0.1, 0.1, 0.3]], first=1, tolerance=1 - math.hypot(*kept) / whole + 1e-9) == 2
    assert halting_count([[1.0, 0.0, 0.0, 0.0]], first=1, tolerance=0.05) == 1
    assert halting_count([[0.0, 1.0, 0.0, 0.0]], first=1, tolerance=0.05) == 4


def test_what_layers_need_is_the_halting_test_of_their_real_attention():
    model = tiny_model("llama")
    requests = as_requests(random_prompts((37,), seed=3), max_tokens=4)
    engine = tiny_engine(model, kv_policy="none", chunk_size=16)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(torch.tensor([engine.encode(requests[0])]), output_attentions=True).attentions
    expected = [halting_count(w[0, :, -1].tolist(), 4, 0.05) for w in weights]
    assert layer_needs(engine, requests, 0.05) == expected


def test_layer_factors_follow_needs_and_are_one_on_average():
    factors = layer_factors([100, 300, 10, 390])
    assert sum(factors) / 4 == pytest.approx(1, abs=1e-3)
    assert factors[3] > factors[1] > factors[0] > factors[2] > 0.2


def test_layers_that_could_share_are_found_and_hold(given):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 4
    engine = tiny_engine(AutoModelForCausalLM.from_config(config).eval(), kv_policy="none")
    requests = as_requests(random_prompts((20, 30), seed=4), max_tokens=5)
    pairs = shared_layers(engine, requests, 2, least=-1.0)
    assert len(pairs.split(",")) == 2
    assert shared_layers(engine, requests, 2, least=1.1) == ""
    other = engine.with_config(engine.config.__class__(kv_policy="none", kv_share_layers=pairs))
    assert [r.error for r in other.stream(requests)] == [None, None]
    assert other.policy.layout(other.spec, 40).nbytes * 2 == engine.policy.layout(engine.spec, 40).nbytes
    windowed = tiny_engine("gemma2", kv_policy="none")  # one of its two layers has a window: they cannot share
    assert shared_layers(windowed, requests, 1, least=-1.0) == ""


def test_measured_layers_become_a_candidate_and_a_run_can_use_them(given, bmx, model):
    given("--kv-budget", "24", "--kv-layer-budgets", "measured", "--share-layers", 1, "--min-agreement", 0.01)
    record = measured()
    factors = record["halting_test"]["factors"]
    settings = [candidate["settings"] for candidate in record["candidates"]]
    assert [float(f) for f in settings[0]["kv_layer_budgets"].split(",")] == pytest.approx(factors, abs=1e-3)
    assert bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--max-tokens", 3).code == 0


# Plots


def test_plots_are_drawn(given, monkeypatch):
    monkeypatch.setattr(report, "find_spec", find_spec)
    ended = given("--kv-policy", "average-attention,none", "--kv-budget", "24,40%", "--kv-format", "auto,int8")
    assert ended.code in (0, 3)
    assert Path("in.calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("in.calibration.svg").read_text()


def test_without_matplotlib_the_rest_is_done_and_a_note_says_how_to_get_plots(given):
    ended = given("--kv-budget", "200")
    assert ended.code == 0
    assert "pip install matplotlib" in ended.err
    assert not Path("in.calibration.png").exists()
