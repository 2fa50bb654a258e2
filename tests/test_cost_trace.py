"""The costs that are traced on the meta device are those that follow from the sizes of the model by hand."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from bmx.model.cost_trace import trace_costs
from bmx.model.inspection import read_spec
from bmx.model.loader import prepare
from bmx.model.spec import Costs

S, F = "sliding_attention", "full_attention"
H, WIDE, HEADS, KV_HEADS, VOCAB = 2048, 8192, 32, 8, 32_000
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=H,
    intermediate_size=WIDE,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
# Of each dense family: its config keys, the width of a head, intermediate tensors alive at once, rotary tables.
DENSE = {
    "llama": (dict(), 64, 3, 1),
    "qwen2": (dict(), 64, 3, 1),
    "qwen3": (dict(head_dim=128), 128, 3, 1),
    "phi3": (dict(), 64, 4, 1),
    "gemma3_text": (dict(head_dim=128, layer_types=[S, F]), 128, 3, 2),
}
MOE = {  # config keys, and the width of an expert
    "qwen3_moe": (dict(head_dim=64, moe_intermediate_size=768, num_experts=16, num_experts_per_tok=4), 768),
    "mixtral": (dict(num_local_experts=8, num_experts_per_tok=2), WIDE),
    "olmoe": (dict(num_experts=16, num_experts_per_tok=4), WIDE),
}
FREE = Costs(activation_bytes=0, traffic_bytes=0, flops=0, operators=0)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def meta_model(family, dtype=torch.bfloat16, layers=2, **config):
    """A model of realistic width on the meta device."""
    if "layer_types" in config:
        config["layer_types"] = (config["layer_types"] * layers)[:layers]
    full_config = AutoConfig.for_model(family, **SIZES | config, num_hidden_layers=layers)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(full_config, dtype=dtype).eval()


@cache
def traced(family, dtype=torch.bfloat16, layers=2):
    return trace_costs(meta_model(family, dtype, layers, **(DENSE | MOE)[family][0]))


def linear_parameters(model):
    """Of all products but the output head's, biases left out."""
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )


@DTYPES
@pytest.mark.parametrize("family", DENSE)
def test_a_token_holds_the_mlp_the_residuals_and_the_rotary_tables(family, dtype):
    _, head_dim, mlp, tables = DENSE[family]
    found = traced(family, dtype).activation_bytes
    assert found == dtype.itemsize * (mlp * WIDE + 4 * H + 2 * head_dim * tables)


@pytest.mark.parametrize("family", DENSE)
def test_where_the_mlp_is_narrow_attention_decides(family):
    """Then the closed form is too little: what the dry run finds is more than it, and less than twice as much."""
    config, head_dim, _, tables = DENSE[family]
    found = trace_costs(meta_model(family, **config | {"intermediate_size": 256})).activation_bytes
    assert 2 * (4 * 256 + 4 * H + 2 * head_dim * tables) < found < 2 * (20 * H)


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_more_layers_hold_no_more_at_once(family):
    few, many = (traced(family, layers=layers) for layers in (2, 3))
    assert few.activation_bytes == many.activation_bytes


@DTYPES
@pytest.mark.parametrize("family", DENSE)
def test_flops_are_two_for_each_parameter_of_a_product(family, dtype):
    """Gemma's embedding and norms, the output head and attention itself do not count."""
    for layers in (2, 3):
        model = meta_model(family, dtype, layers, **DENSE[family][0])
        assert traced(family, dtype, layers).flops == 2 * linear_parameters(model)


def test_biases_are_not_products():
    assert (
        trace_costs(meta_model("llama", attention_bias=True, mlp_bias=True)).flops
        == trace_costs(meta_model("llama")).flops
    )


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("family", MOE)
def test_of_experts_those_that_are_active_count_and_the_router(family, layers):
    config, width = MOE[family]
    number = config.get("num_experts") or config["num_local_experts"]
    model = meta_model(family, layers=layers, **config)
    experts = config["num_experts_per_tok"] * 3 * H * width
    assert trace_costs(model).flops == 2 * (linear_parameters(model) + layers * (experts + number * H))


@pytest.mark.parametrize("family", MOE)
def test_more_experts_cost_no_more_but_the_router(family):
    config, _ = MOE[family]
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    few, many = (trace_costs(meta_model(family, **config | {name: number})) for number in (16, 64))
    assert many.flops - few.flops == 2 * 2 * 48 * H  # of both layers
    assert abs(many.activation_bytes - few.activation_bytes) < 48 * 100  # the router's scores


@pytest.mark.parametrize("family", [*DENSE, *MOE])
def test_every_layer_adds_the_same_operators_and_the_same_traffic(family):
    one, two, three = (traced(family, layers=layers) for layers in (2, 4, 6))
    assert three.operators - two.operators == two.operators - one.operators > 0
    assert three.traffic_bytes - two.traffic_bytes == two.traffic_bytes - one.traffic_bytes > 0


