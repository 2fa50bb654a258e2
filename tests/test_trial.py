"""Kernels that raise, or compute wrong numbers, are replaced by plain torch one by one, and it is said."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import answers, as_requests, random_prompts, tiny_engine, tiny_loaded
from families import FAMILIES, tiny_model

triton = pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from bmx import EngineConfig, kernels
from bmx.engine.kernel_trials import needed_by_mixers
from bmx.errors import DeviceError
from bmx.job.manifest import run_finished
from bmx.kernels import reference, trial, trial_inputs
from bmx.kernels.contract import FUNCTIONS
from bmx.kernels.ranking import EvictionOrder
from bmx.kernels.registry import CAPABILITIES
from bmx.model.fp8_modules import quantise
from bmx.model.fused_modules import fused_modules
from bmx.model.loader import choose_dtype
from bmx.model.spec_settings import under_settings
from bmx.plan.device import Device
from bmx.stats import Stats
from bmx.terminal import environment

MODULE = "bmx.kernels.triton"
TIGHT = {"kv_budget": 20, "kv_sink": 2, "kv_recent": 5, "chunk_size": 16, "max_num_seqs": 2}
PROMPTS = random_prompts((40, 11))


@pytest.fixture(autouse=True)
def compiled(cpu_kernels, monkeypatch):
    """Triton's kernels are chosen, and tried as if they were compiled. None has been tried yet."""
    cpu_kernels("triton")
    small = FAMILIES["llama"]()
    small.num_hidden_layers = 1
    monkeypatch.setitem(FAMILIES, "small", lambda: small)
    monkeypatch.setattr(trial, "interpreted", lambda: False)
    forget()
    yield
    forget()


def forget():
    """Nothing was tried, and nothing was said."""
    trial._failures.cache_clear()
    trial._warn.cache_clear()


def fail(*_, **__):
    raise OutOfResources(131072, 101376, "shared memory")


def wrong(x, weight, epsilon):
    return 1.1 * reference.rms_norm(x, weight, epsilon)


def test_g17_a_kernel_that_raises_and_one_that_is_wrong_are_replaced_and_no_other(monkeypatch, caplog):
    monkeypatch.setattr(f"{MODULE}.decode_step", fail)
    monkeypatch.setattr(f"{MODULE}.rms_norm", wrong)
    engine = tiny_engine("small", **TIGHT)
    chosen = engine.backend.kernels
    assert chosen.name == "triton"
    assert set(chosen.replaced) == {"decode_step", "rms_norm"}
    assert chosen.replaced["decode_step"].startswith("OutOfResources: out of resource: shared memory, Required: 131072")
    assert chosen.replaced["rms_norm"] == "wrong numbers: output is off by 10.0%"
    assert engine.describe()["replaced_kernels"] == chosen.replaced
    assert len(caplog.messages) == 2
    assert all("plain torch computes" in message for message in caplog.messages)
    own = sys.modules[MODULE]
    for name in FUNCTIONS:
        assert getattr(chosen.module, name) is getattr(reference if name in chosen.replaced else own, name)


def test_g17_answers_are_those_of_plain_torch_and_the_plan_knows(monkeypatch, cpu_kernels):
    monkeypatch.setattr(f"{MODULE}.prefill_step", fail)
    engine, requests = tiny_engine("small", **TIGHT), as_requests(PROMPTS, max_tokens=3)
    answered = answers(engine, requests)
    assert not engine.backend.kernels.capabilities.orders
    planned = [
        Device.of("cuda", engine.spec, 0, EngineConfig(**TIGHT), chosen)
        for chosen in (engine.backend.kernels, kernels.Kernels("triton", ""))
    ]
    assert [device.captures for device in planned] == [False, True]
    assert planned[0].workspace(512, 1024, 4) > planned[1].workspace(512, 1024, 4)
    cpu_kernels("reference")
    assert answers(tiny_engine("small", **TIGHT), requests) == answered


