"""Compiles Triton kernels for GPUs that are not there, and says what they need of them.

A kernel file's ``compiled_for(head_dim)`` says what is launched. Kernels that have been imported to be interpreted
cannot be compiled, so that another process does it: this file is its program.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a block may have
MODULES = (
    "bmx.kernels.triton_prefill",
    "bmx.kernels.triton_decode",
    "bmx.kernels.triton_evict",
    "bmx.kernels.triton_pointwise",
)
# Head sizes to compile for each architecture. The largest heads need the most registers, so both compile those.
HEAD_DIMS = {80: (64, 128), 90: (96, 128)}
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Built:
    """What one compiled kernel needs.

    Attributes:
        registers: of a thread; ``shared``: bytes of a block; ``spills``: bytes stored and loaded for want of registers.
        serial: whether the assembler complains that tensor cores wait for each other.
    """

    module: str
    kernel: str
    arch: int
    registers: int
    shared: int
    spills: int
    serial: bool


@cache
def built() -> list[Built]:
    """All that is launched, compiled by other processes, one for each architecture."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = [
            running.enter_context(subprocess.Popen([sys.executable, __file__, str(arch)], env=environment, **pipes))
            for arch in ARCHITECTURES
        ]
        found = []
        for process in processes:
            out, err = process.communicate()
            assert process.returncode == 0, err
            found += [Built(**entry) for entry in json.loads(out)]
    return found


def attributes(types: dict[str, str]) -> dict[tuple[int], list]:
    """What is known of arguments: addresses are divisible by 16 unless another number follows, numbers if 16 does."""
    return {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind.endswith(":16") or (kind.startswith("*") and ":" not in kind)
    }


def compiled(module, kernel, types, constants, warps, stages, arch) -> Built:
    """One kernel for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    plain = {name: kind.split(":")[0] for name, kind in types.items()}
    source = ASTSource(fn=kernel, signature=plain, constexprs=constants, attrs=attributes(types))
    options = {"num_warps": warps, "num_stages": stages}
    with redirect_stdout(io.StringIO()) as log:
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    said = log.getvalue()
    stored, loaded = map(int, SPILLED.search(said).groups())
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    return Built(module, kernel.__name__, arch, registers, made.metadata.shared, stored + loaded, "serialized" in said)


def main(arch: int) -> None:
    found = []
    for module in MODULES:
        dims = HEAD_DIMS[arch]
        launched = {repr(launch): launch for dim in dims for launch in import_module(module).compiled_for(dim)}
        found += [compiled(module, *launch, arch) for launch in launched.values()]
    sys.stdout.write(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
