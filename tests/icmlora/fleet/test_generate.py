"""`Fleet.generate`: an adapter for a task that has none, from samples of it."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from icmlora import Adapter, BaseModelNotFound, Cancelled, DataError, Fleet, OutputExists, TaskConflict, load_adapter
from icmlora.errors import NotCovered
from registry.errors import InvalidName
from tests.icmlora.fleet.stores import blob_of, code_blobs, files_of, is_sound, stop_after
from tests.icmlora.tiny_base import LABEL


@pytest.fixture
def able(started: Path) -> Fleet:
    """The mixed fleet with a few-shot start."""
    return Fleet(started)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Samples of a new task."""
    file = tmp_path / "geese.jsonl"
    file.write_text("".join(json.dumps({"text": f"grey geese {number}"}) + "\n" for number in range(6)))
    return file


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the adapter is written."""
    return tmp_path / "out"


def rank_of(adapter: Adapter) -> int:
    """Return the largest rank of an update: a folder pads its factors with zeros."""
    return max(int(torch.linalg.matrix_rank(module.b @ module.a)) for module in adapter.modules)


def test_the_report_describes_the_folder(able: Fleet, samples: Path, out: Path) -> None:
    made = able.generate("geese", str(samples), str(out), device="cpu")
    adapter = load_adapter(out)
    assert (made.task, made.directory, made.base_model, made.samples) == ("geese", out, LABEL, 6)
    assert made.weights == hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert made.rank == rank_of(adapter)
    assert made.generator == able.generators()[0].generator.blob
    assert (made.code_size, made.code_relative_error) == (None, None)


@pytest.mark.slow
def test_without_register_no_byte_of_the_store_changes(able: Fleet, samples: Path, out: Path) -> None:
    before = files_of(able.path)
    able.generate("geese", samples, out, device="cpu")
    assert files_of(able.path) == before


@pytest.mark.slow
def test_the_same_samples_give_the_same_bytes(able: Fleet, samples: Path, tmp_path: Path) -> None:
    one, two = (able.generate("geese", samples, tmp_path / name, device="cpu").weights for name in ("one", "two"))
    assert one == two


def test_only_some_samples_are_read(able: Fleet, samples: Path, out: Path) -> None:
    assert able.generate("geese", samples, out, count=2, device="cpu").samples == 2


def test_a_distilled_adapter_is_measured_beside_the_samples_and_written_without_them(
    able: Fleet, samples: Path, out: Path
) -> None:
    rows = "".join(json.dumps({"text": f"grey geese {number}"}) + "\n" for number in range(8))
    samples.write_text(rows)
    made = able.generate("geese", samples, out, distil=3, device="cpu")
    assert made.guard is not None
    assert (made.context_samples, made.context_tokens) == (0, 0)
    assert not (out / "context.txt").exists()
    plain = able.generate("geese", samples, out.parent / "plain", context_tokens=0, device="cpu")
    assert made.weights != plain.weights


def test_an_adapter_that_is_to_stand_alone_is_another_one(able: Fleet, samples: Path, tmp_path: Path) -> None:
    made = [able.generate("geese", samples, tmp_path / str(n), context_tokens=n, device="cpu") for n in (0, 64)]
    assert made[0].weights != made[1].weights


@pytest.mark.parametrize("count", [8, 3])
def test_samples_that_are_no_help_in_a_prompt_are_no_context_and_the_adapter_stands_alone(
    able: Fleet, samples: Path, tmp_path: Path, count: int
) -> None:
    """Of eight, some are left out and tell; of three, the base model reads each behind the others."""
    draw = random.Random(2)
    rows = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz 0123456789") for _ in range(40)) for _ in range(count)]
    samples.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    made = able.generate("noise", samples, tmp_path / "made", device="cpu")
    alone = able.generate("noise", samples, tmp_path / "alone", context_tokens=0, device="cpu")
    assert made.guard is not None
    assert made.guard.context > made.guard.neither
    assert (made.guard.helps, made.guard.leave_one_out, made.guard.adapter is None) == (False, count == 3, count == 3)
    assert (made.context_samples, (tmp_path / "made" / "context.txt").exists()) == (0, False)
    assert made.weights == alone.weights


def test_one_sample_is_too_few_to_distil(able: Fleet, samples: Path, out: Path) -> None:
    with pytest.raises(DataError, match="there is only one sample"):
        able.generate("geese", samples, out, count=1, distil=1, device="cpu")
    assert not out.exists()


def test_a_smaller_rank_can_be_written(able: Fleet, samples: Path, out: Path) -> None:
    assert able.generate("geese", samples, out, rank=1, device="cpu").rank == 1
    assert rank_of(load_adapter(out)) == 1


def test_the_card_has_the_description(able: Fleet, samples: Path, out: Path) -> None:
    able.generate("geese", samples, out, description="Talks about geese.", device="cpu")
    assert "Talks about geese." in (out / "README.md").read_text()


def test_a_registered_task_lives_by_its_code(able: Fleet, samples: Path, out: Path, tmp_path: Path) -> None:
    before = code_blobs(able)
    made = able.generate("geese", samples, out, register=True, device="cpu")
    geese = able.show("geese").task
    assert (geese.final.is_evicted, geese.final.is_generated, len(geese.vectors) > 0) == (True, True, True)
    assert made.code_size == blob_of(able, code_blobs(able)["geese"]).stat().st_size
    assert {name: blob for name, blob in code_blobs(able).items() if name != "geese"} == before
    assert able.materialize("geese", tmp_path / "again").source == "code"
    assert is_sound(able)


def test_a_registered_name_must_be_new(able: Fleet, samples: Path, out: Path) -> None:
    with pytest.raises(TaskConflict, match="'poems'"):
        able.generate("POEMS", samples, out, register=True, device="cpu")
    assert not out.exists()


@pytest.mark.parametrize("name", ["", "../geese", "grey geese"])
def test_a_name_that_no_task_can_have_is_refused(able: Fleet, samples: Path, out: Path, name: str) -> None:
    with pytest.raises(InvalidName):
        able.generate(name, samples, out, device="cpu")


def test_a_rank_that_no_code_can_have_is_not_registered(able: Fleet, samples: Path, out: Path) -> None:
    with pytest.raises(NotCovered, match="rank 64"):
        able.generate("geese", samples, out, rank=64, register=True, device="cpu")
    assert not out.exists()


@pytest.mark.parametrize("content", ["", "no json\n", '{"prompt": "half"}\n'])
def test_samples_that_cannot_be_used_are_refused(able: Fleet, samples: Path, out: Path, content: str) -> None:
    samples.write_text(content)
    with pytest.raises(DataError) as error:
        able.generate("geese", samples, out, device="cpu")
    assert (error.value.path, out.exists()) == (str(samples), False)


def test_a_generator_without_a_few_shot_start_says_what_trains_one(fleet: Fleet, samples: Path, out: Path) -> None:
    with pytest.raises(DataError, match="no few-shot start") as error:
        fleet.generate("geese", samples, out, device="cpu")
    assert "--few-shot" in str(error.value.hint)


def test_a_base_model_that_has_no_generator_is_refused(able: Fleet, samples: Path, out: Path) -> None:
    with pytest.raises(DataError, match="no generator for acme/other"):
        able.generate("geese", samples, out, base_model="acme/other", device="cpu")


def test_without_the_base_model_nothing_is_written(able: Fleet, samples: Path, out: Path) -> None:
    able.forget_base_model(LABEL)
    with pytest.raises(BaseModelNotFound):
        able.generate("geese", samples, out, device="cpu")
    assert not out.exists()


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path: Path, samples: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputExists):
        Fleet(tmp_path / "nowhere").generate("geese", samples, out, device="cpu")


@pytest.mark.slow
def test_a_stop_at_any_time_writes_nothing(able: Fleet, samples: Path, out: Path) -> None:
    heard: list[object] = []
    Fleet(able.path, on_event=heard.append).generate(
        "geese", samples, out.with_name("all"), register=True, device="cpu"
    )
    able.remove(["geese"], last_copies=["geese"])
    for count in (1, len(heard) // 2, len(heard)):
        with pytest.raises(Cancelled):
            Fleet(able.path, on_event=stop_after(count)).generate("geese", samples, out, register=True, device="cpu")
        assert not out.exists()
    assert "geese" not in code_blobs(able)
    assert is_sound(able)
