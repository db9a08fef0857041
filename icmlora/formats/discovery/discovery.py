"""Find adapters under the user's folders, and group them into tasks.

    loras/shakespeare/                       the task "shakespeare"
        adapter_config.json ...              its final adapter
        checkpoint-80/  checkpoint-100/      its checkpoints, steps 80 and 100
        samples.jsonl  eval.jsonl            its texts

If a run has only checkpoints, its final adapter is the checkpoint that the trainer recorded as best, else the last
checkpoint. An adapter in a folder such as `shakespeare/final` belongs to the run `shakespeare`; if a run has several
(`best` and `last`), each is a task. A run with a placeholder instead of its final adapter is skipped: no checkpoint
becomes the final adapter. `task_names.py` and `naming.py` choose task names. This module opens only trainer state,
small files and the first bytes of files. Never imports torch.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats import catalogue
from icmlora.formats.discovery.found import FoundTask
from icmlora.formats.discovery.initial_weights import with_initial_weights
from icmlora.formats.discovery.naming import NameTemplate, choose_names
from icmlora.formats.discovery.placeholder import (
    PLACEHOLDER_NAME,
    FoundPlaceholder,
    Placeholder,
    find_placeholders,
    is_placeholder,
)
from icmlora.formats.discovery.task_names import (
    EVAL_NAMES,
    IMAGES,
    SAMPLES_NAMES,
    STATE_NAME,
    best_step,
    naming_folder,
    run_folder,
)
from icmlora.formats.discovery.tree import Folder, walk
from icmlora.formats.discovery.unsupported import APPLE_DOUBLE, PICKLES, described, foreign_adapters, is_passed_over
from icmlora.formats.format import FoundAdapter
from icmlora.formats.peft.config import MAX_CONFIG_BYTES
from icmlora.formats.peft.peft import CONFIG_NAME, WEIGHTS_NAME
from icmlora.io.files import open_regular, read_exactly, read_regular
from registry.names import natural_key, task_name_problem

if TYPE_CHECKING:
    from icmlora.fleet.ingest.known_tasks import KnownTasks

_NOTES = (*SAMPLES_NAMES, *EVAL_NAMES, STATE_NAME)
_BLOCK = 1 << 20
_LOGS = frozenset({"wandb", "mlruns", "lightning_logs", "tensorboard", "tb_logs", "swanlog"})
"""Folders where experiment trackers keep copies of configurations."""
_REPORTED = frozenset({".safetensors", ".zip"})
"""Suffixes of files to report if no adapter was found."""


@dataclass(frozen=True)
class Discovery:
    """Contents of the user's folders: tasks in natural order of names, refusals in order of paths."""

    tasks: tuple[FoundTask, ...]
    refused: tuple[AdapterRefused, ...]
    stand_ins: tuple[SkippedPlaceholder, ...] = ()  # in order of paths


@dataclass(frozen=True)
class SkippedPlaceholder:
    """A placeholder, and how many adapters of its run are skipped because of it."""

    path: Path
    placeholder: Placeholder
    passed_over: int


@dataclass
class _Run:
    """The files of one task found so far; keys are steps, None outside checkpoints."""

    root: Path = field(default_factory=Path)
    adapters: dict[int | None, FoundAdapter] = field(default_factory=dict)
    notes: dict[str, dict[int | None, Path]] = field(default_factory=dict)
    not_kept: list[Path] = field(default_factory=list)
    part: str | None = None
    placeholders: dict[Path, FoundPlaceholder] = field(default_factory=dict)  # by path

    @property
    def is_away(self) -> bool:
        """Whether a placeholder replaces its final adapter."""
        return None not in self.adapters and any(found.may_be_final for found in self.placeholders.values())

    def note(self, name: str) -> Path | None:
        """Return a file next to the adapters: the run's own, else from the last checkpoint that has it."""
        places = self.notes.get(name, {})
        return places[max(places, key=_order)] if places else None

    def joined(self, inner: _Run) -> _Run:
        """Return this run with a subfolder's files; notes of the subfolder take precedence."""
        notes = {name: self.notes.get(name, {}) | inner.notes.get(name, {}) for name in self.notes | inner.notes}
        not_kept = [*self.not_kept, *inner.not_kept]
        placeholders = self.placeholders | inner.placeholders
        return _Run(inner.root, self.adapters | inner.adapters, notes, not_kept, placeholders=placeholders)

    def stand_ins(self) -> Iterator[SkippedPlaceholder]:
        """Yield its readable placeholders; skipped adapters count for the first that may be final."""
        left = len(self.adapters) if self.is_away else 0
        for path, found in self.placeholders.items():
            if isinstance(found.content, Placeholder):
                yield SkippedPlaceholder(path, found.content, left if found.may_be_final else 0)
                left = 0 if found.may_be_final else left


