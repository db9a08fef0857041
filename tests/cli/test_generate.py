"""`icm generate`: an adapter for a task that was never ingested."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from icm_cli.errors import ExitCode
from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.kinds.likelihood import nll
from icmlora.base_models.running.attach import adapted
from icmlora.fleet.few_shot import from_samples, generating
from registry.store import Store
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import icm_quietly, write_subject
from tests.icmlora.tiny_base import load_tiny_base

Icm = Callable[..., Ran]
LINES = [{"text": f"grey geese number {number} of the grey geese"} for number in range(20)]


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "geese.jsonl", LINES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "adapter"


@pytest.fixture
def generate(icm: Icm, started: Path, samples: Path, out: Path) -> Callable[..., Ran]:
    """Return a function that generates `geese` with some more options; without a context, unless one asks for it."""

    def call(*options: object, name: str = "geese", file: Path = samples, folder: Path = out) -> Ran:
        return icm("generate", name, "--samples", file, "-o", folder, "--device", "cpu", "--context", "0", *options)

    return call


def write_lines(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Press Ctrl-C once, before the first step of a part of the work."""

    def work(*arguments: Any, **options: Any) -> Any:
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        pids.clear()
        return real(*arguments, **options)

    module = generating if hasattr(generating, at) else from_samples
    real, pids = getattr(module, at), [os.getpid()]
    monkeypatch.setattr(module, at, work)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("this is not to be reached")


def names(icm: Icm) -> list[str]:
    return [row["name"] for row in icm("ls", "--json").document]


Generate = Callable[..., Ran]


@pytest.mark.slow
def test_it_writes_a_folder_that_peft_loads_and_that_helps_on_the_samples(
    generate: Generate, samples: Path, out: Path, tmp_path: Path
) -> None:
    document = generate("--json").document
    base, examples = load_tiny_base(tmp_path / "base"), parse_examples(samples.read_bytes())
    without = nll(base.model, base.tokenizer, examples, max_tokens=128).value
    with adapted(base, out):
        found = nll(base.model, base.tokenizer, examples, max_tokens=128).value
    assert found < without
    assert document["base_nats_per_token"] == pytest.approx(without, abs=0.05)
    assert document["nats_per_token"] == pytest.approx(found, abs=0.05)


def test_json_keeps_its_names(generate: Generate) -> None:
    document = generate("--json").document
    assert set(document) == {
        "task", "output", "base_model", "generator", "samples_count", "rank", "base_nats_per_token", "nats_per_token",
        "nearest", "farther_than", "outside", "code_size", "code_relative_error", "code_squared_error",
        "weights", "samples_at_limit", "precision", "context_samples", "context_tokens", "measured", "described",
    }  # fmt: skip
    assert (document["task"], document["samples_count"], document["code_size"]) == ("geese", 20, None)


@pytest.mark.slow
def test_the_same_samples_give_the_same_bytes(generate: Generate, tmp_path: Path) -> None:
    one, other = (generate("--json", folder=tmp_path / name).document for name in ("one", "other"))
    assert one["weights"] == other["weights"]


def test_text_tells_the_losses_and_that_it_is_to_be_measured(generate: Generate, out: Path) -> None:
    ran = generate()
    assert ran.out == f"{out}\n"
    assert "geese from 20 samples, rank 4" in ran.err
    assert "nats per token on these samples" in ran.err
    assert "evaluate it on held-out text" in ran.err
    assert not (out / "context.txt").exists()


def test_the_samples_are_kept_as_context_and_the_two_are_measured_on_others(generate: Generate, out: Path) -> None:
    ran = generate("--context", "100", "--json")
    document, text = ran.document, (out / "context.txt").read_text()
    assert text.count("grey geese number") == document["context_samples"] > 0
    assert document["context_tokens"] <= 100
    assert document["measured"]["samples_count"] == 4
    card = (out / "README.md").read_text()
    assert "context.txt" in card
    assert f"recommended | {document['measured']['recommended']}" in card
    assert "nats per token on 4 held-out samples: neither " in generate("--context", "100", "--force").err


