"""Everything that can be asked of bmx on one NVIDIA card, part by part, in less than ten minutes and one JSON file.

    benchmarks/gpu.sh gpu.json                                     # on a card: sets up what is missing
    FULL=1 benchmarks/gpu.sh gpu.json --only throughput            # also 20,000 in, 2,000 out, as long as it takes
    python benchmarks/gpu.py --try out.json                        # on a CPU, tiny: does the script work?

Each part is a process of its own with a limit in seconds, so that none can stop another; the file is written anew after
each result. Parts: the machine's rates; kernels against float64, and their speed; ``pytest -m gpu``; decoding with and
without graphs; planned against seen memory; tokens a second of Llama-3.1-8B with random weights; ``bmx bench``. At the
end a table says which targets were met.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = {  # most seconds of each; what is left for throughput is its
    "machine": 45,
    "kernels": 110,
    "tests": 110,
    "graphs": 70,
    "memory": 45,
    "throughput": 10_000,
    "bench": 60,
}
IN_ALL = 570  # seconds
KEPT_FOR = {"kernels": 330, "tests": 270, "graphs": 235, "memory": 205, "throughput": 45}  # seconds for later parts
LEAST = 10  # seconds that a part is begun with
ENDING = 25  # seconds of its limit that throughput leaves for its beginning and its end
TAIL = 40
PRESET = "smollm2-135m"


class Record:
    """A JSON file that is written anew whenever something is noted."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self.path, self.found = path, found
        self.write()

    def note(self, name: str, value: Any) -> None:
        self.found[name] = value
        self.write()

    def write(self) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(self.found, indent=1, default=str))
        beside.replace(self.path)


