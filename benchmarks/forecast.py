"""Predicted against real time: `bmx plan-batch` before, `bmx run` after, on the demo model and this machine's CPU.

    python benchmarks/forecast.py                   # several jobs, one after the other
    python benchmarks/forecast.py --job full-cache

The machine's rates are measured anew, not taken from the cache, right before each run. All answers have their full
length (--ignore-eos), as the forecast assumes. Prints seconds, prefill and decode rates, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bmx import hardware
from bmx.plan import machine_speed as rates

SAMPLES = Path(__file__).parent.parent / "sample_inputs" / "long_documents.jsonl"
JOBS = {
    "short-answers": ("--kv-budget", "512", "--max-tokens", "32"),
    "budget-1024": ("--kv-budget", "1024", "--max-tokens", "96"),
    "long-answers": ("--kv-budget", "512", "--max-tokens", "256"),
    "full-cache": ("--kv-policy", "none", "--max-tokens", "64"),
    "few-slots": ("--kv-budget", "512", "--max-tokens", "64", "--kv-cache-memory", "60M"),
}


def bmx(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "bmx", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bmx {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def compare(name: str, settings: tuple[str, ...]) -> float:
    """Print one job's lines; returns predicted seconds over real ones."""
    common = (str(SAMPLES), "--ignore-eos", "--device", "cpu", "--dtype", "bfloat16", *settings)
    rates.forget("cpu", "bfloat16", hardware.cpu_name())
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.jsonl"
        options = json.loads(bmx("plan-batch", *common, "--json"))["options"]
        wanted = "full cache" if "none" in settings else "batch-max"
        guess = next(option["forecast"] for option in options if option["cache"] == wanted)
        bmx("run", *common, "-o", str(output))
        real = json.loads((output.parent / (output.name + ".run.json")).read_text())["throughput"]
    ratio = guess["seconds"] / real["seconds"]
    prefill, decode = real["prefill_tokens_per_second"], real["decode_tokens_per_second"]
    print(f"{name:14} predicted {guess['seconds']:6.1f} s  real {real['seconds']:6.1f} s  ratio {ratio:.2f}   "
          f"prefill {guess['prefill_rate']:6,.0f} / {prefill:6,.0f} tok/s   "
          f"decode {guess['decode_rate']:6,.0f} / {decode:6,.0f} tok/s", flush=True)  # fmt: skip
    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS)
    args = parser.parse_args()
    ratios = [compare(name, JOBS[name]) for name in ([args.job] if args.job else JOBS)]
    print(f"ratios of predicted to real seconds: {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
