"""Find adapters under the folders a user gives, and make tasks of them.

    loras/shakespeare/                       the task "shakespeare"
        adapter_config.json ...              its final adapter
        checkpoint-80/  checkpoint-100/      its checkpoints, steps 80 and 100
        samples.jsonl  eval.jsonl            its texts

A run without an adapter outside its checkpoints has as final adapter the checkpoint that the trainer noted as best, or
else the last one. An adapter in a folder such as `shakespeare/final` belongs to the run `shakespeare`; see
`task_names.py`. Only a trainer's notes and the first bytes of files are opened here. Never imports torch.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from icmlora.errors import AdapterRefused
from icmlora.formats import catalogue
from icmlora.formats.foreign import foreign_adapters
from icmlora.formats.format import AdapterFormat, AdapterPaths
from icmlora.formats.task_names import (
    EVAL_NAMES,
    SAMPLES_NAMES,
    STATE_NAME,
    best_step,
    name_of,
    step_of,
    telling_folder,
)
from icmlora.formats.tree import Folder, walk
from registry.names import escape, natural_key, task_name_problem

_NOTES = (*SAMPLES_NAMES, *EVAL_NAMES, STATE_NAME)


@dataclass(frozen=True)
class FoundAdapter:
    """One adapter on disk; the paths lead to regular files."""

    format: AdapterFormat
    place: Path  # its folder, or for a single file the file without its suffix
    weights: Path  # the file with its tensors
    config: Path | None  # the file with its configuration; None for a format without one
    card: Path | None
    step: int | None  # the training step of a checkpoint, or None for an adapter that is not a checkpoint
    is_final: bool  # whether this is *the* adapter of its task; true for exactly one
    companions: Mapping[str, Path] = field(default_factory=dict)  # other files that belong to it, by name


@dataclass(frozen=True)
class FoundTask:
    """A task: its final adapter, its checkpoints, and its texts."""

    name: str  # a valid task name
    folder: Path
    adapters: tuple[FoundAdapter, ...]  # in order of steps; an adapter that is not a checkpoint comes last
    samples: Path | None  # `samples.jsonl`, or the same as JSON or Parquet
    eval_data: Path | None  # `eval.jsonl`, likewise

    @property
    def final(self) -> FoundAdapter:
        """The adapter that stands for the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


@dataclass(frozen=True)
class Discovery:
    """What is under the folders given: tasks in natural order of names, refusals in order of paths."""

    tasks: tuple[FoundTask, ...]
    refused: tuple[AdapterRefused, ...]


@dataclass(frozen=True)
class _Located:
    """The paths of one adapter and the format that found them."""

    format: AdapterFormat
    paths: AdapterPaths


@dataclass
class _Run:
    """What was met of one task so far; the keys are steps, None for what is not in a checkpoint."""

    adapters: dict[int | None, _Located] = field(default_factory=dict)
    notes: dict[str, dict[int | None, Path]] = field(default_factory=dict)

    def note(self, name: str) -> Path | None:
        """Return a file next to the adapters: the run's own, else the one in its last checkpoint that has it."""
        places = self.notes.get(name, {})
        return places[max(places, key=_order)] if places else None

    def joined(self, inner: _Run) -> _Run:
        """Add what a folder in this run has; where both have a note of one kind, the inner folder's counts."""
        notes = {name: self.notes.get(name, {}) | inner.notes.get(name, {}) for name in self.notes | inner.notes}
        return _Run(self.adapters | inner.adapters, notes)


def find_adapters(paths: Sequence[Path], *, name: str | None = None, texts: bool = True) -> Discovery:
    """Find every adapter under some folders: the tasks, and what looks like an adapter but is not taken."""
    # Not taken are formats that are not read, links out of the tree, names that cannot be a task's, and folders with
    # the same name (which are not merged).
    refused: list[AdapterRefused] = []
    runs: defaultdict[Path, _Run] = defaultdict(_Run)
    watched = {*_NOTES} if texts else {STATE_NAME}
    watched = watched.union(*(known.watched for known in catalogue.FORMATS))
    for path in paths:
        root = Path(os.path.realpath(path))
        if root.is_dir():
            for folder in walk(root, watched, refused.append):
                _collect(folder, root, runs, refused)
        elif not _collect_file(root, runs):
            fact = "is not a folder" if root.exists() else "does not exist"
            hint = "give the folder that holds adapter_config.json"
            refused.append(AdapterRefused(fact, kind="not-a-folder", path=path, hint=hint))
    found = _gathered(runs, refused)
    names = _names(found, name, refused)
    tasks = [_task(task_name, folder, found[folder]) for folder, task_name in names.items()]
    if not texts:
        tasks = [replace(task, samples=None, eval_data=None) for task in tasks]
    tasks.sort(key=lambda task: natural_key(task.name))
    return Discovery(tuple(tasks), tuple(_unique(refused)))


def _collect(folder: Folder, root: Path, runs: defaultdict[Path, _Run], refused: list[AdapterRefused]) -> None:
    found = [_Located(known, paths) for known in catalogue.FORMATS for paths in known.find(folder)]
    for located in found:
        home, step = _home(located.paths.place, root)
        first = runs[home].adapters.setdefault(step, located)
        if first.paths != located.paths:
            message = f"step {step} was found already, in {escape(first.paths.place.name, 120)}"
            refused.append(AdapterRefused(message, kind="name-collision", path=located.paths.place))
    # Next to an adapter that is read, the same adapter as a pickle or in shards is not worth a refusal.
    if not found:
        of_no_format = foreign_adapters(folder.files)
        refused.extend(of_no_format or [error for known in catalogue.FORMATS for error in known.refuse(folder)])
    home, step = _home(folder.path, root)
    for name in _NOTES:
        if name in folder.files:
            runs[home].notes.setdefault(name, {}).setdefault(step, folder.files[name])