def find_adapters(paths: Sequence[Path], *, name: str | None = None, texts: bool = True) -> Discovery:
    """Find and name every adapter under some folders, and report refused ones."""
    found = find_tasks(paths, texts=texts)
    return replace(found, tasks=name_tasks(found.tasks, name=name))


def find_tasks(
    paths: Sequence[Path], *, texts: bool = True, read_bin: bool = False, initial: Path | None = None
) -> Discovery:
    """Find every adapter like `find_adapters`, without naming the tasks.

    Args:
        paths: Folders, or files of single-file formats.
        texts: Also find samples and held-out texts.
        read_bin: Accept weights in a pickle.
        initial: A folder with the initial weights of adapters; searched for by default.
    """
    # Refused: unknown formats, and links out of the tree.
    refused: list[AdapterRefused] = []
    runs: defaultdict[Path, _Run] = defaultdict(_Run)
    watched = {PLACEHOLDER_NAME, *_NOTES} if texts else {PLACEHOLDER_NAME, STATE_NAME}
    watched = watched.union(*(known.watched for known in catalogue.FORMATS), PICKLES if read_bin else ())
    for path in paths:
        root = Path(os.path.realpath(path))
        if root.is_dir():
            for folder in walk(root, watched, refused.append):
                _collect(with_pickle(folder) if read_bin else folder, root, runs, refused)
        elif root.is_file():
            if not _collect_file(root, runs):
                refused.append(described(root))
        else:
            fact = "is neither a folder nor a file" if root.exists() else "does not exist"
            hint = "specify a folder of adapters, or a file"
            refused.append(AdapterRefused(fact, kind="not-a-folder", path=path, hint=hint))
    gathered = _gathered(runs)
    tasks = [_task(folder, run) for folder, run in gathered if run.adapters and not run.is_away]
    if not texts:
        tasks = [replace(task, samples=None, eval_data=None) for task in tasks]
    tasks = with_initial_weights(tasks, initial)
    stand_ins = sorted((item for _, run in gathered for item in run.stand_ins()), key=lambda item: item.path)
    unique = {(error.path, error.kind): error for error in refused}.values()  # paths may overlap
    in_order = sorted(unique, key=lambda error: (error.path or "", error.kind))
    return Discovery(tuple(tasks), tuple(in_order), tuple(stand_ins))


def no_adapter(paths: Sequence[Path]) -> AdapterRefused:
    """Return the refusal for folders without adapters, naming a file found instead."""
    folders = (folder for path in paths for folder in walk(path, (), lambda refusal: None))
    files = (file for folder in folders for file in folder.files.values())
    first = next((file for file in files if file.suffix.lower() in _REPORTED), None)
    if first is None:
        hint = "specify a folder that contains adapter_config.json and adapter_model.safetensors, or a file"
        where = ", ".join(map(str, paths))
        return AdapterRefused("no adapter was found", kind="nothing-found", path=where or None, hint=hint)
    found = described(first)
    return type(found)(f"no adapter was found: this is {found.message}", kind=found.kind, path=first, hint=found.hint)


def name_tasks(
    tasks: Sequence[FoundTask],
    *,
    name: str | None = None,
    known: KnownTasks | None = None,
    pattern: NameTemplate | None = None,
    same_name_is_same_task: bool = False,
) -> tuple[FoundTask, ...]:
    """Return the tasks with their names, in natural order; see `naming.choose_names`."""
    if name is not None:
        name = unicodedata.normalize("NFC", name)
        problem = task_name_problem(name)
        if problem is not None:
            raise AdapterRefused(f"--name is not a valid task name: {problem}", kind="name")
        if len(tasks) != 1:
            hint = "use --name with the folder of one task, or use --name-from"
            raise AdapterRefused(f"--name names one task, but {len(tasks)} were found", kind="name", hint=hint)
        names = [name]
    else:
        names = choose_names(tasks, known, pattern=pattern, same_name_is_same_task=same_name_is_same_task)
    named = [replace(task, name=chosen) for task, chosen in zip(tasks, names, strict=True)]
    return tuple(sorted(named, key=lambda task: natural_key(task.name)))


