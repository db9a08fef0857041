"""The folders of trainers: every adapter becomes a task, or an earlier adapter of one, by one command."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from icmlora import Fleet
from tests.cli.conftest import Ran, icm
from tests.compat import seam
from tests.compat.building import WEIGHTS, write_lora
from tests.compat.not_yet import NOT_YET
from tests.compat.trees import TREES, Tree

__all__ = ["icm"]

_ALL = "test_all_trees_in_one_folder_become_tasks_by_one_command"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter, of which the trees hold trainings."""
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    write_lora(folder, "llama", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"})
    return folder


def _expected(test: str, name: str) -> list[pytest.MarkDecorator]:
    reason = NOT_YET.get(test, {}).get(name)
    return [] if reason is None else [pytest.mark.xfail(strict=True, reason=reason)]


def digest(folder: Path) -> str:
    """Return the digest of an adapter's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def stored(fleet: Fleet) -> tuple[dict[str, str], set[str]]:
    """Return the digest of each task's adapter with the task's name, and the digests of all adapters."""
    details = [fleet.show(row.name) for row in seam.tasks(fleet)]
    finals = {shown.task.final.weights: shown.task.name for shown in details}
    return finals, {adapter.weights for shown in details for adapter in shown.task.adapters}


def problems(fleet: Fleet, tree: Tree, folder: Path) -> list[str]:
    """Return which places of a tree are missing in the store, or have a task whose name does not tell them apart."""
    finals, everything = stored(fleet)
    found = []
    for place, words in tree.tasks.items():
        name = finals.get(digest(folder / place))
        if name is None or not all(word.lower() in name.lower() for word in words):
            found.append(f"{place} is {name}")
    return found + [f"{place} is not in the store" for place in tree.others if digest(folder / place) not in everything]


@pytest.mark.one_case
@pytest.mark.parametrize(
    "tree",
    [pytest.param(tree, id=tree.name, marks=_expected("test_a_tree_becomes_its_tasks", tree.name)) for tree in TREES],
)
def test_a_tree_becomes_its_tasks(tree: Tree, plain: Path, tmp_path: Path) -> None:
    tree.write(tmp_path / "loras", plain, seed=1)
    fleet = Fleet(tmp_path / "tree-store", cache=tmp_path / "cache")
    seam.ingest(fleet, tmp_path / "loras")
    assert problems(fleet, tree, tmp_path / "loras") == []
    assert len(seam.tasks(fleet)) == len(tree.tasks)


@pytest.fixture
def everything(plain: Path, tmp_path: Path) -> Path:
    """All trees in one folder, which is what a home directory looks like after two years."""
    for seed, tree in enumerate(TREES):
        tree.write(tmp_path / "loras" / tree.name, plain, seed)
    return tmp_path / "loras"


@pytest.mark.slow
@pytest.mark.parametrize("_", [pytest.param(None, id="all", marks=_expected(_ALL, "all"))])
def test_all_trees_in_one_folder_become_tasks_by_one_command(
    _: None, icm: Callable[..., Ran], everything: Path, tmp_path: Path
) -> None:
    ran = icm("ingest", everything, "--no-vectors")
    assert ran.code in (0, 3), ran.err
    fleet = Fleet(tmp_path / "store")
    assert [line for tree in TREES for line in problems(fleet, tree, everything / tree.name)] == []


def test_the_trees_hold_forty_adapters() -> None:
    assert sum(len(tree.tasks) + len(tree.others) + len(tree.copies) for tree in TREES) >= 40