def test_g17_a_kernel_that_fails_in_the_rehearsal_alone_gives_way_to_plain_torch(monkeypatch, caplog, cpu_kernels):
    own = sys.modules[MODULE].prefill_step

    def prefill_step(output, query, *args, **options):
        return own(output, query, *args, **options) if len(query) == trial.TOKENS * trial.SLOTS else fail()

    monkeypatch.setattr(f"{MODULE}.prefill_step", prefill_step)
    engine, requests = tiny_engine("small", **TIGHT), as_requests(PROMPTS, max_tokens=3)
    assert engine.backend.kernels.name == "triton"
    answered = answers(engine, requests)
    assert engine.backend.kernels.name == "reference"
    [warning] = caplog.messages
    assert "OutOfResources: out of resource" in warning
    cpu_kernels("reference")
    assert answers(tiny_engine("small", **TIGHT), requests) == answered


def test_kernels_that_work_are_kept_and_tried_once_for_all_layers_alike(caplog, monkeypatch):
    engine = tiny_engine("llama", **TIGHT)
    assert engine.backend.kernels == kernels.choose("cpu")
    for name in FUNCTIONS:
        monkeypatch.setattr(f"{MODULE}.{name}", fail)
    assert engine.with_config(engine.config).backend.kernels.replaced == {}
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("family", "kv_format", "policy"),
    [
        ("gemma2", "model", "far-attention"),
        ("gpt_oss", "int8/int4", "far-attention"),
        ("youtu", "model", "far-attention"),
        ("small", "int8", "r-kv"),
    ],
)
def test_no_false_alarms_in_capped_windowed_quantised_latent_or_ranked_attention(family, kv_format, policy):
    assert tiny_engine(family, kv_format=kv_format, kv_policy=policy).backend.kernels.replaced == {}


def test_keys_that_are_scaled_by_channel_are_tried_where_a_run_has_them(monkeypatch):
    settings = {"kv_policy": "none", "kv_format": "int8/int4"}
    engine = tiny_engine("small", kv_budget=40, **settings)
    assert engine.backend.kernels.replaced == {}
    forget()
    monkeypatch.setattr(f"{MODULE}.decode_by_channel", fail)
    chosen = tiny_engine("small", kv_budget=40, **settings).backend.kernels
    assert set(chosen.replaced) == {"append_by_channel", "decode_by_channel", "read_by_channel"}
    assert not chosen.capabilities.profile.reads_by_channel


def wrong_states(value, states, *_, **__):
    states.zero_()
    return value


@pytest.mark.parametrize(
    ("family", "function", "damage", "reason"),
    [
        ("qwen3_5_text", "delta_rule", fail, "OutOfResources"),
        ("olmo_hybrid", "delta_rule", lambda _q, _k, value, _g, _b, *rest, **_: wrong_states(value, *rest), "wrong"),
        ("granitemoehybrid", "state_space", lambda x, *_: x.float(), "wrong numbers: output"),
    ],
)
def test_g17_mixers_that_fail_are_left_to_plain_torch(monkeypatch, family, function, damage, reason):
    spec = under_settings(tiny_loaded(family).spec, EngineConfig(state_format="bfloat16"))
    mixers = list(needed_by_mixers(tiny_loaded(family).model, spec))

    def chosen():
        forget()
        return trial.tried(kernels.choose("cpu"), mixers, torch.float32, torch.device("cpu"))

    assert chosen().replaced == {}
    assert chosen().capabilities.mixes_in_place
    monkeypatch.setattr(f"{MODULE}.{function}", damage)
    assert set(chosen().replaced) == {function}
    assert not chosen().capabilities.mixes_in_place
    assert chosen().replaced[function].startswith(reason)
    assert chosen().capabilities.capturable


def test_mixers_are_tried_where_a_model_has_them(monkeypatch):
    tiny_loaded("lfm2")  # on a GPU, plain torch computes while a model is looked at
    monkeypatch.setattr(f"{MODULE}.convolve", fail)
    assert set(tiny_engine("lfm2", kv_policy="none").backend.kernels.replaced) == {"convolve"}


def without_compiler(*_, **__):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable or set triton.knobs")


