"""Compiles Triton kernels for GPUs that this machine lacks, and reports the registers and memory that they need.

A kernel file's ``compiled_for`` lists what is launched for keys and values of some sizes, on GPUs with some shared
memory. Kernels that were imported to be interpreted cannot be compiled, so another process compiles them: this file is
its program. The test compiles some where registers and shared memory are scarce; ``python tests/aot.py`` compiles every
launch in every size for every architecture, and prints a table (half an hour on one core; ``python tests/aot.py 90``
compiles for one).
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
KILOBYTES = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of shared memory that a block may have
SIZES = ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256))  # of keys and values
MODULES = tuple(
    f"bmx.kernels.triton_{name}"
    for name in (
        *("prefill", "decode", "channel_decode", "evict", "pointwise", "fp8", "draw"),
        *("convolve", "delta_rule", "state_space"),
    )
)
SPARED = 64  # bytes stored and loaded: the assembler may put a few values aside so that another block fits
FEW = 3  # launches of a file that the test compiles, from all over its list
# What the test compiles: files and sizes by architecture.
TESTED: dict[int, dict[str, tuple[tuple[int, int], ...]]] = {
    86: {"bmx.kernels.triton_decode": ((128, 128),), "bmx.kernels.triton_evict": ((128, 128),)},
    89: {"bmx.kernels.triton_fp8": ((128, 128),)},
    90: {
        "bmx.kernels.triton_prefill": ((128, 128),),
        "bmx.kernels.triton_pointwise": ((64, 64),),
        "bmx.kernels.triton_draw": ((64, 64),),
        "bmx.kernels.triton_channel_decode": ((128, 128),),
        "bmx.kernels.triton_convolve": ((128, 128),),
        "bmx.kernels.triton_delta_rule": ((128, 128),),
        "bmx.kernels.triton_state_space": ((128, 128),),
    },
}
LEAST = {"bmx.kernels.triton_fp8": 89}  # architecture that a file's kernels are for, where not all are
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Built:
    """What one compiled kernel needs.

    Attributes:
        heads: sizes of keys and values.
        registers: of a thread; ``shared``: bytes of a block; ``spills``: bytes stored and loaded for want of registers.
        serial: whether the assembler complains that tensor cores wait for each other.
    """

    module: str
    kernel: str
    arch: int
    heads: tuple[int, int]
    registers: int
    shared: int
    spills: int
    serial: bool

    @property
    def fits(self) -> bool:
        """Whether it runs on the architecture, and keeps what it works on in registers."""
        return self.spills <= SPARED and self.shared <= KILOBYTES[self.arch] * 1024 and not self.serial


def built(arch: int) -> list[Built]:
    """The kernels that are tested, compiled for an architecture by another process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        command = [sys.executable, __file__, str(arch), "tested"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return [Built(**kernel) for kernel in json.loads(ended.stdout)]


def source(variant):
    """A launch as Triton's compiler takes it: types, constants, and what addresses and numbers are divisible by.

    Addresses are divisible by 16 unless another number follows, numbers if 16 does.
    """
    from triton.compiler import ASTSource

    constants, divisible, signature = dict(variant.constants), {}, {}
    for place, (name, kind) in enumerate(variant.types.items()):
        entries = {(place,): kind} if isinstance(kind, str) else {(place, i): each for i, each in enumerate(kind)}
        for path, each in entries.items():
            if each is None:
                constants[path] = None
            elif each.endswith(":16") or (each.startswith("*") and ":" not in each):
                divisible[path] = [["tt.divisibility", 16]]
        plain = ["constexpr" if each is None else each.split(":")[0] for each in entries.values()]
        signature[name] = plain[0] if isinstance(kind, str) else type(kind)(*plain)
    return ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=divisible)


def compiled(module, variant, arch, heads) -> Built:
    """One launch for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    with redirect_stdout(io.StringIO()) as log:
        binary = triton.compile(source(variant), target=GPUTarget("cuda", arch, 32), options=options)
    ptxas = log.getvalue()
    stored, loaded = map(int, SPILLED.search(ptxas).groups())
    registers = int(re.search(r"Used (\d+) registers", ptxas).group(1))
    name, spills = variant.kernel.__name__, stored + loaded
    return Built(module, name, arch, heads, registers, binary.metadata.shared, spills, "serialized" in ptxas)


def kernels_of(modules: dict[str, tuple[tuple[int, int], ...]], arch: int, most: int = 1000) -> list[Built]:
    """Each launch of these files once, compiled for an architecture; of a file and a size at most so many."""
    made = {}
    for module, sizes in modules.items():
        for heads in sizes:
            launches = import_module(module).compiled_for(*heads, KILOBYTES[arch] * 1024)
            for launch in launches[:: -(-len(launches) // most)]:
                made.setdefault(repr(launch), (module, launch, arch, heads))
    return [compiled(*each) for each in made.values()]


def compile_all(architectures) -> None:
    """Print what every kernel needs; exits with 1 if one does not fit."""
    good = True
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        for arch in architectures:
            files = [name for name in MODULES if arch >= LEAST.get(name, arch)]
            for kernel in kernels_of(dict.fromkeys(files, SIZES), arch):
                good = good and kernel.fits
                sys.stdout.write(f"{'ok  ' if kernel.fits else 'BAD '} {kernel}\n")
    sys.exit(not good)


if __name__ == "__main__":
    if sys.argv[2:] == ["tested"]:
        arch = int(sys.argv[1])
        sys.stdout.write(json.dumps([asdict(kernel) for kernel in kernels_of(TESTED[arch], arch, FEW)]))
    else:
        compile_all(map(int, sys.argv[1:] or KILOBYTES))
