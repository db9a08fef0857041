"""`icm ingest`: what is taken, what is refused, and that the same again changes nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icm_cli.commands.ingest import print_problems
from icm_cli.errors import ExitCode
from icm_cli.output import Mode, Output
from icmlora import Cancelled, Fleet
from icmlora.fleet.context import Event, Progress
from icmlora.fleet.ingest.files import batches
from icmlora.fleet.ingest.report import IngestReport, InputProblem
from registry.store import Store
from tests.cli.conftest import Ran, modules_of
from tests.cli.fleet import BASE, write_adapter, write_broken, write_run, write_texts

Icm = Callable[..., Ran]


def names(icm: Icm) -> list[str]:
    return icm("ls", "-q").out.split()


def test_a_fleet_becomes_tasks_with_their_checkpoints(icm: Icm, fleet: Path) -> None:
    ran = icm("ingest", fleet)
    assert ran.code == 0
    assert "ingested 3 tasks: 9 new adapters, 0 unchanged" in ran.out
    assert names(icm) == ["rust", "shakespeare", "sql"]


def test_a_single_folder_is_a_task(icm: Icm, tmp_path: Path) -> None:
    icm("ingest", write_adapter(tmp_path / "solo"))
    assert names(icm) == ["solo"]


def test_the_same_again_changes_nothing(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = sorted(path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file())
    ran = icm("ingest", stored)
    assert "0 new adapters, 9 unchanged" in ran.out
    assert sorted(path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()) == before


def test_the_stored_bytes_are_the_given_bytes(stored: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        task = store.task("rust")
        final = task.final
        assert store.blobs.read(final.weights) == (stored / "rust" / "adapter_model.safetensors").read_bytes()
        assert store.blobs.read(final.config) == (stored / "rust" / "adapter_config.json").read_bytes()
        assert final.card is not None
        assert store.blobs.read(final.card) == b"# rust\n"
        assert task.samples is not None
        assert store.blobs.read(task.samples) == (stored / "rust" / "samples.jsonl").read_bytes()


def test_nothing_in_the_given_folder_is_changed(icm: Icm, fleet: Path) -> None:
    before = {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file()}
    icm("ingest", fleet)
    assert {path: path.read_bytes() for path in fleet.rglob("*") if path.is_file()} == before


def test_a_new_checkpoint_is_added_to_its_task(icm: Icm, stored: Path) -> None:
    write_adapter(stored / "rust" / "checkpoint-120", seed=7)
    assert "1 new adapter, 9 unchanged" in icm("ingest", stored).out
    assert len(icm("show", "rust", "--json").document["adapters"]) == 4


def test_json_says_one_line_per_task_and_a_summary(icm: Icm, fleet: Path) -> None:
    ran = icm("ingest", fleet, "--json")
    assert [event["type"] for event in ran.events] == ["task", "task", "task", "summary"]
    assert ran.events[0] | {"size": 0} == {
        "type": "task",
        "task": "rust",
        "status": "added",
        "new": 3,
        "known": 0,
        "size": 0,
        "evicted": 0,
        "restored": 0,
        "samples": {"kept": 4, "skipped": 0, "reason": None},
        "eval_data": {"kept": 2, "skipped": 0, "reason": None},
        "folder": str(fleet / "rust"),
        "is_renamed": False,
        "base_model": BASE,
        "base_is_guess": False,
        "original_only": None,
        "extras_size": 0,
        "lora_size": 2 * 16 * 4,
        "converted_from": None,
        "initial": None,
        "format": "peft",
        "wrapper": None,
        "same_as": None,
        "same_as_final": [],
        "version": 1,
    }
    assert ran.events[-1]["without_vectors"] == ["rust", "shakespeare", "sql"]


def test_a_dry_run_checks_everything_and_stores_nothing(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    assert "would ingest 3 tasks: 9 new adapters" in icm("ingest", fleet, "-n").out
    assert not (tmp_path / "store").exists()


def test_a_dry_run_finds_what_would_be_refused(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet, "-n")
    assert (ran.code, str(fleet / "bad") in ran.out) == (ExitCode.PARTLY, True)


def test_what_cannot_be_taken_is_listed_and_the_rest_is_taken(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet)
    assert ran.code == ExitCode.PARTLY
    assert "ingested 3 tasks: 9 new adapters, 0 unchanged, 1 refused" in ran.out
    title, row = ran.out.splitlines()[-2:]
    assert title.split("  ")[0] == "REFUSED"
    assert row.startswith(str(fleet / "bad" / "adapter_model.safetensors"))
    assert names(icm) == ["rust", "shakespeare", "sql"]


def test_strict_stops_before_anything_is_stored(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet, "--strict")
    assert (ran.code, ran.err.startswith(f"error: {fleet / 'bad'}")) == (ExitCode.FAILED, True)
    assert not (tmp_path / "store").exists()


def test_strict_lists_all_that_it_found(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    for name in ("bad", "worse"):
        write_broken(fleet / name)
    ran = icm("ingest", fleet, "--strict")
    assert (ran.code, "2 inputs were refused, and --strict allows none" in ran.err) == (ExitCode.FAILED, True)
    assert all(str(fleet / name) in ran.out for name in ("bad", "worse"))
    assert not (tmp_path / "store").exists()


def test_strict_takes_a_fleet_in_which_all_is_well(icm: Icm, fleet: Path) -> None:
    ran = icm("ingest", fleet, "--strict")
    assert (ran.code, names(icm)) == (0, ["rust", "shakespeare", "sql"])


def test_strict_finds_conflicts_with_the_store_too(icm: Icm, stored: Path) -> None:
    write_adapter(stored / "rust", seed=99)
    write_adapter(stored / "verilog", seed=98)
    assert icm("ingest", stored, "--strict", "--on-conflict", "fail").code == ExitCode.FAILED
    assert "verilog" not in names(icm)


def test_a_bad_checkpoint_costs_only_itself(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "rust" / "checkpoint-80")
    ran = icm("ingest", fleet)
    assert (ran.code, "1 ingested in part" in ran.out) == (ExitCode.PARTLY, True)
    assert "(rust was ingested without it)" in ran.out
    assert [entry["step"] for entry in icm("show", "rust", "--json").document["adapters"]] == [100, None]


def test_a_bad_final_adapter_costs_the_task(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "rust")
    assert icm("ingest", fleet).code == ExitCode.PARTLY
    assert names(icm) == ["shakespeare", "sql"]


def test_what_can_have_no_code_is_taken_and_named_in_one_line(icm: Icm, fleet: Path) -> None:
    write_adapter(fleet / "dead", value=float("nan"))
    for name in ("hada", "hadb"):
        write_adapter(fleet / name, peft_type="LOHA")
    ran = icm("ingest", fleet)
    assert ran.code == 0
    start = "3 tasks cannot have a code and stay originals: "
    (line,) = [line for line in ran.err.splitlines() if line.startswith(start)]
    assert "hada, hadb (peft_type is 'LOHA', not LORA)" in line
    events = {event["task"]: event for event in icm("ingest", fleet, "--json").events if event["type"] == "task"}
    assert [name for name, event in events.items() if event["original_only"]] == ["dead", "hada", "hadb"]


def test_files_that_are_not_kept_are_counted(icm: Icm, fleet: Path) -> None:
    for place in ("rust", "sql", "sql/checkpoint-80"):
        (fleet / place / "value_head.bin").write_bytes(b"x")
        (fleet / place / "optimizer.pt").write_bytes(b"x")
    ran = icm("ingest", fleet)
    assert (ran.code, "did not store 3 files next to adapters: value_head.bin (3 times)" in ran.err) == (0, True)
    assert icm("ingest", fleet, "--json").events[-1]["not_kept"] == {"value_head.bin": 3}


def test_extras_that_are_larger_than_the_lora_are_said(icm: Icm, fleet: Path) -> None:
    (fleet / "rust" / "tokenizer.json").write_bytes(os.urandom(4096))
    ran = icm("ingest", fleet)
    assert "1 task has extras (heads, tokenizers, other files) larger than the LoRA: rust (4.0 KiB" in ran.err


def test_a_git_lfs_pointer_is_named_as_such(icm: Icm, fleet: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"
    (fleet / "rust" / "adapter_model.safetensors").write_text(pointer)
    ran = icm("ingest", fleet)
    assert (ran.code, "Git LFS pointer" in ran.out, "git lfs pull" in ran.out) == (ExitCode.PARTLY, True, True)


def test_a_trainers_pickles_end_nothing(icm: Icm, fleet: Path) -> None:
    (fleet / "other").mkdir()
    for name in ("random_states_0.pkl", "optimizer.bin", "sampler.bin", "eval_results.pkl", "train.bin"):
        (fleet / "other" / name).write_bytes(b"x")
    assert icm("ingest", fleet).code == 0


def test_the_table_of_problems_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = Output()
    out.mode = Mode.HUMAN
    path = "/" + "/".join(f"folder-{number}" for number in range(20)) + "/adapter_model.safetensors"
    print_problems(out, [InputProblem(path, "damaged", "has 2 bytes, too few for a file " * 3, "do it again " * 9)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 + len("\x1b[1m\x1b[0m")
    assert "".join(line.split("  ")[0] for line in lines[2:] if not line.startswith(" ")) == path
    assert " ".join(line.split("  ")[-1].strip() for line in lines[2:]).count("again") == 9


def test_a_pickle_is_refused_unopened_with_its_own_exit_code(icm: Icm, tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    ran = icm("ingest", folder, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.UNSAFE, "pickle")


def test_when_everything_is_refused_the_first_reason_decides_the_exit_code(icm: Icm, tmp_path: Path) -> None:
    write_broken(tmp_path / "a")
    write_broken(tmp_path / "b")
    ran = icm("ingest", tmp_path)
    assert ran.code == ExitCode.FAILED
    assert "all 2 inputs were refused" in ran.err
    assert all(str(tmp_path / name) in ran.out for name in "ab")
    pickled = write_adapter(tmp_path / "Z")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert icm("ingest", tmp_path).code == ExitCode.UNSAFE


@pytest.mark.slow
def test_a_pickle_next_to_its_configuration_says_which_option_reads_it(icm: Icm, tmp_path: Path) -> None:
    pickled = write_adapter(tmp_path / "old")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "--read-bin" in icm("ingest", pickled).err


def test_read_bin_takes_pickles_and_says_so(icm: Icm, tmp_path: Path) -> None:
    for name in ("one", "evil"):
        pickled = write_adapter(tmp_path / "loras" / name)
        torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
        (pickled / "adapter_model.safetensors").unlink()
    torch.save({"a": [1]}, tmp_path / "loras" / "evil" / "adapter_model.bin")
    ran = icm("ingest", tmp_path / "loras", "--read-bin")
    assert (ran.code, names(icm)) == (ExitCode.PARTLY, ["one"])
    assert "1 task converted from a pickle and stored as safetensors: one (from adapter_model.bin)" in ran.err
    assert "evil" in ran.out


def test_a_folder_without_adapters_is_an_error(icm: Icm, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    ran = icm("ingest", tmp_path / "empty")
    assert ran.code == ExitCode.FAILED
    assert "no adapter was found" in ran.err


def test_a_name_can_be_given_to_one_task(icm: Icm, tmp_path: Path) -> None:
    icm("ingest", write_run(tmp_path / "output"), "--name", "poems")
    assert names(icm) == ["poems"]


def test_samples_can_be_given_for_one_task(icm: Icm, tmp_path: Path) -> None:
    texts = write_texts(tmp_path, "texts.jsonl", count=9)
    icm("ingest", write_run(tmp_path / "poems"), "--samples", texts)
    with Store.open(tmp_path / "store") as store:
        samples = store.task("poems").samples
        assert samples is not None
        assert store.blobs.read(samples) == texts.read_bytes()


def test_samples_for_many_tasks_are_refused(icm: Icm, fleet: Path) -> None:
    ran = icm("ingest", fleet, "--samples", write_texts(fleet / "rust", "other.jsonl"))
    assert "--samples is for one task, but 3 were found" in ran.err


def test_samples_that_were_given_are_taken_where_others_are_left_out(icm: Icm, tmp_path: Path) -> None:
    run, texts = write_run(tmp_path / "poems"), write_texts(tmp_path, "texts.jsonl", count=9)
    (run / "eval.jsonl").write_text("")
    assert icm("ingest", run, "--no-texts", "--samples", texts).code == 0
    with Store.open(tmp_path / "store") as store:
        assert store.blobs.read(str(store.task("poems").samples)) == texts.read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"{", b'\xef\xbb\xbf{"peft_type": "LORA"}', b"[" * 99],
    ids=["broken", "bom", "deep"],
)
def test_what_is_wrong_with_a_configuration_is_said_of_its_file(icm: Icm, tmp_path: Path, content: bytes) -> None:
    config = write_adapter(tmp_path / "rust") / "adapter_config.json"
    config.write_bytes(content)
    ran = icm("ingest", tmp_path / "rust")
    assert ran.code != 0
    assert ran.err.startswith(f"error: {config}: ")


def test_what_is_wrong_with_weights_is_said_of_their_file(icm: Icm, tmp_path: Path) -> None:
    weights = write_broken(tmp_path / "rust") / "adapter_model.safetensors"
    assert icm("ingest", tmp_path / "rust").err.startswith(f"error: {weights}: ")


def test_a_folder_above_whose_name_is_no_unicode_is_no_obstacle(icm: Icm, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/fl\xff"))
    write_run(odd / "rust")
    assert icm("ingest", odd).code == 0
    with Store.open(tmp_path / "store") as store:
        assert [adapter.source for adapter in store.task("rust").adapters] == [
            f"{tmp_path}/fl\\xff/rust/{place}".rstrip("/") for place in ("checkpoint-80", "checkpoint-100", "")
        ]
    assert "3 unchanged" in icm("ingest", odd).out
    assert icm("show", "rust").code == 0


@pytest.mark.one_case
@pytest.mark.parametrize("folder", [b"\xff", b"\xff/adapter"])
def test_a_name_that_is_no_unicode_becomes_a_plain_one(icm: Icm, fleet: Path, folder: bytes) -> None:
    write_adapter(Path(os.fsdecode(os.fsencode(fleet) + b"/" + folder)))
    ran = icm("ingest", fleet)
    assert ran.code == 0
    assert "1 task has another name than its folder: task-" in ran.err
    assert len(names(icm)) == 4
    assert "0 new adapters" in icm("ingest", fleet).out


def test_runs_with_their_adapters_in_a_folder_of_one_name_are_tasks(icm: Icm, tmp_path: Path) -> None:
    for name in ("t1", "t2"):
        write_adapter(tmp_path / "runs" / name / "adapter")
    assert icm("ingest", tmp_path / "runs").code == 0
    assert names(icm) == ["t1", "t2"]
    assert "0 new adapters, 1 unchanged" in icm("ingest", tmp_path / "runs" / "t1" / "adapter").out


def test_folders_that_link_to_the_same_weights_keep_their_own_configurations(icm: Icm, tmp_path: Path) -> None:
    for name, alpha in (("a", 4), ("b", 8), ("bad", 2)):
        folder = write_adapter(tmp_path / "loras" / name, lora_alpha=alpha)
        (folder / "adapter_model.safetensors").replace(tmp_path / "loras" / "weights")
        (folder / "adapter_model.safetensors").symlink_to("../weights")
    (tmp_path / "loras" / "bad" / "adapter_config.json").write_text("{")
    ran = icm("ingest", tmp_path / "loras")
    assert (ran.code, names(icm)) == (ExitCode.PARTLY, ["a", "b"])
    with Store.open(tmp_path / "store") as store:
        for name in ("a", "b"):
            given = tmp_path / "loras" / name / "adapter_config.json"
            assert store.blobs.read(store.task(name).final.config) == given.read_bytes()


def test_a_changed_adapter_in_the_folder_of_a_known_task_is_its_next_version(icm: Icm, stored: Path) -> None:
    write_adapter(stored / "rust", seed=99)
    ran = icm("ingest", stored)
    assert (ran.code, ran.out.partition(";")[0]) == (0, "ingested 3 tasks: 1 new adapter, 8 unchanged")
    assert "1 task has a new version, because its adapter changed: rust (version 2)" in ran.err
    assert "0 new adapters, 9 unchanged" in icm("ingest", stored).out


def test_several_new_versions_are_listed_in_one_line(icm: Icm, stored: Path) -> None:
    for name in ("rust", "sql"):
        write_adapter(stored / name, seed=99)
    fact = "2 tasks have a new version, because their adapters changed: rust (version 2), sql (version 2)"
    assert fact in icm("ingest", stored).err


def test_a_conflict_leaves_the_other_tasks_of_the_batch_alone(icm: Icm, stored: Path) -> None:
    write_adapter(stored / "rust", seed=99)
    write_adapter(stored / "verilog", seed=98)
    ran = icm("ingest", stored, "--on-conflict", "fail")
    assert (ran.code, "--on-conflict version|skip" in ran.out) == (ExitCode.PARTLY, True)
    assert "verilog" in names(icm)


def test_another_folder_under_the_name_of_a_known_task_is_a_conflict(icm: Icm, stored: Path, tmp_path: Path) -> None:
    ran = icm("ingest", write_adapter(tmp_path / "other", seed=99), "--name", "rust")
    assert (ran.code, "--on-conflict version|skip" in ran.err) == (ExitCode.FAILED, True)


@pytest.mark.parametrize(("choice", "status", "version"), [("skip", "skipped", 1), ("version", "version", 2)])
def test_a_conflict_is_decided_by_the_option(
    icm: Icm, stored: Path, tmp_path: Path, choice: str, status: str, version: int
) -> None:
    other = write_adapter(tmp_path / "other", seed=99)
    ran = icm("ingest", other, "--name", "rust", "--on-conflict", choice, "--json")
    assert (ran.code, ran.events[0]["status"], ran.events[0]["version"]) == (0, status, version)


def test_a_hostile_folder_name_cannot_reach_the_terminal(icm: Icm, tmp_path: Path) -> None:
    write_adapter(tmp_path / "loras" / "\x1b[2Jx\u202e")
    write_broken(tmp_path / "loras" / "\x1b[2Jy\u202e")
    ran = icm("ingest", tmp_path / "loras")
    assert ran.code == ExitCode.PARTLY
    assert not {"\x1b", "\u202e"} & set(ran.err + ran.out)


def stopping(batches: Callable[..., Iterator[object]]) -> Callable[..., Iterator[object]]:
    """Return the same batches; the user presses Ctrl-C when the first one is handed out."""

    def call(*arguments: object) -> Iterator[object]:
        for number, batch in enumerate(batches(*arguments)):
            if number == 0:
                signal.raise_signal(signal.SIGINT)
            yield batch

    return call


def stop_after(count: int) -> Callable[[Event], None]:
    """Return a listener that stops the work with its nth event."""
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if len(heard) == count:
            raise Cancelled

    return listen


def test_an_ingest_that_is_stopped_at_once_has_stored_nothing(fleet: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled) as stop:
        Fleet(tmp_path / "store", on_event=stop_after(1)).ingest([fleet])
    assert isinstance(stop.value.report, IngestReport)
    assert (stop.value.report.found, stop.value.report.done) == (3, [])


def test_an_ingest_that_is_stopped_between_batches_keeps_the_first(
    icm: Icm, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icmlora.fleet.ingest.files._BATCH_ADAPTERS", 3)
    with pytest.raises(Cancelled) as stop:
        Fleet(tmp_path / "store", on_event=stop_after(3)).ingest([fleet])  # progress, the first task, progress
    assert isinstance(stop.value.report, IngestReport)
    assert [task.task for task in stop.value.report.done] == names(icm) == ["rust"]
    assert stop.value.report.without_vectors == ["rust"]


def test_a_stopped_command_prints_what_it_has_and_exits_with_130(
    icm: Icm, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icmlora.fleet.ingest.files._BATCH_ADAPTERS", 3)
    monkeypatch.setattr("icmlora.fleet.ingest.ingestion.batches", stopping(batches))
    ran = icm("ingest", fleet, "--json")
    assert ran.code == ExitCode.INTERRUPTED
    assert [event["type"] for event in ran.events] == ["task", "summary"]
    assert "1 of 3 tasks" in ran.err.splitlines()[-1]


def test_progress_counts_adapters(fleet: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    Fleet(tmp_path / "store", on_event=heard.append).ingest([fleet])
    assert [(event.done, event.total) for event in heard if isinstance(event, Progress)] == [(0, 9), (9, 9)]


def test_ingest_does_not_need_torch(fleet: Path) -> None:
    assert not {"torch", "transformers", "peft"} & modules_of("ingest", str(fleet))


def test_json_has_a_line_for_each_problem(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    write_broken(fleet / "rust" / "checkpoint-80")
    ran = icm("ingest", fleet, "--json")
    problems = [event for event in ran.events if event["type"] == "problem"]
    assert [(Path(item["path"]).parent.name, item["task"]) for item in problems] == [
        ("bad", None),
        ("checkpoint-80", "rust"),
    ]
    assert (ran.events[-1]["not_taken"], ran.events[-1]["in_part"]) == (1, 1)
    assert problems[0].keys() == {"type", "path", "kind", "message", "hint", "task"}


def test_quiet_says_one_line_for_each_problem(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet, "-q")
    assert (ran.code, ran.out, ran.err.count("\n")) == (ExitCode.PARTLY, "", 1)
