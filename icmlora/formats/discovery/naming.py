"""Name every task; a folder gets the same name in every run.

1. A task in the store keeps its name. It is recognised by its folder, or else by its bytes.
2. Any other task is named after its folder, if no other folder and no task in the store has that name.
3. Otherwise the parent folder's name is prepended, and so on upward, until the name is free.
4. If two tasks share that folder (`dog` and `Dog`), the second gets a number: `dog-2`.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from registry.names import escape, folder_of, source_label

if TYPE_CHECKING:
    from icmlora.fleet.ingest.known_tasks import KnownTasks
    from icmlora.formats.discovery.found import FoundTask
    from registry.manifests import Task
    from registry.tables import TaskRow

_NUMBER = re.compile(r"-\d{1,9}$", re.ASCII)


def choose_names(
    tasks: Sequence[FoundTask],
    known: KnownTasks | None = None,
    *,
    pattern: NameTemplate | None = None,
    same_name_is_same_task: bool = False,
) -> list[str]:
    """Return a name for each task; names are unique ignoring case.

    Args:
        tasks: The tasks.
        known: The tasks in the store; None if there is no store.
        pattern: Pattern for new names, instead of the rule; tasks in the store keep their names.
        same_name_is_same_task: Treat a task in the store with the same name as the same task, from any folder.
    """
    own = [name_chain(task.folder, task.part) for task in tasks]
    chains = [*own] if pattern is None else list(map(pattern.chain, tasks))
    names = {} if known is None else _Recognised(tasks, chains, own, known).names()
    if pattern is None:
        _number(tasks, chains, names, known)
    crowded = _crowded(chains, names, known)
    by_name = _named(known, (chains[index][0] for index in range(len(tasks)) if index not in names))
    for index in range(len(tasks)):
        first = chains[index][0].lower()
        if index in names or first in crowded or first not in by_name:
            continue
        home = _home_of(by_name[first].source)
        if same_name_is_same_task and first not in {name.lower() for name in names.values()}:
            names[index] = chains[index][0]
        elif home == tasks[index].folder:
            # Another adapter of the same folder has the name: `last` was ingested before `best` existed.
            chains[index] = name_chain(tasks[index].folder, tasks[index].part or tasks[index].places[0].name)
        elif _is_newer_snapshot(tasks[index].folder, home):
            chains[index] = name_chain(tasks[index].folder, tasks[index].folder.name[:7])
    possible = (name for index, chain in enumerate(chains) if index not in names for name in chain)
    taken = _named(known, possible).keys() | {name.lower() for name in names.values()}
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


def _named(known: KnownTasks | None, names: Iterable[str]) -> Mapping[str, TaskRow]:
    return {} if known is None else known.named(names)


def _number(
    tasks: Sequence[FoundTask], chains: list[list[str]], names: dict[int, str], known: KnownTasks | None
) -> None:
    """Number new tasks of one folder whose names differ only in case or in invalid characters."""
    alike: defaultdict[tuple[Path, str, str], list[int]] = defaultdict(list)
    for index, chain in enumerate(chains):
        if index not in names:
            alike[*_place(tasks[index].folder), chain[0].lower()].append(index)
    by_name = _named(known, (first for *_, first in alike))
    counts: defaultdict[str, int] = defaultdict(int)
    for (*place, first), some in alike.items():
        # A folder of exactly this name keeps it.
        some.sort(key=lambda index: (tasks[index].folder.name != chains[index][0], tasks[index].folder))
        home = _home_of(by_name[first].source) if first in by_name else None
        if home is None or [*_place(home)] != place or home == tasks[some[0]].folder:
            del some[0]
        counts[first] = max(counts[first], len(some))
    free = _free_ends(counts, known)
    for (*_, first), some in alike.items():
        for index, end in zip(some, free[first], strict=False):
            folder = tasks[index].folder
            chains[index] = chain_of(chains[index][0] + end, names_above(folder)[1:], folder)


def _free_ends(counts: Mapping[str, int], known: KnownTasks | None) -> dict[str, list[str]]:
    """Return for each name at least `counts` of the suffixes `-2`, `-3` ... that are unused in the store."""
    free: dict[str, list[str]] = {name: [] for name in counts}
    start = 2
    while short := [name for name, count in counts.items() if len(free[name]) < count]:
        ends = [f"-{number}" for number in range(start, 2 * start)]
        used = _named(known, (name + end for name in short for end in ends))
        for name in short:
            free[name] += [end for end in ends if name + end not in used]
        start *= 2
    return free


def _place(folder: Path) -> tuple[Path, str]:
    """Return a key that is equal for siblings whose names yield the same task name."""
    return folder.parent, plain_name(folder.name).lower()


def _crowded(chains: Sequence[Sequence[str]], names: dict[int, str], known: KnownTasks | None) -> set[str]:
    """Return the short names that several folders share: no task gets one of them."""
    # Tasks with a name from the user do not count.
    counted = [
        chain[0].lower()
        for index, chain in enumerate(chains)
        if index not in names or names[index].lower() in map(str.lower, chain)
    ]
    crowded = {name for name, times in Counter(counted).items() if times > 1}
    free = {chains[index][0].lower() for index in range(len(chains)) if index not in names} - crowded
    if known is None or not free:
        return crowded
    present = {name.lower() for name in names.values()}
    # A task in the store counts too if its folder has the short name and the task a longer name.
    for row in known.ending_with(free):
        name = row.name.lower()
        if name not in present:
            first, *others = map(str.lower, name_chain(_home_of(row.source)))
            if first in free and name in others and name.endswith(f"-{first}"):
                crowded.add(first)
    return crowded


def _home_of(place: str) -> Path:
    return naming_folder(run_folder(Path(place))[0])


def _is_newer_snapshot(folder: Path, other: Path) -> bool:
    repository = cached_repository(folder)
    return repository is not None and repository == cached_repository(other) and folder.parent == other.parent


class _Recognised:
    """Finds tasks that are already in the store."""

    def __init__(
        self,
        tasks: Sequence[FoundTask],
        chains: Sequence[Sequence[str]],
        own: Sequence[Sequence[str]],
        known: KnownTasks,
    ) -> None:
        self._tasks, self._known = tasks, known
        # Possible names of the task in the store, most likely first.
        self._possible: list[list[str]] = []
        for task, chain, names in zip(tasks, chains, own, strict=True):
            without_part = [] if task.part is None else name_chain(task.folder)
            self._possible.append(list(dict.fromkeys(map(str.lower, (*chain, *names, *without_part)))))
        self._names: dict[int, str] = {}

    def names(self) -> dict[int, str]:
        """Return the names of the recognised tasks by index."""
        folders = self._known.in_folders(folder for task in self._tasks for folder in _folders_of(task))
        self._claim(lambda index: self._of_its_folder(index, folders))
        left = (name for index, names in enumerate(self._possible) if index not in self._names for name in names)
        by_name = self._known.named(left)
        self._claim(lambda index: self._of_its_name(index, by_name))
        return self._names

    def _claim(self, candidates: Callable[[int], Iterator[str]]) -> None:
        """Assign its first unclaimed candidate to each unnamed task."""
        claimed = set(self._names.values())
        for index in range(len(self._tasks)):
            if index not in self._names:
                name = next((item for item in candidates(index) if item not in claimed), None)
                if name is not None:
                    self._names[index] = name
                    claimed.add(name)

    def _of_its_folder(self, index: int, by_folder: Mapping[str, Sequence[TaskRow]]) -> Iterator[str]:
        """Yield tasks with an adapter from the same place, and either a name of the folder or the same bytes."""
        task = self._tasks[index]
        final, places = source_label(task.final.place), _places_of(task)
        rows = {row.name: row for folder in _folders_of(task) for row in by_folder.get(folder, ())}
        for row in sorted(rows.values(), key=lambda row: row.source != final):
            name = row.name.lower()
            is_possible = name in self._possible[index] or _NUMBER.sub("", name) in self._possible[index]
            if is_possible and row.source in places:
                yield row.name
                continue
            known = self._known.task(row)
            if known is not None and places & _sources(known) and (is_possible or _has_bytes_of(task, known)):
                yield row.name

    def _of_its_name(self, index: int, by_name: Mapping[str, TaskRow]) -> Iterator[str]:
        """Yield tasks of a possible name with the same bytes (a moved folder) or an adapter from the same place."""
        task = self._tasks[index]
        for row in (by_name[name] for name in self._possible[index] if name in by_name):
            known = self._known.task(row)
            if known is not None and (_has_bytes_of(task, known) or _places_of(task) & _sources(known)):
                yield row.name


def _places_of(task: FoundTask) -> set[str]:
    return set(map(source_label, task.places))


def _folders_of(task: FoundTask) -> set[str]:
    """Return the folders that a task in the store with one of these adapters may have come from."""
    places = _places_of(task)
    runs = (source_label(run_folder(place)[0]) for place in task.places)
    return {*places, *map(folder_of, places), *runs}


def _sources(known: Task) -> set[str]:
    return {adapter.source for adapter in known.adapters}


def _has_bytes_of(task: FoundTask, known: Task) -> bool:
    weights, config = task.files
    try:
        if config is not None:
            data = read_regular(config, max_bytes=MAX_CONFIG_BYTES)
            if hashlib.sha256(data).hexdigest() != known.final.config:
                return False
        with open_regular(weights, max_bytes=2**62) as (descriptor, size):
            return size == known.final.weights.size and hash_open(descriptor, size) == known.final.weights
    except AdapterRefused:
        return False


_PLACEHOLDER = re.compile(r"\{([a-z]{1,16})(?:([#%])([^{}]{1,64}))?\}")
_MAX_PATTERN = 200


@dataclass(frozen=True)
class NameTemplate:
    """A pattern for the names of tasks, such as `{parent}-{name}`.

    {name}          the folder that the task is named after
    {parent}        its parent folder; {grandparent} the parent of that folder
    {path}          all folders from the user's folder down to it, joined with "-"
    {name#run-}     without the prefix "run-"; {name%-lora} without the suffix "-lora"

    Folders with a generic name (`lora`, `adapter`, `final` ...) are skipped.
    """

    text: str

    def __post_init__(self) -> None:
        rest = _PLACEHOLDER.sub("", self.text)
        unknown = {match[1] for match in _PLACEHOLDER.finditer(self.text)} - set(_FIELDS)
        if len(self.text) > _MAX_PATTERN or unknown or "{" in rest or "}" in rest or rest == self.text:
            message = f"--name-from {escape(self.text, 120)!r} is not a name pattern"
            hint = f"write text and {', '.join(f'{{{name}}}' for name in _FIELDS)}, as in '{{parent}}-{{name}}'"
            raise AdapterRefused(message, kind="name", hint=hint)

    def chain(self, task: FoundTask) -> list[str]:
        """Return candidate names of a task: the pattern's, then longer names."""
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