def test_g17_where_nothing_can_be_compiled_plain_torch_runs_alone_and_says_why_once(monkeypatch, caplog):
    for name in trial.TRIALS:
        monkeypatch.setattr(f"{MODULE}.{name}", without_compiler)
    chosen = tiny_engine("small").backend.kernels
    assert chosen.name == "reference"
    assert "plain torch: RuntimeError: Failed to find C compiler" in chosen.why
    assert not chosen.capabilities.orders
    assert callable(chosen.module.decode_step)
    [warning] = caplog.messages
    assert "Failed to find C compiler" in warning


def test_g17_a_triton_that_cannot_be_imported_leaves_plain_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE, None)
    chosen = tiny_engine("small").backend.kernels
    assert chosen.name == "reference"
    assert "plain torch: ModuleNotFoundError" in chosen.why


def test_g17_float8_weights_that_a_kernel_rounds_wrongly_are_left_to_plain_torch(monkeypatch):
    """Only in models that have them."""
    monkeypatch.setattr("bmx.kernels.triton.round_rows", fail)
    model = tiny_model("small")
    for quantised in (False, True):
        if quantised:
            quantise(model)
        engine = tiny_engine(model, kv_policy="none")
        assert set(engine.backend.kernels.replaced) == ({"product"} if quantised else set())


@pytest.mark.parametrize(
    ("capability", "hip", "name", "dtype", "why"),
    [
        ((7, 0), None, "reference", torch.float16, "compute capability 8.0 or later, this one has 7.0"),
        ((7, 5), None, "reference", torch.float16, "compute capability 8.0 or later, this one has 7.5"),
        ((9, 4), "7.0", "reference", torch.bfloat16, "AMD's"),
        ((8, 0), None, "triton", torch.bfloat16, "compiled for the GPU"),
        ((12, 0), None, "triton", torch.bfloat16, "compiled for the GPU"),
    ],
)
def test_g18_gpus_that_triton_kernels_are_not_for_run_plain_torch_and_it_is_said_once(
    monkeypatch, caplog, capability, hip, name, dtype, why
):
    monkeypatch.delenv("BMX_KERNELS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    device, chosen = torch.device("cuda"), kernels.choose("cuda")
    assert chosen.name == name
    assert why in chosen.why
    assert choose_dtype(EngineConfig(), device, {}) is dtype
    assert [message for message in caplog.messages if "float16" in message] != [] or dtype is torch.bfloat16
    caplog.clear()
    for _ in range(2 if name == "reference" else 0):
        assert trial.tried(chosen, [LAYER], dtype, device) == chosen
    assert len(caplog.messages) == (name == "reference")


def test_every_function_that_triton_computes_has_a_trial():
    module = kernels.Kernels("triton", "").module
    own = {name for name in FUNCTIONS if getattr(module, name) is not getattr(reference, name)}
    assert own == {*trial.TRIALS, *kernels.MIXERS}


LAYER = trial.Attention(
    heads=2,
    kv_heads=1,
    key_dim=16,
    value_dim=16,
    order=EvictionOrder(by="average", sink=2, recent=4, window=None),
    mass=True,
)


def replaced(layer=LAYER):
    chosen = trial.tried(kernels.choose("cpu"), [layer], torch.float32, torch.device("cpu"))
    return dict(chosen.replaced)


def damaged_decode(change):
    """Plain torch's decoding step, after which something is changed."""

    def decode_step(output, query, key, value, rows, *args, **options):
        done = reference.decode_step(output, query, key, value, rows, *args, **options)
        change(output, rows)
        return done

    return decode_step


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda output, _: output[0, 0].mul_(2), "output is off"),
        (lambda output, _: output[0, 0, 0].fill_(float("nan")), "output is off"),
        (lambda _, rows: rows.mass.mul_(0.9), "mass is off"),
        (lambda _, rows: rows.keys.neg_(), "keys is off"),
        (lambda _, rows: rows.positions.add_(1), "pairs are kept or evicted"),
    ],
)
def test_whatever_a_step_writes_is_compared(monkeypatch, change, what):
    monkeypatch.setattr(f"{MODULE}.decode_step", damaged_decode(change))
    assert what in replaced()["decode_step"]


