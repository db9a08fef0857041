"""`icm ingest`: what is taken, what is refused, and that the same again changes nothing."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from icmlora import Cancelled, Fleet
from icmlora.fleet.context import Event, Progress
from icmlora.fleet.ingest import IngestReport
from icmlora.fleet.ingest_files import batches
from registry.store import Store
from tests.cli.conftest import Ran, modules_of
from tests.cli.fleet import write_adapter, write_broken, write_run, write_texts

Icm = Callable[..., Ran]


def names(icm: Icm) -> list[str]:
    return icm("ls", "-q").out.split()


def test_a_fleet_becomes_tasks_with_their_checkpoints(icm: Icm, fleet: Path) -> None:
    ran = icm("ingest", fleet)
    assert ran.code == 0
    assert "ingested 3 tasks: 9 new adapters, 0 known" in ran.out
    assert names(icm) == ["rust", "shakespeare", "sql"]


def test_a_single_folder_is_a_task(icm: Icm, tmp_path: Path) -> None:
    icm("ingest", write_adapter(tmp_path / "solo"))
    assert names(icm) == ["solo"]


def test_the_same_again_changes_nothing(icm: Icm, stored: Path, tmp_path: Path) -> None:
    before = sorted(path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file())
    ran = icm("ingest", stored)
    assert "0 new adapters, 9 known" in ran.out
    assert sorted(path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()) == before


def test_the_stored_bytes_are_the_given_bytes(stored: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        final = store.tasks.final("rust")
        task = store.tasks.get("rust")
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
    assert "1 new adapter, 9 known" in icm("ingest", stored).out
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
    }
    assert ran.events[-1]["without_vectors"] == ["rust", "shakespeare", "sql"]


def test_a_dry_run_checks_everything_and_stores_nothing(icm: Icm, fleet: Path, tmp_path: Path) -> None:
    assert "would ingest 3 tasks: 9 new adapters" in icm("ingest", fleet, "-n").out
    assert not (tmp_path / "store").exists()


def test_a_dry_run_finds_what_would_be_refused(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    assert "cut short" in icm("ingest", fleet, "-n").err


def test_a_refusal_ends_the_ingest_with_the_fact_and_the_path(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet)
    assert ran.code == ExitCode.FAILED
    assert "claims a header" in ran.err
    assert str(fleet / "bad") in ran.err


def test_what_is_good_of_the_batch_stays_when_a_refusal_ends_the_ingest(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    icm("ingest", fleet)
    assert names(icm) == ["rust", "shakespeare", "sql"]


def test_with_skip_bad_the_rest_goes_on_and_the_exit_code_says_so(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet, "--skip-bad")
    assert ran.code == ExitCode.PARTLY
    assert "claims a header" in ran.err
    assert names(icm) == ["rust", "shakespeare", "sql"]


def test_a_bad_checkpoint_costs_only_itself(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "rust" / "checkpoint-80")
    assert icm("ingest", fleet, "--skip-bad").code == ExitCode.PARTLY
    assert [entry["step"] for entry in icm("show", "rust", "--json").document["adapters"]] == [100, None]


def test_a_bad_final_adapter_costs_the_task(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "rust")
    icm("ingest", fleet, "--skip-bad")
    assert names(icm) == ["shakespeare", "sql"]


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
    ran = icm("ingest", tmp_path, "--skip-bad")
    assert ran.code == ExitCode.FAILED
    assert "all 2 inputs were refused" in ran.err


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
        samples = store.tasks.get("poems").samples
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
        assert store.blobs.read(str(store.tasks.get("poems").samples)) == texts.read_bytes()


@pytest.mark.parametrize(
    "content",
    [b"{", b'\xef\xbb\xbf{"peft_type": "LORA"}', b'{"peft_type": "LORA", "revision": 5}', b"[" * 99],
    ids=["broken", "bom", "type", "deep"],
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


def test_hints_of_what_is_passed_over_are_given_once_each(icm: Icm, fleet: Path) -> None:
    for name in ("a", "b"):
        write_broken(fleet / name)
    weights = write_adapter(fleet / "c") / "adapter_model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    ran = icm("ingest", fleet, "--skip-bad")
    assert ran.code == ExitCode.PARTLY
    assert ran.err.count("warning: ") == 3
    assert ran.err.count("hint: fetch the file again: it seems cut short\n") == 1
    assert ran.err.count("hint: run 'git lfs pull'\n") == 1


def test_a_folder_above_whose_name_is_no_unicode_is_no_obstacle(icm: Icm, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/fl\xff"))
    write_run(odd / "rust")
    assert icm("ingest", odd).code == 0
    with Store.open(tmp_path / "store") as store:
        assert [row.source for row in store.tasks.adapters("rust")] == [
            f"{tmp_path}/fl\\xff/rust/{place}".rstrip("/") for place in ("checkpoint-80", "checkpoint-100", "")
        ]
    assert "3 known" in icm("ingest", odd).out
    assert icm("show", "rust").code == 0


@pytest.mark.parametrize("folder", [b"\xff", b"\xff/adapter"])
def test_a_name_that_is_no_unicode_is_refused_by_name(icm: Icm, fleet: Path, folder: bytes) -> None:
    write_adapter(Path(os.fsdecode(os.fsencode(fleet) + b"/" + folder)))
    ran = icm("ingest", fleet, "--skip-bad")
    assert ran.code == ExitCode.PARTLY
    assert "cannot name a task" in ran.err
    assert names(icm) == ["rust", "shakespeare", "sql"]
    assert icm("ingest", fleet, "--skip-bad", "--json").code == ExitCode.PARTLY


def test_runs_with_their_adapters_in_a_folder_of_one_name_are_tasks(icm: Icm, tmp_path: Path) -> None:
    for name in ("t1", "t2"):
        write_adapter(tmp_path / "runs" / name / "adapter")
    assert icm("ingest", tmp_path / "runs").code == 0
    assert names(icm) == ["t1", "t2"]
    assert "0 new adapters, 1 known" in icm("ingest", tmp_path / "runs" / "t1" / "adapter").out


def test_folders_that_link_to_the_same_weights_keep_their_own_configurations(icm: Icm, tmp_path: Path) -> None:
    for name, alpha in (("a", 4), ("b", 8), ("other", 0)):
        folder = write_adapter(tmp_path / "loras" / name, lora_alpha=alpha, r=4 if name == "other" else 2)
        (folder / "adapter_model.safetensors").replace(tmp_path / "loras" / "weights")
        (folder / "adapter_model.safetensors").symlink_to("../weights")
    ran = icm("ingest", tmp_path / "loras")
    assert (ran.code, names(icm)) == (0, ["a", "b", "other"])
    with Store.open(tmp_path / "store") as store:
        assert [store.tasks.final(name).original_only is None for name in names(icm)] == [True, True, False]
        for name in ("a", "b", "other"):
            given = tmp_path / "loras" / name / "adapter_config.json"
            assert store.blobs.read(store.tasks.final(name).config) == given.read_bytes()


def test_another_adapter_under_a_known_name_is_a_conflict(icm: Icm, stored: Path) -> None:
    write_adapter(stored / "rust", seed=99)
    ran = icm("ingest", stored)
    assert ran.code == ExitCode.FAILED
    assert "--on-conflict" in ran.err


def test_a_conflict_leaves_the_other_tasks_of_the_batch_alone(icm: Icm, stored: Path) -> None:
    write_adapter(stored / "rust", seed=99)
    write_adapter(stored / "verilog", seed=98)
    assert icm("ingest", stored, "--skip-bad").code == ExitCode.PARTLY
    assert "verilog" in names(icm)


@pytest.mark.parametrize(("choice", "status"), [("skip", "skipped"), ("replace", "replaced")])
def test_a_conflict_is_decided_by_the_option(icm: Icm, stored: Path, choice: str, status: str) -> None:
    write_adapter(stored / "rust", seed=99)
    ran = icm("ingest", stored / "rust", "--on-conflict", choice, "--json")
    assert (ran.code, ran.events[0]["status"]) == (0, status)


def test_a_hostile_folder_name_cannot_reach_the_terminal(icm: Icm, tmp_path: Path) -> None:
    write_adapter(tmp_path / "loras" / "\x1b[2Jx\u202e")
    ran = icm("ingest", tmp_path / "loras")
    assert ran.code != 0
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
    assert (stop.value.report.found, stop.value.report.ingested) == (3, [])


def test_an_ingest_that_is_stopped_between_batches_keeps_the_first(
    icm: Icm, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icmlora.fleet.ingest_files._BATCH_ADAPTERS", 3)
    with pytest.raises(Cancelled) as stop:
        Fleet(tmp_path / "store", on_event=stop_after(3)).ingest([fleet])  # progress, the first task, progress
    assert isinstance(stop.value.report, IngestReport)
    assert [task.task for task in stop.value.report.ingested] == names(icm) == ["rust"]
    assert stop.value.report.without_vectors == ["rust"]


def test_a_stopped_command_prints_what_it_has_and_exits_with_130(
    icm: Icm, fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icmlora.fleet.ingest_files._BATCH_ADAPTERS", 3)
    monkeypatch.setattr("icmlora.fleet.ingest.batches", stopping(batches))
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


def test_warnings_in_json_are_json(icm: Icm, fleet: Path) -> None:
    write_broken(fleet / "bad")
    ran = icm("ingest", fleet, "--skip-bad", "--json")
    warning = json.loads(ran.err.splitlines()[0])
    assert (warning["type"], warning["kind"]) == ("warning", "damaged")


NO_CODE = {
    "diverged": {"value": float("nan")},
    "infinite": {"value": float("inf")},
    "nothing": {"lora_alpha": 0},
    "pissa": {"init_lora_weights": "pissa"},
    "other": {"peft_type": "LOHA"},
    "unlike": {"r": 4},
}


def test_what_can_have_no_code_is_kept_as_its_original_and_says_why(icm: Icm, tmp_path: Path) -> None:
    for name, options in NO_CODE.items():
        write_adapter(tmp_path / "in" / name, **options)  # type: ignore[arg-type]
    assert icm("ingest", tmp_path / "in").code == 0
    rows = {row["name"]: row for row in icm("ls", "--json").document}
    assert sorted(rows) == sorted(NO_CODE)
    reasons = {name: row["original_only"] for name, row in rows.items()}
    words = ("NaN", "Inf", "does nothing", "pissa", "LOHA", "rank 2 but adapter_config.json says 4")
    assert all(word in reasons[name] for name, word in zip(NO_CODE, words, strict=True))
    assert icm("ls").out.count("original only") == len(NO_CODE)
    for name in NO_CODE:
        assert reasons[name] in icm("show", name).out
        icm("materialize", name, "-o", tmp_path / "out" / name)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "out" / name / file).read_bytes() == (tmp_path / "in" / name / file).read_bytes()


def test_a_switch_whose_tensors_are_kept_is_no_reason_against_a_code(icm: Icm, tmp_path: Path) -> None:
    for number, field in enumerate(({"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"})):
        write_adapter(tmp_path / "in" / f"t{number}", **field)
    assert icm("ingest", tmp_path / "in").code == 0
    assert [row["original_only"] for row in icm("ls", "--json").document] == [None] * 3


def test_files_next_to_an_adapter_are_kept_with_it(icm: Icm, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "in" / "rust")
    files = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}", "spiece.model": bytes(range(256))}
    for name, data in {**files, "optimizer.pt": b"state", "notes.txt": b"mine"}.items():
        (folder / name).write_bytes(data)
    assert icm("ingest", folder).code == 0
    assert icm("ls", "--json").document[0]["extras_bytes"] > 0
    shown = icm("show", "rust", "--json").document
    assert {extra["file"] for extra in shown["adapters"][0]["extras"]} == set(files)
    icm("materialize", "rust", "-o", tmp_path / "out")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: written.get(name) for name in files} == files
    assert not {"optimizer.pt", "notes.txt"} & written.keys()
