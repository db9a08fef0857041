"""Measure how much there is to read in the three packages, or in another checkout of them.

    python -m tests.metrics [ROOT] [--json]

Tokens leave out comments and docstrings. A private function counts as used once if its name occurs once besides its
definition, in its own file. Cycles are strongly connected components of the import graph, with imports inside functions
and under TYPE_CHECKING.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("registry", "icmlora", "icm_cli")
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_MANY_ARGUMENTS = 4
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """A parsed file."""

    name: str
    text: str
    tree: ast.Module

    @classmethod
    def read(cls, root: Path, path: Path) -> Module:
        """Read a file below the root of a checkout."""
        parts = path.relative_to(root).with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        return cls(".".join(parts[:-1] if parts[-1] == "__init__" else parts), text, ast.parse(text))

    @property
    def functions(self) -> list[Function]:
        """All functions and methods."""
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @property
    def tokens(self) -> int:
        """Number of tokens without comments and docstrings."""
        owners = (node for node in ast.walk(self.tree) if isinstance(node, ast.Module | ast.ClassDef | Function))
        docstrings = {
            (node.body[0].lineno, node.body[0].col_offset) for node in owners if ast.get_docstring(node) is not None
        }
        found = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(token.type not in _LAYOUT and token.start not in docstrings for token in found)

    @property
    def used_once(self) -> int:
        """Number of private functions that are used once, in this file."""
        names = Counter(node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name))
        names.update(node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute))
        return sum(_is_private(one.name) and names[one.name] == 1 for one in self.functions)

    @property
    def inner_imports(self) -> int:
        """Number of import statements inside functions."""
        found = {
            id(node)
            for one in self.functions
            for node in ast.walk(one)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        return len(found)

    def imports(self, known: Mapping[str, Module]) -> set[str]:
        """Return the modules of the packages that this one imports, at any place."""
        found = set[str]()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in known else node.module for name in names)
        return {name for name in found if name in known and name != self.name}


def measure(root: Path) -> dict[str, float]:
    """Return the figures of the packages below a folder."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    modules = {module.name: module for module in (Module.read(root, path) for path in paths)}
    nodes = [node for module in modules.values() for node in ast.walk(module.tree)]
    functions = [function for module in modules.values() for function in module.functions]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    cycles = list(components({name: module.imports(modules) for name, module in modules.items()}))
    return {
        "files": len(modules),
        "lines": sum(module.text.count("\n") for module in modules.values()),
        "tokens": sum(module.tokens for module in modules.values()),
        "functions": len(functions),
        "lines of the median function": statistics.median((one.end_lineno or 0) - one.lineno + 1 for one in functions),
        "private functions used once": sum(module.used_once for module in modules.values()),
        "dataclasses and named tuples": sum(_is_record(node) for node in nodes if isinstance(node, ast.ClassDef)),
        "keywords x=x": sum(_repeats_name(keyword) for call in calls for keyword in call.keywords),
        "calls with more than four positional arguments": sum(len(call.args) > _MANY_ARGUMENTS for call in calls),
        "imports inside functions": sum(module.inner_imports for module in modules.values()),
        "import cycles": len(cycles),
        "modules in import cycles": sum(map(len, cycles)),
        "class names used twice": sum(count > 1 for count in classes.values()),
    }


def components(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """Yield the strongly connected components of more than one node (Tarjan 1972)."""
    index, low, stack, active = dict[str, int](), dict[str, int](), list[str](), set[str]()

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        active.add(node)
        for other in sorted(graph[node]):
            if other not in index:
                yield from visit(other)
                low[node] = min(low[node], low[other])
            elif other in active:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            found = stack[stack.index(node) :]
            del stack[len(stack) - len(found) :]
            active.difference_update(found)
            if len(found) > 1:
                yield found

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            yield from visit(node)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_record(node: ast.ClassDef) -> bool:
    decorated = any("dataclass" in ast.unparse(one) for one in node.decorator_list)
    return decorated or any(ast.unparse(base).endswith("NamedTuple") for base in node.bases)


def _repeats_name(keyword: ast.keyword) -> bool:
    return isinstance(keyword.value, ast.Name) and keyword.value.id == keyword.arg


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.root)
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        sys.stdout.writelines(f"{value:>9,} {name}\n" for name, value in found.items())


if __name__ == "__main__":
    main()