def _collect(folder: Folder, root: Path, runs: defaultdict[Path, _Run], refused: list[AdapterRefused]) -> None:
    # The user's folder may be a checkpoint itself, so include its own name.
    levels = 1 + len(folder.path.relative_to(root).parts)
    found = (adapter for known in catalogue.FORMATS for adapter in known.find(folder))
    adapters = [replace(adapter, pickle=folder.pickle) for adapter in found]
    homes = [run_folder(one.place, levels) if one.run is None else (one.run, one.step) for one in adapters]
    for adapter, (home, step) in zip(adapters, homes, strict=True):
        run = runs[home]
        run.root = root
        first = run.adapters.setdefault(step, adapter)
        if first.files != adapter.files and not _is_copy(first, adapter):
            # `checkpoint-5` next to `epoch_5`, or `checkpoint-05`.
            apart = runs[adapter.place]
            apart.root, apart.part = root, adapter.place.name
            apart.adapters[step] = adapter
    away = _collect_placeholders(folder, {adapter.place for adapter in adapters}, levels, root, runs, refused)
    kept = {path for adapter in adapters for path in adapter.files}
    # Do not refuse a copy as a pickle or in shards next to a folder's adapter.
    if not away and all(adapter.place != folder.path for adapter in adapters):
        of_no_format = foreign_adapters({name: path for name, path in folder.files.items() if path not in kept})
        refused.extend(of_no_format)
        if not adapters and not of_no_format and _LOGS.isdisjoint(folder.path.relative_to(root).parts):
            refused.extend(error for known in catalogue.FORMATS for error in known.refuse(folder))
    home, step = run_folder(folder.path, levels)
    for name in _NOTES:
        if name in folder.files:
            runs[home].notes.setdefault(name, {}).setdefault(step, folder.files[name])
    if adapters:
        kept.update(folder.files[name] for name in _NOTES if name in folder.files)
        others = [folder.path / name for name, path in folder.files.items() if path not in kept]
        owner = runs[home] if runs[home].adapters else runs[homes[0][0]]
        met = set(owner.not_kept)
        owner.not_kept.extend(
            path
            for path in others
            if path not in met and not is_placeholder(path.name) and not is_passed_over(path.name)
        )


def _collect_placeholders(
    folder: Folder,
    adapters: Collection[Path],
    levels: int,
    root: Path,
    runs: defaultdict[Path, _Run],
    refused: list[AdapterRefused],
) -> bool:
    """Collect the placeholders of a folder whose adapters are gone; return whether there are any."""
    away = [found for found in find_placeholders(folder) if found.place not in adapters]
    for found in away:
        run = runs[run_folder(found.place, levels)[0]]
        run.root, run.placeholders[found.path] = root, found
        if isinstance(found.content, AdapterRefused):
            refused.append(found.content)
    return bool(away)


def with_pickle(folder: Folder) -> Folder:
    """List a pickle as the weights of a folder with a configuration and no other weights."""
    pickle = next((name for name in PICKLES if name in folder.files), None)
    if pickle is None or WEIGHTS_NAME in folder.files or CONFIG_NAME not in folder.files:
        return folder
    return Folder(folder.path, {**folder.files, WEIGHTS_NAME: folder.files[pickle]}, pickle)


def _collect_file(file: Path, runs: defaultdict[Path, _Run]) -> bool:
    """Collect an adapter given as a single file; return False if no format recognises it."""
    if file.name.startswith(APPLE_DOUBLE):
        return False
    folder = Folder(file.parent, {file.name: file})
    for known in catalogue.FORMATS:
        for adapter in known.find(folder):
            runs[adapter.place].adapters[None] = adapter
            return True
    return False