def _collect_file(file: Path, runs: defaultdict[Path, _Run]) -> bool:
    """Take an adapter that is a single file and was given by its own path; False if no format knows it."""
    if not file.is_file():
        return False
    folder = Folder(file.parent, {file.name: file})
    for known in catalogue.FORMATS:
        for paths in known.find(folder):
            runs[paths.place].adapters[None] = _Located(known, paths)
            return True
    return False


def _home(path: Path, root: Path) -> tuple[Path, int | None]:
    """Return the folder of the run that a folder belongs to, and its step."""
    # `run/checkpoint-80` belongs to `run`. PEFT saves an adapter that is not called "default" one level deeper: so
    # `run/checkpoint-80/NAME` belongs to `run/NAME`, where the same trainer puts the final adapter.
    # The innermost checkpoint-N is the step; the folder given may be one itself, so its own name takes part.
    parts = [root.name, *path.relative_to(root).parts]
    for index in range(len(parts) - 1, -1, -1):
        step = step_of(parts[index])
        if step is not None:
            return root.parent.joinpath(*parts[:index], *parts[index + 1 :]), step
    return path, None


def _gathered(runs: Mapping[Path, _Run], refused: list[AdapterRefused]) -> dict[Path, _Run]:
    """Return the runs that have adapters, each under the folder that its task is named after."""
    # So `rust/final` joins the run `rust` and its checkpoints. Two adapters of one run are not merged.
    places: defaultdict[Path, list[Path]] = defaultdict(list)
    found = {folder: run for folder, run in runs.items() if run.adapters}
    for folder in sorted(found):
        if (home := telling_folder(folder)) != folder:
            places[home].append(folder)
    for home, folders in places.items():
        inner = [found.pop(folder) for folder in folders]
        outer = runs.get(home, _Run())
        # The run's checkpoints and one `final` or `best` folder fit together if no step is there twice.
        if len(inner) == 1 and not outer.adapters.keys() & inner[0].adapters.keys():
            found[home] = outer.joined(inner[0])
            continue
        for folder in folders:
            message = f"{escape(home.name, 120)} has another adapter too: they are not merged"
            hint = "ingest it alone with --name"
            refused.append(AdapterRefused(message, kind="name-collision", path=folder, hint=hint))
    return found


def _names(found: dict[Path, _Run], name: str | None, refused: list[AdapterRefused]) -> dict[Path, str]:
    if name is not None:
        return _given_name(list(found), name)
    by_name: defaultdict[str, list[Path]] = defaultdict(list)
    for folder in sorted(found):
        problem = task_name_problem(name_of(folder))
        if problem is None:
            by_name[name_of(folder).lower()].append(folder)
        else:
            hint = "rename the folder, or ingest it alone with --name"
            refused.append(AdapterRefused(f"cannot name a task: {problem}", kind="name", path=folder, hint=hint))
    for twins in by_name.values():
        for folder in twins if len(twins) > 1 else ():
            message = f"{len(twins)} folders have the name {name_of(folder)}: they are not merged"
            hint = "ingest them one by one with --name"
            refused.append(AdapterRefused(message, kind="name-collision", path=folder, hint=hint))
    return {twins[0]: name_of(twins[0]) for twins in by_name.values() if len(twins) == 1}


def _given_name(folders: list[Path], name: str) -> dict[Path, str]:
    problem = task_name_problem(name)
    if problem is not None:
        raise AdapterRefused(f"--name cannot name a task: {problem}", kind="name")
    if len(folders) != 1:
        hint = "give --name with the folder of one task"
        raise AdapterRefused(f"--name names one task, but {len(folders)} were found", kind="name", hint=hint)
    return {folders[0]: name}


def _task(name: str, folder: Path, run: _Run) -> FoundTask:
    final = _final_step(run)
    steps = sorted(run.adapters, key=_order)
    return FoundTask(
        name=name,
        folder=folder,
        adapters=tuple(_adapter(run.adapters[step], step, is_final=step == final) for step in steps),
        samples=_text(folder, run, SAMPLES_NAMES),
        eval_data=_text(folder, run, EVAL_NAMES),
    )


def _text(folder: Path, run: _Run, names: Sequence[str]) -> Path | None:
    found = (run.note(name) or _next_to(folder, name) for name in names)
    return next((path for path in found if path is not None), None)


def _final_step(run: _Run) -> int | None:
    if None in run.adapters:
        return None
    state = run.note(STATE_NAME)
    best = best_step(state) if state is not None else None
    return best if best in run.adapters else max(run.adapters, key=_order)


def _order(step: int | None) -> tuple[bool, int]:
    """Order steps; an adapter outside a checkpoint comes last, because it was saved when training was over."""
    return (step is None, step or 0)


def _adapter(located: _Located, step: int | None, *, is_final: bool) -> FoundAdapter:
    paths = located.paths
    files = paths.place, paths.weights, paths.config, paths.card
    return FoundAdapter(located.format, *files, step, is_final, paths.companions)


def _next_to(folder: Path, name: str) -> Path | None:
    """Find a text in the run's folder, for the case that only a checkpoint of the run was given."""
    path = folder / name
    return path if path.is_file() and not path.is_symlink() else None


def _unique(refused: list[AdapterRefused]) -> list[AdapterRefused]:
    """Drop duplicates, which come from overlapping paths."""
    met = {(error.path, error.kind): error for error in refused}
    return sorted(met.values(), key=lambda error: (error.path or "", error.kind))
