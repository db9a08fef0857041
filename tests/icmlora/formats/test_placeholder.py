"""The placeholder file: what it says comes back, and nothing else is read from one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.discovery.folder import load_adapter
from icmlora.formats.discovery.placeholder import (
    MAX_BYTES,
    PLACEHOLDER_NAME,
    CodeStamp,
    FileStamp,
    Placeholder,
    ReplacedFile,
    parse_placeholder,
    placeholder_path,
    placeholder_to_json,
    read_placeholder,
)
from registry.names import task_name_problem
from tests.cli.fleet import write_adapter, write_run

DIGEST = "0a" * 32
WEIGHTS = ReplacedFile("adapter_model.safetensors", "weights", FileStamp(DIGEST, 12))
CONFIG = ReplacedFile("adapter_config.json", "config", FileStamp("1b" * 32, 3))
PLAIN = Placeholder("poems", "/home/ann/icm", "peft", True, DIGEST, "1b" * 32, (CONFIG, WEIGHTS))

digests = st.text("0123456789abcdef", min_size=64, max_size=64)
stamps = st.builds(FileStamp, digests, st.integers(0, 2**53))
tasks = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", fullmatch=True).filter(
    lambda name: task_name_problem(name) is None
)
names = st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,40}", fullmatch=True).filter(
    lambda name: not name.endswith(PLACEHOLDER_NAME)
)
paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=80)


@st.composite
def placeholders(draw: st.DrawFn) -> Placeholder:
    found = sorted(draw(st.sets(names, min_size=1, max_size=5)))
    parts = ["weights", "config", *["companion"] * 3][: len(found)]
    order = draw(st.permutations(parts))
    files = tuple(
        ReplacedFile(name, part, draw(stamps))  # type: ignore[arg-type]  # the parts are those of the type
        for name, part in zip(found, order, strict=True)
    )
    code = draw(st.none() | st.builds(CodeStamp, stamps, stamps))
    return Placeholder(draw(tasks), draw(paths), "peft", draw(st.booleans()), draw(digests), draw(digests), files, code)


@given(placeholders())
def test_what_is_written_is_read_back(placeholder: Placeholder) -> None:
    data = placeholder_to_json(placeholder)
    assert parse_placeholder(data) == placeholder
    assert placeholder_to_json(parse_placeholder(data)) == data
    assert len(data) < MAX_BYTES


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
json_values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=8), scalars, max_size=3)


@given(placeholders(), st.data())
def test_a_value_of_another_kind_is_refused_or_read_as_it_is(placeholder: Placeholder, data: st.DataObject) -> None:
    value = json.loads(placeholder_to_json(placeholder))
    place = value
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(json_values)
    try:
        read = parse_placeholder(json.dumps(value).encode())
    except AdapterRefused:
        return
    assert json.loads(placeholder_to_json(read)) == {**value, "about": json.loads(placeholder_to_json(PLAIN))["about"]}


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    with pytest.raises(AdapterRefused):
        parse_placeholder(data)


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(placeholder_to_json(PLAIN)) | fields).encode()


def of_file(**fields: Any) -> bytes:
    first, second = json.loads(placeholder_to_json(PLAIN))["files"]
    return changed(files=[first, second | fields])


def test_a_person_learns_from_it_what_to_do() -> None:
    value = json.loads(placeholder_to_json(PLAIN))
    assert "`icm restore`" in value["about"]
    assert (value["task"], value["store"]) == ("poems", "/home/ann/icm")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"icm_placeholder": NaN}',
        changed()[:-2],
        changed(task="../etc"),
        changed(task="con"),
        changed(store=""),
        changed(store="a\0b"),
        changed(store="x" * 5000),
        changed(more=1),
        changed(icm_placeholder=0),
        changed(icm_placeholder=True),
        changed(icm_placeholder=1.0),
        changed(files=[]),
        changed(files={}),
        changed(code={"sha256": DIGEST}),
        of_file(name="../adapter_model.safetensors"),
        of_file(name="/etc/passwd"),
        of_file(name=".bashrc"),
        of_file(name="adapter_config.json"),
        of_file(name=PLACEHOLDER_NAME),
        of_file(part="config"),
        of_file(part="companion"),
        of_file(size=-1),
        of_file(size=True),
        of_file(size=2**60),
        of_file(sha256=DIGEST.upper()),
        of_file(sha256=DIGEST[:-1]),
        changed().replace(b'"task"', b'"task": "other", "task"'),
        b" " * (MAX_BYTES + 1),
    ],
)
def test_a_malformed_placeholder_is_refused(data: bytes) -> None:
    with pytest.raises(AdapterRefused):
        parse_placeholder(data)


@pytest.mark.parametrize(("version", "fact"), [(1, r"was written by icm 0\.x"), (3, "was written by a newer icm")])
def test_one_of_another_icm_says_so(version: int, fact: str) -> None:
    with pytest.raises(AdapterRefused, match=fact) as error:
        parse_placeholder(changed(icm_placeholder=version, new="field"))
    assert "icm version that wrote it" in str(error.value.hint)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "symlink"),
        (os.mkfifo, "special-file"),
        (lambda path: path.write_bytes(b" " * (MAX_BYTES + 1)), "limits"),
    ],
)
def test_only_a_small_plain_file_is_read(tmp_path: Path, make: Callable[[Path], object], kind: str) -> None:
    make(tmp_path / PLACEHOLDER_NAME)
    with pytest.raises(UnsafeInput) as error:
        read_placeholder(tmp_path / PLACEHOLDER_NAME)
    assert error.value.kind == kind


# In a tree


def leave(place: Path, *, is_final: bool = True, task: str = "poems") -> Path:
    """Replace an adapter by hand."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (place / name).unlink(missing_ok=True)
    path = placeholder_path(place, is_folder=True)
    path.write_bytes(placeholder_to_json(Placeholder(task, "/store", "peft", is_final, DIGEST, DIGEST, PLAIN.files)))
    return path


