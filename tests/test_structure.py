"""The house rules that a reader relies on: who may import whom, what is loaded when, and how long things are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import bmx

ROOT = Path(bmx.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=NAMES)

# From the ground up; a file imports from its own room and from those before it. Files outside any room are ground.
ROOMS = ("ground", "kernels", "kv", "model", "compress", "plan", "engine", "cluster")
ROOMS += ("terminal", "job", "measure", "cli")
FRONT = {"__init__", "__main__"}  # the package's face names everything, lazily
HEAVY = {"torch", "transformers", "triton", "ray"}
MAY_BE_HEAVY = ("kernels/", "kv/", "engine/", "model/fused_modules.py", "model/int8_modules.py", "model/mixers.py")
MAY_BE_HEAVY += (
    "model/fp8_modules.py",
    "model/joined_weights.py",
    "model/split_modules.py",
    "model/rope.py",
    "model/cost_trace.py",
    "measure/full_cache_answers.py",
    "measure/layer_analysis.py",
)
MAY_BE_HEAVY += ("measure/decode_bound.py", "cluster/ray_")
MAX_LINES = 450
MAX_FUNCTION_LINES, SHARE_WITHIN = 30, 0.9


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`engine/sampler.py` is engine.sampler, `kv/__init__.py` is kv."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in FILES}


def own_imports(path: Path) -> set[str]:
    """Modules of bmx that a file imports anywhere, for types alone too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "bmx":
                inner = ".".join(parts[1:])
                known = (inner, inner.rpartition(".")[0], "__init__")
                found.add(next(module for module in known if module in MODULES))
    return found - {name_of(path)}


def room_of(module: str) -> int:
    """The place of a module's room in the order of imports."""
    name = module.split(".", maxsplit=1)[0]
    return ROOMS.index(name) if (ROOT / name).is_dir() else 0


def runtime_imports(body: list[ast.stmt]) -> Iterator[str]:
    """Top packages imported when a file is loaded: not within functions, not for types alone."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from runtime_imports(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "handlers", "orelse", "finalbody"):
                yield from runtime_imports(getattr(node, field, []))


def test_every_folder_is_a_room_with_a_place_in_the_order():
    assert {path.parent.name for path in FILES if path.parent != ROOT} == set(ROOMS) - {"ground"}


@EVERY_FILE
def test_a_file_imports_only_from_its_own_room_and_those_before_it(path):
    module = name_of(path)
    if module in FRONT:
        return
    above = {other for other in own_imports(path) - FRONT if room_of(other) > room_of(module)}
    assert above == set()


def test_no_imports_go_in_circles():
    waiting = {name: own_imports(path) - FRONT for name, path in MODULES.items() if name not in FRONT}
    while waiting:
        free = {name for name, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needs for name, needs in waiting.items() if name not in free}


@EVERY_FILE
def test_heavy_packages_are_loaded_where_tensors_live(path):
    if not str(path.relative_to(ROOT)).startswith(MAY_BE_HEAVY):
        assert HEAVY.isdisjoint(runtime_imports(tree(path).body))


def heavy_after(code: str) -> str:
    """The heavy packages that a fresh Python has loaded after this code, as the last line it prints."""
    code += f"\nimport sys; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


def test_what_stands_above_the_engine_and_below_it_loads_without_torch():
    """One process imports them all: a heavy package that any of them loads is still loaded at the end."""
    light = {
        module.removesuffix("__init__")
        for module in set(MODULES) - {"__main__", "model.loader", "engine"}
        if not f"{module.replace('.', '/')}.py".startswith(MAY_BE_HEAVY)
    }
    assert len(light) > 30
    assert heavy_after("\n".join(f"import bmx.{module}".rstrip(".") for module in sorted(light))) == ""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["bench", "--help"], ["--version"], ["run", "--print-config", "x.jsonl"]],
)
def test_help_loads_no_torch(arguments):
    assert heavy_after(f"from bmx.cli.commands import app; app({arguments!r}, standalone_mode=False)") == ""


@EVERY_FILE
def test_mistakes_raise_and_only_the_display_prints(path):
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        printing = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not printing, f"print in line {node.lineno}"


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public classes, functions and methods of a file or class."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{child.name}.")


@EVERY_FILE
def test_every_file_and_every_public_name_says_what_it_is(path):
    if path.name == "__main__.py":
        return
    assert ast.get_docstring(tree(path))
    assert [name for name, node in public(tree(path)) if not ast.get_docstring(node)] == []


@EVERY_FILE
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function from its `def` on, its docstring left out."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def test_most_functions_are_short():
    functions = {
        f"{name_of(path)}.{node.name}": lines_of(node)
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    long = {name: lines for name, lines in functions.items() if lines > MAX_FUNCTION_LINES}
    assert len(long) <= (1 - SHARE_WITHIN) * len(functions), long