def test_distilled_samples_are_no_context_and_are_measured_beside_the_adapter(generate: Generate, out: Path) -> None:
    ran = generate("--context", "100", "--distil", 2)
    assert "nats per token on 4 held-out samples: neither " in ran.err
    assert "context: " not in ran.err
    assert not (out / "context.txt").exists()
    card = (out / "README.md").read_text()
    assert "steps of distillation | 2" in card
    assert "recommended" not in card  # there is one way


def test_quiet_prints_the_folder_alone(generate: Generate, out: Path) -> None:
    ran = generate("-q")
    assert (ran.out, ran.err) == (f"{out}\n", "")


def test_without_registering_the_store_knows_nothing_of_it(icm: Icm, generate: Generate) -> None:
    generate()
    assert "geese" not in names(icm)
    assert icm("verify", "-v", "--json").document["findings"] == []


def test_the_card_says_that_nobody_trained_it(generate: Generate, out: Path) -> None:
    generate("--description", "geese\n# in the\x1b[2J fog", "--refine", 2)
    card = (out / "README.md").read_text()
    assert "generated by icm from 20 samples" in card
    assert "| gradient steps after generating | 2 |" in card
    assert "\x1b" not in card
    assert "\n# in" not in card


def test_a_few_samples_of_the_file_are_spread_over_it(generate: Generate, tmp_path: Path) -> None:
    chosen = write_lines(tmp_path / "chosen.jsonl", [LINES[0], LINES[5], LINES[10], LINES[15]])
    some = generate("--count", 4, "--json", folder=tmp_path / "some").document
    same = generate("--json", file=chosen, folder=tmp_path / "same").document
    assert some["samples_count"] == same["samples_count"] == 4
    assert some["weights"] == same["weights"]


@pytest.mark.slow
def test_all_samples_of_the_file_are_read_up_to_64(generate: Generate, tmp_path: Path) -> None:
    lines = [{"text": f"goose {number}"} for number in range(70)]
    assert generate("--json", folder=tmp_path / "few").document["samples_count"] == 20
    many = generate("--json", file=write_lines(tmp_path / "many.jsonl", lines), folder=tmp_path / "many").document
    assert many["samples_count"] == 64


def test_one_sample_is_enough(generate: Generate, out: Path) -> None:
    assert generate("--count", 1).code == 0
    assert (out / "adapter_model.safetensors").exists()


def test_prompts_are_read_and_only_completions_count(generate: Generate, tmp_path: Path) -> None:
    lines = [{"prompt": f"number {number}: ", "completion": "grey geese"} for number in range(4)]
    document = generate("--json", file=write_lines(tmp_path / "pairs.jsonl", lines)).document
    assert document["nats_per_token"] < document["base_nats_per_token"]


@pytest.mark.slow
def test_refining_lowers_the_loss_on_the_samples_further(generate: Generate, tmp_path: Path) -> None:
    plain = generate("--json", folder=tmp_path / "plain").document
    refined = generate("--refine", 10, "--json", folder=tmp_path / "refined").document
    assert refined["nats_per_token"] < plain["nats_per_token"]
    assert refined["rank"] == plain["rank"]


def test_a_rank_is_that_of_what_is_written(generate: Generate, tmp_path: Path) -> None:
    document = generate("--rank", 20, "--json", folder=tmp_path / "wide").document
    assert document["rank"] == 20
    assert json.loads((tmp_path / "wide" / "adapter_config.json").read_text())["r"] == 20


@pytest.mark.slow
def test_a_rank_beyond_all_that_there_is_is_said(generate: Generate) -> None:
    ran = generate("--rank", 256)
    assert ran.code == 0
    assert "requested rank 256, but the samples support only rank " in ran.err


@pytest.mark.slow
def test_samples_of_which_only_the_beginning_is_read_are_counted(generate: Generate, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "long.jsonl", [*LINES[:3], {"text": "grey geese " * 200}])
    ran = generate(file=file, folder=tmp_path / "text")
    assert "used only the first 128 tokens of each sample; 1 sample reached this limit" in ran.err
    assert generate("--json", file=file, folder=tmp_path / "json").document["samples_at_limit"] == 1
    assert "reached this limit" not in generate(folder=tmp_path / "short").err


