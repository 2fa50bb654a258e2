"""What looks like a model and is none, or is one of another tool: one line says what it is, a second what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


def put(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def without(folder, *patterns):
    for pattern in patterns:
        for file in filter(Path.is_file, folder.glob(pattern)):
            file.unlink()


def adapter(folder):
    without(folder, "config.json", "generation_config.json", "tokenizer*")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    put(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "some/base"})


def adapter_with_config(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    put(folder / "adapter_config.json", {"base_model_name_or_path": "some/base"})


def own_format(folder):
    without(folder, "*")
    put(folder / "params.json", {"dim": 32})
    put(folder / "consolidated.00.pth")


def gguf_files(folder):
    without(folder, "*")
    put(folder / "tiny-Q8_0.gguf")


def gguf_files_with_config(folder):
    without(folder, "model.safetensors")
    put(folder / "tiny-Q8_0.gguf")


def pickled(folder):
    without(folder, "*.safetensors")
    put(folder / "pytorch_model-00001-of-00001.bin")
    put(folder / "pytorch_model.bin.index.json", {"weight_map": {}})


def onnx(folder):
    without(folder, "*.safetensors")
    put(folder / "onnx" / "model.onnx")


def tensorflow(folder):
    without(folder, "*.safetensors")
    put(folder / "tf_model.h5")


def no_weights(folder):
    without(folder, "*.safetensors")


def no_tokenizer(folder):
    without(folder, "tokenizer*")


def settings(folder, **values):
    put(folder / "config.json", json.loads((folder / "config.json").read_text()) | values)


def mlx(folder):
    settings(folder, quantization={"group_size": 64, "bits": 4})


def exl2(folder):
    settings(folder, quantization_config={"quant_method": "exl2", "bits": 4.0})


def gptq(folder):
    settings(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})


def deeper(folder):
    shutil.copytree(folder, folder / "snapshots" / "abc")
    without(folder, "*")


def diffusion(folder):
    without(folder, "*")
    put(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})


def empty(folder):
    without(folder, "*")


FOUND = {  # what was done to a good model folder: words of the message, words of the hint
    adapter: ("LoRA adapter of some/base", "merge_and_unload"),
    adapter_with_config: ("LoRA adapter of some/base", "merge_and_unload"),
    own_format: ("params.json", "transformers' format"),
    gguf_files: ("holds GGUF files", "copy/tiny-Q8_0.gguf"),
    gguf_files_with_config: ("holds GGUF files", "copy/tiny-Q8_0.gguf"),
    pickled: ("pickled weights only (pytorch_model-00001-of-00001.bin)", "safetensors"),
    onnx: ("ONNX (onnx/model.onnx)", ".gguf"),
    tensorflow: ("TensorFlow (tf_model.h5)", ".gguf"),
    no_weights: ("no model.safetensors", "download"),
    no_tokenizer: ("neither tokenizer.json nor tokenizer.model", "copy"),
    mlx: ("MLX", "made from"),
    exl2: ("ExLlamaV2", "made from"),
    gptq: ("optimum", ".gguf"),
    deeper: ("models in folders of their own", "snapshots/abc"),
    diffusion: ("diffusers", "--model takes"),
    empty: ("empty", "--model takes"),
}


@pytest.mark.parametrize("spoil", FOUND, ids=lambda spoil: spoil.__name__)
def test_d_a_folder_that_is_no_model_is_named_for_what_it_is(bmx, model, tmp_path, spoil):
    folder = Path(shutil.copytree(model, tmp_path / "copy"))
    spoil(folder)
    put(tmp_path / "in.jsonl", {"prompt": "w3"})
    ended = bmx("run", "in.jsonl", "--model", folder)
    assert ended.code == 1
    message, hint = ended.complaint
    assert FOUND[spoil][0] in message
    assert FOUND[spoil][1] in hint
    assert not Path("in.out.jsonl").exists()


FILES = {
    "model.safetensors": ("only the weights", "folder"),
    "pytorch_model.bin": ("pickled", "--model takes"),
    "sha256-1234": ("GGUF file without the ending", "ln -s"),
    "notes.txt": ("is not a model", "--model takes"),
}


@pytest.mark.parametrize("name", FILES)
def test_d_a_file_that_is_no_model_is_named_for_what_it_is(bmx, tmp_path, name):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "sha256-1234").write_bytes(b"GGUF\x03\x00\x00\x00")
    put(tmp_path / "notes.txt", "hello")
    put(tmp_path / "in.jsonl", {"prompt": "w3"})
    ended = bmx("run", "in.jsonl", "--model", name)
    assert ended.code == 1
    message, hint = ended.complaint
    assert FILES[name][0] in message
    assert FILES[name][1] in hint
