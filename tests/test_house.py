"""The bars of CONTRIBUTING: sizes of files and functions, docstrings, and what never appears in the code."""

import ast
from pathlib import Path

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
