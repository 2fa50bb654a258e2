"""What is written in Triton compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import aot


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_kernels_compile_for_gpus_and_fit_into_them(arch):
    """Each launch for one GPU; ``python tests/aot.py`` compiles more of them."""
    kernels = aot.built(arch)
    assert {kernel.module for kernel in kernels} == {name for name, dims in aot.TESTED.items() if arch in dims}
    assert set(aot.TESTED) == set(aot.ALL)
    assert [kernel for kernel in kernels if not kernel.fits] == []