@pytest.mark.parametrize("family", DENSE)
def test_wider_numbers_hold_twice_the_bytes_and_cost_the_same_flops(family):
    half, whole = (traced(family, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert half.flops == whole.flops
    assert 1.5 * half.activation_bytes < whole.activation_bytes <= 2 * half.activation_bytes
    assert half.traffic_bytes < whole.traffic_bytes < 2 * half.traffic_bytes
    assert half.operators >= whole.operators  # norms are computed in float32


def test_a_wider_model_moves_more():
    narrow, wide = (
        trace_costs(meta_model("llama", hidden_size=width, intermediate_size=4 * width)) for width in (1024, 2048)
    )
    assert wide.traffic_bytes > 1.8 * narrow.traffic_bytes
    assert wide.operators == narrow.operators


def test_a_vocabulary_costs_a_step_nothing():
    """No logits are computed for tokens that are not sampled."""
    assert trace_costs(meta_model("llama", vocab_size=1000)) == trace_costs(meta_model("llama", vocab_size=100_000))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "short_factor": [1.0] * 32,
    "long_factor": [2.0] * 32,
    "original_max_position_embeddings": 4096,
}


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LONGROPE, "max_position_embeddings": 16_384}], ids=len)
def test_a_model_is_left_as_it_was_and_costs_the_same_again(family, rope):
    """What a model computes once and keeps is no cost of a step."""
    model = meta_model(family, **(DENSE | MOE)[family][0], **rope)
    before = model.config._attn_implementation
    assert trace_costs(model) == trace_costs(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gemma3n_text", "deepseek_v3", "gpt2", "phi3"])
def test_a_loaded_model_costs_what_its_config_alone_says(family):
    """A loaded model is traced by a copy on the meta device."""
    costs = prepare(tiny_model(family).bfloat16()).spec.costs
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16).eval()
    assert prepare(meta).spec.costs == costs
    assert min(costs.activation_bytes, costs.traffic_bytes, costs.flops, costs.operators) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_loaded_model_with_experts_has_its_costs_in_any_type(family, dtype):
    """On the meta device, products of experts are defined for bfloat16 alone; their FLOPs are the same in all types."""
    half, found = (prepare(tiny_model(family).to(kind)).spec.costs for kind in (torch.bfloat16, dtype))
    assert found.flops == half.flops
    wider = dtype.itemsize / 2
    assert wider * half.activation_bytes * 0.7 < found.activation_bytes < wider * half.activation_bytes * 1.3


@pytest.mark.parametrize("family", ["qwen3_5_text", "granitemoehybrid_nope", "lfm2"])
def test_of_mixers_the_products_count_and_not_what_mixes_tokens(family):
    """Their states are read and written by functions of the kernels, which plans and forecasts count by themselves."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.bfloat16).eval()
    flops = trace_costs(model).flops
    assert flops == pytest.approx(2 * linear_parameters(model), rel=0.01)  # older releases rotate with a product


@pytest.mark.parametrize("family", ["qwen3_5_text", "kimi_linear", "jamba", "lfm2"])
def test_the_states_of_a_model_without_contents_are_those_of_the_loaded_one(family):
    loaded = tiny_model(family).bfloat16()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16).eval()
    assert prepare(empty).spec.states == prepare(loaded).spec.states


def delta_nets(c, layers):
    """Bytes of gated delta nets in float32, with windows in 16 bits, as the guide has it."""
    heads, keys, key, value = (
        c.linear_num_value_heads,
        c.linear_num_key_heads,
        c.linear_key_head_dim,
        c.linear_value_head_dim,
    )
    return layers * (4 * heads * key * value + 2 * (c.linear_conv_kernel_dim - 1) * (2 * keys * key + heads * value))


def mamba_2(layers, heads, dim, groups, numbers, window):
    """The same of Mamba-2."""
    return layers * (4 * heads * dim * numbers + 2 * (window - 1) * (heads * dim + 2 * groups * numbers))


def of_mamba_keys(c, layers):
    return mamba_2(layers, c.mamba_n_heads, c.mamba_d_head, c.mamba_n_groups, c.mamba_d_state, c.mamba_d_conv)


CLOSED_FORMS = {
    "qwen3_5_text": lambda c: delta_nets(c, c.layer_types.count("linear_attention")),
    "qwen3_5_moe_text": lambda c: delta_nets(c, c.layer_types.count("linear_attention")),
    "qwen3_next": lambda c: delta_nets(c, c.layer_types.count("linear_attention")),
    "granitemoehybrid": lambda c: of_mamba_keys(c, c.num_hidden_layers - 1),
    "bamba": lambda c: of_mamba_keys(c, c.num_hidden_layers - len(c.attn_layer_indices)),
    "falcon_h1": lambda c: of_mamba_keys(c, c.num_hidden_layers),
    "nemotron_h": lambda c: mamba_2(
        sum(kind in {"mamba", "mamba2", "linear_attention"} for kind in c.layers_block_type),
        *(c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size, c.conv_kernel),
    ),
    "lfm2": lambda c: 2 * c.layer_types.count("conv") * (c.conv_L_cache - 1) * c.hidden_size,
    "lfm2_moe": lambda c: 2 * c.layer_types.count("conv") * (c.conv_L_cache - 1) * c.hidden_size,
}


@pytest.mark.parametrize("family", CLOSED_FORMS)
def test_a_row_holds_the_states_that_the_closed_form_of_its_config_says(family):
    config = FAMILIES[family]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert read_spec(model, lambda _: FREE).state_bytes == CLOSED_FORMS[family](config) > 0