def main() -> int:
    args = parsed()
    if args.part:
        return child(args)
    began = time.monotonic()
    only = args.only.split(",") if args.only else list(PARTS)
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise SystemExit(f"no part is called {unknown[0]}; there are {', '.join(PARTS)}")
    full = os.environ.get("FULL") == "1"
    record = Record(Path(args.output), begun(args, full))
    for name in PARTS:
        if name in only:
            record.found["parts"][name] = entry = {"found": {}}
            part(name, entry, record, args, seconds_for(name, only, began, full))
            print(f"{name}: {told(entry)}", flush=True)
    record.note("seconds", time.monotonic() - began)
    lines = [] if args.tried else targets(record.found)
    record.note("targets", lines)
    for line in lines:
        print(f"{line['part']:12} {line['what']:46} {line['figure']:>16}  {line['target']:>22}  {line['met']}")
    if args.tried:
        print("tried on a CPU: no figure of this means anything")
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="gpu.json")
    parser.add_argument("--try", dest="tried", action="store_true", help="on a CPU, tiny, no figures")
    parser.add_argument("--only", help=f"of {','.join(PARTS)}")
    parser.add_argument("--jobs", default="", help="of prefill,decode,5000/500,2000/200,20000/2000")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    parser.add_argument("--rates", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def begun(args: argparse.Namespace, full: bool) -> dict[str, Any]:
    commit = ran(["git", "rev-parse", "HEAD"], 10)["output"].strip()
    return {
        "kind": "tried on a CPU" if args.tried else "measured on a GPU",
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit if re.fullmatch("[0-9a-f]{40}", commit) else None,
        "full": full,
        "parts": {},
    }


def seconds_for(name: str, only: list[str], began: float, full: bool) -> float:
    """What a part may take: its own limit, or what is left beside what later ones need."""
    if full:
        return PARTS[name] if name != "throughput" else 6 * 3600
    later = any(list(PARTS).index(other) > list(PARTS).index(name) for other in only)
    kept = KEPT_FOR.get(name, 0) if later else 0
    return min(PARTS[name], IN_ALL - (time.monotonic() - began) - kept)


def told(entry: dict[str, Any]) -> str:
    if entry.get("problem"):
        return str(entry["problem"]["message"])
    return f"{entry['seconds']:.0f} s"


def part(name: str, entry: dict[str, Any], record: Record, args: argparse.Namespace, limit: float) -> None:
    """Run one part and note what comes of it, and what went wrong."""
    started = time.monotonic()
    entry["limit"] = limit
    try:
        if limit < LEAST:
            raise TimeoutError("not begun: no time was left")
        if name == "tests":
            entry["found"] = tests(limit, args.tried)
        elif name == "bench":
            entry["found"] = bench(limit, args.tried)
        else:
            apart(name, entry, record, args, limit)
    except Exception as problem:
        entry["problem"] = described(problem)
    entry["seconds"] = time.monotonic() - started
    record.write()


def described(problem: BaseException) -> dict[str, str]:
    trace = traceback.format_exception(problem, limit=-4)
    return {"type": type(problem).__name__, "message": str(problem)[:600], "traceback": "".join(trace)[-2500:]}


def apart(name: str, entry: dict[str, Any], record: Record, args: argparse.Namespace, limit: float) -> None:
    """A part in a process of its own, whose file is read whenever it has changed."""
    rates = record.found["parts"].get("machine", {}).get("found", {}).get("rates", {})
    with tempfile.TemporaryDirectory() as folder:
        mine, seen = Path(folder, "part.json"), 0

        def look() -> None:
            nonlocal seen
            if mine.exists() and mine.stat().st_mtime_ns != seen:
                seen = mine.stat().st_mtime_ns
                entry["found"] = json.loads(mine.read_text())
                record.write()

        command = [sys.executable, __file__, str(mine), "--part", name, "--seconds", str(limit - ENDING)]
        command += ["--rates", json.dumps(rates), "--jobs", args.jobs] + (["--try"] if args.tried else [])
        done = ran(command, limit, look)
        look()
    problem = entry["found"].pop("problem", None)
    if done["rc"]:
        entry["output_tail"] = done["output"].splitlines()[-TAIL:]
        told_why = "ran past its limit" if done["timed_out"] else f"ended with {done['rc']}"
        entry["problem"] = problem or {"type": "Ended", "message": told_why, "traceback": ""}


def ran(command: list[str], limit: float, look: Callable[[], None] = lambda: None, **more: str) -> dict[str, Any]:
    """A command and all that it starts, ended at its limit: its exit code and what it said."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT, env=os.environ | more
        )
        while process.poll() is None and time.monotonic() - started < limit:
            time.sleep(0.2)
            look()
        timed_out = process.poll() is None
        if timed_out:
            os.killpg(process.pid, signal.SIGKILL)
        rc = process.wait()
        said.seek(0)
        output = said.read().decode(errors="replace")
    return {"rc": rc, "output": output, "timed_out": timed_out, "seconds": time.monotonic() - started}


def child(args: argparse.Namespace) -> int:
    """One part, in this process."""
    if args.tried:  # before Triton is imported
        os.environ |= {"TRITON_INTERPRET": "1", "BMX_KERNELS": "triton", "CUDA_VISIBLE_DEVICES": ""}
    record, rates = Record(Path(args.output), {}), json.loads(args.rates)
    try:
        import gpu_kernels
        import gpu_runs

        place = gpu_kernels.Place(tried=args.tried)
        jobs = args.jobs.split(",") if args.jobs else []
        {
            "machine": lambda: machine(record.note, place),
            "kernels": lambda: gpu_kernels.run(record.note, place, rates),
            "graphs": lambda: gpu_runs.graphs(record.note, place),
            "memory": lambda: gpu_runs.memory(record.note, place),
            "throughput": lambda: gpu_runs.throughput(record.note, place, rates, args.seconds, jobs),
        }[args.part]()
    except Exception as problem:
        record.note("problem", described(problem))
        traceback.print_exc()
        return 1
    return 0


def machine(note: Callable[[str, Any], None], place: Any) -> None:
    """What it is, and what it reaches of large products and copies."""
    import torch
    from gpu_kernels import median_seconds

    packages = {name: version(name) for name in ("torch", "triton", "transformers")}
    note("versions", {"python": platform.python_version(), **packages})
    if not place.tried:
        free, total = torch.cuda.mem_get_info()
        note("gpu", {"name": torch.cuda.get_device_name(), "memory": total, "free": free, "driver": driver()})
        note("cuda", torch.version.cuda)
        note("capability", torch.cuda.get_device_capability())
    side, size = (256, 2**22) if place.tried else (8192, 2**32)
    a, b = (torch.randn(side, side, device=place.device, dtype=place.dtype) for _ in range(2))
    out = torch.empty_like(a)
    flops = 2 * side**3 / median_seconds(lambda: torch.mm(a, b, out=out), place)
    block = torch.empty(size, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(block)
    copy = 2 * size / median_seconds(lambda: target.copy_(block), place)
    note("matmul_tflops", flops / 1e12)
    note("copy_tb_per_second", copy / 1e12)
    note("rates", {"flops": flops, "copy": copy})


def driver() -> str | None:
    asked = ran(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20)
    return asked["output"].strip().splitlines()[0] if asked["rc"] == 0 and asked["output"].strip() else None


def tests(limit: float, tried: bool) -> dict[str, Any]:
    """The tests that need a GPU; on a CPU they must all be skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=8", "-p", "no:cacheprovider"]
    more = {"CUDA_VISIBLE_DEVICES": ""} if tried else {}
    done = ran([*command, "tests/test_gpu.py"], limit, **more)  # other files need packages that may not be there
    lines = done["output"].splitlines()
    counts = dict.fromkeys(("passed", "failed", "skipped", "errors"), 0)
    for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1] if lines else ""):
        counts["errors" if what == "error" else what] = int(count)
    if done["timed_out"]:  # there is no summary
        ended = re.findall(r"^tests/\S+.* (PASSED|FAILED|SKIPPED|ERROR)\b", done["output"], re.MULTILINE)
        counts = {name: ended.count(name.removesuffix("s").upper()) for name in counts}
    names = [line.split()[1] for line in lines if re.match(r"(FAILED|ERROR) \S", line)]
    return {**counts, "names": names, "rc": done["rc"], "timed_out": done["timed_out"], "tail": lines[-TAIL:]}


