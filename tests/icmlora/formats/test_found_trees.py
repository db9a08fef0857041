"""Whatever tree of runs there is, every adapter in it is found once, in one order, from every folder above it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from icmlora.errors import AdapterRefused
from icmlora.formats.discovery.discovery import Discovery, find_adapters
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from icmlora.formats.discovery.task_names import best_step, naming_folder, step_of
from registry.names import task_name_problem
from tests.icmlora.adapter_files import adapter as in_memory, config, factors, key, write_adapter
from tests.icmlora.small_fleet import make_adapter

# By task: its steps, and whether it has an adapter of its own.
Trees = dict[str, tuple[list[int], bool]]
TREES: st.SearchStrategy[Trees] = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9-]{0,6}[a-z]", fullmatch=True).filter(
        lambda name: task_name_problem(name) is None and naming_folder(Path("/runs") / name).name == name
    ),
    st.tuples(st.lists(st.integers(0, 999), max_size=3, unique=True), st.booleans()).filter(lambda run: any(run)),
    min_size=1,
    max_size=4,
)
CONFIG = config()


def touch_adapter(folder: Path) -> None:
    """Write files with the names of an adapter's: to find it, nothing more is opened."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes(CONFIG)
    (folder / "adapter_model.safetensors").write_bytes(b"\0")


def planted(root: Path, trees: Trees, depth: int) -> Path:
    for number, (name, (steps, own)) in enumerate(trees.items()):
        home = root.joinpath(*(f"level-{level}" for level in range((depth + number) % 3)), name)
        for step in steps:
            touch_adapter(home / f"checkpoint-{step}")
        if own:
            home.mkdir(parents=True, exist_ok=True)
            (home / "adapter_config.json").write_bytes(CONFIG)
            (home / "adapter_model.safetensors").write_bytes(b"\0")
    return root


def summary(discovery: Discovery) -> dict[str, list[int | None]]:
    assert discovery.refused == ()
    return {task.name: [adapter.step for adapter in task.adapters] for task in discovery.tasks}


@given(trees=TREES, depth=st.integers(0, 2))
def test_every_adapter_is_found_once_in_the_order_of_its_steps(
    tmp_path_factory: pytest.TempPathFactory, trees: Trees, depth: int
) -> None:
    root = planted(tmp_path_factory.mktemp("tree"), trees, depth)
    wanted = {name: [*sorted(steps), *([None] if own else [])] for name, (steps, own) in trees.items()}
    assert summary(find_adapters([root])) == wanted


@given(trees=TREES, depth=st.integers(0, 2))
def test_exactly_one_adapter_of_a_task_is_final_and_it_is_the_last(
    tmp_path_factory: pytest.TempPathFactory, trees: Trees, depth: int
) -> None:
    for task in find_adapters([planted(tmp_path_factory.mktemp("tree"), trees, depth)]).tasks:
        assert [adapter.is_final for adapter in task.adapters].count(True) == 1
        assert task.final is task.adapters[-1]


@given(trees=TREES)
def test_the_same_is_found_from_the_root_twice_and_from_each_task(
    tmp_path_factory: pytest.TempPathFactory, trees: Trees
) -> None:
    root = planted(tmp_path_factory.mktemp("tree"), trees, 0)
    whole = find_adapters([root])
    assert find_adapters([root, root]) == whole
    assert find_adapters([task.folder for task in whole.tasks]) == whole
    assert find_adapters([task.folder for task in reversed(whole.tasks)]) == whole


@given(name=st.text("checkpoint-0123456789 x", max_size=20))
def test_a_step_is_the_number_after_checkpoint_and_nothing_else(name: str) -> None:
    digits = name.removeprefix("checkpoint-")
    valid = name.startswith("checkpoint-") and digits.isdigit() and len(digits) <= 12
    assert step_of(name) == (int(digits) if valid else None)


@given(notes=st.dictionaries(st.text(max_size=6), st.none() | st.integers() | st.text(max_size=8), max_size=4))
def test_the_note_of_the_best_checkpoint_is_found_among_any_others(
    tmp_path_factory: pytest.TempPathFactory, notes: dict[str, object]
) -> None:
    state = tmp_path_factory.mktemp("state") / "trainer_state.json"
    state.write_text(json.dumps({**notes, "best_model_checkpoint": "runs/rust/checkpoint-70", "loss": float("nan")}))
    assert best_step(state) == 70


@pytest.mark.parametrize("text", ["", "[]", '"best_model_checkpoint"', '"best_model_checkpoint": 7', "\x00\xff"])
def test_a_state_without_such_a_note_has_no_best_step(tmp_path: Path, text: str) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    assert best_step(tmp_path / "trainer_state.json") is None


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_reported_and_the_others_are_found(tmp_path: Path, missing: str) -> None:
    write_adapter(tmp_path / "rust")
    (write_adapter(tmp_path / "sql") / missing).unlink()
    discovery = find_adapters([tmp_path])
    assert [task.name for task in discovery.tasks] == ["rust"]
    assert ["sql" in Path(error.path or "").parts for error in discovery.refused] == [True]


def test_refusals_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("c", "a", "b"):
        (write_adapter(tmp_path / name) / "adapter_model.safetensors").unlink()
    paths = [str(error.path) for error in find_adapters([tmp_path]).refused]
    assert paths == sorted(paths)
    assert len(paths) == 3


def test_a_name_for_one_task_is_not_given_to_two(tmp_path: Path) -> None:
    write_adapter(tmp_path / "rust")
    write_adapter(tmp_path / "sql")
    with pytest.raises(AdapterRefused, match="2 were found"):
        find_adapters([tmp_path], name="mine")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_saved_adapter_is_found_and_loaded_again(tmp_path: Path, dtype: str) -> None:
    original = make_adapter(0)
    save_adapter(original, tmp_path / "rust", dtype=dtype)
    (task,) = find_adapters([tmp_path]).tasks
    loaded = load_adapter(task.final.place)
    assert [shape.module for shape in loaded.layout] == [shape.module for shape in original.layout]
    assert loaded.base_model == original.base_model


def test_a_folder_without_an_adapter_is_not_loaded(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(AdapterRefused, match="no adapter in this folder"):
            load_adapter(place)


@given(rank=st.integers(1, 9), seed=st.integers(0, 1000))
def test_float32_keeps_the_dw_of_any_adapter(tmp_path_factory: pytest.TempPathFactory, rank: int, seed: int) -> None:
    tensors = factors(rank=rank, seed=seed)
    names = sorted({name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors})
    original = in_memory(*((name, tensors[key(name, "A")], tensors[key(name, "B")]) for name in names))
    folder = tmp_path_factory.mktemp("saved") / "rust"
    save_adapter(original, folder, dtype="float32")
    for module, other in zip(load_adapter(folder).modules, original.modules, strict=True):
        wanted = other.b @ other.a
        assert float((module.b @ module.a - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())
