"""Everything that can be asked of bmx on one NVIDIA card, cell by cell, in less than nine minutes and one JSON file.

    benchmarks/gpu.sh OUT.json                            # on a card: sets up what is missing
    benchmarks/gpu.sh OUT.json --decisive                 # what decides, in less than four minutes
    benchmarks/gpu.sh OUT.json --part kernels,throughput  # some parts
    python benchmarks/gpu.py --try OUT.json               # on a CPU, tiny: does the script work?

Each cell is a process of its own with a limit in seconds, so that none can stop another, and the file is written anew
after each result. Parts, in this order: the machine's rates; kernels against float64, and their speed; tokens a second
of Llama-3.1-8B with random weights; decoding with and without graphs; planned against seen memory; ``pytest -m gpu``;
``bmx bench``. At the end a table says which targets were met.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("machine", "kernels", "throughput", "graphs", "memory", "tests", "bench")
IN_ALL, IN_HALF = 530, 230  # seconds, of everything and of what decides
LEAST = 10  # seconds that a cell is begun with
WORKERS = 8  # that run tests side by side, where pytest-xdist is installed
TAIL = 40
PRESET = "smollm2-135m"
PRELOADED = (
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3", "phi3")),
    "bmx.kernels.triton",
)


def main() -> int:
    args = parsed()
    if args.tried:  # before Triton is imported
        os.environ |= {"TRITON_INTERPRET": "1", "BMX_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    import gpu_cells
    import gpu_kernels
    import gpu_runs

    for name in PRELOADED:  # once for all cells; none of it touches the GPU
        import_module(name)

    began, place = time.monotonic(), gpu_cells.Place(tried=args.tried)
    chosen = args.part.split(",") if args.part else PARTS
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise SystemExit(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    every = [gpu_cells.Cell(part="machine", name="rates", seconds=60, work=machine, decisive=True)]
    every += [*gpu_kernels.cells(place), *gpu_runs.cells(place)]
    every += [gpu_cells.Cell(part="tests", name="pytest", seconds=200, work=tests)]
    every += [gpu_cells.Cell(part="bench", name="bench", seconds=60, work=bench)]
    cells = [cell for cell in every if cell.part in chosen and (cell.decisive or not args.decisive)]
    cells.sort(key=lambda cell: PARTS.index(cell.part))
    record = gpu_cells.Record(Path(args.output).absolute(), begun(args))
    in_all = args.seconds or (IN_HALF if args.decisive else IN_ALL)
    for cell in cells:
        entry = record.found["parts"].setdefault(cell.part, {}).setdefault(cell.name, {})
        limit = min(cell.seconds, in_all - (time.monotonic() - began))
        if limit < LEAST:
            entry["problem"] = {"type": "NotBegun", "message": "not begun: no time was left"}
        else:
            gpu_cells.run_cell(cell, entry, record, place, limit)
        record.found["rates"] |= entry.get("found", {}).get("rates", {})
        print(f"{cell.part} / {cell.name}: {told(entry)}", flush=True)
    record.note("seconds", time.monotonic() - began)
    lines = [] if args.tried else targets(record.found["parts"])
    record.note("targets", lines)
    for line in lines:
        print(f"{line['part']:11} {line['what']:48} {line['figure']:>20}  {line['target']:>18}  {line['met']}")
    if args.tried:
        print("tried on a CPU: no figure of this means anything")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the JSON file; traces are written beside it")
    parser.add_argument("--try", dest="tried", action="store_true", help="on a CPU, tiny, no figures")
    parser.add_argument("--decisive", action="store_true", help="only the cells that decide")
    parser.add_argument("--part", help=f"of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, help=f"in all ({IN_ALL}, or {IN_HALF} for what decides)")
    return parser.parse_args()


def begun(args: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "kind": "tried on a CPU" if args.tried else "measured on a GPU",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "rates": {},
        "parts": {},
    }


def told(entry: dict[str, Any]) -> str:
    """How a cell ended, in a line."""
    problem = entry.get("problem")
    return problem["message"].partition("\n")[0] if problem else f"{entry['seconds']:.0f} s"


# Cells that need no other file.


def machine(context: Any) -> dict[str, Any]:
    """What it is, and what it reaches of large products and copies."""
    import torch
    from gpu_cells import median_seconds

    place, found = context.place, {}
    packages = {name: version(name) for name in ("torch", "triton", "transformers")}
    context.note("versions", {"python": platform.python_version(), **packages})
    if not place.tried:
        free, total = torch.cuda.mem_get_info()
        told = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": told.name, "memory": total, "free": free, "driver": driver(), "properties": str(told)}
        found["cuda"], found["capability"] = torch.version.cuda, torch.cuda.get_device_capability()
    side, size = (256, 2**22) if place.tried else (8192, 2**32)
    a, b = (torch.randn(side, side, device=place.device, dtype=place.dtype) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * side**3 / median_seconds(lambda: torch.mm(a, b, out=out), place)
    block = torch.empty(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(block)
    copy = 2 * size / median_seconds(lambda: target.copy_(block), place)
    rates = {"flops": flops, "copy": copy}
    return {**found, "matmul_tflops": flops / 1e12, "copy_tb_per_second": copy / 1e12, "rates": rates}


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip().partition("\n")[0]


def tests(context: Any) -> dict[str, Any]:
    """The tests that need a GPU; on a CPU they must all be skipped. Their count is kept as they end."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=8", "-p", "no:cacheprovider"]
    command += ["-W", "default", "tests/test_gpu.py"]  # a warning of an untried torch is no failure
    if find_spec("xdist"):
        command += ["-n", "1" if context.place.tried else str(WORKERS), "--dist", "load"]
    lines, counts = [], dict.fromkeys(("PASSED", "FAILED", "SKIPPED", "ERROR"), 0)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    for line in process.stdout or ():
        lines.append(line.rstrip())
        ended = re.search(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", line) if "tests/test_gpu.py::" in line else None
        if ended and not re.match(r"(FAILED|ERROR) ", line):  # a line of the summary
            counts[ended[1]] += 1
            context.note("counts", counts)
    names = [line.split()[1] for line in lines if re.match(r"(FAILED|ERROR) \S", line)]
    return {"counts": counts, "names": names, "rc": process.wait(), "tail": lines[-TAIL:]}


def bench(context: Any) -> dict[str, Any]:
    """The command that users measure with, on the smallest shape."""
    import json

    tokens, answer, prompts = ("96", "8", "2") if context.place.tried else ("2000", "128", "256")
    more = ["--device", "cpu", "--kv-budget", "64"] if context.place.tried else ["--memory-limit", "16G"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "bench.json")
        command = [sys.executable, "-m", "bmx", "bench", "--shape", PRESET, "--input-tokens", tokens]
        command += ["--output-tokens", answer, "--prompts", prompts, "-o", str(output), *more]
        interpreted = {"TRITON_INTERPRET", "BMX_KERNELS"}  # on a CPU, for the other cells
        env = {name: value for name, value in os.environ.items() if name not in interpreted}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).splitlines()[-TAIL:]
        if done.returncode:
            raise RuntimeError(f"bmx bench ended with {done.returncode}: " + " | ".join(said[-4:]))
        return {"command": command[2:-2], "bench": json.loads(output.read_text()), "said": said}


