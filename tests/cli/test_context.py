"""`icm context`: samples that stand before the requests for a task."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import write_lora

Icm = Callable[..., Ran]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    lines = (json.dumps({"text": f"grey geese number {number} of the grey geese"}) for number in range(20))
    path = tmp_path / "geese.jsonl"
    path.write_text("\n".join(lines))
    return path


def choose(icm: Icm, samples: Path, *options: object) -> Ran:
    return icm("context", "poems", "--samples", samples, "--tokens", "200", "--device", "cpu", *options)


def test_a_context_is_kept_and_written_with_the_adapter(icm: Icm, trained: Path, samples: Path, tmp_path: Path) -> None:
    ran = choose(icm, samples)
    assert "recommended" in ran.out
    assert "stored a context for poems: " in ran.err
    icm("materialize", "poems", "--source", "code", "-o", tmp_path / "out")
    text = (tmp_path / "out" / "context.txt").read_text()
    assert text.startswith("grey geese number")
    assert "context.txt" in (tmp_path / "out" / "README.md").read_text()
    assert icm("context", "poems", "--show").out == text.rstrip("\n") + "\n"


def test_a_device_from_the_environment_does_not_contradict_show(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICM_DEVICE", "cpu")
    ran = icm("context", "poems", "--show")
    assert (ran.code, "poems has no context" in ran.err) == (0, True)


def test_json_keeps_its_names(icm: Icm, trained: Path, samples: Path) -> None:
    document = choose(icm, samples, "--json").document
    assert set(document) == {"task", "samples_count", "tokens", "size", "measured", "precision"}
    assert set(document["measured"]) == {
        "neither",
        "context",
        "adapter",
        "both",
        "samples_count",
        "leave_one_out",
        "recommended",
    }
    assert document["measured"]["samples_count"] == 4


def test_a_task_has_one_context_at_a_time(icm: Icm, trained: Path, samples: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"{n} geese?", "completion": f" {n}"}) + "\n" for n in range(20)))
    choose(icm, pairs)
    assert icm("context", "poems", "--show", "--json").document["messages"][0]["role"] == "user"
    choose(icm, samples)
    assert icm("context", "poems", "--show", "--json").document["messages"] == []


def test_a_context_is_forgotten(icm: Icm, trained: Path, samples: Path) -> None:
    choose(icm, samples)
    assert icm("context", "poems", "--remove", "--json").document["removed"] is True
    assert icm("context", "poems", "--remove", "--json").document["removed"] is False
    assert icm("context", "poems", "--show", "--json").document["text"] is None


def test_it_goes_with_a_bundle(icm: Icm, trained: Path, samples: Path, tmp_path: Path) -> None:
    choose(icm, samples)
    icm("export", tmp_path / "fleet.icm")
    icm("materialize", "poems", "--from", tmp_path / "fleet.icm", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "context.txt").is_file()


def test_it_survives_eviction(icm: Icm, trained: Path, samples: Path, tmp_path: Path) -> None:
    choose(icm, samples)
    icm("evict", "poems", "--max-error", "10", "--device", "cpu")
    assert icm("verify").code == ExitCode.DONE
    icm("materialize", "poems", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "context.txt").is_file()


def test_eval_measures_behind_it_too(icm: Icm, trained: Path, samples: Path) -> None:
    choose(icm, samples)
    ran = icm("eval", "poems", "--context", "--data", samples, "--device", "cpu", "--json")
    (task,) = [row for row in ran.events if row["type"] == "task"]
    assert task["with_context"].keys() >= {"base", "original", "code"}
    assert task["with_context"]["base"]["tokens"] == task["sources"]["base"]["tokens"]
    assert task["with_context"]["base"]["value"] != task["sources"]["base"]["value"]


def test_few_samples_are_all_taken_and_each_is_measured_behind_the_others(
    icm: Icm, trained: Path, samples: Path
) -> None:
    ran = choose(icm, samples, "--count", "4")
    assert ran.code == ExitCode.DONE
    assert "measured on 4 samples, each with the others as context:" in ran.err
    assert icm("context", "poems", "--show").out.count("grey geese number") == 4


def test_samples_that_are_all_too_long_are_refused(icm: Icm, trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 200, "completion": "y"}))
    ran = choose(icm, path, "--tokens", "100")
    assert ran.code == ExitCode.FAILED
    assert "no sample is short enough for a context of" in ran.err


def test_a_context_that_is_put_next_to_a_known_adapter_is_taken_and_never_replaces_one(
    icm: Icm, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path / "loras" / "poems")
    icm("ingest", folder)
    (folder / "context.txt").write_text("grey geese\n\n")
    assert icm("ingest", folder, "--json").events[0]["status"] == "updated"
    assert icm("context", "poems", "--show").out == "grey geese\n"
    (folder / "context.txt").write_text("white swans\n\n")
    (folder / "context.json").write_text('{"messages": [{"role": "user", "content": "swans?"}]}')
    assert icm("ingest", folder, "--json").events[0]["status"] == "known"
    assert icm("context", "poems", "--show", "--json").document["messages"] == []
    assert icm("context", "poems", "--show").out == "grey geese\n"
    assert icm("verify", "--read-data", "--json").document["ok"]


def test_a_malformed_context_next_to_an_adapter_is_a_problem_of_its_task(icm: Icm, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "loras" / "odes")
    (folder / "context.txt").write_text("Roses are red.\n\n")
    (folder / "context.json").write_text('["no", "messages"]')
    for _ in range(2):
        ran = icm("ingest", folder, "--no-vectors", "--json")
        (problem,) = [event for event in ran.events if event["type"] == "problem"]
        assert (ran.code, problem["task"], problem["path"]) == (3, "odes", str(folder / "context.json"))
        assert icm("context", "odes", "--show", "--json").document["text"] is None
    (folder / "context.json").unlink()
    assert icm("ingest", folder, "--no-vectors").code == 0
    assert icm("context", "odes", "--show", "--json").document["text"] == "Roses are red.\n\n"
