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
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that a block may have
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Built:
    """What one compiled kernel needs.

    Attributes:
        registers: of a thread; ``shared``: bytes of a block; ``spills``: bytes stored and loaded for want of registers.
        serial: whether the assembler complains that tensor cores wait for each other.
    """

    kernel: str
    arch: int
    registers: int
    shared: int
    spills: int
    serial: bool


def built(module: str, head_dim: int, architectures=tuple(ARCHITECTURES)) -> list[Built]:
    """All that a kernel file launches for heads of this size, compiled in another process."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        command = [sys.executable, __file__, module, str(head_dim), *map(str, architectures)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Built(**entry) for entry in json.loads(done.stdout)]


def attributes(types: dict[str, str]) -> dict[tuple[int], list]:
    """What is known of arguments: addresses are divisible by 16 unless another number follows, numbers if 16 does."""
    return {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types.values())
        if kind.endswith(":16") or (kind.startswith("*") and ":" not in kind)
    }


def compiled(kernel, types, constants, warps, stages, arch) -> Built:
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
    return Built(kernel.__name__, arch, registers, made.metadata.shared, stored + loaded, "serialized" in said)


if __name__ == "__main__":
    launches = import_module(sys.argv[1]).compiled_for(int(sys.argv[2]))
    found = [compiled(*launch, int(arch)) for arch in sys.argv[3:] for launch in launches]
    sys.stdout.write(json.dumps([asdict(one) for one in found]))
