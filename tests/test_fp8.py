"""Linear layers in 8-bit floats: they multiply what was rounded, near what it was, on GPUs that can."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import tiny_model
from test_quantization import SIZES, linear, logits_of
from transformers import LlamaForCausalLM

from bmx import EngineConfig
from bmx.errors import UsageError
from bmx.kernels import fp8_products
from bmx.kernels.fp8_products import MOST, multiply, product, round_rows
from bmx.model.fp8_modules import Fp8Linear, quantise
from bmx.model.inspection import held_bytes
from bmx.model.loader import check_quantization, prepare, quantize
from bmx.model.preview import with_quantized_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ROUNDED = 2**-4  # of a number, at most: half of the last of three bits behind the first
LEAST_STEP = 2**-10 / MOST  # of a row's greatest number: half a step of its smallest ones


def rows_of(count=9, inputs=576):
    """Rows of numbers of all sizes, a row of zeros among them."""
    torch.manual_seed(1)
    x = torch.randn(count, inputs) * torch.logspace(-3, 3, count).unsqueeze(1)
    x[4] = 0
    return x


def decoded(codes, scales):
    return codes.double() * scales.double().unsqueeze(1)


@pytest.fixture
def without_row_scales(monkeypatch):
    """A GPU that multiplies without scales of rows alone, in float32; returns the sizes that were refused."""
    refused = []

    def scaled_mm(a, b, scale_a, scale_b, out_dtype, **_):
        if scale_a.numel() > 1:
            refused.append(len(a))
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`")
        return ((a.float() @ b.float()) * (scale_a * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_products, "_by_tensor", set())
    return refused


def test_rounded_rows_are_near_what_they_were():
    x = rows_of()
    codes, scales = round_rows(x)
    assert codes.dtype == FP8
    greatest = x.abs().amax(1, keepdim=True)
    assert ((decoded(codes, scales) - x).abs() <= ROUNDED * x.abs() + LEAST_STEP * greatest).all()
    assert (codes.float().abs().amax(1)[greatest.squeeze(1) > 0] == MOST).all()


def assert_multiplies(bias):
    """In float64 from rounded numbers, and from the numbers as they were."""
    layer, x = linear(576, 96, bias).to(BF16), rows_of().to(BF16)
    small = Fp8Linear(layer)
    codes, scales = round_rows(x)
    y = small(x)
    assert y.dtype == BF16
    weight = decoded(small.codes, small.scales)
    shift = 0 if layer.bias is None else layer.bias.double()
    expected = decoded(codes, scales) @ weight.t() + shift
    terms = decoded(codes, scales).abs() @ weight.abs().t()
    assert ((y - expected).abs() <= 2**-8 * (3 * (expected - shift).abs() + expected.abs()) + 1e-5 * terms).all()
    wide, own = x.double(), layer.weight.double()
    exact, sizes = wide @ own.t() + shift, wide.abs() @ own.abs().t()
    most = wide.abs().amax(1, keepdim=True) * own.abs().amax(1) * x.shape[1]
    assert ((y - exact).abs() <= (2 * ROUNDED + ROUNDED**2 + 2**-7) * sizes + 3 * LEAST_STEP * most + 0.01).all()
    assert ((y - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_the_rounded_numbers(bias):
    assert_multiplies(bias)


@pytest.mark.parametrize("bias", [True, False])
def test_where_scales_of_rows_are_refused_they_follow_the_product(bias, without_row_scales):
    """cuBLAS on an H100 refuses few rows of many inputs; asked once for each size."""
    assert_multiplies(bias)
    assert without_row_scales == [9]
    assert_multiplies(bias)
    assert without_row_scales == [9]


def test_other_errors_are_errors(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    with pytest.raises(RuntimeError, match="illegal"):
        Fp8Linear(linear(32, 16))(torch.ones(1, 32))


@pytest.mark.parametrize(
    ("capability", "version", "ignores"),
    [((8, 9), "2.11.0+cu130", True), ((8, 9), "2.12.1", False), ((9, 0), "2.11.0+cu130", False)],
)
def test_on_ada_before_torch_2_12_scales_follow(capability, version, ignores, monkeypatch):
    """There the product with scales of rows is launched on another stream than its inputs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch, "__version__", version)
    assert fp8_products._ignores_streams(torch.device("cuda")) == ignores


def test_a_row_that_is_no_number_leaves_the_others_alone():
    layer, x = Fp8Linear(linear(64, 32)), torch.randn(6, 64)
    expected = layer(x)
    x[2, 3], x[3, 3] = float("nan"), float("inf")
    y = layer(x)
    assert not y[2:4].isfinite().any()
    assert torch.equal(y[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])


