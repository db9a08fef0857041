"""`icm report`: what is printed, written and refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran, modules_of
from tests.cli.tiny_fleet import write_lora

Icm = Callable[..., Ran]


def test_it_says_what_was_written_and_how_large_it_is(icm: Icm, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "fleet.html"
    ran = icm("report", "-o", page)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"wrote {page}: 3 tasks, ")
    assert page.read_bytes().startswith(b"<!doctype html>")


def test_json_is_one_document_about_the_page(icm: Icm, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "fleet.html"
    document = icm("report", "-o", page, "--json").document
    assert document == {
        "output": str(page),
        "size": page.stat().st_size,
        "tasks_count": 3,
        "maps": [],
        "quality": "relative error",
        "outputs": [],
        "pictures": [],
        "failed": [],
    }


def test_quiet_prints_the_path_alone(icm: Icm, trained: Path, tmp_path: Path) -> None:
    assert icm("report", "-o", tmp_path / "fleet.html", "-q").out == f"{tmp_path / 'fleet.html'}\n"


def test_a_page_that_exists_is_replaced_with_force_only(icm: Icm, trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "fleet.html"
    page.write_text("mine")
    refused = icm("report", "-o", page)
    assert (refused.code, page.read_text(), "--force" in refused.err) == (ExitCode.FAILED, "mine", True)
    assert icm("report", "-o", page, "--force").code == 0
    assert page.read_text() != "mine"


@pytest.mark.slow
def test_it_needs_neither_torch_nor_matplotlib(trained: Path, tmp_path: Path) -> None:
    assert not {"torch", "matplotlib", "transformers"} & modules_of("report", "-o", str(tmp_path / "fleet.html"))


def test_outputs_of_chosen_tasks_are_on_the_page(icm: Icm, trained: Path, tmp_path: Path) -> None:
    page, prompts = tmp_path / "fleet.html", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "text number"}\n')
    options = ("--prompts", prompts, "--max-new-tokens", 4, "--device", "cpu", "--json")
    document = icm("report", "-o", page, "--outputs", "poems", "--outputs", "silent", *options).document
    assert (document["outputs"], document["failed"]) == (["poems", "silent"], [])
    assert page.read_text().count("<blockquote") == 2


@pytest.mark.slow
def test_a_task_without_outputs_is_named_and_the_exit_code_says_partly(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "other", base_model_name_or_path="acme/none"), "--no-vectors")
    page = tmp_path / "fleet.html"
    chosen = ("--outputs", "poems", "--outputs", "silent", "--outputs", "other")
    ran = icm("report", "-o", page, *chosen, "--max-new-tokens", 2, "--device", "cpu", "--json")
    reasons = {entry["task"]: entry["reason"] for entry in ran.document["failed"]}
    assert (ran.code, ran.document["outputs"], set(reasons)) == (ExitCode.PARTLY, ["poems"], {"silent", "other"})
    assert "no held-out text" in reasons["silent"]
    told = icm("report", "-o", page, *chosen, "--max-new-tokens", 2, "--device", "cpu", "--force")
    assert (told.code, "silent: it has no held-out text" in told.err) == (ExitCode.PARTLY, True)
    assert "no outputs for 1 task (other): " in told.err


@pytest.mark.parametrize("options", [("--outputs", "nobody"), ("--max-new-tokens", "0"), ("--prompts", "none.txt")])
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    icm: Icm, trained: Path, tmp_path: Path, options: tuple[str, str]
) -> None:
    assert icm("report", "-o", tmp_path / "fleet.html", *options).code in (ExitCode.FAILED, ExitCode.USAGE)
    assert not (tmp_path / "fleet.html").exists()


def test_a_file_of_prompts_that_is_missing_is_named(icm: Icm, trained: Path, tmp_path: Path) -> None:
    ran = icm("report", "-o", tmp_path / "fleet.html", "--outputs", "poems", "--prompts", tmp_path / "none.txt")
    assert (ran.code, str(tmp_path / "none.txt") in ran.err) == (ExitCode.FAILED, True)


def test_without_a_store_it_says_so(icm: Icm, tmp_path: Path) -> None:
    assert icm("report", "-o", tmp_path / "fleet.html").code == ExitCode.NO_STORE


def test_errors_of_a_code_are_shown_by_kind_of_module(icm: Icm, trained: Path) -> None:
    document = icm("show", "poems", "--errors", "--json").document
    groups = {entry["group"]: set(entry["errors"]) for entry in document["errors"]}
    assert groups
    assert set().union(*groups.values()) == {"code"}
    printed = icm("show", "poems", "--errors")
    assert (printed.code, "ERROR OF CODE" in printed.out, all(name in printed.out for name in groups)) == (
        0,
        True,
        True,
    )
    assert icm("show", "poems", "--json").document["errors"] is None


def test_errors_without_an_original_are_refused(icm: Icm, trained: Path) -> None:
    icm("evict", "poems", "--max-error", "0.9")
    ran = icm("show", "poems", "--errors")
    assert (ran.code, "so its code cannot be compared with it" in ran.err) == (ExitCode.FAILED, True)


@pytest.mark.slow
def test_a_report_of_image_tasks_says_how_far_their_pictures_are_apart(icm: Icm, tmp_path: Path) -> None:
    from tests.icmlora.fleet.image_store import write_images  # imports diffusers

    write_images(tmp_path / "made")
    how = ("--steps", 1, "--seeds", 2, "--image-size", 32, "--device", "cpu", "--store", tmp_path / "made" / "store")
    document = icm("report", "-o", tmp_path / "a.html", "--outputs", "pear", *how, "--json").document
    (pictures,) = document["pictures"]
    assert (pictures["task"], pictures["sources"]) == ("pear", ["base model", "original", "code"])
    assert 0 < pictures["to_original"]["code"] < pictures["between_seeds"]
    ran = icm("report", "-o", tmp_path / "b.html", "--outputs", "pear", "--outputs", "loha", *how)
    assert (ran.code, "pear, image distance: base model to original " in ran.out) == (ExitCode.PARTLY, True)
    assert "loha: its file has no trigger words" in ran.err