def test_another_base_model_than_those_of_the_store_is_refused_with_where_to_look(generate: Generate) -> None:
    ran = generate("--base-model", "mistyped")
    assert "there is no generator for mistyped" in ran.err
    assert "run `icm generators` to list generators of other base models" in ran.err


@pytest.mark.slow
def test_the_nearest_tasks_are_named_where_enough_can_be_compared(icm: Icm, generate: Generate, tmp_path: Path) -> None:
    for subject in ("apples", "pears"):
        icm("ingest", write_subject(tmp_path / subject), "--device", "cpu")
    document = generate("--json", folder=tmp_path / "one").document
    assert {row["task"] for row in document["nearest"]} == {"apples", "pears", "poems", "rules"}
    distances = [row["distance"] for row in document["nearest"]]
    assert distances == sorted(distances)
    assert document["outside"] == (document["farther_than"] >= 0.95)
    ran = generate(folder=tmp_path / "two")
    assert "nearest tasks: " in ran.err
    assert ("unlike the stored tasks" in ran.err) == document["outside"]


@pytest.mark.slow
def test_the_samples_of_a_known_task_lie_near_it_and_not_outside(icm: Icm, generate: Generate, tmp_path: Path) -> None:
    for subject in ("apples", "pears"):
        icm("ingest", write_subject(tmp_path / subject), "--device", "cpu")
    document = generate("--json", file=tmp_path / "apples" / "samples.jsonl").document
    assert (document["nearest"][0]["task"], document["outside"]) == ("apples", False)


@pytest.mark.slow
def test_where_too_few_can_be_compared_it_says_that_it_does_not_know(generate: Generate, tmp_path: Path) -> None:
    document = generate("--json", folder=tmp_path / "one").document
    assert (document["nearest"], document["farther_than"], document["outside"]) == ([], None, None)
    assert "distance to stored tasks unknown" in generate(folder=tmp_path / "two").err


