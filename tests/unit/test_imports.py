"""Who may import whom, read from the sources: the one-way rule, and where each heavy library may appear."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("topology", "planner", "engines", "flexpiped")  # each may import itself and those to its left
MODEL_LIBRARIES = {"torch", "transformers", "vllm", "sglang", "ray"}
ENGINE_FOLDERS = ("native", "text", "served/plugin", "vllm", "sglang")  # the only places of those libraries
ALONE = {
    "ortools": "planner/solver.py",
    "pynvml": "topology/nvml.py",
    "opentelemetry": "flexpiped/spans.py",
}  # one module each


def modules_imported(source: str, package: str) -> set[str]:
    """Return the full names of all modules that a source imports, at any depth and also lazily."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names, level=0):
                found |= {f"{module}.{alias.name}" for alias in names}
            case ast.ImportFrom(module=module, level=level):
                base = package.split(".")[: len(package.split(".")) + 1 - level]
                found.add(".".join([*base, module or ""]).rstrip("."))
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                found.add(name)
            case ast.Call(func=ast.Name(id="__import__" | "import_module"), args=[ast.Constant(value=str(name)), *_]):
                found.add(name)
            case _:
                pass
    return found


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tops(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    return {name.split(".")[0] for name in modules_imported(path.read_text(), package)}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_to_the_left(package: str) -> None:
    right = set(PACKAGES[PACKAGES.index(package) + 1 :])
    wrong = {name_of(path): sorted(tops(path) & right) for path in (ROOT / package).rglob("*.py") if tops(path) & right}
    assert wrong == {}


def test_model_libraries_stay_in_the_engine_processes() -> None:
    allowed = tuple(f"engines/{folder}/" for folder in ENGINE_FOLDERS)
    wrong = {
        name_of(path): sorted(tops(path) & MODEL_LIBRARIES)
        for path in sources()
        if tops(path) & MODEL_LIBRARIES and not name_of(path).startswith(allowed)
    }
    assert wrong == {}


@pytest.mark.parametrize("library", sorted(ALONE))
def test_some_libraries_are_imported_by_one_module(library: str) -> None:
    users = {name_of(path) for path in sources() if library in tops(path)}
    assert users <= {ALONE[library]}


def test_what_moves_touch_of_sglang_stands_in_one_module() -> None:
    """Else its check at start would not see all; others touch the start, draws, penalties and idling only."""
    plugin = ROOT / "engines" / "sglang" / "plugin" / "flexpiped_sglang"
    users = {path.name for path in plugin.glob("*.py") if "sglang" in tops(path)}
    assert users == {"internals.py", "registration.py", "seeds.py", "penalties.py", "idling.py"}


DECISIONS = {  # what the simulator must have from the daemon, and from where
    "own_policy.py": {"planner.policy.decide", "planner.policy.settle", "planner.policy.changed_by_others"},
    "fleet.py": {"planner.routing.choose_replica", "planner.prediction.Pipeline"},
    "outlooks.py": {"planner.prediction.Pipeline", "planner.prediction.best_cvs"},
    "step_times.py": {"planner.prediction.PipelineTimes"},
    "run.py": {"planner.load.LoadMonitor"},
    "host_memory.py": {f"planner.parameter_cache.{each}" for each in ("added", "left", "taken")},
    "pool.py": {"planner.scaling.host_affinity"},
}
DECIDED_ELSEWHERE = ("policy", "policy_state", "policy_view", "proposal", "guard", "granularity", "scaling", "routing",
    "prediction", "queueing", "load", "arrivals")  # fmt: skip


def test_the_simulator_decides_routes_and_predicts_by_the_daemons_own_code() -> None:
    folder = ROOT / "planner" / "simulation"
    for name, needed in DECISIONS.items():
        assert needed <= modules_imported((folder / name).read_text(), "planner.simulation"), name
    elsewhere = {each for part in DECIDED_ELSEWHERE for each in defined_in(ROOT / "planner" / f"{part}.py")}
    assert {"decide", "settle", "choose_replica", "best_cvs", "LoadMonitor", "scores", "propose"} <= elsewhere
    own = {path.name: defined_in(path) & elsewhere for path in folder.glob("*.py")}
    assert {name: sorted(found) for name, found in own.items() if found} == {}


def defined_in(path: Path) -> set[str]:
    """Return the public functions and classes of a module."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text()).body
    return {each.name for each in body if isinstance(each, kinds) and not each.name.startswith("_")}


def test_nothing_imports_the_tests() -> None:
    assert [name_of(path) for path in sources() if "tests" in tops(path)] == []


def test_every_source_is_looked_at() -> None:
    seen = {name_of(path) for path in sources()}
    assert {"planner/solver.py", "engines/protocol.py", "topology/device.py", "flexpiped/__init__.py"} <= seen


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import torch.nn as nn", {"torch.nn"}),
        ("from planner import solver", {"planner.solver"}),
        ("def f():\n    from ortools.sat import x", {"ortools.sat.x"}),
        ("from . import b\nfrom .c import d\nfrom .. import e", {"engines.native", "engines.native.c", "engines"}),
        ("importlib.import_module('vllm.engine')", {"vllm.engine"}),
        ("__import__('ray')", {"ray"}),
        ("if TYPE_CHECKING:\n    import sglang", {"sglang"}),
    ],
)
def test_imports_are_found(source: str, names: set[str]) -> None:
    assert modules_imported(source, "engines.native") == names
