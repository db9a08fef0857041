"""Adapters in other forms than a PEFT folder: recognised by name or by a few bytes, and refused with the way out.

A trainer's own state (optimizer, scheduler, random numbers, arguments) and whole models are no adapters: they are
passed over in silence, unopened.

Find adapters under the folders a user gives, and make tasks of them.

    loras/shakespeare/                       the task "shakespeare"
        adapter_config.json ...              its final adapter
        checkpoint-80/  checkpoint-100/      its checkpoints, steps 80 and 100
        samples.jsonl  eval.jsonl            its texts

A run without an adapter of its own has its best checkpoint as final adapter if the trainer noted which one that is,
else its last. What a folder such as `shakespeare/final` holds is the run's own: see `icmlora.run_names`. Nothing is
opened here but the notes of a trainer and the first bytes of files in other dialects.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.tree import (
    CARD_NAME,
    CONFIG_NAME,
    EVAL_NAME,
    SAMPLES_NAME,
    STATE_NAME,
    WEIGHTS_NAME,
    Folder,
    best_step,
    name_of,
    step_of,
    telling_folder,
    walk,
)
from icmlora.io.files import open_regular, read_exactly
from registry.names import natural_key, printable, task_name_problem

_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors|adapter_model\.safetensors\.index\.json")
_PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|nemo|pth\.lora)")
_NOT_ADAPTERS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|pytorch_model|consolidated|mp_rank|zero_|bf16_zero_).*"
    r"|model[-.0-9a-z]*\.(bin|pt|pth|ckpt)"
)

_LITGPT = "merge it with 'litgpt merge_lora' and extract a LoRA, or train with PEFT"
_RESAVE = "re-save the adapter as safetensors where it was trained"
_BARE = "put the adapter_config.json that it was trained with beside it"
_TO_PEFT = "convert it to a PEFT folder first"

# Exact names that tell a dialect: kind, what it is, what to do.
_NAMES: Mapping[str, tuple[str, str, str]] = {
    "adapters.safetensors": ("mlx", "an MLX-LM adapter", _TO_PEFT),
    "pytorch_lora_weights.safetensors": ("diffusers", "a diffusers LoRA", _TO_PEFT),
    "adapter_model.safetensors": ("bare", "adapter weights without adapter_config.json: alpha is unknown", _BARE),
    "latest_checkpointed_iteration.txt": ("megatron", "a Megatron run", "use AutoBridge.export_adapter_ckpt"),
}

# Marks in the header of a safetensors file of any other name.
_MARKS: tuple[tuple[bytes, tuple[str, str, str]], ...] = (
    (rb'\.(hada_w1_a|lokr_w1(_a)?|oft_blocks)"', ("lycoris", "a LyCORIS adapter", _TO_PEFT)),
    (rb'\.lora_(down|up)\.weight"', ("kohya", "a kohya LoRA", "convert it with diffusers, then save with PEFT")),
    (rb'\.lora_[ab]"', ("mlx", "an MLX-LM adapter", _TO_PEFT)),
    (rb'\.lora_[AB]\.weight"', ("bare", "LoRA weights without adapter_config.json: alpha is unknown", _BARE)),
)
_PEEK_BYTES = 1024 * 1024
_GGUF_ADAPTER = b"general.type" + (8).to_bytes(4, "little") + (7).to_bytes(8, "little") + b"adapter"


def foreign_adapters(files: Mapping[str, Path], *, has_config: bool) -> list[AdapterRefused]:
    """Return a refusal for each adapter in a folder that is not in PEFT's form.

    Args:
        files: Name to path of the regular files of a folder that lacks `adapter_config.json` or the weights.
        has_config: Whether `adapter_config.json` is there, so that only the weights are wrong or missing.
    """
    found = [refusal for name, path in sorted(files.items()) if (refusal := _foreign(name, path)) is not None]
    if has_config and not found:
        path = files["adapter_config.json"].parent
        hint = "copy adapter_model.safetensors beside adapter_config.json"
        found.append(AdapterRefused("no adapter_model.safetensors", kind="no-weights", path=path, hint=hint))
    return found


def _foreign(name: str, path: Path) -> AdapterRefused | None:
    if name in _NAMES:
        return _refusal(_NAMES[name], path)
    if _SHARD.fullmatch(name):
        return _refusal(("shards", "an adapter in several files", "join them: load it with PEFT and save it"), path)
    if _PICKLE.fullmatch(name) and not _NOT_ADAPTERS.fullmatch(name):
        hint = _LITGPT if name.endswith(".pth.lora") else _RESAVE
        return UnsafeInput("a pickle, which could run code: it was not opened", kind="pickle", path=path, hint=hint)
    if name.endswith(".gguf"):
        if _GGUF_ADAPTER in _peek(path, 64 * 1024):
            return _refusal(("gguf", "a llama.cpp adapter", "give the PEFT folder it was made from"), path)
    elif name.endswith(".safetensors"):
        head = _peek(path, _PEEK_BYTES)
        header = head[8 : 8 + int.from_bytes(head[:8], "little")]
        return next((_refusal(facts, path) for mark, facts in _MARKS if re.search(mark, header)), None)
    return None


def _refusal(facts: tuple[str, str, str], path: Path) -> AdapterRefused:
    kind, what, hint = facts
    return AdapterRefused(f"{what}: this form is not read", kind=kind, path=path, hint=hint)


def _peek(path: Path, size: int) -> bytes:
    """Read the start of a file; empty if it cannot be read, because it may be nothing of ours."""
    try:
        with open_regular(path, max_bytes=2**62) as (descriptor, length):
            return read_exactly(descriptor, min(size, length), 0)
    except AdapterRefused:
        return b""


_WATCHED = frozenset({CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, STATE_NAME})
_TEXTS = frozenset({SAMPLES_NAME, EVAL_NAME})


@dataclass(frozen=True)
class FoundAdapter:
    """One adapter on disk; the paths lead to regular files.

    Attributes:
        folder: Where it is.
        config: Its `adapter_config.json`.
        weights: Its `adapter_model.safetensors`.
        card: Its README.md, or None.
        step: The training step of a checkpoint, or None for a folder that is no checkpoint.
        is_final: Whether this is *the* adapter of its task; true for exactly one.
    """

    folder: Path
    config: Path
    weights: Path
    card: Path | None
    step: int | None
    is_final: bool


@dataclass(frozen=True)
class FoundTask:
    """A task: its final adapter, its checkpoints, and the texts beside them.

    Attributes:
        name: A valid task name, as `icmlora.run_names` finds it.
        folder: The folder of the run.
        adapters: In order of steps; an adapter that is no checkpoint comes last.
        samples: `samples.jsonl`, or None.
        eval_data: `eval.jsonl`, or None.
    """

    name: str
    folder: Path
    adapters: tuple[FoundAdapter, ...]
    samples: Path | None
    eval_data: Path | None

    @property
    def final(self) -> FoundAdapter:
        """The adapter that stands for the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


