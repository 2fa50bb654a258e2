"""`bmx calibrate`: what is measured against the full cache, what is recommended, and what a run makes of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import as_requests, random_prompts, tiny_engine, words
from families import FAMILIES, tiny_model
from hypothesis import given as given_values
from hypothesis import settings as fuzz
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoModelForCausalLM

from bmx import kv_formats
from bmx.config import EngineConfig
from bmx.errors import BmxError
from bmx.measure import plots as report
from bmx.measure.calibration_checks import REFERENCES, problem_of
from bmx.measure.calibration_file import ANSWERS_KEY
from bmx.measure.candidates import full_cache_config, settings_of
from bmx.measure.full_cache_answers import FullCacheAnswer, FullCacheAnswers, divergence
from bmx.measure.layer_analysis import pooled_factors, shared_layers
from bmx.measure.metrics import Agreement, on_frontier, rouge_l
from bmx.request import Result
from bmx.run_config import all_settings, setting_named
from bmx.shutdown import Stop
from bmx.terminal.reports import calibration_lines
from bmx.terminal.tables import candidate_words
from bmx.units import parse_layers

FILE = "in.calibration.json"
ANSWERS = Path("in.calibration.teacher.safetensors")
FLAGS = ("--max-tokens", 6, "--chunk-size", 16, "--kv-recent", 8, "--rows", 3, "--dtype", "float32")
FLAGS += ("--kv-format", "model")


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
    assert {candidate["tokens"] for candidate in candidates.values()} == {3 * 6}


def test_every_combination_is_measured_once_and_stands_in_the_table(given):
    ended = given(
        *("--kv-policy", "average-attention,keydiff,none", "--kv-budget", "24,40%", "--kv-format", "model,int8"),
        *("--kv-layer-budgets", "uniform,pyramid"),
    )
    settings = [candidate["settings"] for candidate in measured()["candidates"]]
    tried = [(s["kv_policy"], s["kv_budget"], s["kv_format"], s["kv_layer_budgets"]) for s in settings]
    assert len(set(tried)) == len(tried)
    evicting = {t for t in tried if t[0] != "none"}
    assert evicting == {
        (policy, budget, form, layers)
        for policy in ("average-attention", "keydiff")
        for form in ("model", "int8")
        for budget, layers in ((24, "uniform"), (24, "pyramid"), (0.4, "uniform"))
    }
    assert [t[2] for t in tried if t[0] == "none"] == ["int8"]  # the full cache itself is what all is measured against
    for line in ("average-attention 24 int8 pyramid", "keydiff 40%", "none int8", "recommended"):
        assert line in ended.out


def test_archives_are_measured_beside_slots_by_the_bytes_of_what_answers_are_written_on(given):
    """Prompts that fit are read as by the full cache: the archive is the full cache in its format."""
    given("--kv-policy", "none", "--kv-format", "int8")
    [full] = measured()["candidates"]
    ended = given("--kv-policy", "average-attention", "--kv-budget", 200, "--kv-archive", "model,int8")
    assert "average-attention 200 archive model" in ended.out
    archives = {c["settings"]["kv_archive"]: c for c in measured()["candidates"][1:]}
    assert archives["model"]["top1_agreement"] == 1
    assert archives["model"]["kl_divergence"] < 1e-5
    assert archives["model"]["kv_bytes_per_sequence"] == measured()["full_cache"]["kv_bytes_per_sequence"]
    assert archives["int8"]["kv_bytes_per_sequence"] == full["kv_bytes_per_sequence"]
    assert archives["int8"]["kl_divergence"] == pytest.approx(full["kl_divergence"], abs=1e-4)


def test_recall_is_a_part_of_archives(given):
    given("--kv-budget", 60, "--kv-archive", "none,int8", "--kv-recall", "clusters", "--kv-recall-pairs", 40)
    chosen = [(c["settings"]["kv_archive"], c["settings"]["kv_recall"]) for c in measured()["candidates"]]
    assert chosen == [("none", "all"), ("int8", "clusters")]


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
        assert least * exact < divergence(mine, best.indices, best.values) <= exact * 1.0001


def test_of_tokens_that_are_equally_likely_the_answers_own_is_the_likeliest():
    """In bfloat16 logits are often equal, and what sorts them has an order of its own."""
    [request], logits = as_requests([[1, 2]]), torch.tensor([0.0, 3.0, 3.0, 1.0])
    best = logits.log_softmax(-1)
    result = Result(id=0, token_ids=(1,), text="")
    answer = FullCacheAnswer(request, result, torch.tensor([[2, 1, 3, 0]]), best[[2, 1, 3, 0]].unsqueeze(0))
    assert answer.compare_token(0, logits) == (True, 0.0)
    assert not answer.compare_token(0, torch.tensor([0.0, 3.0, 3.1, 1.0]))[0]
    answer.result = replace(answer.result, token_ids=(3,))  # sampled
    assert answer.compare_token(0, torch.tensor([0.0, 3.0, 3.1, 1.0]))[0]
    assert not answer.compare_token(0, torch.tensor([0.0, 3.0, 2.9, 4.0]))[0]


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


def test_a_run_takes_a_recommended_budget_in_bytes(given, bmx, model):
    given("--kv-budget", "60%bytes", "--kv-format", "int8/int4", "--min-agreement", 0.01)
    assert measured()["recommended"]["kv_budget"] == "60%bytes"
    ran = bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--max-tokens", 3)
    assert ran.code == 0
    rows = [json.loads(line) for line in Path("in.out.jsonl").read_text().splitlines()]
    assert {row["kv"]["asked"] for row in rows} == {"60%bytes"}
    fingerprint = json.loads(Path("in.out.jsonl.run.json").read_text())["fingerprint"]
    assert (fingerprint["kv_budget"], fingerprint["kv_format"]) == ("60%bytes", "int8/int4")


def test_a_run_takes_a_recommended_archive(given, bmx, model):
    given("--kv-budget", 60, "--kv-archive", "int8", "--min-agreement", 0.01)
    run = ("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--max-tokens", 3)
    ran = bmx(*run)
    assert ran.code == 0
    rows = [json.loads(line) for line in Path("in.out.jsonl").read_text().splitlines()]
    assert {(row["kv"]["format"], row["kv"]["evicted"]) for row in rows} == {("int8", 0)}
    refused = bmx(*run, "--kv-archive", "int4")
    assert "kv_archive is int4" in refused.complaint[0]


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


def test_the_table_is_in_the_order_of_bytes_with_the_frontier_and_the_recommended_candidate_marked(given):
    ended = given("--kv-budget", "24,50%,200", "--kv-format", "model,int8", "--min-agreement", 0.2)
    lines = ended.out.splitlines()
    sizes = [float(line.split(" MB")[0].split()[-1]) for line in lines if " MB" in line]
    assert sizes == sorted(sizes, reverse=True)
    candidates = {(c["settings"]["kv_budget"], c["settings"]["kv_format"]): c for c in measured()["candidates"]}
    best = measured()["recommended"]
    [recommended] = [line for line in lines if line.startswith("> ")]
    assert recommended.startswith(f"> {candidate_words(best)} ")
    starred = sum(line.startswith("* ") and " MB" in line for line in lines)
    assert starred == sum(c["on_frontier"] and c["settings"] != best for c in candidates.values())
    most = max(candidates.values(), key=lambda c: (c["top1_agreement"], -c["kl_divergence"]))
    assert most["on_frontier"]


def test_the_frontier_by_hand():
    agreements = [(10, 0.9), (10, 0.8), (20, 0.9), (30, 0.95), (40, 0.94), (10, 0.9)]
    assert on_frontier([(size, (agreement, 0)) for size, agreement in agreements]) == [1, 0, 0, 1, 0, 1]
    assert on_frontier([(10, (0.9, -0.2)), (10, (0.9, -0.1))]) == [False, True]  # the same tokens, other likelihoods
    assert on_frontier([(1000, (0.8, 0)), (1005, (0.9, 0))]) == [
        False,
        True,
    ]  # the same bytes


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


def test_an_empty_list_of_candidates_is_one_that_was_not_given(given):
    ended = given("--kv-policy", "", "--kv-budget", "", "--kv-format", "", "--kv-layer-budgets", "", "--kv-archive", "")
    assert ended.code in (0, 3)
    candidates = [entry["settings"] for entry in measured()["candidates"]]
    assert {entry["kv_policy"] for entry in candidates} == {EngineConfig().kv_policy}
    assert [(entry["kv_archive"], entry["kv_budget"], entry["kv_format"]) for entry in candidates] == [
        ("none", budget, kv_format)
        for budget in ("50%bytes", "25%bytes", "12.5%bytes")
        for kv_format in ("model", "int8", "int8/int4", "int4")
    ] + [("int8/int4", "25%bytes", "model"), ("int4", "25%bytes", "model")]
    assert "14 candidates to measure on 3 prompts" in ended.err
    assert "1 of 14, about " in ended.err


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
        (("--kv-layer-budgets", "measured"), "kv_layer_budgets needs a budget in KV pairs"),
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


# Files that somebody else has written


GOOD = {
    "calibration_format": 1, "model": "fake", "fingerprint": {}, "candidates": [], "min_agreement": 0.9,
    "recommended": {"kv_policy": "keydiff", "kv_budget": 80},
}  # fmt: skip


def auto(bmx, *flags):
    """A run of the fake model that takes its budget from ``in.calibration.json``."""
    Path("in.jsonl").write_text('{"prompt": "w1 w2"}\n')
    return bmx("run", "in.jsonl", "-m", "fake", "--kv-budget", "auto", *flags)


def test_candidates_with_rounded_states_are_compared_with_whole_ones():
    config = EngineConfig(state_format="bfloat16")
    assert full_cache_config(config).state_format == "float32"
    assert settings_of(config)["state_format"] == "bfloat16"
    assert candidate_words(settings_of(config)).endswith("bfloat16 states")


def test_b1_a_calibration_file_sets_the_cache(bmx):
    Path(FILE).write_text(json.dumps(GOOD))
    shown = auto(bmx, "--print-config").out
    assert "kv_policy: keydiff\nkv_budget: 80\n" in shown


def test_b1_auto_in_an_earlier_calibration_file_is_the_models_own_type(bmx, monkeypatch):
    """Whatever ``auto`` stands for now."""
    monkeypatch.setattr(kv_formats, "AUTO_FORMAT", "int8/int4")
    Path(FILE).write_text(json.dumps(GOOD | {"recommended": GOOD["recommended"] | {"kv_format": "auto"}}))
    assert "kv_format: model\n" in auto(bmx, "--print-config").out


def test_b1_a_calibration_file_from_before_there_were_archives_and_states_is_read(given, bmx, model):
    given("--kv-budget", 200)
    record = measured()
    for settings in (*(candidate["settings"] for candidate in record["candidates"]), record["recommended"]):
        for name in ("kv_archive", "kv_recall", "kv_recall_pairs", "kv_recall_every", "state_format"):
            del settings[name]
    Path(FILE).write_text(json.dumps(record))
    run = ("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--dry-run")
    assert bmx(*run).code == 0
    assert "kv_archive is int4" in bmx(*run, "--kv-archive", "int4").complaint[0]
    ended = given("--kv-budget", "200,24")
    assert "1 candidate to measure" in ended.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("trust_remote_code", True), ("output_file", "precious.txt"), ("overwrite", True), ("model", "demo"),
        ("max_tokens", 9), ("prompt_template", "{x}"), ("stats_file", "precious.txt"), ("memory_limit", "1G"),
        ("config", "x.yaml"), ("nothing", 1), ("kv_budget", "auto"), ("kv_budget", [1]), ("kv_policy", {"a": 1}),
        ("kv_policy", "magic"), ("kv_value_norm", "yes"), ("kv_sink", None), ("kv_sink", True), ("kv_budget", 10**400),
        ("kv_probe", "\ud800"), ("kv_layer_budgets", "1e999,1"), ("chunk_size", -5),
    ],
)  # fmt: skip
def test_b1_a_calibration_file_sets_nothing_else(bmx, name, value):
    """Such a file may come with the data: it is refused as a whole, and nothing of it has an effect."""
    Path("precious.txt").write_text("mine")
    Path(FILE).write_text(json.dumps(GOOD | {"recommended": GOOD["recommended"] | {name: value}}))
    ended = auto(bmx)
    assert ended.code == 2
    assert name in ended.complaint[0]
    assert Path("precious.txt").read_text() == "mine"
    assert not Path("in.out.jsonl").exists()


DAMAGED = {
    "no JSON": "{", "no text": b"\xff\xfe\x00", "a list": "[1]", "null": "null", "a number": "7",
    "NaN": json.dumps(GOOD).replace("0.9", "NaN"), "infinity": json.dumps(GOOD).replace("0.9", "1e999"),
    "very deep": '{"a":' * 100_000 + "1" + "}" * 100_000, "a deep list": "[" * 100_000,
    "thousands of digits": json.dumps(GOOD).replace("0.9", "9" * 5000),
    "hundreds of digits": json.dumps(GOOD).replace("0.9", "9" * 500),
    "another version": json.dumps(GOOD | {"calibration_format": 99}),
    "no budget": json.dumps(GOOD | {"recommended": {"kv_policy": "keydiff"}}),
    "a list to take": json.dumps(GOOD | {"recommended": [1]}),
    "text to take": json.dumps(GOOD | {"recommended": "keydiff"}),
    "candidates of nothing": json.dumps(GOOD | {"candidates": [None]}),
    "a list of factors": json.dumps(GOOD | {"layer_factors": [1]}),
    "factors of nothing": json.dumps(GOOD | {"layer_factors": {"share": 1, "factors": {"h2o": "0"}}}),
    "pairs of nothing": json.dumps(GOOD | {"shared_layers": {"asked": 1, "pairs": "3:7"}}),
    **{f"no {name}": json.dumps({key: GOOD[key] for key in GOOD if key != name}) for name in GOOD if name[:3] != "min"},
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_b2_a_damaged_calibration_file_is_one_line(bmx, content):
    Path(FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = auto(bmx)
    assert ended.code == 2
    assert FILE in ended.complaint[0]
    assert len(ended.complaint[0]) < 500


IDS = ["folder", "pipe", "device"]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)], ids=IDS)
def test_b2_what_is_no_file_is_not_read_for_ever(bmx, make):
    make(FILE)
    ended = auto(bmx)
    assert ended.code == 2
    assert "it is not a file" in ended.complaint[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def whole_record(tmp_path_factory):
    """What a calibration writes, with everything in it that may be measured."""
    settings = {setting.name: setting.default for setting in all_settings() if setting.calibrated}
    sizes = {"kv_bytes_per_sequence": 9, "slots": 1, "predicted_seconds": 1.0, "predicted_tokens_per_second": 2.0}
    candidate = {"settings": settings} | sizes | Agreement().record() | dict.fromkeys(REFERENCES, 0.5)
    return GOOD | {
        "candidates": [candidate], "full_cache": sizes | {"rows": 1}, "recommended": settings,
        "layer_factors": {"share": 0.25, "factors": {"h2o": "1,1"}}, "full_cache_seconds": 3.5,
        "shared_layers": {"asked": 1, "least_cosine": 0.5, "pairs": "1:0"},
    }  # fmt: skip


def places(value, path=()):
    """The paths to all values within a value of JSON."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


