"""The rules of CONTRIBUTING that a program can check."""

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

import icmlora
from icmlora.fleet.api import Fleet

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("icm_cli", "icmlora", "registry") for path in (ROOT / package).rglob("*.py"))
# The one place where a pickle is read, in a process of its own.
ALLOWED = {"icmlora/formats/discovery/pickle_child.py": {"torch.load"}}
FORBIDDEN = {"torch.load", "torch.save", "pickle.load", "pickle.loads", "yaml.load", "eval", "exec", "print"}


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_calls_what_is_forbidden(path: Path) -> None:
    calls = {
        called(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    }
    assert not (calls & FORBIDDEN) - ALLOWED.get(str(path.relative_to(ROOT)), set())


def test_public_names_have_docstrings() -> None:
    public = [*vars(Fleet).items(), *((name, getattr(icmlora, name)) for name in icmlora.__all__)]
    described = [(name, value) for name, value in public if not name.startswith("_") and callable(value)]
    assert [name for name, value in described if not value.__doc__] == []


def test_there_are_no_import_cycles() -> None:
    graph = grimp.build_graph("icm_cli", "icmlora", "registry", exclude_type_checking_imports=False, cache_dir=None)
    # A cycle raises `CycleError`, which names its modules.
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


def test_each_class_name_is_used_once() -> None:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_each_help_text_is_written_once() -> None:
    texts = Counter[str]()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and called(node) in ("Param", "option", "argument"):
                position = 0 if called(node) == "Param" else 1
                texts.update(ast.unparse(argument) for argument in node.args[position : position + 1])
    assert len(texts) > 150
    assert [text for text, count in texts.items() if count > 1 and text not in ("text", "param.help")] == []