def bench(limit: float, tried: bool) -> dict[str, Any]:
    """The command that users measure with, on the smallest shape."""
    tokens, answer, prompts = ("96", "8", "2") if tried else ("2000", "128", "256")
    more = ["--device", "cpu", "--kv-budget", "64"] if tried else ["--memory-limit", "16G"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "bench.json")
        command = [sys.executable, "-m", "bmx", "bench", "--shape", PRESET, "--input-tokens", tokens]
        command += ["--output-tokens", answer, "--prompts", prompts, "-o", str(output), *more]
        done = ran(command, limit)
        found = json.loads(output.read_text()) if output.exists() else None
    said = done["output"].splitlines()[-TAIL:]
    if done["rc"]:
        why = "ran past its limit" if done["timed_out"] else f"ended with {done['rc']}"
        raise RuntimeError(f"bmx bench {why}: " + " | ".join(said[-4:]))
    return {"command": command[2:-2], "bench": found, "tail": said}


# The table at the end.

AIMS = (  # part, of its results, figure, what it is, least, unit
    ("throughput", "prefill", "mfu", "prefill, MFU at 8,000 in", 0.60, "%"),
    ("throughput", "decode", "share_of_copy", "decode, share of copy bandwidth", 0.75, "%"),
    ("throughput", "5000/500", "generated_tokens_per_second", "5,000 in, 500 out, generated", 3000, "tok/s"),
    ("throughput", "20000/2000", "generated_tokens_per_second", "20,000 in, 2,000 out, generated", 2700, "tok/s"),
)
STAND_IN = ("throughput", "2000/200", AIMS[-1][2], "2,000 in, 200 out: same ratio, same slots", 2700, "tok/s")


