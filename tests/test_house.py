"""The bars of CONTRIBUTING: sizes of files and functions, docstrings, no import cycles, and what the code never has."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("icm_cli", "icmlora", "registry") for path in (ROOT / package).rglob("*.py"))
# The one place where a pickle is read, in a process of its own.
ALLOWED = {"icmlora/formats/discovery/pickle_child.py": {"torch.load"}}
FORBIDDEN = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "yaml.load", "eval", "exec", "print"}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of its statements; a docstring may be as long as its keywords need."""
    first = function.body[1] if ast.get_docstring(function) and len(function.body) > 1 else function.body[0]
    return (function.end_lineno or 0) - first.lineno


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_to_the_bars(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [node.name for node in functions if length(node) >= 60]
    calls = {called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert len(text.splitlines()) <= 600
    assert long == []
    assert ast.get_docstring(tree)
    assert not (calls & FORBIDDEN) - ALLOWED.get(str(path.relative_to(ROOT)), set())


def test_there_are_no_import_cycles() -> None:
    graph = grimp.build_graph("icm_cli", "icmlora", "registry", exclude_type_checking_imports=False, cache_dir=None)
    # A cycle raises `CycleError`, which names its modules.
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
