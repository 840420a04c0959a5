"""The house stays in order: imports go down only, names mean one thing, functions stay short."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import moespan.version

SOURCE = Path(moespan.version.__file__).parent

FLOORS = (
    "version",
    "errors",
    "units",
    "forks",
    "files",
    "cache_folder",
    "log",
    "device",
    "cgroups",
    "memory",
    "config",
    "text",
    "checkpoint",
    "parallel",
    "ops",
    "model",
    "planner",
    "machine",
    "engine",
    "launch",
    "front",
    "measure",
    "doctor",
    "search",
    "serve",
    "cli",
)
"""Folders and modules of the package; each imports only itself and those above it in this list."""

MAY_KNOW_DEVICES = {"device", "ops", "machine", "doctor"}
"""Floors whose code may ask which device it runs on; all others read a row of `device.py`."""

MOST_LINES_OF_A_FUNCTION = 80
ENGINE_CORE = ("engine", "scheduler", "sequence", "blocks", "step", "replicas", "worker")
MOST_LINES_OF_THE_ENGINE_CORE = 1640  # 1500, drafts in plans and results, chunks in plans in flight

SAME_NAME = {
    "bench": "a verb, and what it runs",
    "calibrate": "a verb, and what it runs",
    "collectives": "their times on real ranks, and what the doctor says of them",
    "device": "the table of devices, and which of them this machine has",
    "engine": "its configuration, and the engine itself",
    "environment": "variables of ranks, and the verb that shows them",
    "experts": "a verb, and where experts lie",
    "info": "a verb that describes a model, and what an engine tells of itself",
    "memory": "of host and devices as it is, and as a layout would need it",
    "nodes": "of one job, and their comparison by the doctor",
    "ops": "one implementation of the seam for each device",
    "report": "what the doctor found, and what a search found",
    "quantize": "a verb, and what it runs",
    "verify": "a verb, and what it runs",
}
"""File names that two modules share, and why they may."""

FILES = [
    path for path in sorted(SOURCE.rglob("*.py")) if path.parent != SOURCE or path.stem[0] != "_"
]
MODULES = {path: ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in FILES}


def floor_of(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "moespan":
            names = [f"moespan.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.startswith("moespan."))


def test_every_module_has_a_floor():
    assert {floor_of(module) for module in MODULES.values()} == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=MODULES.__getitem__)
def test_imports_go_down_only(path: Path):
    own = FLOORS.index(floor_of(MODULES[path]))
    upward = [
        f"line {line}: {name}" for line, name in imports(path) if FLOORS.index(floor_of(name)) > own
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    known = {name.removesuffix(".__init__") for name in MODULES.values()}
    needs: dict[str, set[str]] = defaultdict(set)
    for path, module in MODULES.items():
        own = module.removesuffix(".__init__")
        # A package and what is in it may name one another: importing either runs both.
        needs[own] |= {
            name
            for _, name in imports(path)
            if name in known
            and not f"{own}.".startswith(f"{name}.")
            and not name.startswith(f"{own}.")
        }
    while needs:
        free = [module for module, wanted in needs.items() if not wanted & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for module in free:
            del needs[module]


def test_a_file_name_means_one_thing():
    found: dict[str, list[str]] = defaultdict(list)
    for module in MODULES.values():
        found[module.rpartition(".")[2]].append(module)
    shared = {name for name, modules in found.items() if len(modules) > 1} - {"__init__"}
    assert shared == set(SAME_NAME), {name: found[name] for name in shared ^ set(SAME_NAME)}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_functions_stay_short():
    long = {
        f"{MODULES[path]}.{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in FILES
        for function in functions(path)
        if not is_kernel(function)
    }
    assert not {name: n for name, n in long.items() if n > MOST_LINES_OF_A_FUNCTION}


def test_the_core_of_the_engine_can_be_read_in_one_sitting():
    files = [SOURCE / "engine" / f"{name}.py" for name in ENGINE_CORE]
    lines = sum(len(file.read_text().splitlines()) for file in files)
    assert lines <= MOST_LINES_OF_THE_ENGINE_CORE


@pytest.mark.parametrize("path", FILES, ids=MODULES.__getitem__)
def test_only_some_floors_ask_which_device_it_is(path: Path):
    if floor_of(MODULES[path]) in MAY_KNOW_DEVICES:
        return
    compared = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare)
        for operand in (node.left, *node.comparators)
        if isinstance(operand, ast.Constant) and operand.value in ("cpu", "cuda", "npu")
    ]
    assert not compared


CLOCK_OF_DAY = {
    "doctor/nodes.py": "compares the clocks of nodes",
    "ops/cpu/weight_cache.py": "the age of files",
    "serve/sampling.py": "`created` of an answer",
    "serve/served.py": "`created` of a model",
    "serve/tracing.py": "when a span ended",
}
"""Where the clock of day is read: it may jump, so no duration is measured by it."""


def test_durations_do_not_depend_on_the_clock_of_day():
    readers = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(value=ast.Name("time"), attr="time" | "time_ns"):
                    readers.add(path.relative_to(SOURCE).as_posix())
                case ast.ImportFrom(module="time"):
                    assert not {alias.name for alias in node.names} & {"time", "time_ns"}, path
    assert readers == set(CLOCK_OF_DAY)
