"""Compiles Triton kernels for GPUs that this machine lacks, and reports the registers and memory that they need.

A kernel file's ``compiled_for(head_dim)`` lists what is launched. Kernels that were imported to be interpreted cannot
be compiled, so another process compiles them: this file is its program.
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
# Head sizes that each file's kernels are compiled for, by architecture: each size for at least one of them, and the
# largest, which needs the most registers, for both where registers are scarce.
MODULES = {
    "bmx.kernels.triton_prefill": {80: (64, 128), 90: (96, 128)},
    "bmx.kernels.triton_decode": {80: (128,), 90: (64, 96)},
    "bmx.kernels.triton_evict": {80: (128,), 90: (96,)},
    "bmx.kernels.triton_pointwise": {80: (128,), 90: (64, 96)},
}
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


def built(arch: int) -> list[Built]:
    """All kernels that are launched, compiled for an architecture by another process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        command = [sys.executable, __file__, str(arch)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [Built(**kernel) for kernel in json.loads(ended.stdout)]


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
    kernels = []
    for module, dims in MODULES.items():
        launches = {repr(launch): launch for dim in dims[arch] for launch in import_module(module).compiled_for(dim)}
        kernels += [compiled(module, *launch, arch) for launch in launches.values()]
    sys.stdout.write(json.dumps([asdict(kernel) for kernel in kernels]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
