"""`bmx bench`: three caches side by side on the same prompts and memory, what is counted, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import random_prompts, watched, words
from families import tiny_model

from bmx import Engine, PromptConfig
from bmx.compress.policy import CompressionPolicy
from bmx.config import EngineConfig
from bmx.engine.backend import ModelBackend
from bmx.errors import MemoryLimitError
from bmx.measure import bench as bench_module
from bmx.measure import plots
from bmx.measure.bench import mean_ratios, ratios
from bmx.measure.bench_sides import SideMeasurement, Workload, measure_decode_only
from bmx.measure.decode_bound import decode_step_seconds
from bmx.model.loader import prepare
from bmx.model.random_models import SHAPES, IdTokenizer, preview_random_model, random_model_config
from bmx.model.spec import Costs, LayerSpec, ModelSpec
from bmx.plan.machine_speed import Rates
from bmx.plan.planner import Length
from bmx.plan.roofline import held_rows, prefill_flops, weights_read
from bmx.terminal.display import Display

SIDES = ("full_cache", "decode_only", "batch_max")
TINY = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
CACHE = ("--kv-budget", 24, "--kv-sink", 2, "--kv-recent", 4, "--chunk-size", 16)
FLAGS = (*CACHE, "--dtype", "float32", "--device", "cpu")
RATES = Rates(flops=1e9, bandwidth=1e9, thin_bandwidth=1e9, operator_seconds=1e-6, source="a test")
SIDE = SideMeasurement(
    slots=2,
    kv_bytes=10,
    planned_bytes=20,
    peak_bytes=30,
    seconds=4.0,
    prefill_seconds=2.0,
    decode_seconds=1.0,
    decode_tokens=7,
    prefill_flops=600,
    step_seconds=0.5,
    step_bytes=100,
)
CELL = ("--shape", "tiny", "--input-tokens", 60, "--output-tokens", 5)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """A tiny shape, which runs in less than a megabyte, and a machine whose rates are known; without the plots."""
    monkeypatch.setattr(plots, "find_spec", lambda _: None)  # to draw them takes longer than to measure
    monkeypatch.setattr("bmx.units.LEAST_MEMORY", 1)
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(bench_module, "measure", lambda device, dtype: RATES)


@pytest.fixture
def bench(bmx):
    """The command with small settings."""
    return lambda *args: bmx("bench", *FLAGS, *args)


def measured(path="bench.json"):
    return json.loads(Path(path).read_text())


def id_engine(**config):
    """A tiny engine that reads token ids."""
    backend = ModelBackend(prepare(tiny_model("llama")))
    return Engine(EngineConfig(device="cpu", **config), PromptConfig(), IdTokenizer(), backend)


# What is measured


def test_three_sides_of_the_same_work_stand_side_by_side(bench, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", find_spec)
    ended = bench(*CELL, "--prompts", 7, "--kv-cache-memory", 50_000)
    assert ended.code == 0
    record = measured()
    assert (record["state"], record["model"]["name"]) == ("finished", "tiny")
    assert record["settings"]["kv_cache_memory"] == 50_000
    [cell] = record["cells"]
    assert (cell["input_tokens"], cell["output_tokens"], cell["prompts"], cell["kv_budget"]) == (60, 5, 7, 24)
    for side in SIDES:
        side_record = cell[side]
        assert side_record["generated_tokens"] == 7 * 5
        assert side_record["generated_tokens_per_second"] == pytest.approx(35 / side_record["seconds"])
        assert side_record["tokens_per_second"] == pytest.approx((7 * 60 + 35) / side_record["seconds"])
        assert side_record["prompts_per_minute"] == pytest.approx(7 * 60 / side_record["seconds"])
        assert side_record["mfu"] == pytest.approx(
            side_record["prefill_flops"] / side_record["prefill_seconds"] / RATES.flops
        )
        share = side_record["decode_step_bytes"] / side_record["decode_step_seconds"] / RATES.bandwidth
        assert side_record["bandwidth_share"] == pytest.approx(share)
        assert side_record["kv_bytes"] <= 50_000
        assert side_record["planned_bytes"] > side_record["kv_bytes"]
    assert cell["ratios"]["full_cache"] == cell["full_cache"]["seconds"] / cell["batch_max"]["seconds"]
    assert record["mean_ratios"] == cell["ratios"]
    table = [line.split("  ")[0].removesuffix(" (as full cache)") for line in ended.out.splitlines()]
    assert table[1:5] == ["cache", "full cache", "decode-only", "batch-max"]
    assert "upper bound that nobody implements" in ended.out
    assert Path("bench.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("bench.svg").read_text()


def test_slots_are_what_the_memory_holds_of_whole_prompts_or_of_budgets(bench):
    bench(*CELL, "--kv-cache-memory", 50_000)
    [cell] = measured()["cells"]
    spec = preview_random_model("tiny", 65, "float32")
    full = CompressionPolicy.from_config(EngineConfig(kv_policy="none"))
    evicting = CompressionPolicy.from_config(EngineConfig(kv_budget=24, kv_sink=2, kv_recent=4))
    assert cell["full_cache"]["slots"] == 50_000 // full.layout(spec, 65).nbytes
    assert cell["batch_max"]["slots"] == 50_000 // evicting.layout(spec, 24).nbytes
    assert cell["prompts"] == 2 * cell["batch_max"]["slots"]


def test_a_bound_has_as_many_slots_as_hold_whole_prompts(monkeypatch):
    """If all steps take equally long, most slots are best; the plan has no row for the answer."""
    monkeypatch.setattr("bmx.measure.decode_bound.decode_step_seconds", lambda *_: 1.0)
    engine = id_engine(kv_policy="none", kv_cache_memory=65_000)
    policy = CompressionPolicy.from_config(EngineConfig(kv_budget=24, kv_sink=2, kv_recent=4))
    workload = Workload(prompts=random_prompts([60] * 9), answer_tokens=5)
    row = engine.policy.layout(engine.spec, 60).nbytes
    fits = engine.config.kv_cache_memory // row
    bound = measure_decode_only(engine, policy, workload, MemoryLimitError("no"), Display("none"))
    assert bound.slots == fits < 9
    assert bound.kv_bytes == fits * row
    assert bound.decode_seconds == -(-9 // fits) * 4 * 1.0


def test_a_full_cache_that_is_faster_is_the_bound(monkeypatch):
    monkeypatch.setattr("bmx.measure.decode_bound.decode_step_seconds", lambda *_: 1e6)
    workload = Workload(prompts=random_prompts([60] * 3), answer_tokens=5)
    policy = CompressionPolicy.from_config(EngineConfig(kv_budget=24, kv_sink=2, kv_recent=4))
    full = replace(SIDE, seconds=1e6)
    bound = measure_decode_only(id_engine(kv_policy="none"), policy, workload, full, Display("none"))
    assert bound == replace(full, as_full_cache=True)


def test_a_grid_is_a_cell_for_each_pair_of_lengths_and_a_line_in_the_summary(bench):
    flags = ("--shape", "tiny", "--input-tokens", "40,60", "--output-tokens", "1,3", "--prompts", 3)
    ended = bench(*flags, "-o", "grid.json")
    record = measured("grid.json")
    cells = [(cell["input_tokens"], cell["output_tokens"]) for cell in record["cells"]]
    assert cells == [(40, 1), (40, 3), (60, 1), (60, 3)]
    assert [line.split()[:3] for line in ended.out.splitlines()[-6:-2]] == [[f"{p:.0f}", "/", str(g)] for p, g in cells]
    alone = record["cells"][0]  # a prompt's last chunk gives the only token: nothing is decoded
    assert [alone[side]["decode_tokens_per_second"] for side in SIDES] == [None] * 3
    assert [alone[side]["bandwidth_share"] for side in SIDES] == [None] * 3


def test_the_preset_takes_a_quarter_of_weights_and_prompts(bmx, monkeypatch):
    monkeypatch.setattr(bench_module, "PAPER_INPUT_TOKENS", (60, 80))
    monkeypatch.setattr(bench_module, "PAPER_OUTPUT_TOKENS", (2,))
    small = ("--kv-sink", 2, "--kv-recent", 4, "--chunk-size", 16, "--dtype", "float32", "--device", "cpu")
    assert bmx("bench", "--shape", "tiny", "--preset", "paper", "--prompts", 3, *small).code == 0
    record = measured()
    row = CompressionPolicy.from_config(EngineConfig(kv_policy="none")).layout(
        preview_random_model("tiny", 82, "float32"), 82
    )
    assert record["settings"]["kv_cache_memory"] == max(record["model"]["weight_bytes"] // 4, row.nbytes)
    assert [cell["kv_budget"] for cell in record["cells"]] == [15, 20]
    assert bmx("bench", "--shape", "tiny", "--preset", "paper", "--prompts", 3, *FLAGS, "-o", "own.json").code == 0
    assert [cell["kv_budget"] for cell in measured("own.json")["cells"]] == [24, 24]


def test_prompts_of_a_file_have_their_own_lengths(bench, model):
    rows = [{"id": f"r{i}", "prompt": words(ids)} for i, ids in enumerate(random_prompts((30, 70, 45, 300)))]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = bench("in.jsonl", "-m", model, "--output-tokens", 4)
    assert ended.code == 0
    [cell] = measured()["cells"]
    assert (cell["prompts"], cell["input_tokens"]) == (3, pytest.approx((30 + 70 + 45) / 3))
    assert {cell[side]["generated_tokens"] for side in SIDES} == {12}
    assert "row r3 has no prompt of at most 252 tokens" in ended.err


def test_what_does_not_fit_is_said_and_the_others_are_measured(bench):
    ended = bench(*CELL, "--prompts", 3, "--kv-cache-memory", 14_000)
    assert ended.code == 0
    [cell] = measured()["cells"]
    assert [cell[side]["fits"] for side in SIDES] == [False, False, True]
    assert cell["ratios"] == {"full_cache": None, "decode_only": None}
    assert "does not fit" in ended.out


# What is counted


def test_flops_of_reading_by_hand():
    """A layer of two query heads of four numbers, a prompt of 10 tokens in chunks of 4, 3 and 3."""
    layer = LayerSpec(query_heads=2, kv_heads=1, key_dim=4, value_dim=4, window=None, owner=0)
    costs = Costs(activation_bytes=1, traffic_bytes=1, flops=100, operators=1)
    sizes = dict(vocab=10, max_length=100, weight_bytes=1000, head_bytes=200, itemsize=2)
    spec = ModelSpec(name="tiny", layers=(layer,), costs=costs, **sizes)
    full = CompressionPolicy.from_config(EngineConfig(kv_policy="none"))
    five = CompressionPolicy.from_config(EngineConfig(kv_budget=5, kv_sink=0, kv_recent=1))
    per_score = 2 * 2 * (4 + 4)
    assert prefill_flops(spec, full, 10, 12, 4) == 10 * 100 + per_score * (10 * 11 // 2)
    assert prefill_flops(spec, five, 10, 5, 4) == 10 * 100 + per_score * ((10) + (3 * 4 + 6) + (3 * 5 + 6))
    assert [held_rows(full, 10, 4), held_rows(five, 10, 4), held_rows(five, 2, 2)] == [12, 5, 3]
    embedding, head = torch.nn.Embedding(10, 5), torch.nn.Linear(5, 10, bias=False)

    class Untied:
        def get_input_embeddings(self):
            return embedding

        def get_output_embeddings(self):
            return head

    assert weights_read(spec, Untied(), 100) == 1000 - 10 * 5 * 4
    assert weights_read(spec, Untied(), 1) == 50 * 2 + 200  # no more than what one token multiplies with


def test_shares_and_ratios_by_hand():
    record = SIDE.record(Workload(prompts=[[1] * 9, [2] * 11], answer_tokens=6), flops=1000.0, bandwidth=400.0)
    assert (record["mfu"], record["bandwidth_share"]) == (0.3, 0.5)
    assert (record["generated_tokens_per_second"], record["tokens_per_second"]) == (3.0, 8.0)
    assert (record["prefill_tokens_per_second"], record["decode_tokens_per_second"]) == (10.0, 7.0)
    assert record["prompts_per_minute"] == 30.0
    cell = {name: {"fits": True, "seconds": s} for name, s in zip(SIDES, (6.0, 4.0, 2.0), strict=True)}
    assert ratios(cell) == {"full_cache": 3.0, "decode_only": 2.0}
    half = {"ratios": {"full_cache": None, "decode_only": 1.0}}
    assert mean_ratios([{"ratios": ratios(cell)}, half]) == {"full_cache": 3.0, "decode_only": 1.5}


def test_the_bound_decodes_in_slots_that_never_evict():
    steps = []
    engine = watched(id_engine(kv_policy="none"), before=lambda _, step: steps.append(step))
    plan = engine.plan([Length(40, 5, 45)] * 3)
    assert decode_step_seconds(engine, plan, slots=3, rows=24, steps=2) > 0
    decoding = [step for step in steps if all(chunk.sequence.decoding for chunk in step.chunks)][-3:]
    assert [[chunk.start for chunk in step.chunks] for step in decoding] == [[20] * 3, [21] * 3, [22] * 3]


def test_shapes_have_the_parameters_of_their_models():
    expected = {
        "llama-3.1-8b": 8.03e9,
        "llama-2-13b": 13.02e9,
        "phi-3.5-mini": 3.82e9,
        "qwen3-8b": 8.19e9,
        "qwen3.5-0.8b": 752.4e6,
        "smollm2-135m": 134.5e6,
    }
    assert set(SHAPES) == {*expected, "tiny"}
    from transformers import AutoModelForCausalLM

    for name, parameters in expected.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(random_model_config(name, 4256))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3), name
        assert model.config.max_position_embeddings >= 4256


# Wrong things


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--shape", "gpt-9"), 2, "no shape is called gpt-9"),
        (("--shape", "tiny", "-m", "demo"), 2, "--shape stands for a model"),
        (("in.jsonl", "--shape", "tiny"), 2, "it cannot be combined with --shape"),
        (("in.jsonl", "--input-tokens", 60), 2, "it cannot be combined with --input-tokens"),
        (("--shape", "tiny", "--input-tokens", "60,x"), 2, "input_tokens cannot be '60,x'"),
        (("--shape", "tiny", "--preset", "book"), 2, "preset cannot be 'book'"),
        (("--shape", "tiny", "--kv-policy", "none"), 2, "the full cache is measured anyway"),
        (("--shape", "tiny", "-o", "-"), 2, "bench keeps what it measures in a file"),
        (("--shape", "tiny", "-o", "nowhere/b.json"), 2, "the folder nowhere does not exist"),
        (("--shape", "tiny", "-o", "there.json"), 2, "there.json exists"),
        (("--shape", "tiny", "-o", "there.json", "--overwrite"), 2, "there.json exists and is not a file of bench"),
        (("-m", "fake"), 2, "the fake model computes nothing"),
        (("missing.jsonl", "-m", "MODEL", "--output-tokens", 2), 5, "missing.jsonl"),
        (("-m", "MODEL", "--input-tokens", 300), 2, "takes 256 tokens"),
        ((*CELL, "--kv-cache-memory", 1000), 4, "for the KV cache"),
        ((*CELL, "--memory-limit", "1M"), 4, "one sequence needs"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_a_hint(bench, model, flags, code, says):
    Path("there.json").write_text("{}")
    Path("in.jsonl").write_text('{"prompt": "w1 w2"}\n')
    ended = bench(*(model if flag == "MODEL" else flag for flag in flags))
    assert (ended.code, "Traceback" in ended.err) == (code, False)
    assert says in ended.err
    assert not Path("bench.json").exists()
    assert Path("there.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["bench.json", "bench.png", "bench.svg"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a8_a_file_of_another_kind_is_never_replaced(bench, name, flags, monkeypatch):
    monkeypatch.setattr(plots, "find_spec", find_spec)
    Path(name).write_text('{"calibration_format": 1}')
    ended = bench(*CELL, *flags)
    assert (ended.code, Path(name).read_text()) == (2, '{"calibration_format": 1}')
    assert f"{name} exists" in ended.complaint[0]


def test_a8_an_input_is_never_the_output(bench, model):
    Path("in.jsonl").write_text('{"prompt": "w1 w2"}\n')
    for flags in ((), ("--overwrite",)):
        assert bench("in.jsonl", "-m", model, "-o", "in.jsonl", *flags).code == 2
    assert Path("in.jsonl").read_text() == '{"prompt": "w1 w2"}\n'


def test_f_a_config_file_of_a_run_serves_the_bench_though_it_comes_through_a_pipe(bench):
    """What only a run takes has no effect: neither its files, nor values that contradict flags of a bench."""
    text = "kv_budget: 20\nerror_file: nowhere/e.jsonl\nstats_file: /\nretry_failed: true\nmax_errors: 1\nlimit: 1\n"
    os.mkfifo("config")
    writer = threading.Thread(target=lambda: Path("config").write_text(text))
    writer.start()
    ended = bench(*CELL[:2], "--preset", "paper", "--prompts", 2, "--input-tokens", 40, "--output-tokens", 2,
                  "--overwrite", "--config", "config")  # fmt: skip
    writer.join()
    assert ended.code == 0
    assert measured()["cells"][0]["kv_budget"] == 24  # the flag's, and not a quarter of the prompt


def test_a_stopped_bench_keeps_the_cells_that_were_finished(bench, monkeypatch):
    measure_cache, sides = bench_module.measure_cache, []

    def stopped(*args):
        sides.append(args)
        if len(sides) > 2:  # the full cache and Batch-Max of the first cell are measured
            signal.raise_signal(signal.SIGINT)
        return measure_cache(*args)

    monkeypatch.setattr(bench_module, "measure_cache", stopped)
    grid = ("--shape", "tiny", "--input-tokens", "40,60", "--output-tokens", 2, "--prompts", 2)
    ended = bench(*grid)
    assert ended.code == 130
    assert "finished cells are in the output file" in ended.err
    assert (measured()["state"], len(measured()["cells"])) == ("unfinished", 1)
    monkeypatch.setattr(bench_module, "measure_cache", measure_cache)
    assert bench(*grid).code == 2
    assert bench(*grid, "--overwrite").code == 0
    assert (measured()["state"], len(measured()["cells"])) == ("finished", 2)


def test_without_matplotlib_the_rest_is_done_and_a_note_says_how_to_get_plots(bench):
    ended = bench(*CELL, "--prompts", 2)
    assert ended.code == 0
    assert "pip install matplotlib" in ended.err