def targets(record: dict[str, Any]) -> list[dict[str, str]]:
    """A line a target; what did not run, or was cut short, is neither met nor missed."""
    lines = [aimed(record, aim) for aim in AIMS]
    stands_in = aimed(record, STAND_IN)
    stands_in["met"] = {"met": "would be met", "missed": "would be missed"}.get(stands_in["met"], stands_in["met"])
    stands_in["target"] = f"of 20,000/2,000: {stands_in['target']}"
    return [*(checked(record, *check) for check in CHECKS), *lines[:3], stands_in, lines[3]]


def aimed(record: dict[str, Any], aim: tuple[str, str, str, str, float, str]) -> dict[str, str]:
    """A line about a figure."""
    part, job, figure, what, least, unit = aim
    found = record["parts"].get(part, {}).get("found", {}).get(job, {})
    value, shown = found.get(figure), (lambda x: f"{100 * x:.1f} %" if unit == "%" else f"{x:,.0f} {unit}")
    line = {"part": part, "what": what, "target": f">= {shown(least)}", "figure": "-", "met": "not run"}
    if "failed" in found:
        line["met"] = "failed"
    elif value is not None:
        line["figure"] = shown(value)
        line["met"] = "cut short" if found.get("cut_short") else "met" if value >= least else "missed"
        if found.get("slots_cut_to_save_time"):
            line["what"] += f" ({found['slots']} of {found['slots_that_fit']} slots)"
    return line


def checked(
    record: dict[str, Any], name: str, what: str, wanted: str, judge: Callable[[dict[str, Any]], tuple[str, bool]]
) -> dict[str, str]:
    """A line about what must simply hold."""
    entry = record["parts"].get(name, {})
    line = {"part": name, "what": what, "target": wanted, "figure": "-", "met": "not run"}
    if not entry.get("found"):
        return line | ({"met": "failed"} if entry.get("problem") else {})
    try:
        figure, held = judge(entry["found"])
    except (KeyError, TypeError, ValueError):
        return line | {"met": "failed"}
    return line | {"figure": figure, "met": "unfinished" if entry.get("problem") else "met" if held else "missed"}


def of_kernels(found: dict[str, Any]) -> tuple[str, bool]:
    wrong = sum(len(one["wrong"]) for one in found.values())
    return f"{wrong} wrong", wrong == 0 and len(found) == 3


def of_tests(found: dict[str, Any]) -> tuple[str, bool]:
    bad = found["failed"] + found["errors"]
    return f"{found['passed']} pass, {bad} fail", found["rc"] == 0 and found["passed"] > 0 and not found["skipped"]


def of_graphs(found: dict[str, Any]) -> tuple[str, bool]:
    good = [one.get("equal") and one.get("nothing_refused") for one in found.values()]
    return f"{sum(map(bool, good))} of 3", len(good) == 3 and all(good)


def of_memory(found: dict[str, Any]) -> tuple[str, bool]:
    ratio = found["4 layers"]["ratio"]
    return f"{ratio:.3f}", ratio <= 1


def of_bench(found: dict[str, Any]) -> tuple[str, bool]:
    cells = found["bench"]["cells"]
    return f"{len(cells)} cell", found["bench"]["state"] == "finished"


CHECKS = (
    ("kernels", "kernels against float64, twice the same bits", "0 wrong", of_kernels),
    ("tests", "pytest -m gpu", "0 fail", of_tests),
    ("graphs", "same tokens with graphs and without, none refused", "3 of 3", of_graphs),
    ("memory", "seen of planned memory", "<= 1", of_memory),
    ("bench", "bmx bench ends", "finished", of_bench),
)


if __name__ == "__main__":
    sys.exit(main())
