"""Which of 300 small faults, put into `registry/` and `icmlora/generator/`, the tests find.

    pip install cosmic-ray pytest-cov
    python -m tests.benchmarks.mutants sample --out MUTANTS.json
    python -m tests.benchmarks.mutants run TREE --mutants MUTANTS.json --out RESULTS.jsonl [--part 0/2]

TREE is a checkout that nothing else uses: its files are changed and put back. Each fault is one operator of cosmic-ray
at one place; places are drawn evenly with a fixed seed, then one of the operators that apply there. Coverage with a
context per test says which tests run the line. The quickest of them run until one fails, or until they have taken 30
seconds in all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

SEED, WANTED = 20261207, 300
PACKAGES = ("registry", "icmlora/generator")
TESTS = ("tests/registry", "tests/icmlora", "tests/cli", "tests/compat")
QUICK = "not slow and not fault"
LIMIT_S = 30.0
IMPORTED = "ignore::pytest.PytestAssertRewriteWarning"  # the forks have torch and its company already


def sample(tree: Path) -> list[dict[str, Any]]:
    """Draw WANTED faults; `|` is left alone because it stands in annotations."""
    import parso  # type: ignore[import-not-found]
    from cosmic_ray.ast import ast_nodes  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-not-found]

    places: dict[tuple[str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for package in PACKAGES:
        for path in sorted((tree / package).rglob("*.py")):
            root = parso.parse(path.read_text())
            for name in sorted(operator_names()):
                if "_BitOr_" in name or name.startswith("core/Variable"):
                    continue
                operator, occurrence = get_operator(name)(), 0
                for node in ast_nodes(root):
                    for start, _stop in operator.mutation_positions(node):
                        found = {
                            "file": str(path.relative_to(tree)),
                            "line": start[0],
                            "operator": name,
                            "occurrence": occurrence,
                        }
                        places[(found["file"], *start)].append(found)
                        occurrence += 1
    draw = random.Random(SEED)
    chosen = draw.sample(sorted(places), WANTED)
    return [{"id": number, **draw.choice(places[place])} for number, place in enumerate(chosen)]


def covering(tree: Path, store: Path) -> tuple[dict[tuple[str, int], set[str]], dict[str, float]]:
    """Run the quick tests once with a coverage context per test: the tests of each line, and each test's seconds."""
    from coverage import CoverageData  # type: ignore[import-not-found]

    data, report = store.with_suffix(".coverage"), store.with_suffix(".xml")
    if not report.exists():
        options = [
            "-q",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "-p",
            "no:cacheprovider",
            "-m",
            QUICK,
            "--cov-context=test",
            "--cov-report=",
        ]
        options += [f"--cov={package}" for package in PACKAGES] + [f"--junit-xml={report}"]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *TESTS], cwd=tree, env={**os.environ, "COVERAGE_FILE": str(data)}
        )
    import xml.etree.ElementTree as ElementTree

    seconds: dict[str, float] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        seconds[f"{case.get('classname')}::{case.get('name')}"] = float(case.get("time") or 0)
    measured = CoverageData(basename=str(data))
    measured.read()
    tests: dict[tuple[str, int], set[str]] = defaultdict(set)
    for file in measured.measured_files():
        inside = str(Path(file).relative_to(tree))
        for line, contexts in measured.contexts_by_lineno(file).items():
            tests[inside, line] |= {context.rpartition("|")[0] for context in contexts if "|" in context}
    return tests, seconds


def as_case(test: str) -> str:
    """Return what the report calls a test: `tests/a/test_b.py::C::test_d` is `tests.a.test_b.C::test_d`."""
    path, _, names = test.partition("::")
    *classes, name = names.split("::") if "[" not in names else [*names.partition("[")[0].split("::")]
    name += "[" + names.partition("[")[2] if "[" in names else ""
    return ".".join([path.removesuffix(".py").replace("/", "."), *classes]) + "::" + name


def chosen(tests: set[str], seconds: dict[str, float]) -> list[str]:
    """Return the quickest tests that take LIMIT_S together, at least one."""
    ordered = sorted(tests, key=lambda test: (seconds.get(as_case(test), 1.0), test))
    total, kept = 0.0, []
    for test in ordered:
        total += seconds.get(as_case(test), 1.0)
        if kept and total > LIMIT_S:
            break
        kept.append(test)
    return kept


def fails(tree: Path, tests: list[str]) -> bool:
    """Run tests in a fork, which spares importing torch again; True if one fails or they hang."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", IMPORTED, *tests])))
    end = time.monotonic() + 8 * LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.05)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return True


def run(tree: Path, mutants: list[dict[str, Any]], out: Path, part: tuple[int, int], store: Path) -> None:
    """Try each fault of a part and add a line of its result; what `out` has already is not tried again."""
    import peft  # noqa: F401  (the forks share what is imported here)
    import torch
    import transformers  # noqa: F401
    from cosmic_ray.mutating import mutate_code  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    tests, seconds = covering(tree, store)
    done = {json.loads(line)["id"] for line in out.read_text().splitlines()} if out.exists() else set()
    whole = [picked for mutant in mutants[:20] if (picked := chosen(tests[mutant["file"], mutant["line"]], seconds))][
        :3
    ]
    if any(fails(tree, picked) for picked in whole):
        raise SystemExit("the tests fail without a fault, so they can find none")
    for mutant in mutants:
        if mutant["id"] % part[1] != part[0] or mutant["id"] in done:
            continue
        picked = chosen(tests[mutant["file"], mutant["line"]], seconds)
        result = "uncovered"
        if picked:
            path = tree / mutant["file"]
            source = path.read_text()
            try:
                path.write_text(mutate_code(source, get_operator(mutant["operator"])(), mutant["occurrence"]))
                result = "killed" if fails(tree, picked) else "survived"
            finally:
                path.write_text(source)
        with out.open("a") as lines:
            lines.write(json.dumps({"id": mutant["id"], "result": result, "tests": len(picked)}) + "\n")


def main() -> None:
    """Read the arguments and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sampling = commands.add_parser("sample")
    sampling.add_argument("--out", type=Path, required=True)
    running = commands.add_parser("run")
    running.add_argument("tree", type=Path)
    running.add_argument("--mutants", type=Path, required=True)
    running.add_argument("--coverage", type=Path, required=True, help="where the measured coverage is kept")
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--part", default="0/1")
    given = parser.parse_args()
    if given.command == "sample":
        given.out.write_text(json.dumps(sample(Path.cwd()), indent=1) + "\n")
        return
    number, _, parts = given.part.partition("/")
    run(
        given.tree.resolve(),
        json.loads(given.mutants.read_text()),
        given.out,
        (int(number), int(parts)),
        given.coverage,
    )


if __name__ == "__main__":
    main()
