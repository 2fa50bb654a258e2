"""The instruction sets that the C++ kernels are compiled for, the best first: what each needs, and what it is called.

Knows processors and compilers' flags by name; compiles nothing. Loads no torch.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field

from bmx import hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSet:
    """Instructions that a compiled library uses, and no others.

    Attributes:
        name: of the kernels, as ``BMX_KERNELS`` takes it.
        title: what it has and the next one has not, for people.
        machine: the architecture, as ``platform.machine`` names it.
        needs: flags of the processor, as Linux names them, and the compiler's flags for each.
        uses: the same for instructions that are used where there are any.
    """

    name: str
    title: str
    machine: str = "x86_64"
    needs: Mapping[str, str]
    uses: Mapping[str, str] = field(default_factory=dict)

    def lack(self) -> str:
        """What this machine lacks, for people; empty if its processor has all of the instructions."""
        if platform.machine() != self.machine:
            return f"it is for {self.machine}"
        missing = [flag for flag in self.needs if flag not in hardware.cpu_flags()]
        return f"the processor has no {missing[0]}" if missing else ""

    def compiler_flags(self) -> tuple[str, ...]:
        """What makes a compiler use these instructions of this processor."""
        used = (option for flag, option in self.uses.items() if flag in hardware.cpu_flags())
        return (*self.needs.values(), *used)


_AVX2 = {"avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c", "bmi1": "-mbmi", "bmi2": "-mbmi2"}
_AVX512 = _AVX2 | {f"avx512{part}": f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "cd")}
_VNNI, _BF16 = {"avx512_vnni": "-mavx512vnni"}, {"avx512_bf16": "-mavx512bf16"}
_AMX = {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16", "amx_int8": "-mamx-int8"}

SETS = {
    one.name: one
    for one in (
        InstructionSet(name="amx", title="AMX", needs=_AVX512 | _VNNI | _BF16 | _AMX),
        InstructionSet(name="avx512bf16", title="AVX512-BF16", needs=_AVX512 | _VNNI | _BF16),
        InstructionSet(name="avx512", title="AVX512", needs=_AVX512, uses=_VNNI),
        InstructionSet(name="avxvnni", title="AVX-VNNI", needs=_AVX2 | {"avx_vnni": "-mavxvnni"}),
        InstructionSet(name="avx2", title="AVX2", needs=_AVX2),
        InstructionSet(
            name="neon",
            title="NEON",
            machine="aarch64",
            needs={"asimd": "-march=armv8-a"},
            uses={"asimddp": "-march=armv8.2-a+dotprod"},
        ),
    )
}


def better_than(name: str | None) -> list[InstructionSet]:
    """The sets of this machine's architecture before that name, the best first; all for None."""
    ours = [one for one in SETS.values() if one.machine == platform.machine()]
    return ours[: ours.index(SETS[name])] if name else ours