@dataclass(frozen=True)
class Discovery:
    """What lies under the folders given: tasks in natural order of names, refusals in order of paths."""

    tasks: tuple[FoundTask, ...]
    refused: tuple[AdapterRefused, ...]


@dataclass
class _Run:
    """What was met of one task so far: step (None: no checkpoint) to folder."""

    adapters: dict[int | None, Folder] = field(default_factory=dict)
    notes: dict[str, dict[int | None, Path]] = field(default_factory=dict)

    def note(self, name: str) -> Path | None:
        """Return a file beside the adapters: the run's own, else the one in its last checkpoint that has it."""
        places = self.notes.get(name, {})
        return places[max(places, key=_order)] if places else None

    def joined(self, inner: _Run) -> _Run:
        """Return this run with what a folder in it has; of two notes of one kind, that folder's counts."""
        notes = {name: self.notes.get(name, {}) | inner.notes.get(name, {}) for name in self.notes | inner.notes}
        return _Run(self.adapters | inner.adapters, notes)


def find_adapters(paths: Sequence[Path], *, name: str | None = None, texts: bool = True) -> Discovery:
    """Find every adapter under some folders.

    Args:
        paths: Folders: adapters, runs, checkpoints, or folders of those at any depth.
        name: A name for the task, instead of its folder's; for exactly one task.
        texts: Find the texts beside them too.

    Returns:
        Tasks, and everything that looks like an adapter but is not taken: other dialects, links out of the tree,
        names that cannot be a task's, and folders of one name (which are not merged).

    Raises:
        AdapterRefused: `name` is no task name, or there is not exactly one task to give it to.
        UnsafeInput: More than a million files.
    """
    refused: list[AdapterRefused] = []
    runs: defaultdict[Path, _Run] = defaultdict(_Run)
    watched = _WATCHED | _TEXTS if texts else _WATCHED
    for path in paths:
        root = Path(os.path.realpath(path))
        if root.is_dir():
            for folder in walk(root, watched, refused.append):
                _collect(folder, root, runs, refused)
        else:
            fact = "is no folder" if root.exists() else "does not exist"
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
    home, step = _home(folder.path, root)
    run = runs[home]
    if CONFIG_NAME in folder.files and WEIGHTS_NAME in folder.files:
        known = run.adapters.setdefault(step, folder)
        if known.path != folder.path:
            message = f"step {step} again, which {known.path.name} has already"
            refused.append(AdapterRefused(message, kind="name-collision", path=folder.path))
            return
    else:
        refused.extend(foreign_adapters(folder.files, has_config=CONFIG_NAME in folder.files))
    for name in (SAMPLES_NAME, EVAL_NAME, STATE_NAME):
        if name in folder.files:
            run.notes.setdefault(name, {})[step] = folder.files[name]


