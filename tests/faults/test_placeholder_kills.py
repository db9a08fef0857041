"""SIGKILL while placeholders replace adapters, and while adapters return: every folder always has one of the two, and a
rerun completes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from icmlora.formats.discovery.placeholder import PLACEHOLDER_NAME, read_placeholder
from registry.store import Store
from tests.faults.promises import has_a_copy
from tests.faults.zygote import KILLED, Run, Zygote

FILES = ("adapter_config.json", "adapter_model.safetensors")
FOLDERS = ("poems", "poems/checkpoint-10", "poems/checkpoint-20", "rules", "silent")
FINALS = ("poems", "rules", "silent")
MODES = {
    "keep": ("evict", "--placeholder", "--keep-originals"),
    "lose": ("evict", "--placeholder", "--max-error", "0.7"),
}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with closing(Zygote()) as found:
        yield found


@dataclass
class Place:
    """A trained store, and the folders that its adapters came from."""

    zygote: Zygote
    store: Path
    loras: Path
    originals: Path
    logs: Path

    def icm(self, *words: object, point: str = "") -> Run:
        """Run one command, which is killed at a failpoint."""
        env = {"ICM_STORE": str(self.store), "ICM_FAILPOINT": point}
        return self.zygote.run([*words, "--json"], env=env, out=self.logs / f"log-{len(list(self.logs.iterdir()))}")

    def broken(self) -> list[str]:
        """Return every promise that is broken."""
        found = [name for name in FOLDERS if not self._is_whole(name) and not self._has_placeholder(name)]
        found += [f"half of {path}" for name in FOLDERS for path in self._files(name) if not self._is_right(path)]
        with Store.open(self.store, read_only=True) as store:
            found += [finding.message for finding in store.verify(read_data=True) if finding.is_problem]
            found += [f"no copy of {name}" for name in FINALS if not has_a_copy(store, name)]
        return found

    def is_back(self) -> bool:
        """Return whether every adapter is in its folder, without any placeholder or half-written file."""
        left = [path for path in self.loras.rglob("*") if ".icm-" in path.name or path.name == PLACEHOLDER_NAME]
        return not left and all(map(self._is_whole, FOLDERS))

    def away(self) -> set[str]:
        """Return the folders that have a placeholder and no file of the adapter."""
        return {name for name in FOLDERS if self._has_placeholder(name) and not self._files(name)}

    def _files(self, name: str) -> list[Path]:
        return [self.loras / name / file for file in FILES if (self.loras / name / file).exists()]

    def _is_whole(self, name: str) -> bool:
        return len(self._files(name)) == len(FILES) and all(map(self._is_right, self._files(name)))

    def _is_right(self, path: Path) -> bool:
        """Return whether a file has the bytes of the original, or its size: a code gives a file of the same form."""
        data, original = path.read_bytes(), (self.originals / path.relative_to(self.loras)).read_bytes()
        return data == original or (path.suffix == ".safetensors" and len(data) == len(original))

    def _has_placeholder(self, name: str) -> bool:
        path = self.loras / name / PLACEHOLDER_NAME
        return path.exists() and len(read_placeholder(path).files) == len(FILES)


@pytest.fixture
def place(zygote: Zygote, trained: Path, own_loras: Path, mixed_template: Path, tmp_path: Path) -> Place:
    (tmp_path / "logs").mkdir()
    return Place(zygote, trained, own_loras, mixed_template / "loras", tmp_path / "logs")


def kill_on_and_on(place: Place, *words: object, point: str) -> int:
    """Run a command until it ends, killing it each time it reaches a point; return the number of kills."""
    for kills in range(40):
        ran = place.icm(*words, point=point)
        assert place.broken() == []
        if ran.status != KILLED:
            assert ran.status == 0, ran.lines
            return kills
    raise AssertionError("it does not get on")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tasks", [("rules",), pytest.param(FINALS, marks=pytest.mark.fault)], ids=len)
def test_a_kill_after_each_file_leaves_the_adapter_or_its_placeholder(
    place: Place, mode: str, tasks: tuple[str, ...]
) -> None:
    away = {name for name in FOLDERS if name.startswith(tasks) and (mode == "keep" or name in FINALS)}
    kills = kill_on_and_on(place, *MODES[mode], *tasks, point="placeholder-file-gone")
    assert (kills, place.away()) == (len(FILES) * len(away), away)
    kills = kill_on_and_on(place, "restore", place.loras, point="output-renamed")
    assert (kills, place.is_back()) == (len(FILES) * len(away), True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "point"),
    [
        ("keep", "placeholder-written"),
        ("lose", "rows-committed"),
        *(
            pytest.param("lose", point, marks=pytest.mark.fault)
            for point in ("placeholder-written", "rows-before-commit", "blob-unlinked")
        ),
    ],
)
def test_a_killed_eviction_is_finished_by_the_same_command(place: Place, mode: str, point: str) -> None:
    assert place.icm(*MODES[mode], point=point).status == KILLED
    assert place.broken() == []
    assert place.icm(*MODES[mode]).status == 0
    assert place.away() == set(FOLDERS if mode == "keep" else FINALS)
    assert place.broken() == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["keep", pytest.param("lose", marks=pytest.mark.fault)])
def test_the_placeholder_goes_last(place: Place, mode: str) -> None:
    assert place.icm(*MODES[mode], "rules").status == 0
    assert place.icm("restore", place.loras, point="restored-adapter").status == KILLED
    assert (place.loras / "rules" / PLACEHOLDER_NAME).exists()
    assert place.broken() == []
    assert place.icm("restore", place.loras).status == 0
    assert place.is_back()


@pytest.mark.slow
def test_the_harness_sees_a_folder_with_neither(place: Place) -> None:
    assert place.icm(*MODES["keep"]).status == 0
    (place.loras / "rules" / PLACEHOLDER_NAME).unlink()
    assert place.broken() == ["rules"]
