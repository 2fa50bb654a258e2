"""Predicted against measured memory: `bmx plan-batch` from the config alone, then `bmx run` with its own plan.

    python benchmarks/memory.py                  # all shapes, each in processes of its own
    python benchmarks/memory.py --shape mha      # one of them

The demo model and random ones of other architectures, on the CPU: peak resident memory of the run's process. Prints a
line per shape: what the config alone predicts, what the plan says once the model is loaded, what was measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parent.parent / "sample_inputs" / "long_documents.jsonl"
SMALL: dict[str, Any] = {
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "max_position_embeddings": 8192,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "demo": ("", {}),
    "gqa": ("Qwen3", dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
                          num_key_value_heads=4, head_dim=64)),
    "mha": ("Llama", dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16)),
    "fused": ("Phi3", dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16,
                           num_key_value_heads=4)),
    "sliding": ("Gemma3Text", dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=12,
                                   num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512)),
    "experts": ("Mixtral", dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
                                num_key_value_heads=2)),
    "wide": ("Llama", dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=4, num_attention_heads=32,
                           num_key_value_heads=8)),
    "plain": ("GPT2", dict(n_embd=768, n_layer=8, n_head=12)),
}  # fmt: skip


def make_model(name: str, folder: Path) -> str:
    """A random model of this shape with the demo model's tokenizer: its folder, or 'demo'."""
    kind, sizes = SHAPES[name]
    if not kind:
        return "demo"
    import torch
    import transformers

    from bmx import EngineConfig
    from bmx.model.source import find_source

    config = getattr(transformers, f"{kind}Config")(**SMALL, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in Path(find_source(EngineConfig())).glob("*"):
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, folder)
    return str(folder)


def bmx(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "bmx", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bmx {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def compare(name: str, budget: str) -> float:
    """Print one shape's line; returns the larger of both errors."""
    with tempfile.TemporaryDirectory() as folder:
        made = subprocess.run(
            [sys.executable, __file__, "--make", name, folder], capture_output=True, text=True, check=True
        )
        output = Path(folder) / "out.jsonl"
        common = (str(SAMPLES), "--model", made.stdout.strip(), "--kv-budget", budget, "--max-tokens", "24",
                  "--ignore-eos", "--device", "cpu", "--dtype", "bfloat16")  # fmt: skip
        asked = json.loads(bmx("plan-batch", *common, "--json"))["options"][0]
        bmx("run", *common, "-o", str(output))
        ran = json.loads((output.parent / (output.name + ".run.json")).read_text())
    before, planned, seen = asked["memory"]["total"], ran["memory"]["predicted_bytes"], ran["memory"]["measured_bytes"]
    errors = before / seen - 1, planned / seen - 1
    print(f"{name:8} {ran['model']['architecture']:22} weights {ran['plan']['memory']['weights'] / 1e6:6,.0f}  "
          f"KV {(ran['plan']['memory']['kv'] + ran['plan']['memory']['scores']) / 1e6:6,.0f}  "
          f"config alone {before / 1e6:6,.0f} ({errors[0]:+6.1%})  plan {planned / 1e6:6,.0f} ({errors[1]:+6.1%})  "
          f"measured {seen / 1e6:6,.0f} MB", flush=True)  # fmt: skip
    if "-v" in sys.argv:
        print("   ", asked["memory"], "\n   ", ran["plan"]["memory"], ran["memory"])
    return max(errors, key=abs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--budget", default="512")
    parser.add_argument("-v", action="store_true", help="every item")
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        print(make_model(args.make[0], Path(args.make[1])))
        return
    errors = [compare(name, args.budget) for name in ([args.shape] if args.shape else SHAPES)]
    print(f"largest error {max(map(abs, errors)):.1%}, most below {min(errors):+.1%}")


if __name__ == "__main__":
    main()
