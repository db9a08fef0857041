"""`icm train --few-shot`: the few-shot start."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.fleet.few_shot import start as starting
from icmlora.io.text import human_size
from tests.cli.coded import codes, current, make_another_current
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import EPISODES, STEPS, write_lora
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
FEW_SHOT = ("train", "--few-shot", "--episodes", EPISODES, "--device", "cpu")
FULL = ("train", "--no-eval", "--refine", "0", "--steps", STEPS, "--device", "cpu")


def of_type(ran: Ran, kind: str) -> list[dict[str, Any]]:
    assert ran.code == 0, ran.err
    return [event for event in ran.events if event["type"] == kind]


def during_episodes(monkeypatch: pytest.MonkeyPatch, happen: Callable[[], None]) -> None:
    """Let something happen after the first episode."""

    def meta_train(*arguments: Any) -> Generator[Any, None, None]:
        for number, found in enumerate(real(*arguments)):
            if number == 0:
                happen()
            yield found

    real = starting.meta_train
    monkeypatch.setattr(starting, "meta_train", meta_train)


def test_it_learns_a_start_and_leaves_generator_and_codes(icm: Icm, trained: Path) -> None:
    before, all_codes = current(trained), codes(trained)
    (learned,) = of_type(icm(*FEW_SHOT, "--json"), "start")
    after = current(trained)
    assert (after.blob, after.version, codes(trained)) == (before.blob, before.version, all_codes)
    assert (after.start, after.start_size) == (learned["start"], learned["size"])
    assert (learned["tasks"], learned["episodes"]) == (3, EPISODES)
    assert icm("verify", "--read-data").code == 0


@pytest.mark.slow
def test_json_lines_keep_their_names(icm: Icm, trained: Path) -> None:
    ran = icm(*FEW_SHOT, "--json")
    episodes, (learned,) = of_type(ran, "episode"), of_type(ran, "start")
    assert len(episodes) == EPISODES
    assert set(episodes[0]) == {"type", "base_model", "task", "number", "episodes", "support", "in_context", "loss"}
    assert set(learned) == {
        "type", "base_model", "generator", "start", "size", "tasks", "left_out", "episodes", "loss", "precision",
        "seconds",
    }  # fmt: skip


@pytest.mark.slow
def test_tasks_without_samples_are_in_the_mean_and_have_no_episode(icm: Icm, trained: Path) -> None:
    ran = icm(*FEW_SHOT, "--json")
    assert {event["task"] for event in of_type(ran, "episode")} == {"poems", "rules"}


@pytest.mark.slow
def test_text_says_what_known_tasks_get(icm: Icm, trained: Path) -> None:
    ran = icm(*FEW_SHOT)
    assert f"few-shot start for {LABEL}: " in ran.out
    assert "of the gain of the trained adapters on held-out samples" in ran.err


@pytest.mark.slow
def test_a_seed_decides_the_start(icm: Icm, trained: Path, started_template: Path) -> None:
    icm(*FEW_SHOT)
    assert current(trained).start == current(started_template).start
    icm(*FEW_SHOT, "--seed", 1)
    assert current(trained).start != current(started_template).start


@pytest.mark.slow
def test_it_needs_no_original(icm: Icm, trained: Path) -> None:
    assert icm("evict", "--max-error", "0.95").code == 0
    assert [event["tasks"] for event in of_type(icm(*FEW_SHOT, "--json"), "start")] == [3]
    assert icm("verify", "--read-data").code == 0


def test_one_task_with_samples_is_too_few(icm: Icm, trained: Path) -> None:
    icm("rm", "poems", "--yes")
    before = current(trained)
    ran = icm(*FEW_SHOT, "--json")
    assert ran.code == ExitCode.FAILED
    assert "a few-shot start needs 2 tasks" in ran.error["message"]
    assert "--samples" in ran.error["hint"]
    assert (ran.out, current(trained)) == ("", before)


@pytest.mark.slow
def test_samples_that_leave_nothing_to_predict_are_none(icm: Icm, trained: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "letters", seed=5)
    (folder / "samples.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    icm("ingest", folder, "--no-vectors")
    ran = icm(*FEW_SHOT, "--json")
    assert "letters" not in {event["task"] for event in of_type(ran, "episode")}


def test_a_base_model_that_is_not_here_is_said(icm: Icm, trained: Path) -> None:
    before = current(trained)
    icm("base", "rm", LABEL)
    ran = icm(*FEW_SHOT, "--json")
    assert (ran.error["kind"], ran.out) == ("base_model_not_found", "")
    assert current(trained) == before


def test_without_a_generator_it_names_the_command_that_makes_one(icm: Icm, mixed: Path) -> None:
    ran = icm(*FEW_SHOT, "--json")
    assert ran.code == ExitCode.FAILED
    assert "icm train" in ran.error["hint"]


@pytest.mark.parametrize(
    "option", ["--update", "--fresh", "--quality=3", "--refine=100", "--steps=5", "--max-error=0.1", "--workers=2"]
)
def test_options_of_generator_and_codes_do_not_go_with_it(icm: Icm, trained: Path, option: str) -> None:
    ran = icm(*FEW_SHOT, option, "--json")
    assert (ran.code, "cannot be combined with" in ran.error["message"]) == (ExitCode.USAGE, True)


def test_episodes_are_only_for_it(icm: Icm, trained: Path) -> None:
    before = codes(trained)
    ran = icm("train", "--episodes", 5, "--json")
    assert (ran.code, "--few-shot" in ran.error["hint"], codes(trained)) == (ExitCode.USAGE, True, before)


def test_ctrl_c_keeps_no_start(icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    during_episodes(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    ran = icm(*FEW_SHOT, "--json")
    assert (ran.code, "no few-shot start was stored" in ran.error["message"]) == (ExitCode.INTERRUPTED, True)
    assert current(trained).start is None
    assert icm("verify", "-v").code == 0


def test_ctrl_c_keeps_the_start_that_was_there(icm: Icm, started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = current(started)
    during_episodes(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert icm(*FEW_SHOT, "--seed", 5).code == ExitCode.INTERRUPTED
    assert current(started) == before


def test_a_failure_keeps_the_start_that_was_there(icm: Icm, started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("something broke")

    before = current(started)
    during_episodes(monkeypatch, fail)
    assert icm(*FEW_SHOT, "--seed", 5).code == ExitCode.FAILED
    assert current(started) == before


def test_a_generator_that_becomes_current_meanwhile_gets_no_start(
    icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    during_episodes(monkeypatch, lambda: make_another_current(trained))
    ran = icm(*FEW_SHOT, "--json")
    assert (ran.error["kind"], "again" in ran.error["hint"]) == ("generator_conflict", True)
    assert (current(trained).version, current(trained).start) == (2, None)


class TestLaterTrainings:
    """What becomes of a start when the generator changes."""

    @pytest.mark.slow
    def test_a_full_training_drops_it_and_says_so(self, icm: Icm, started: Path) -> None:
        ran = icm(*FULL)
        assert "no few-shot start; the previous generator had one" in ran.err
        assert "--few-shot" in ran.err
        assert current(started).start is None

    @pytest.mark.one_case
    @pytest.mark.parametrize("name", ["started", "trained"])
    def test_json_says_whether_there_was_one(self, icm: Icm, name: str, request: pytest.FixtureRequest) -> None:
        request.getfixturevalue(name)
        (event,) = of_type(icm(*FULL, "--json"), "trained")
        assert event["start_dropped"] == (name == "started")

    @pytest.mark.slow
    def test_nothing_is_said_where_there_was_none(self, icm: Icm, trained: Path) -> None:
        assert "few-shot" not in icm(*FULL).err

    @pytest.mark.slow
    def test_an_update_keeps_it(self, icm: Icm, started: Path, tmp_path: Path) -> None:
        before = current(started).start
        icm("ingest", write_lora(tmp_path / "extra", seed=9, targets=("mlp.down_proj",), rank=8), "--no-vectors")
        assert icm(*FULL, "--update").code == 0
        assert (current(started).start, current(started).version) == (before, 2)

    @pytest.mark.slow
    def test_it_is_learned_where_the_newest_network_is_of_other_modules(
        self, icm: Icm, trained: Path, tmp_path: Path
    ) -> None:
        icm("ingest", write_lora(tmp_path / "extra", seed=9, targets=("mlp.down_proj",), rank=8), "--no-vectors")
        assert icm(*FULL, "--update").code == 0
        assert of_type(icm(*FEW_SHOT, "--json"), "start")
        assert icm("verify", "--read-data").code == 0


class TestTheBill:
    """Where a start is counted and shown."""

    def test_generators_list_it(self, icm: Icm, started: Path) -> None:
        (row,) = icm("generators", "--json").document
        made = current(started)
        assert (row["start"], row["start_size"]) == (made.start, made.start_size)
        assert f"{made.start_size} B" in icm("generators").out

    def test_generators_without_one_have_a_dash(self, icm: Icm, trained: Path) -> None:
        (row,) = icm("generators", "--json").document
        assert (row["start"], row["start_size"]) == (None, 0)
        assert " - " in icm("generators").out.splitlines()[1]

    @pytest.mark.slow
    def test_stats_add_it_to_what_all_tasks_share(self, icm: Icm, trained: Path) -> None:
        before = icm("stats", "--json").document
        icm(*FEW_SHOT)
        after, size = icm("stats", "--json").document, current(trained).start_size
        assert after["fleets"][0]["start_size"] == size
        assert after["fleets"][0]["decoder_size"] == before["fleets"][0]["decoder_size"]
        assert after["on_disk"]["generators"] == before["on_disk"]["generators"] + size
        grown = sum(after["on_disk"][use] - before["on_disk"][use] for use in ("database", "manifests"))
        assert after["compact_size"] == before["compact_size"] + size + grown

    def test_stats_print_the_generators_with_their_starts(self, icm: Icm, started: Path) -> None:
        made = current(started)
        (line,) = [line for line in icm("stats").out.splitlines() if line.startswith("generators ")]
        assert human_size(made.size + made.start_size) in line