@fuzz(max_examples=300, deadline=None, derandomize=True)
@given_values(data=st.data())
def test_b2_any_value_in_any_place_is_either_usable_or_refused(whole_record, data):
    """Usable: the table can be printed (a calibration recommends anew before), and the settings can be taken."""
    record = json.loads(json.dumps(whole_record))
    where = data.draw(st.sampled_from([path for path in places(record) if path]))
    owner = record
    for key in where[:-1]:
        owner = owner[key]
    if isinstance(owner, dict) and data.draw(st.booleans()):
        del owner[where[-1]]
    else:
        owner[where[-1]] = data.draw(JSON)
    if problem_of(record):
        return
    if {"full_cache", "min_agreement"} <= record.keys():
        list(calibration_lines(record | {"recommended": None}, Path("x")))
    for name, value in (record["recommended"] or {}).items():
        setting_named(name).coerce(value)


def test_b2_a_damaged_calibration_is_not_taken_up(given):
    """A key less, a value of another type, in a file that a calibration has really written."""
    given("--kv-budget", "24")
    whole = measured()
    for damage in (
        {"candidates": [{}]}, {"candidates": "none"}, {"fingerprint": None}, {"full_cache": {"rows": 6}},
        {"layer_factors": {}}, {"layer_factors": {"share": 0.25, "factors": {"h2o": [1]}}},
        {"candidates": [whole["candidates"][0] | {"top1_agreement": None}]},
        {"candidates": [whole["candidates"][0] | {"settings": {"overwrite": True}}]},
    ):  # fmt: skip
        Path(FILE).write_text(json.dumps(whole | damage))
        ended = given("--kv-budget", "24")
        assert ended.code == 2
        assert "cannot be used" in ended.complaint[0]
        assert "--overwrite" in ended.complaint[1]