class TestRefusals:
    """What is refused, before any work."""

    @pytest.fixture(autouse=True)
    def no_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(generating, "open_base", never)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\n\n",
            b"not json\n",
            b'{"text": 3}\n',
            b'{"text": " "}\n',
            b'{"text": "\\ud800"}\n',
            b"\xff\xfe\n",
            b"[" * 100_000,
        ],
        ids=repr,
    )
    def test_samples_that_are_none(self, generate: Generate, tmp_path: Path, out: Path, data: bytes) -> None:
        (tmp_path / "bad.jsonl").write_bytes(data)
        ran = generate("--json", file=tmp_path / "bad.jsonl")
        assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "data_error")
        assert "bad.jsonl" in ran.error["message"]
        assert not out.exists()

    def test_a_file_that_is_not_there(self, generate: Generate, tmp_path: Path, out: Path) -> None:
        ran = generate("--json", file=tmp_path / "none.jsonl")
        assert (ran.code, "none.jsonl" in ran.error["message"]) == (ExitCode.FAILED, True)
        assert not out.exists()

    def test_a_folder_or_a_pipe_as_samples(self, generate: Generate, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        assert generate(file=tmp_path).code not in (0, ExitCode.USAGE)
        assert generate(file=tmp_path / "pipe").code not in (0, ExitCode.USAGE)

    @pytest.mark.parametrize("name", ["../up", "", "a b", "x\x1b[2J", "con", "a" * 129])
    def test_a_name_that_is_none(self, generate: Generate, out: Path, name: str) -> None:
        ran = generate("--json", name=name)
        assert ran.error["kind"] == "invalid_name"
        assert not out.exists()

    def test_a_folder_that_holds_something(self, generate: Generate, out: Path) -> None:
        out.mkdir()
        (out / "mine").touch()
        assert generate("--json").error["kind"] == "output_exists"
        assert [path.name for path in out.iterdir()] == ["mine"]

    @pytest.mark.parametrize("name", ["poems", "POEMS"])
    def test_a_name_that_is_taken_where_it_is_to_be_registered(self, generate: Generate, out: Path, name: str) -> None:
        ran = generate("--register", "--json", name=name)
        assert ran.error["kind"] == "task_conflict"
        assert "another name" in ran.error["hint"]
        assert "--on-conflict" not in ran.error["hint"]
        assert not out.exists()

    def test_a_rank_that_no_code_has_where_it_is_to_be_registered(self, generate: Generate, out: Path) -> None:
        ran = generate("--register", "--rank", 20, "--json")
        assert "--rank 4" in ran.error["hint"]
        assert not out.exists()

    def test_a_generator_without_a_start(self, icm: Icm, trained: Path, samples: Path, out: Path) -> None:
        ran = icm("generate", "geese", "--samples", samples, "-o", out, "--json")
        assert ran.code == ExitCode.FAILED
        assert "--few-shot" in ran.error["hint"]

    def test_a_store_without_a_generator(self, icm: Icm, mixed: Path, samples: Path, out: Path) -> None:
        ran = icm("generate", "geese", "--samples", samples, "-o", out, "--json")
        assert "icm train`, then `icm train --few-shot" in ran.error["hint"]

    def test_another_base_model(self, generate: Generate) -> None:
        assert "no generator for other/base" in generate("--base-model", "other/base", "--json").error["message"]

    def test_no_store(self, icm: Icm, samples: Path, out: Path) -> None:
        assert icm("generate", "geese", "--samples", samples, "-o", out).code == ExitCode.NO_STORE

    def test_a_damaged_start(self, generate: Generate, started: Path) -> None:
        with Store.open(started, read_only=True) as store:
            (made,) = store.generators()
            path = Path(store.blobs.place(str(made.start)))
        path.chmod(0o644)
        path.write_bytes(b"x" * made.start_size)
        assert generate("--json").code == ExitCode.DAMAGED


@pytest.mark.slow
def test_the_name_of_a_known_task_is_fine_where_nothing_is_registered(icm: Icm, generate: Generate) -> None:
    before = icm("show", "poems", "--json").document
    assert generate(name="poems").code == 0
    assert icm("show", "poems", "--json").document == before


def test_force_replaces_what_is_there(generate: Generate, out: Path) -> None:
    out.mkdir()
    (out / "adapter_config.json").write_text("{}")
    assert generate("--force").code == 0
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_texts_without_a_token_to_predict_are_refused_and_nothing_is_written(
    generate: Generate, tmp_path: Path, out: Path
) -> None:
    ran = generate("--json", file=write_lines(tmp_path / "letters.jsonl", [{"text": "a"}, {"text": "b"}]))
    assert ran.error["kind"] == "data_error"
    assert not out.exists()


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("open_base", ()),
        ("extract_context", ()),
        ("adapt", ()),
        ("finetune", ("--refine", 5)),
        ("distil", ("--distil", 5)),
    ],
)
def test_ctrl_c_writes_nothing(
    icm: Icm,
    generate: Generate,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    options: tuple[object, ...],
) -> None:
    press_ctrl_c(monkeypatch, part)
    ran = generate("--register", *options, "--json")
    assert (ran.code, "nothing was written" in ran.error["message"]) == (ExitCode.INTERRUPTED, True)
    assert not out.exists()
    assert "geese" not in names(icm)
    assert icm("verify", "-v", "--json").document["findings"] == []


@pytest.mark.slow
def test_a_few_shot_start_that_is_trained_meanwhile_does_not_matter(
    icm: Icm, generate: Generate, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_another(*arguments: Any) -> Any:
        icm_quietly(started, "train", "--few-shot", "--episodes", 3, "--device", "cpu")
        return real(*arguments)

    before = generate("--json", folder=tmp_path / "before").document
    real = generating.read_few_shot_start
    monkeypatch.setattr(generating, "read_few_shot_start", train_another)
    ran = generate("--json", folder=tmp_path / "meanwhile")
    assert (ran.code, ran.document["weights"]) == (0, before["weights"])