@pytest.mark.parametrize("inputs", [64, 100])
def test_on_a_gpu_one_kernel_rounds(inputs, monkeypatch):
    triton_fp8 = pytest.importorskip("bmx.kernels.triton_fp8")
    x = rows_of(inputs=3 * inputs).to(DEVICE)[:, inputs : 2 * inputs]
    codes, scales = triton_fp8.round_rows(x)
    expected_codes, expected_scales = round_rows(x)
    torch.testing.assert_close(scales, expected_scales)
    carried = expected_codes.float().abs().frexp().mantissa == 0.5  # the interpreter forgets the carry to the exponent
    assert torch.equal(codes.float()[~carried], expected_codes.float()[~carried])


def test_layers_of_one_input_round_it_once():
    layers = tuple(Fp8Linear(linear(64, outputs)).layer for outputs in (32, 48))
    asked = []

    def rounded(x):
        asked.append(x.shape)
        return round_rows(x)

    x = torch.randn(2, 5, 64)
    together = product(layers, rounded)(x)
    assert asked == [(10, 64)]
    for y, layer in zip(together, layers, strict=True):
        assert torch.equal(y.flatten(0, 1), multiply(*round_rows(x.flatten(0, 1)), layer, x.dtype))


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_answers_are_near_those_without(family, cpu_kernels):
    cpu_kernels("reference")
    model = tiny_model(family).to(BF16)
    before = logits_of(prepare(model))
    assert quantise(model) > 0
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    after = logits_of(prepare(model))
    assert 1e-3 < (after - before).norm() / before.norm() < 0.35
    teacher, student = before.log_softmax(-1), after.log_softmax(-1)
    assert 0 < (teacher.exp() * (teacher - student)).sum() < 0.25


def test_layers_of_odd_sizes_stay_as_they_are():
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj, mlp.gate_proj = torch.nn.Linear(32, 40), torch.nn.Linear(24, 64)
    quantise(model)
    kinds = [type(part) for part in (mlp.up_proj, mlp.gate_proj, mlp.down_proj)]
    assert kinds == [torch.nn.Linear, torch.nn.Linear, Fp8Linear]


def test_what_is_foreseen_is_what_is_held():
    model = LlamaForCausalLM(SIZES).to(BF16)
    spec = prepare(model).spec
    seen = with_quantized_weights(spec, EngineConfig(quantization="fp8"), "cuda")
    quantise(model)
    assert seen.quantization == "fp8"
    assert seen.weight_bytes == pytest.approx(held_bytes(model), rel=0.02)
    assert seen.weight_bytes < 0.6 * spec.weight_bytes


def gpu(monkeypatch, capability, hip=None):
    """A GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "A100")
    monkeypatch.setattr(torch, "version", SimpleNamespace(hip=hip))


def test_gpus_without_8_bit_floats_are_refused(monkeypatch):
    for capability in ((8, 9), (9, 0), (10, 0), (12, 0)):
        gpu(monkeypatch, capability)
        check_quantization("fp8", "bfloat16", "cuda")
    for dtype, device, capability, hip, said in (
        ("bfloat16", "cpu", (9, 0), None, "GPUs only"),
        ("float16", "cuda", (9, 0), None, "computes in float16"),
        ("bfloat16", "cuda", (8, 0), None, "A100 has 8.0"),
        ("bfloat16", "cuda", (9, 4), "6.2", "NVIDIA"),
    ):
        gpu(monkeypatch, capability, hip)
        with pytest.raises(UsageError, match=said) as refused:
            check_quantization("fp8", dtype, device)
        assert refused.value.hint


def test_products_that_fail_or_are_wrong_are_a_line(monkeypatch):
    """Tried before a weight is rounded. The CPU stands in for the card."""
    monkeypatch.setattr("bmx.model.loader.check_quantization", lambda *_: None)
    loaded = prepare(tiny_model("llama").to(BF16))

    def fails(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling something\nand more")

    for scaled_mm, said in (
        (fails, "CUBLAS_STATUS_INTERNAL_ERROR"),
        (lambda a, b, *_, **__: a.float() @ a.float().t(), "wrong"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_scaled_mm", scaled_mm)
            with pytest.raises(UsageError, match=said):
                quantize(loaded, "fp8")
    assert not any(isinstance(module, Fp8Linear) for module in loaded.model.modules())
    assert quantize(loaded, "fp8").spec.quantization == "fp8"


def test_on_a_cpu_it_is_refused_before_weights_are_read(bmx, model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "w5"}\n')
    for command in ("run", "plan-batch", "calibrate"):
        ended = bmx(command, "in.jsonl", "--model", model, "--quantization", "fp8", "--device", "cpu")
        assert ended.code == 2
        assert "--quantization fp8 works on GPUs only" in ended.err
