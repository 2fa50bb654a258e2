"""Checkpoints that read images or sounds too: their text side answers text rows, and nothing else of them is held."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import answers, as_requests, random_prompts, reference_answers, word_tokenizer
from families import VOCAB, WINDOW
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from bmx import Engine, EngineConfig, PromptConfig
from bmx.engine.backend import ModelBackend
from bmx.errors import ModelError
from bmx.model.loader import load_model
from bmx.model.preview import preview_spec

LENGTHS, NEW_TOKENS = (5, 40, 17, 9), 6
CROWD: dict[str, Any] = dict(
    kv_policy="none", kv_format="model", chunk_size=7, max_num_seqs=3, max_num_batched_tokens=20
)
TEXT: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
VISION: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
QWEN_VISION: dict[str, Any] = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    patch_size=8,
    temporal_patch_size=1,
    out_hidden_size=32,
)
THREE_AXES = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])
SEEN = dict(image_token_id=VOCAB - 1, video_token_id=VOCAB - 2)
QWEN_SEEN = SEEN | dict(vision_start_token_id=VOCAB - 3, vision_end_token_id=VOCAB - 4)


def composite(model_type: str, text: dict[str, Any], vision: dict[str, Any], **top: Any) -> Any:
    return AutoConfig.for_model(
        model_type, text_config=TEXT | text, vision_config=vision, tie_word_embeddings=False, **top
    )


QWEN3_VISION = QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    "qwen2_5_vl": partial(
        composite,
        "qwen2_5_vl",
        dict(rope_parameters=THREE_AXES),
        QWEN_VISION | dict(window_size=16, fullatt_block_indexes=[0]),
        **QWEN_SEEN,
    ),
    "qwen3_vl": partial(composite, "qwen3_vl", dict(rope_parameters=THREE_AXES), QWEN3_VISION, **QWEN_SEEN),
    "qwen3_vl_moe": partial(
        composite, "qwen3_vl_moe", dict(rope_parameters=THREE_AXES) | EXPERTS, QWEN3_VISION, **QWEN_SEEN
    ),
    "mistral3": partial(
        composite,
        "mistral3",
        dict(model_type="mistral", sliding_window=WINDOW),
        VISION | dict(model_type="pixtral", head_dim=8),
        image_token_index=VOCAB - 1,
    ),
    "llava_next": partial(
        composite,
        "llava_next",
        dict(model_type="llama"),
        VISION | dict(model_type="clip_vision_model", projection_dim=16),
        image_token_index=VOCAB - 1,
    ),
    "video_llama_3": partial(  # its class computes logits for every token
        composite,
        "video_llama_3",
        dict(model_type="qwen2"),
        dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=8),
        **SEEN,
    ),
    "smolvlm": partial(composite, "smolvlm", dict(model_type="llama"), VISION, image_token_id=VOCAB - 1),
}
SIDES = ("vision", "visual", "projector", "connector")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function that gives the folder of a family's tiny checkpoint, as it would be published."""
    root = tmp_path_factory.mktemp("vision")

    def folder(family: str) -> Path:
        place = root / family
        if not place.exists():
            save(FAMILIES[family](), place)
        return place

    return folder


def save(config: Any, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.35)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def opened(folder: Path, **settings: Any) -> Engine:
    return Engine.open(EngineConfig(model=str(folder), dtype="float32", device="cpu", **settings))


