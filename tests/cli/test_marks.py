"""`icm edit`, and what `icm ls` and `icm show` make of names, tags and notes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.completion import complete_filter, complete_sort, complete_tag, complete_task
from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran, modules_of
from tests.cli.fleet import BASE, write_adapter, write_run

Icm = Callable[..., Ran]


def test_a_task_is_renamed(icm: Icm, stored: Path) -> None:
    assert icm("edit", "rust", "--name", "oxide", "-q").out == "oxide\n"
    assert icm("ls", "-q").out == "oxide\nshakespeare\nsql\n"
    assert icm("edit", "oxide", "--name", "rust", "--json").document[0]["task"] == "rust"


def test_one_name_is_not_for_several_tasks(icm: Icm, stored: Path) -> None:
    ran = icm("edit", "rust", "sql", "--name", "oxide", "--tag", "prod")
    assert (ran.code, "2 tasks cannot all be named 'oxide'" in ran.err) == (ExitCode.FAILED, True)
    assert icm("ls", "-q", "-F", "tag=prod").out == ""


def test_a_name_that_is_taken_changes_nothing(icm: Icm, stored: Path) -> None:
    ran = icm("edit", "rust", "--name", "sql", "--note", "the good one", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "task_conflict")
    assert ran.error["message"] == "there is already a task named 'sql'"
    assert icm("ls", "-q").out == "rust\nshakespeare\nsql\n"
    assert icm("show", "rust", "--json").document["note"] is None


def test_what_is_not_a_name_says_the_rule(icm: Icm, stored: Path) -> None:
    ran = icm("edit", "rust", "--name", "a/b", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "invalid_name")
    assert "a name has letters, digits" in ran.error["message"]


def test_a_renamed_task_still_materializes(icm: Icm, stored: Path, tmp_path: Path) -> None:
    icm("edit", "rust", "--name", "oxide")
    assert icm("materialize", "oxide", "--source", "original", "-o", tmp_path / "out").code == 0
    written = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert written == (stored / "rust" / "adapter_model.safetensors").read_bytes()


def test_a_renamed_task_is_known_when_its_folder_is_ingested_again(icm: Icm, stored: Path) -> None:
    icm("edit", "rust", "--name", "oxide")
    statuses = {event["task"]: event["status"] for event in icm("ingest", stored, "--json").events if "status" in event}
    assert statuses == {"oxide": "known", "shakespeare": "known", "sql": "known"}
    write_adapter(stored / "rust" / "checkpoint-200", seed=200)
    icm("ingest", stored)
    assert icm("ls", "-q").out == "oxide\nshakespeare\nsql\n"
    assert len(icm("show", "oxide", "--json").document["adapters"]) == 4


def test_another_adapter_in_the_folder_of_a_renamed_task_is_a_new_task(icm: Icm, stored: Path) -> None:
    icm("edit", "rust", "--name", "oxide")
    write_adapter(stored / "rust", seed=99)
    icm("ingest", stored / "rust")
    assert icm("ls", "-q").out == "oxide\nrust\nshakespeare\nsql\n"


def test_tags_are_added_shown_counted_and_removed(icm: Icm, stored: Path) -> None:
    done = icm("edit", "rust", "sql", "--tag", "prod", "--tag", "big", "--json").document
    assert [(task["task"], task["tags"]) for task in done] == [("rust", ["big", "prod"]), ("sql", ["big", "prod"])]
    assert icm("edit", "sql", "--untag", "big", "--untag", "prod", "--json").document[0]["tags"] == []
    assert icm("ls", "--tags", "--json").document == [
        {"tag": "big", "tasks_count": 1},
        {"tag": "prod", "tasks_count": 1},
    ]
    assert icm("ls", "--tags", "-q").out == "big\nprod\n"
    assert icm("show", "rust", "--json").document["tags"] == ["big", "prod"]
    assert "big, prod" in icm("show", "rust").out


def test_edit_without_options_shows_what_is_set(icm: Icm, stored: Path) -> None:
    icm("edit", "rust", "--tag", "prod", "--note", "for the demo", "--pin")
    ran = icm("edit", "RUST")
    assert ran.out.split() == ["TASK", "TAGS", "PINNED", "NOTE", "rust", "prod", "yes", "for", "the", "demo"]
    assert icm("edit", "RUST", "--json").document == [
        {"task": "rust", "tags": ["prod"], "note": "for the demo", "pinned": True}
    ]


def test_without_a_tag_in_the_store_ls_says_so(icm: Icm, stored: Path) -> None:
    ran = icm("ls", "--tags")
    assert (ran.code, ran.out, ran.err) == (0, "", "no task has a tag\n")


def test_edit_of_no_task_is_wrong_usage(icm: Icm, stored: Path) -> None:
    assert icm("edit", "--tag", "prod").code == ExitCode.USAGE


def test_a_tag_that_is_added_and_removed_is_refused(icm: Icm, stored: Path) -> None:
    ran = icm("edit", "rust", "--tag", "prod", "--untag", "PROD", "--json")
    assert (ran.code, ran.error["message"]) == (ExitCode.FAILED, "tag 'prod' is both added and removed")


def test_a_note_is_kept_shown_and_removed(icm: Icm, stored: Path) -> None:
    assert icm("edit", "rust", "--note", "for the demo\nin spring").code == 0
    assert "for the demo in spring" in icm("show", "rust").out
    assert icm("show", "rust", "--json").document["note"] == "for the demo\nin spring"
    assert icm("edit", "rust", "--no-note", "--json").document[0]["note"] is None


def test_a_note_that_is_given_and_removed_is_wrong_usage(icm: Icm, stored: Path) -> None:
    assert icm("edit", "rust", "--note", "text", "--no-note").code == ExitCode.USAGE


def test_an_empty_note_names_the_way_to_remove_it(icm: Icm, stored: Path) -> None:
    ran = icm("edit", "rust", "--note", "", "--json")
    assert (ran.code, "--no-note" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_ls_filters_sorts_and_limits(icm: Icm, stored: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "more" / "verse", base_model_name_or_path="acme/llama")
    icm("ingest", tmp_path / "more")
    icm("edit", "rust", "verse", "--tag", "prod")
    assert icm("ls", "-q", "-F", "tag=prod").out == "rust\nverse\n"
    assert icm("ls", "-q", "-F", "tag=prod", "-F", "base~LLAMA").out == "verse\n"
    assert icm("ls", "-q", "--sort", "name:desc", "--limit", 2).out == "verse\nsql\n"
    assert [row["name"] for row in icm("ls", "-F", "rank>=3", "--json").document] == []
    assert [row["tags"] for row in icm("ls", "--sort", "size", "--limit", 1, "--json").document] == [["prod"]]


def test_ls_says_how_many_tasks_the_limit_hides(icm: Icm, stored: Path) -> None:
    assert icm("ls", "--limit", 2).err == "1 more task not shown\n"
    assert icm("ls", "--limit", 1, "-F", "name~s").err == "2 more tasks not shown\n"
    assert icm("ls", "--limit", 3).err == ""


def test_ls_with_a_filter_that_nothing_passes_does_not_ask_for_an_ingest(icm: Icm, stored: Path) -> None:
    ran = icm("ls", "-F", "rank>100")
    assert (ran.code, ran.out, ran.err) == (0, "", "no task matches the filters\n")


@pytest.mark.parametrize("arguments", [("-F", "ranks>=8"), ("--sort", "tag"), ("--limit", "0")])
def test_ls_with_a_wrong_filter_order_or_limit_is_wrong_usage(icm: Icm, stored: Path, arguments: tuple[str]) -> None:
    assert icm("ls", *arguments).code == ExitCode.USAGE


def test_a_wrong_filter_lists_the_fields(icm: Icm, stored: Path) -> None:
    error = icm("ls", "-F", "ranks>=8", "--json").error
    assert (error["kind"], error["message"]) == ("invalid_filter", "there is no field 'ranks'")
    assert "fields: name, base, rank, size, code" in error["hint"]


def test_a_bundle_is_listed_whole(icm: Icm, tmp_path: Path) -> None:
    assert icm("ls", "--from", tmp_path / "fleet.icm", "--limit", 3).code == ExitCode.USAGE


def test_ls_has_a_column_for_tags_only_if_a_task_has_some(icm: Icm, stored: Path) -> None:
    assert "TAGS" not in icm("ls").out
    icm("edit", "rust", "--tag", "prod")
    assert icm("ls").out.splitlines()[0].endswith("TAGS")


def test_ls_has_a_column_for_extras_only_if_a_task_has_some(icm: Icm, stored: Path, tmp_path: Path) -> None:
    assert "EXTRAS" not in icm("ls").out
    write_run(tmp_path / "chat", steps=())
    (tmp_path / "chat" / "tokenizer.json").write_text('{"version": "1.0"}')
    icm("ingest", tmp_path / "chat")
    assert "EXTRAS" in icm("ls").out


def test_ls_with_filters_imports_neither_torch_nor_numpy(stored: Path) -> None:
    assert not {"torch", "numpy"} & modules_of("ls", "-F", "rank>=2", "--sort", "gain")


def test_fields_complete_with_their_operators(stored: Path) -> None:
    assert complete_filter("ra") == ["rank=", "rank!=", "rank>", "rank>=", "rank<", "rank<="]
    assert "tag=" in complete_filter("")


def test_values_complete_after_the_operator(icm: Icm, stored: Path) -> None:
    icm("edit", "rust", "--tag", "prod")
    assert complete_filter("tag=p") == ["tag=prod"]
    assert complete_filter("base~") == [f"base~{BASE}"]
    assert complete_filter("name!=s") == ["name!=shakespeare", "name!=sql"]
    assert complete_filter("status=c") == ["status=coded"]
    assert complete_filter("rank>=") == []


def test_orders_and_tags_complete(icm: Icm, stored: Path) -> None:
    icm("edit", "rust", "--tag", "prod")
    assert complete_sort("si") == ["size", "size:desc"]
    assert complete_tag("") == ["prod"]
    assert complete_task("S") == ["shakespeare", "sql"]


def test_completion_without_a_store_offers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_STORE", str(tmp_path / "nowhere"))
    assert (complete_task(""), complete_tag(""), complete_filter("tag=")) == ([], [], [])