def _gathered(runs: Mapping[Path, _Run]) -> list[tuple[Path, _Run]]:
    """Return the runs with adapters or placeholders, each with the folder that its task is named after."""
    # So `rust/final` and `rust/output/checkpoint-5` join the run `rust`. Folders that do not fit remain separate tasks.
    places: defaultdict[Path, list[Path]] = defaultdict(list)
    found = {folder: run for folder, run in runs.items() if run.adapters or run.placeholders}
    for folder, run in sorted(found.items()):
        places[naming_folder(folder.parent if run.part is not None else folder)].append(folder)
    gathered: list[tuple[Path, _Run]] = []
    for home, folders in places.items():
        outer = runs.get(home, _Run())
        main = replace(outer, adapters={}, not_kept=[], placeholders={})
        for folder in sorted(folders, key=lambda folder: _rank(folder, home)):
            # Drop adapters that `main` has byte for byte: trainers save the last adapter twice.
            run, known = found[folder], main.adapters
            own = {
                step: one for step, one in run.adapters.items() if step not in known or not _is_copy(known[step], one)
            }
            run = replace(run, adapters=own)
            if not _fit(main, run):
                part = run.part or "-".join(folder.relative_to(home).parts)
                notes = _Run(notes=outer.notes).joined(run).notes
                gathered.append((home, replace(run, notes=notes, part=part)))
            elif run.adapters or run.placeholders:
                main = main.joined(run)
        gathered.append((home, main))
    return gathered


def _rank(folder: Path, home: Path) -> tuple[int, str]:
    """Rank the folders of one run: the first with an adapter outside its checkpoints has the final adapter."""
    if folder == home:
        return 0, ""
    words = set(folder.name.lower().replace("-", "_").split("_"))
    if words & {"best", "final"}:
        return (1 if "best" in words else 2), str(folder)
    return (4 if words & {"last", "latest"} else 3), str(folder)


def _fit(run: _Run, other: _Run) -> bool:
    """Return whether two folders can be one run: disjoint steps and one base model."""
    if run.adapters.keys() & other.adapters.keys():
        return False
    if not run.adapters or not other.adapters:
        return True
    first, second = (_base_of(next(iter(some.adapters.values()))) for some in (run, other))
    return first is None or second is None or first == second


def _base_of(adapter: FoundAdapter) -> str | None:
    if adapter.config is None:
        return None
    try:
        return adapter.format.read_config(read_regular(adapter.config, max_bytes=MAX_CONFIG_BYTES)).base_model
    except AdapterRefused:
        return None


def _is_copy(first: FoundAdapter, second: FoundAdapter) -> bool:
    pairs = [(first.weights, second.weights), (first.config, second.config)]
    return all(
        one == other or (one is not None and other is not None and _same_bytes(one, other)) for one, other in pairs
    )


def _same_bytes(one: Path, other: Path) -> bool:
    try:
        with (
            open_regular(one, max_bytes=2**62) as (first, size),
            open_regular(other, max_bytes=2**62) as (second, other_size),
        ):
            if size != other_size:
                return False
            return all(
                read_exactly(first, min(_BLOCK, size - start), start)
                == read_exactly(second, min(_BLOCK, size - start), start)
                for start in range(0, size, _BLOCK)
            )
    except AdapterRefused:
        return False


def _task(folder: Path, run: _Run) -> FoundTask:
    steps = sorted(run.adapters, key=_order)
    final = steps[-1]
    if final is not None:
        state = run.note(STATE_NAME)
        best = best_step(state) if state is not None else None
        final = best if best in run.adapters else final
    return FoundTask(
        name="",
        folder=folder,
        adapters=tuple(replace(run.adapters[step], step=step, is_final=step == final) for step in steps),
        samples=_text(folder, run, SAMPLES_NAMES),
        eval_data=_text(folder, run, EVAL_NAMES),
        part=run.part,
        root=run.root,
        not_kept=tuple(sorted(run.not_kept)),
    )


def _text(folder: Path, run: _Run, names: Sequence[str]) -> Path | None:
    for name in names:
        beside = folder / name  # not among the notes if the user gave only a checkpoint
        if (path := run.note(name)) is not None:
            return path
        if beside.is_file() and not beside.is_symlink():
            return beside
    images = folder / names[0].partition(".")[0]  # examples in the `imagefolder` convention
    if not images.is_dir() or images.is_symlink():
        return None
    is_one = (images / "metadata.jsonl").is_file() or any(path.suffix.lower() in IMAGES for path in images.glob("*/*"))
    return images if is_one else None


def _order(step: int | None) -> tuple[bool, int]:
    """Return a sort key for steps; an adapter outside a checkpoint comes last, saved at the end of training."""
    return (step is None, step or 0)