def answers_of_another(path):
    """The file of another calibration: valid, of the same rows, but decided by something else."""
    with safe_open(path, "pt") as file:
        held = json.loads(file.metadata()[ANSWERS_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a mapping
    held["made_by"]["seed"] = 77
    return save(tensors, {ANSWERS_KEY: json.dumps(held)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.read_bytes()[:100],
        lambda path: path.read_bytes()[:-9],
        lambda path: b"",
        answers_of_another,
    ],
    ids=["torn", "cut short", "empty", "another's"],
)
def test_b2_answers_of_the_full_cache_that_do_not_fit_are_made_again(given, monkeypatch, damage):
    given("--kv-budget", "24")
    whole = ANSWERS.read_bytes()
    ANSWERS.write_bytes(damage(ANSWERS))
    assert given("--kv-budget", "24,200").code == 0
    assert measured()["candidates"][1]["top1_agreement"] == 1
    assert ANSWERS.read_bytes() == whole


def test_a7_rows_that_have_changed_are_not_given_the_old_figures(given, bmx, model):
    """The ids are the same: rows count by their content."""
    assert given("--kv-budget", "24", "--min-agreement", 0.01).code == 0
    before, rows = measured(), Path("in.jsonl").read_text().splitlines()
    rows[1] = json.dumps(json.loads(rows[1]) | {"prompt": words(random_prompts((50,), seed=9)[0])})  # of the sample
    Path("in.jsonl").write_text("\n".join(rows) + "\n")
    ended = given("--kv-budget", "24", "--min-agreement", 0.01)
    assert ended.code == 2
    assert "changed since: 'r1'" in ended.complaint[0]
    assert measured() == before
    assert given("--kv-budget", "24", "--min-agreement", 0.01, "--overwrite").code == 0
    assert measured()["candidates"][0]["kl_divergence"] != before["candidates"][0]["kl_divergence"]


def test_a7_sizes_are_those_of_the_input_as_it_is(given):
    """A row outside the sample has changed: what was measured holds, memory and slots are worked out anew."""
    given("--kv-budget", "30%", "--rows", 1)
    before, rows = measured(), Path("in.jsonl").read_text().splitlines()
    longer = json.loads(rows[-1]) | {"prompt": words(random_prompts((200,), seed=9)[0])}
    Path("in.jsonl").write_text("\n".join([*rows[:-1], json.dumps(longer)]) + "\n")
    assert given("--kv-budget", "30%", "--rows", 1).code == 3
    after = measured()
    assert after["full_cache"]["kv_bytes_per_sequence"] > before["full_cache"]["kv_bytes_per_sequence"]
    [old], [new] = before["candidates"], after["candidates"]
    assert new["kv_bytes_per_sequence"] > old["kv_bytes_per_sequence"]
    assert new["top1_agreement"] == old["top1_agreement"]


OTHERS = ["in.calibration.json", "in.calibration.teacher.safetensors", "in.calibration.png", "in.calibration.svg"]


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("content", ["mine", "{}", '{"format": 2, "state": "finished"}'])
def test_a8_a_file_of_another_kind_is_never_replaced(given, monkeypatch, name, content):
    monkeypatch.setattr(report, "find_spec", find_spec)
    Path(name).write_text(content)
    for flags in ((), ("--overwrite",)):
        ended = given("--kv-budget", "24", *flags)
        assert ended.code == 2
        assert name in ended.complaint[0]
        assert Path(name).read_text() == content
        assert {path.name for path in Path().iterdir()} <= {"in.jsonl", name}


def test_a8_a_plot_that_nobody_draws_is_in_nobodys_way(given):
    """Without matplotlib."""
    Path("in.calibration.png").write_text("mine")
    assert given("--kv-budget", "24", "--min-agreement", 0.01).code == 0
    assert Path("in.calibration.png").read_text() == "mine"


def test_a8_a_link_is_followed(given):
    Path("there").mkdir()
    Path("c.json").symlink_to("there/c.json")
    assert given("--kv-budget", "24", "--min-agreement", 0.01, "-o", "c.json").code == 0
    assert Path("c.json").is_symlink()
    assert measured("there/c.json")["candidates"]


def test_a8_the_calibrations_own_files_are_replaced(given, monkeypatch):
    monkeypatch.setattr(report, "find_spec", find_spec)
    for flags in ((), ("--overwrite",)):
        assert given("--kv-budget", "24", "--min-agreement", 0.01, *flags).code == 0
    assert all(Path(name).stat().st_size for name in OTHERS)
    for name in OTHERS:
        Path(name).write_bytes(b"")  # an empty file holds nothing that could be lost
    assert given("--kv-budget", "24", "--min-agreement", 0.01, "--overwrite").code == 0


# Layers


def reference_scores(model, prompt, policy):
    """The scores [K, R] of unprotected pairs by layer, from transformers' attention matrices in float64."""
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([prompt]), output_attentions=True).attentions
    scores, tokens, distance = [], len(prompt), RECENT if policy == "far-attention" else 0
    query, key = torch.arange(tokens).view(-1, 1), torch.arange(tokens)
    for attention in attentions:
        counts = attention[0].double() * (query - key >= distance)
        heads = counts.view(model.config.num_key_value_heads, -1, tokens, tokens)
        lives = (tokens - key - distance).clamp(min=1)
        if policy == "far-attention":
            found = (heads.square().mean(1).sum(1) / lives).sqrt()
        else:
            found = heads.mean(1).sum(1) / lives
        scores.append(found[:, SINK : tokens - RECENT])
    return scores


SINK, RECENT = 4, 8


@pytest.mark.parametrize("policy", ["average-attention", "far-attention"])
def test_layers_compete_with_their_scores_for_half_of_the_pairs(policy):
    model = tiny_model("llama")
    requests = as_requests(random_prompts((37, 50), seed=3), max_tokens=4)
    engine = tiny_engine(model, kv_policy=policy, kv_sink=SINK, kv_recent=RECENT, kv_budget=20, chunk_size=16)
    expected = torch.zeros(2, model.config.num_key_value_heads)
    for request in requests:
        scores = reference_scores(tiny_model("llama"), engine.encode(request), policy)
        best = torch.cat([layer.flatten() for layer in scores]).sort(descending=True).values
        least = best[round(0.3 * len(best)) - 1]
        won = torch.stack([(layer >= least).float().mean(1) for layer in scores])  # by layer and head
        expected += (0.5 + 0.5 * won / won.mean()) / len(requests)
    factors = pooled_factors(engine, requests, 0.3)
    assert torch.tensor(factors).tolist() == pytest.approx(expected, abs=1e-3)
    assert torch.tensor(factors).mean() == pytest.approx(1, abs=1e-3)


def test_layers_whose_window_fits_do_not_compete():
    engine = tiny_engine("gemma2", kv_budget=40, kv_recent=RECENT)
    factors = pooled_factors(engine, as_requests(random_prompts((60,), seed=3)), 0.25)
    alone, windowed = sorted(factors, key=lambda factor: factor == 1.0)
    assert windowed == 1.0
    assert sum(alone) / len(alone) == pytest.approx(1)


def test_layers_of_a_prompt_that_is_all_protected_cannot_be_compared():
    engine = tiny_engine("llama", kv_budget=60, kv_recent=40)
    with pytest.raises(BmxError, match="too short to compare layers"):
        pooled_factors(engine, as_requests(random_prompts((12,), seed=3)), 0.25)


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
    [factors] = record["layer_factors"]["factors"].values()
    settings = [candidate["settings"] for candidate in record["candidates"]]
    for told, found in zip(parse_layers(settings[0]["kv_layer_budgets"]), parse_layers(factors), strict=True):
        assert told == pytest.approx(found, abs=1e-3)
    assert bmx("run", "in.jsonl", "-m", model, "--dtype", "float32", "--kv-budget", "auto", "--max-tokens", 3).code == 0


# Plots


def test_plots_are_drawn(given, monkeypatch):
    monkeypatch.setattr(report, "find_spec", find_spec)
    ended = given("--kv-policy", "average-attention,none", "--kv-budget", "24,40%", "--kv-format", "model,int8")
    assert ended.code in (0, 3)
    assert Path("in.calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("in.calibration.svg").read_text()


def test_without_matplotlib_the_rest_is_done_and_a_note_says_how_to_get_plots(given):
    ended = given("--kv-budget", "200")
    assert ended.code == 0
    assert "pip install matplotlib" in ended.err
    assert not Path("in.calibration.png").exists()