# The table at the end.


@dataclass(frozen=True)
class Aim:
    """A figure that is to be reached: of a cell, or of the first of several that has it."""

    part: str
    cell: str
    figure: str
    what: str
    least: float
    unit: str


AIMS = (
    Aim("throughput", "prefill", "mfu", "prefill at 8,000 in, MFU", 0.62, "%"),
    Aim("throughput", "prefill fp8", "prompt_tokens_per_second", "prefill with FP8 weights", 50_000, "tok/s"),
    Aim("throughput", "decode 256", "share_of_floors", "decode, 256 slots, of the sum of floors", 0.80, "%"),
    Aim("throughput", "5000/500", "generated_tokens_per_second", "5,000 in, 500 out", 3000, "tok/s"),
    Aim("throughput", "5000/500 fp8", "generated_tokens_per_second", "5,000 in, 500 out, FP8 weights", 4200, "tok/s"),
    Aim("throughput", "2000/200", "generated_tokens_per_second", "2,000 in, 200 out, for 20,000/2,000", 2900, "tok/s"),
)
Found = dict[str, dict[str, dict[str, Any]]]


def targets(parts: Found) -> list[dict[str, str]]:
    """A line a target; what did not run, or was cut short, is neither met nor missed."""
    return [*(check(parts) for check in CHECKS), *(aimed(parts, aim) for aim in AIMS)]


