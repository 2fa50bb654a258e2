"""Compiles the C++ kernels for an instruction set, once, and stores the library in the user's cache.

Knows compilers, caches and where torch keeps its OpenMP; imports no torch, and knows nothing of what is computed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from bmx import hardware
from bmx.cache import cache_folder, store, warn_once
from bmx.kernels.instruction_sets import SETS, InstructionSet, better_than

SOURCE = Path(__file__).parent / "cpp" / "kernels.cpp"
COMPILERS = ("g++", "c++")  # of GNU, as the OpenMP library that torch brings
FLAGS = ("-O3", "-std=c++17", "-mtune=native", "-fPIC", "-fopenmp", "-w", "-ffp-contract=off", "-fno-strict-aliasing")
TIMEOUT = 120  # seconds that a compiler may take
NO_COMPILER = "no C++ compiler is installed (g++)"


logger = logging.getLogger(__name__)


class CannotBuildError(Exception):
    """The compiled kernels cannot be built on this machine; its text says why."""


@cache
def library(name: str) -> ctypes.PyDLL | str:
    """The kernels compiled for an instruction set, loaded; or the reason why this machine cannot have them.

    Args:
        name: of the set, one of ``SETS``.
    """
    chosen = SETS[name]
    if lack := chosen.lack():
        return lack
    compiler = _compiler()
    if not compiler:
        return NO_COMPILER
    try:
        openmp = _openmp()
        loaded = _cached(chosen, compiler, openmp) or _built(chosen, compiler, openmp)
    except CannotBuildError as reason:
        return str(reason)
    if loaded.bmx_start():
        return f"the system does not let this process use {chosen.title}"
    return loaded


@dataclass(frozen=True, slots=True)
class Best:
    """What this machine can have of the compiled kernels.

    Attributes:
        name: of the best set; None for no compiled kernels.
        lack: why there is none, or what would be faster, for people; empty where there is nothing better.
    """

    name: str | None
    lack: str


@cache
def best() -> Best:
    """The best instruction set whose kernels this machine can have. What is slower for a reason is said once."""
    failed: dict[str, str] = {}
    possible = [one for one in better_than(None) if not one.lack()]
    for chosen in possible:
        reason = library(chosen.name)
        if not isinstance(reason, str):
            if failed:
                better, why = next(iter(failed.items()))
                logger.warning("kernels run that are compiled for %s, slower than %s: %s", chosen.title, better, why)
            return Best(chosen.name, _what_would_be_faster(chosen, failed))
        failed[chosen.title] = reason
        if reason == NO_COMPILER:
            break
    if failed:
        reason = next(iter(failed.values()))
        logger.warning("there are no compiled kernels, which makes runs slower: %s", reason)
        return Best(None, reason)
    ours = better_than(None)
    return Best(None, f"the processor has no {ours[-1].title}" if ours else f"there are none for {platform.machine()}")


def _what_would_be_faster(chosen: InstructionSet, failed: Mapping[str, str]) -> str:
    """The better sets, and why this machine cannot have them.

    Args:
        chosen: the set that is used.
        failed: by title of a better set, why its kernels cannot be used here.
    """
    lacking = [one.title for one in better_than(chosen.name) if one.title not in failed][::-1]
    parts = [f"{title} would be faster: {reason}" for title, reason in failed.items()]
    if lacking:
        which = " or ".join(filter(None, (", ".join(lacking[:-1]), lacking[-1])))
        parts.append(f"{which} would be faster, the processor has none")
    return "; ".join(parts)


def _compiler() -> str | None:
    return os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)


def _cached(chosen: InstructionSet, compiler: str, openmp: Path) -> ctypes.PyDLL | None:
    """The library from the cache, if it is there, this user's own, and as it was written."""
    with suppress(OSError):
        folder, key = cache_folder("kernels"), _key(chosen, compiler, openmp)
        for file in folder.glob(f"{key}-*.so"):
            with suppress(OSError):
                if file.stat().st_uid == os.geteuid() and file.name == _name(key, file.read_bytes()):
                    return ctypes.PyDLL(str(file))
    return None


def _built(chosen: InstructionSet, compiler: str, openmp: Path) -> ctypes.PyDLL:
    """The library, compiled now and stored in the cache."""
    try:
        with tempfile.TemporaryDirectory(prefix="bmx-", ignore_cleanup_errors=True) as folder:
            built = _compile(chosen, compiler, openmp, Path(folder))
            try:
                content = built.read_bytes()
                store(cache_folder("kernels") / _name(_key(chosen, compiler, openmp), content), content)
            except OSError as error:
                warn_once(
                    f"the compiled kernels cannot be kept ({error.strerror}), and are compiled in each run", error
                )
            return ctypes.PyDLL(str(built))
    except OSError as error:
        raise CannotBuildError(f"the library that {compiler} builds cannot be stored or loaded: {error}") from None


def _openmp() -> Path:
    """The OpenMP library that torch brings; with another one, its threads would compete with torch's for the cores."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    libraries = sorted(folder.glob("libgomp*.so*")) if folder else []
    if not libraries:
        raise CannotBuildError("torch comes without the OpenMP library of GNU")
    return libraries[0]


def _key(chosen: InstructionSet, compiler: str, openmp: Path) -> str:
    """The part of the library's name that tells the source, instruction set, processor, compiler and torch."""
    flags = (*FLAGS, *chosen.compiler_flags())
    parts = (hardware.cpu_name(), *flags, str(shutil.which(compiler)), str(openmp))
    source = b"".join(path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    digest = hashlib.sha256("\n".join(parts).encode() + source).hexdigest()[:32]
    return f"{SOURCE.stem}-{chosen.name}-{digest}"


def _name(key: str, content: bytes) -> str:
    """The library's file name: it ends with a digest of the content, since half a library ends the process."""
    return f"{key}-{hashlib.sha256(content).hexdigest()[:32]}.so"


def _compile(chosen: InstructionSet, compiler: str, openmp: Path, folder: Path) -> Path:
    """Compile and link; returns the library.

    Raises:
        CannotBuildError: the compiler fails, takes too long, or cannot be started.
    """
    objects, built = folder / "kernels.o", folder / "kernels.so"
    commands = (
        (compiler, *FLAGS, *chosen.compiler_flags(), "-c", str(SOURCE), "-o", str(objects)),
        (compiler, "-shared", str(objects), str(openmp), f"-Wl,-rpath,{openmp.parent}", "-o", str(built)),
    )
    for command in commands:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if "error" in line] or [f"exit {error.returncode}"]
            raise CannotBuildError(f"{compiler} cannot compile them: {lines[0]}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CannotBuildError(f"{compiler} does not work: {error}") from None
    return built
