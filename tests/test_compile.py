"""What is written in Triton compiles for GPUs that are not here, and keeps what it works on in registers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import aot


@pytest.mark.parametrize("module", aot.MODULES)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_kernels_compile_for_gpus_and_fit_into_them(module, arch):
    found = [one for one in aot.built() if (one.module, one.arch) == (module, arch)]
    assert found
    for one in found:
        assert one.spills == 0, one
        assert one.shared <= aot.ARCHITECTURES[arch], one
        assert not one.serial, one
