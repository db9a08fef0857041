"""Give every task that was found a name, so that the same folder gets the same name in every run.

1. A task that the store has keeps its name. It is recognised by its folder, or else by its bytes.
2. Any other task is named after its folder, if no other folder and no task of the store has that name.
3. Otherwise the name of the folder above is put in front, and so on upward, until the name is free.
4. Where that tells nothing, because two lie in one folder (`dog` and `Dog`), the second gets a number: `dog-2`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.discovery.task_names import (
    cached_repository,
    chain_of,
    is_generic,
    name_chain,
    names_above,
    naming_folder,
    plain_name,
    run_folder,
)
from icmlora.formats.peft.config import MAX_CONFIG_BYTES
from icmlora.io.files import hash_open, open_regular, read_regular
from registry.names import escape, source_label

if TYPE_CHECKING:
    from icmlora.formats.discovery.discovery import FoundTask
    from registry.records import TaskOrigin

_NUMBER = re.compile(r"-\d{1,9}$", re.ASCII)


def choose_names(
    tasks: Sequence[FoundTask],
    known: Sequence[TaskOrigin] = (),
    *,
    pattern: NameTemplate | None = None,
    same_name_is_same_task: bool = False,
) -> list[str]:
    """Return a name for each task; no two are the same in any case.

    Args:
        tasks: The tasks that were found.
        known: The tasks of the store.
        pattern: Makes the names instead of the rule; tasks that the store has keep theirs.
        same_name_is_same_task: A task of the store that has the same name is the same task, wherever it came from.
    """
    chains = [name_chain(task.folder, task.part) if pattern is None else pattern.chain(task) for task in tasks]
    names = _Recognised(tasks, chains, known).names()
    if pattern is None:
        _number(tasks, chains, names, known)
    by_name = {origin.name.lower(): origin for origin in known}
    taken = by_name.keys() | {name.lower() for name in names.values()}
    crowded = _crowded(chains, names, known)
    for index in range(len(tasks)):
        first = chains[index][0].lower()
        if index in names or first in crowded or first not in by_name:
            continue
        if same_name_is_same_task and first not in {name.lower() for name in names.values()}:
            names[index] = chains[index][0]
        elif _home_of(by_name[first]) == tasks[index].folder:
            # Another adapter of the same folder has the name, such as `last` before there was a `best`.
            chains[index] = name_chain(tasks[index].folder, tasks[index].part or tasks[index].places[0].name)
        elif _is_newer_snapshot(tasks[index].folder, _home_of(by_name[first])):
            chains[index] = name_chain(tasks[index].folder, tasks[index].folder.name[:7])
    level = 0
    while len(names) < len(tasks):
        proposed = {
            index: chain[min(level, len(chain) - 1)] for index, chain in enumerate(chains) if index not in names
        }
        counts = Counter(name.lower() for name in proposed.values())
        for index, name in proposed.items():
            is_last = level >= len(chains[index])
            if is_last or (
                counts[name.lower()] == 1 and name.lower() not in taken and (level or name.lower() not in crowded)
            ):
                names[index] = name
        taken |= {name.lower() for name in names.values()}
        level += 1
    return [names[index] for index in range(len(tasks))]


def _number(
    tasks: Sequence[FoundTask], chains: list[list[str]], names: dict[int, str], known: Sequence[TaskOrigin]
) -> None:
    """Number new tasks of one folder whose names differ in nothing but case, or in characters that no name has."""
    used = {origin.name.lower() for origin in known}
    homes = {origin.name.lower(): _home_of(origin) for origin in known}
    alike: defaultdict[tuple[Path, str, str], list[int]] = defaultdict(list)
    for index, chain in enumerate(chains):
        if index not in names:
            alike[*_place(tasks[index].folder), chain[0].lower()].append(index)
    for (*place, first), some in alike.items():
        # The one that is called so keeps the name.
        some.sort(key=lambda index: (tasks[index].folder.name != chains[index][0], tasks[index].folder))
        home = homes.get(first)
        is_taken = home is not None and [*_place(home)] == place and home != tasks[some[0]].folder
        free = (f"-{number}" for number in count(2) if f"{first}-{number}" not in used)
        for index in some if is_taken else some[1:]:
            folder = tasks[index].folder
            chains[index] = chain_of(chains[index][0] + next(free), names_above(folder)[1:], folder)


def _place(folder: Path) -> tuple[Path, str]:
    """Return what is equal for folders that lie together and whose names come out alike."""
    return folder.parent, plain_name(folder.name).lower()


def _crowded(chains: Sequence[Sequence[str]], names: dict[int, str], known: Sequence[TaskOrigin]) -> set[str]:
    """Return the short names that several folders have: they are given to none of them."""
    # A task that the user named does not count.
    counted = [
        chain[0].lower()
        for index, chain in enumerate(chains)
        if index not in names or names[index].lower() in map(str.lower, chain)
    ]
    crowded = {name for name, times in Counter(counted).items() if times > 1}
    free = {chains[index][0].lower() for index in range(len(chains)) if index not in names}
    present = {name.lower() for name in names.values()}
    for origin in known:
        name = origin.name.lower()
        if name in present:
            continue
        ends = {name[place + 1 :] for place, letter in enumerate(name) if letter == "-"} & free
        if ends - crowded:
            chain = [item.lower() for item in name_chain(_home_of(origin))]
            crowded |= ends & set(chain[:1]) if name in chain else set()
    return crowded


def _home_of(origin: TaskOrigin) -> Path:
    return naming_folder(run_folder(Path(origin.sources[0]))[0])


def _is_newer_snapshot(folder: Path, other: Path) -> bool:
    repository = cached_repository(folder)
    return repository is not None and repository == cached_repository(other) and folder.parent == other.parent


class _Recognised:
    """Finds the tasks that the store has already."""

    def __init__(
        self, tasks: Sequence[FoundTask], chains: Sequence[Sequence[str]], known: Sequence[TaskOrigin]
    ) -> None:
        self._tasks = tasks
        self._known = {origin.name.lower(): origin for origin in known}
        self._by_source: defaultdict[str, list[TaskOrigin]] = defaultdict(list)
        for origin in known:
            for source in origin.sources:
                self._by_source[source].append(origin)
        # The names under which the store may have the task, the most likely first.
        self._possible = [
            [name.lower() for name in (*chain, *name_chain(task.folder, task.part), *name_chain(task.folder))]
            for task, chain in zip(tasks, chains, strict=True)
            if known
        ]

    def names(self) -> dict[int, str]:
        """Return the names of those that were recognised, by their number."""
        names: dict[int, str] = {}
        claimed: set[str] = set()
        if not self._known:
            return names
        for candidates in (self._of_its_place, self._of_its_name):
            for index in range(len(self._tasks)):
                if index in names:
                    continue
                origin = next((item for item in candidates(index) if item.name not in claimed), None)
                if origin is not None:
                    names[index] = origin.name
                    claimed.add(origin.name)
        return names

    def _of_its_place(self, index: int) -> Iterator[TaskOrigin]:
        """Yield the tasks that came from the same place: under a name of the folder, or with the same bytes."""
        final, *others = map(source_label, self._tasks[index].places)
        met = {origin.name: origin for source in (final, *others) for origin in self._by_source.get(source, ())}
        for origin in sorted(met.values(), key=lambda item: item.sources[0] != final):
            name = origin.name.lower()
            is_possible = name in self._possible[index] or _NUMBER.sub("", name) in self._possible[index]
            if is_possible or _has_bytes_of(self._tasks[index], origin):
                yield origin

    def _of_its_name(self, index: int) -> Iterator[TaskOrigin]:
        """Yield the tasks that came from a place of another path, which is the same folder after a move."""
        for name in dict.fromkeys(self._possible[index]):
            origin = self._known.get(name)
            if origin is not None and _has_bytes_of(self._tasks[index], origin):
                yield origin


def _has_bytes_of(task: FoundTask, origin: TaskOrigin) -> bool:
    weights, config = task.files
    try:
        if (
            config is not None
            and hashlib.sha256(read_regular(config, max_bytes=MAX_CONFIG_BYTES)).hexdigest() != origin.config
        ):
            return False
        with open_regular(weights, max_bytes=2**62) as (descriptor, size):
            return size == origin.weights_size and hash_open(descriptor, size) == origin.weights
    except AdapterRefused:
        return False


_PLACEHOLDER = re.compile(r"\{([a-z]{1,16})(?:([#%])([^{}]{1,64}))?\}")
_MAX_PATTERN = 200


@dataclass(frozen=True)
class NameTemplate:
    """How the user wants tasks to be named, such as `{parent}-{name}`.

    {name}          the folder that the task is named after
    {parent}        the folder above it; {grandparent} the one above that
    {path}          all folders from the one given down to it, joined with "-"
    {name#run-}     without "run-" in front; {name%-lora} without "-lora" at the end

    Folders whose name says nothing (`lora`, `adapter`, `final` ...) are passed over.
    """

    text: str

    def __post_init__(self) -> None:
        rest = _PLACEHOLDER.sub("", self.text)
        unknown = {match[1] for match in _PLACEHOLDER.finditer(self.text)} - set(_FIELDS)
        if len(self.text) > _MAX_PATTERN or unknown or "{" in rest or "}" in rest or rest == self.text:
            message = f"--name-from {escape(self.text, 120)!r} is not a pattern of names"
            hint = f"write text and {', '.join(f'{{{name}}}' for name in _FIELDS)}, as in '{{parent}}-{{name}}'"
            raise AdapterRefused(message, kind="name", hint=hint)

    def chain(self, task: FoundTask) -> list[str]:
        """Return the names that a task can have: the pattern's, then longer ones."""
        above = names_above(task.folder)
        first = _PLACEHOLDER.sub(lambda match: self._value(match, task, above), self.text).strip("-._/ ")
        return chain_of(first.replace("/", "-"), above[1:], task.places[0])

    def _value(self, match: re.Match[str], task: FoundTask, above: Sequence[str]) -> str:
        name, cut, text = match.groups()
        if name == "path":
            inside = task.folder.relative_to(task.root).parts if task.folder.is_relative_to(task.root) else ()
            telling = [part for part in inside if not is_generic(part)] or list(above[:1])
            value = "-".join(telling)
        else:
            level = _FIELDS.index(name)
            value = above[level] if level < len(above) else ""
        if name in ("name", "path") and task.part is not None:
            value = f"{value}-{task.part}"
        if cut is None:
            return value
        return value.removeprefix(text) if cut == "#" else value.removesuffix(text)


_FIELDS = ("name", "parent", "grandparent", "path")