def test_a_folder_with_a_placeholder_is_no_task_and_no_refusal(tmp_path: Path) -> None:
    path = leave(write_adapter(tmp_path / "poems"))
    write_adapter(tmp_path / "rules")
    found = find_adapters([tmp_path])
    assert [task.name for task in found.tasks] == ["rules"]
    assert found.refused == ()
    assert [(item.path, item.placeholder.task, item.passed_over) for item in found.stand_ins] == [(path, "poems", 0)]


def test_checkpoints_next_to_a_placeholder_make_no_new_task(tmp_path: Path) -> None:
    leave(write_run(tmp_path / "poems"))
    found = find_adapters([tmp_path])
    assert (found.tasks, [item.passed_over for item in found.stand_ins]) == ((), [2])


def test_a_run_whose_final_adapter_was_a_checkpoint_is_passed_over_too(tmp_path: Path) -> None:
    for step in (10, 20):
        write_adapter(tmp_path / "poems" / f"checkpoint-{step}", seed=step)
    leave(tmp_path / "poems" / "checkpoint-20")
    found = find_adapters([tmp_path])
    assert (found.tasks, [item.passed_over for item in found.stand_ins]) == ((), [1])


def test_a_run_in_a_folder_with_a_plain_name_is_passed_over_as_a_whole(tmp_path: Path) -> None:
    leave(write_adapter(tmp_path / "poems" / "final"))
    write_adapter(tmp_path / "poems" / "output" / "checkpoint-5")
    assert find_adapters([tmp_path]).tasks == ()


def test_a_placeholder_of_a_checkpoint_leaves_the_run(tmp_path: Path) -> None:
    leave(write_run(tmp_path / "poems") / "checkpoint-80", is_final=False)
    found = find_adapters([tmp_path])
    assert [(task.name, len(task.adapters)) for task in found.tasks] == [("poems", 2)]
    assert len(found.stand_ins) == 1


def test_a_placeholder_next_to_its_adapter_hides_nothing(tmp_path: Path) -> None:
    path = leave(tmp_path)
    write_adapter(tmp_path)
    assert path.exists()
    found = find_adapters([tmp_path])
    assert (len(found.tasks), found.stand_ins, found.tasks[0].not_kept) == (1, (), ())


def test_a_placeholder_that_cannot_be_read_is_refused_and_still_hides_its_checkpoints(tmp_path: Path) -> None:
    leave(write_run(tmp_path / "poems")).write_text("{")
    write_adapter(tmp_path / "rules")
    found = find_adapters([tmp_path])
    assert [task.name for task in found.tasks] == ["rules"]
    assert [Path(str(error.path)).name for error in found.refused] == [PLACEHOLDER_NAME]


def test_loading_from_a_folder_with_a_placeholder_says_how_to_get_the_adapter(tmp_path: Path) -> None:
    leave(write_adapter(tmp_path / "poems"))
    with pytest.raises(AdapterRefused, match="placeholder") as error:
        load_adapter(tmp_path / "poems")
    assert "icm restore" in str(error.value.hint)


def test_a_placeholder_is_met_once_where_paths_overlap(tmp_path: Path) -> None:
    leave(write_adapter(tmp_path / "poems"))
    assert len(find_adapters([tmp_path, tmp_path / "poems"]).stand_ins) == 1
