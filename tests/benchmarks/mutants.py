"""Put 300 small faults into `registry/` and `icmlora/generator/`, one at a time, and count how many the tests find.

    pip install cosmic-ray pytest-cov
    python -m tests.benchmarks.mutants TREE NAME

TREE is a checkout that nothing else uses: the study changes its files and puts them back. Each fault of the sample is
one operator of cosmic-ray at one place. Places are drawn evenly with a fixed seed, then one of the operators that apply
there. Coverage with a context per test lists the tests that run the line. The quickest of them run until one fails, or
until 30 seconds of tests have passed. The result of each fault is added to the sample as NAME, so a stopped study
continues. Coverage stays in the folder mutants-NAME of the temporary directory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

SEED, WANTED = 20261207, 300
PACKAGES = ("registry", "icmlora/generator")
TESTS = ("tests/registry", "tests/icmlora", "tests/cli", "tests/compat")
LIMIT_S = 30.0
SAMPLE = Path(__file__).parent / "results" / "mutants.json"

Mutant = dict[str, Any]


def drawn(tree: Path) -> list[Mutant]:
    """Draw WANTED faults. `|` is left alone because most of them are in annotations."""
    import parso  # type: ignore[import-not-found]
    from cosmic_ray.ast import ast_nodes  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-not-found]

    names = [
        name for name in sorted(operator_names()) if "_BitOr_" not in name and not name.startswith("core/Variable")
    ]
    places: dict[tuple[str, int, int], list[Mutant]] = defaultdict(list)
    for path in sorted(path for package in PACKAGES for path in (tree / package).rglob("*.py")):
        file, nodes = str(path.relative_to(tree)), list(ast_nodes(parso.parse(path.read_text())))
        for name in names:
            operator = get_operator(name)()
            starts = [start for node in nodes for start, _stop in operator.mutation_positions(node)]
            for occurrence, start in enumerate(starts):
                fault = {"file": file, "line": start[0], "operator": name, "occurrence": occurrence}
                places[file, *start].append(fault)
    draw = random.Random(SEED)
    chosen = draw.sample(sorted(places), WANTED)
    return [{"id": number, **draw.choice(places[place])} for number, place in enumerate(chosen)]


def tests_by_line(tree: Path, folder: Path) -> dict[tuple[str, int], list[str]]:
    """Run the fast tests once, and list for each line the tests that run it, the quickest first, up to LIMIT_S."""
    from coverage import CoverageData  # type: ignore[import-not-found]

    data, report = folder / "coverage", folder / "junit.xml"
    if not report.exists():
        measured = [f"--cov={package}" for package in PACKAGES] + ["--cov-context=test", "--cov-report="]
        workers = ["-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
        command = [sys.executable, "-m", "pytest", "-q", *workers, "-m", "not slow and not fault", *measured]
        environment = {**os.environ, "COVERAGE_FILE": str(data)}
        subprocess.run([*command, f"--junit-xml={report}", *TESTS], cwd=tree, env=environment, check=True)
    cases = ElementTree.parse(report).iter("testcase")
    seconds = {f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in cases}
    coverage = CoverageData(basename=str(data))
    coverage.read()
    found = {}
    for file in coverage.measured_files():
        for line, contexts in coverage.contexts_by_lineno(file).items():
            tests = {context.removesuffix("|run") for context in contexts if context.endswith("|run")}
            kept, total = [], 0.0
            for took, test in sorted((seconds.get(_in_report(test), 1.0), test) for test in tests):
                total += took
                if kept and total > LIMIT_S:
                    break
                kept.append(test)
            found[str(Path(file).relative_to(tree)), line] = kept
    return found


def _in_report(test: str) -> str:
    """Return the report's name of `tests/a/test_b.py::C::test_d[e]`, which is `tests.a.test_b.C::test_d[e]`."""
    name, bracket, values = test.partition("[")
    owner, _, function = name.rpartition("::")
    return owner.replace(".py", "").replace("/", ".").replace("::", ".") + "::" + function + bracket + values


def fails(tree: Path, tests: list[str]) -> bool:
    """Run tests in a fork, which need not import torch again; return whether one fails or they hang."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        import pytest

        # pytest warns about plugins that came with torch's imports, and warnings are errors here.
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        ]
        os._exit(int(pytest.main([*options, *tests])))
    end = time.monotonic() + 8 * LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return True


def main() -> None:
    """Try every fault that has no result under this name yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path)
    parser.add_argument("name")
    given = parser.parse_args()
    tree, name = given.tree.resolve(), given.name
    mutants: list[Mutant] = json.loads(SAMPLE.read_text()) if SAMPLE.exists() else drawn(tree)
    folder = Path(tempfile.gettempdir()) / f"mutants-{name}"
    folder.mkdir(exist_ok=True)
    tests = tests_by_line(tree, folder)

    import peft  # noqa: F401  (the forks share these imports)
    import torch
    import transformers  # noqa: F401
    from cosmic_ray.mutating import mutate_code  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    left = [mutant for mutant in mutants if name not in mutant]
    covered = [found for mutant in left if (found := tests.get((mutant["file"], mutant["line"])))]
    if any(fails(tree, found) for found in covered[:3]):
        raise SystemExit("the tests fail without a fault, so their failures mean nothing")
    for mutant in left:
        found = tests.get((mutant["file"], mutant["line"]))
        mutant[name] = "uncovered"
        if found:
            path = tree / mutant["file"]
            source = path.read_text()
            try:
                path.write_text(mutate_code(source, get_operator(mutant["operator"])(), mutant["occurrence"]))
                mutant[name] = "killed" if fails(tree, found) else "survived"
            finally:
                path.write_text(source)
        SAMPLE.write_text("[\n" + ",\n".join(json.dumps(row) for row in mutants) + "\n]\n")
    print(json.dumps(Counter(mutant[name] for mutant in mutants)))


if __name__ == "__main__":
    main()