def test_attention_that_is_not_added_up_is_noticed(monkeypatch):
    def decode_step(*args, **options):
        return reference.decode_step(*args, **options | {"accumulate": False})

    monkeypatch.setattr(f"{MODULE}.decode_step", decode_step)
    assert "mass is off" in replaced()["decode_step"]


def test_slots_that_are_read_in_pieces_are_tried_too(monkeypatch):
    def decode_step(output, query, key, value, rows, *args, **options):
        done = reference.decode_step(output, query, key, value, rows, *args, **options)
        output.mul_(1 if rows.largest == trial_inputs.ROWS else 2)
        return done

    monkeypatch.setattr(f"{MODULE}.decode_step", decode_step)
    assert "output is off" in replaced()["decode_step"]


def test_a_step_that_declines_is_not_a_failure(monkeypatch):
    monkeypatch.setattr(f"{MODULE}.prefill_step", lambda *_, **__: False)
    assert replaced() == {}


def test_g17_an_error_after_which_the_gpu_refuses_every_call_ends_the_run_with_the_way_out(monkeypatch):
    def refused(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", refused)
    with pytest.raises(DeviceError, match="a trial of the kernel gate stopped the GPU: RuntimeError: bad") as caught:
        trial._check_alive(torch.device("cuda"), "gate", RuntimeError("bad"))
    assert "BMX_KERNELS=reference" in caught.value.hint


def test_memory_that_runs_out_in_a_trial_is_no_fault_of_the_kernel(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"{MODULE}.gate", full)
    with pytest.raises(torch.OutOfMemoryError):
        replaced()


@pytest.mark.parametrize(
    ("capability", "told"),
    [
        ((7, 5), "compute capability 7.5, float16 (no bfloat16 in hardware)"),
        ((8, 6), "compute capability 8.6, bfloat16"),
    ],
)
def test_g17_the_environment_names_the_numbers_and_what_is_replaced(monkeypatch, capability, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(environment, "_free", str)
    monkeypatch.setattr("bmx.hardware.free_gpu_memory", lambda: "some")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    card = SimpleNamespace(shared_memory_per_block_optin=101376)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(environment.shutil, "which", lambda _: None)
    monkeypatch.setattr(trial, "tried", lambda chosen, *_: replace(chosen, replaced={"gate": "it is broken"}))
    rows = environment.environment()
    assert ("gpu (CUDA)", f"a card, {told}, 99 KB of shared memory a block, some") in rows
    assert ("C compiler", "none (gcc or clang), which Triton needs") in rows
    assert ("gate", "in plain torch: it is broken") in rows


def counts(family, monkeypatch):
    """Parts of a family's tiny model, where Triton's kernels may compute those in float32."""
    changed = replace(CAPABILITIES["triton"], model_dtypes=("float32",))
    monkeypatch.setattr(kernels, "CAPABILITIES", {**CAPABILITIES, "triton": changed})
    with fused_modules(tiny_model(family), kernels.Kernels("triton", "")) as counted:
        return counted


def test_parts_that_kernels_take_over_are_counted_by_kind(monkeypatch):
    assert counts("small", monkeypatch) == {
        "linear": {"kernels": 8, "torch": 0},
        "norm": {"kernels": 3, "torch": 0},
        "mlp": {"kernels": 1, "torch": 0},
        "rotary": {"kernels": 1, "torch": 0},
    }


def test_parts_that_are_left_to_torch_are_counted_with_the_reason(monkeypatch):
    monkeypatch.setattr(f"{MODULE}.rms_norm", fail)
    counted = counts("helium", monkeypatch)
    assert counted["norm"]["kernels"] == 0
    assert counted["norm"]["why"].startswith("HeliumRMSNorm: OutOfResources: out of resource: shared memory")
    assert counted["rotary"] == {"kernels": 0, "torch": 2, "why": "HeliumAttention: the kernel's numbers are others"}


def test_the_manifest_counts_the_parts_where_they_are_counted():
    assert "modules" not in run_finished("finished", (), Stats())
    counted = {"linear": {"kernels": 8, "torch": 0}}
    assert run_finished("finished", (), Stats(modules=counted))["modules"] == counted