def state(entry: dict[str, Any]) -> str:
    """Why a cell has no verdict; empty if it has one."""
    if not entry:
        return "not run"
    kinds = {"TimedOut": "timed out", "NotBegun": "not begun"}
    return kinds.get(entry["problem"]["type"], "failed") if "problem" in entry else ""


def aimed(parts: Found, aim: Aim) -> dict[str, str]:
    """A line about a figure."""
    entry = parts.get(aim.part, {}).get(aim.cell, {})
    found = entry.get("found", {})
    value, shown = found.get(aim.figure), (lambda x: f"{100 * x:.1f} %" if aim.unit == "%" else f"{x:,.0f} {aim.unit}")
    line = {"part": aim.part, "what": aim.what, "target": f">= {shown(aim.least)}", "figure": "-"}
    if value is None:
        return line | {"met": state(entry) or "no figure"}
    if found.get("slots_cut_to_save_time"):
        line["what"] += f", {found['slots']} of {found['slots_that_fit']} slots"
    met = state(entry) or ("cut short" if found.get("cut_short") else "met" if value >= aim.least else "missed")
    return line | {"figure": shown(value), "met": met}


def checked(
    part: str, what: str, wanted: str, judge: Callable[[dict[str, dict[str, Any]]], tuple[str, bool]], parts: Found
) -> dict[str, str]:
    """A line about what must simply hold, in all cells of a part."""
    entries = parts.get(part, {})
    line = {"part": part, "what": what, "target": wanted, "figure": "-"}
    states = [state(entry) for entry in entries.values() if state(entry)]
    if not entries or len(states) == len(entries):
        return line | {"met": states[0] if states else "not run"}
    figure, held = judge({name: entry["found"] for name, entry in entries.items() if not state(entry)})
    return line | {"figure": figure, "met": f"{len(states)} {states[0]}" if states else "met" if held else "missed"}


def of_kernels(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    judged = [one["wrong"] for one in found.values() if "wrong" in one]
    wrong = sum(map(len, judged))
    return f"{wrong} wrong in {len(judged)}", bool(judged) and not wrong


def of_tests(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    counts = found["pytest"]["counts"]
    bad = counts["FAILED"] + counts["ERROR"]
    good = found["pytest"]["rc"] == 0 and counts["PASSED"] > 0 and not counts["SKIPPED"]
    return f"{counts['PASSED']} pass, {bad} fail", good


def of_graphs(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    good = [one["equal"] and one["nothing_refused"] for one in found.values()]
    return f"{sum(good)} of {len(good)}", all(good)


def of_memory(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    ratio = max(one["ratio"] for one in found.values())
    return f"{ratio:.3f}", ratio <= 1


def of_bench(found: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    made = found["bench"]["bench"]
    return f"{len(made['cells'])} cell", made["state"] == "finished"


CHECKS = (
    partial(checked, "kernels", "kernels against float64, twice the same bits", "0 wrong", of_kernels),
    partial(checked, "graphs", "same tokens with graphs and without, none refused", "all", of_graphs),
    partial(checked, "memory", "seen of planned memory", "<= 1", of_memory),
    partial(checked, "tests", "pytest -m gpu", "0 fail", of_tests),
    partial(checked, "bench", "bmx bench ends", "finished", of_bench),
)


if __name__ == "__main__":
    sys.exit(main())
