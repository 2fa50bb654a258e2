"""What is written in Triton compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import aot


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_kernels_compile_for_gpus_and_fit_into_them(arch):
    kernels = aot.built(arch)
    assert {kernel.module for kernel in kernels} == set(aot.MODULES)
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.shared <= aot.ARCHITECTURES[arch], kernel
        assert not kernel.serial, kernel