def _home(path: Path, root: Path) -> tuple[Path, int | None]:
    """Return the folder of the run that a folder belongs to, and its step.

    `run/checkpoint-80` belongs to `run`. PEFT saves an adapter that is not called "default" one level deeper: so
    `run/checkpoint-80/NAME` belongs to `run/NAME`, where the same trainer puts the final adapter.
    """
    parts = [root.name, *path.relative_to(root).parts]
    for index in range(len(parts) - 1, -1, -1):
        step = step_of(parts[index])
        if step is not None:
            return root.parent.joinpath(*parts[:index], *parts[index + 1 :]), step
    return path, None


def _gathered(runs: Mapping[Path, _Run], refused: list[AdapterRefused]) -> dict[Path, _Run]:
    """Return the runs that have adapters, each under the folder that its task is called by.

    So `rust/final` is the run `rust`, beside the checkpoints that lie there. Two adapters of a run are not merged.
    """
    places: defaultdict[Path, list[Path]] = defaultdict(list)
    found = {folder: run for folder, run in runs.items() if run.adapters}
    for folder in sorted(found):
        if (home := telling_folder(folder)) != folder:
            places[home].append(folder)
    for home, folders in places.items():
        inner = [found.pop(folder) for folder in folders]
        outer = runs.get(home, _Run())
        if len(inner) == 1 and not outer.adapters.keys() & inner[0].adapters.keys():
            found[home] = outer.joined(inner[0])
            continue
        for folder in folders:
            message = f"{printable(home.name)} has another adapter than this one: they are not merged"
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
            message = f"{len(twins)} folders are called {name_of(folder)}: they are not merged"
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
        samples=run.note(SAMPLES_NAME) or _beside(folder, SAMPLES_NAME),
        eval_data=run.note(EVAL_NAME) or _beside(folder, EVAL_NAME),
    )


def _final_step(run: _Run) -> int | None:
    if None in run.adapters:
        return None
    state = run.note(STATE_NAME)
    best = best_step(state) if state is not None else None
    return best if best in run.adapters else max(run.adapters, key=_order)


def _order(step: int | None) -> tuple[bool, int]:
    """Order steps; what is no checkpoint comes last, because it was saved when training was over."""
    return (step is None, step or 0)


def _adapter(folder: Folder, step: int | None, *, is_final: bool) -> FoundAdapter:
    files = folder.files
    return FoundAdapter(folder.path, files[CONFIG_NAME], files[WEIGHTS_NAME], files.get(CARD_NAME), step, is_final)


def _beside(folder: Path, name: str) -> Path | None:
    """Find a text in the run's folder when only a checkpoint of the run was given."""
    path = folder / name
    return path if path.is_file() and not path.is_symlink() else None


def _unique(refused: list[AdapterRefused]) -> list[AdapterRefused]:
    """Drop what was met twice because the paths given overlap."""
    met = {(error.path, error.kind): error for error in refused}
    return sorted(met.values(), key=lambda error: (error.path or "", error.kind))