def whole_model(folder: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def is_text(tensor: str) -> bool:
    return not any(side in tensor for side in SIDES)


def changed_copy(folder: Path, to: Path, **config: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return to


def keep_tensors(folder: Path, kept: Any) -> None:
    """Rewrite a checkpoint's weights with only those tensors whose names ``kept`` accepts."""
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if kept(name)}, file, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_text_rows_are_answered_as_the_whole_model_answers_them_by_its_text_side_alone(checkpoint, family):
    folder, prompts = checkpoint(family), random_prompts(LENGTHS)
    with opened(folder, **CROWD) as engine:
        spec, model = engine.backend.loaded.spec, engine.backend.loaded.model
        found = answers(engine, as_requests(prompts, max_tokens=NEW_TOKENS))
    assert found == reference_answers(whole_model(folder), prompts, NEW_TOKENS)
    assert [name for name, _ in model.named_parameters() if not is_text(name)] == []
    stored = load_file(folder / "model.safetensors")
    text = sum(tensor.nbytes for name, tensor in stored.items() if is_text(name))
    assert text <= spec.weight_bytes < text + 100  # frequencies of the rotary embedding
    foretold = preview_spec(EngineConfig(model=str(folder), dtype="float32"), "cpu")
    assert foretold.layers == spec.layers
    assert foretold.weight_bytes == pytest.approx(spec.weight_bytes, abs=100)


def test_a_class_that_knows_no_rows_of_logits_computes_all_where_none_are_named(checkpoint):
    """As a captured round asks for them, and ``generate`` itself."""
    model = opened(checkpoint("video_llama_3")).backend.model
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        every = model(input_ids=tokens, use_cache=False).logits
        assert every.shape == (1, 3, VOCAB)
        assert torch.equal(model(input_ids=tokens, use_cache=False, logits_to_keep=0).logits, every)
        some = model(input_ids=tokens, use_cache=False, logits_to_keep=torch.tensor([0, 2])).logits
    torch.testing.assert_close(some, every[:, [0, 2]])


def test_a_hybrids_text_side_has_a_class_of_its_own(tmp_path):
    """As the files of Qwen 3.5 are published: with weights for images, and for guessing several tokens at once."""
    layers = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
    heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    rope = dict(rope_parameters=THREE_AXES | dict(mrope_section=[1, 1, 0], partial_rotary_factor=0.5))
    save(
        composite("qwen3_5", rope | layers | heads, QWEN_VISION | dict(num_position_embeddings=16), **QWEN_SEEN),
        tmp_path,
    )
    weights = load_file(tmp_path / "model.safetensors")
    assert {"model.visual.pos_embed.weight", "model.language_model.embed_tokens.weight"} <= weights.keys()
    save_file(weights | {"mtp.fc.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors", {"format": "pt"})
    config, prompts = EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", **CROWD), random_prompts(LENGTHS)
    backend = ModelBackend(load_model(str(tmp_path), config))
    with Engine(config, PromptConfig(), word_tokenizer(), backend) as engine:
        found = answers(engine, as_requests(prompts, max_tokens=NEW_TOKENS))
    assert found == reference_answers(whole_model(tmp_path), prompts, NEW_TOKENS)
    assert preview_spec(config, "cpu") == backend.loaded.spec
    assert [name for name, _ in backend.loaded.model.named_parameters() if not is_text(name)] == []


@pytest.mark.parametrize(("device", "dtype", "shrinks"), [("cpu", "float32", 1), ("cuda", "bfloat16", 2)])
def test_a_quantised_checkpoints_other_weights_are_not_foretold(checkpoint, tmp_path, device, dtype, shrinks):
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    folder = changed_copy(checkpoint("qwen3_vl"), tmp_path / "fp8", quantization_config=quantised)
    stored = load_file(folder / "model.safetensors")
    text = sum(tensor.nbytes for name, tensor in stored.items() if is_text(name))
    foretold = preview_spec(EngineConfig(model=str(folder), dtype=dtype), device).weight_bytes
    assert foretold == pytest.approx(text / shrinks, abs=100)


def test_missing_tensors_count_on_the_text_side_only(checkpoint, tmp_path):
    text_alone, broken = tmp_path / "text", tmp_path / "broken"
    shutil.copytree(checkpoint("qwen3_vl"), text_alone)
    keep_tensors(text_alone, is_text)
    shutil.copytree(text_alone, broken)
    keep_tensors(broken, lambda name: "layers.1.mlp.up_proj" not in name)
    prompts = random_prompts((9,))
    with opened(text_alone) as engine, opened(checkpoint("qwen3_vl")) as whole:
        requests = as_requests(prompts, max_tokens=NEW_TOKENS)
        assert answers(engine, requests) == answers(whole, requests)
    with pytest.raises(ModelError, match=r"1 tensors are missing \(.*layers.1.mlp.up_proj.weight\)"):
        opened(broken)


def test_a_head_that_is_the_embedding_needs_no_tensor_of_its_own(checkpoint, tmp_path):
    folder = changed_copy(checkpoint("qwen3_vl"), tmp_path / "tied", tie_word_embeddings=True)
    keep_tensors(folder, lambda name: name != "lm_head.weight")
    prompts = random_prompts(LENGTHS)
    with opened(folder, kv_policy="none", kv_format="model") as engine:
        found = answers(engine, as_requests(prompts, max_tokens=NEW_TOKENS))
    assert found == reference_answers(whole_model(folder), prompts, NEW_TOKENS)


def test_the_text_sizes_may_stand_beside_the_vision_config(checkpoint, tmp_path):
    """As in the published files of Qwen2-VL and Qwen2.5-VL."""
    folder = tmp_path / "flat"
    shutil.copytree(checkpoint("qwen2_5_vl"), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config.pop("text_config") | config))
    prompts = random_prompts(LENGTHS)
    with opened(folder, kv_policy="none", kv_format="model") as engine:
        found = answers(engine, as_requests(prompts, max_tokens=NEW_TOKENS))
    assert found == reference_answers(whole_model(folder), prompts, NEW_TOKENS)


PARTS = "{% for m in messages %}{% for part in m.content %}{{ 'w7 ' + part.text + ' w8' }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_the_processors_chat_template_goes_before_the_tokenizers(checkpoint, tmp_path, file):
    folder = changed_copy(checkpoint("smolvlm"), tmp_path / "chat")
    word_tokenizer(chat_template="w9").save_pretrained(folder)
    (folder / file).write_text(json.dumps({"chat_template": PARTS}))
    with opened(folder) as engine, opened(checkpoint("smolvlm")) as plain:
        [asked] = engine.chat([[{"role": "user", "content": "w5 w6"}]], max_tokens=NEW_TOKENS)
        [same] = plain.generate(["w7 w5 w6 w8"], max_tokens=NEW_TOKENS)
    assert asked.usage.prompt_tokens == 4
    assert asked.text == same.text != ""


def test_rows_with_images_fail_and_the_others_are_answered(checkpoint, tmp_path, bmx):
    folder = changed_copy(checkpoint("smolvlm"), tmp_path / "chat")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    text, image = {"type": "text", "text": "w5 w6"}, {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    rows = {
        "parts": {"messages": [{"role": "user", "content": [text]}]},
        "text": {"messages": [{"role": "user", "content": "w5 w6"}], "images": []},
        "part": {"messages": [{"role": "user", "content": [image, text]}]},
        "beside": {"messages": [{"role": "user", "content": "w5 w6", "images": ["y.png"]}]},
        "column": {"prompt": "w5 w6", "image": "y.png"},
    }
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"id": name} | row) + "\n" for name, row in rows.items()))
    assert bmx("run", "rows.jsonl", "--model", folder, "--max-tokens", 4).code == 3
    answered = {row["id"]: row["text"] for row in map(json.loads, Path("rows.out.jsonl").read_text().splitlines())}
    assert answered.keys() == {"parts", "text"}
    assert answered["parts"] == answered["text"]
    errors = {
        row["id"]: row["error"] for row in map(json.loads, Path("rows.out.jsonl.errors.jsonl").read_text().splitlines())
    }
    assert "a part of type 'image_url': bmx reads text only" in str(errors["part"])
    assert "a message has 'images': bmx reads text only" in str(errors["beside"])
    assert "unsupported: image" in str(errors["column"])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no class that writes text"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "no class that writes text"),
        ({"model_type": "siglip", "architectures": ["SiglipModel"]}, "no class that writes text"),
        ({"model_type": "qwen2_5_omni", "architectures": ["Qwen2_5OmniForConditionalGeneration"]}, "several models"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "an encoder-decoder model"),
    ],
)
def test_a_checkpoint_that_writes_no_text_is_refused_by_name(model, tmp_path, bmx, config, reason):
    folder = tmp_path / "other"
    shutil.copytree(model, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "w5"}\n')
    for command in ("run", "plan-batch"):
        ended = bmx(command, "rows.jsonl", "--model", folder)
        assert ended.code == 1
        assert f"bmx cannot run {config['architectures'][0]}" in ended.complaint[0]
        assert reason in ended.complaint[0]
