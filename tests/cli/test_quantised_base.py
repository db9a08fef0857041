"""`icm base add --load-in`, and how every command says that a figure was measured on such a base model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from icm_cli.errors import ExitCode
from tests.cli.conftest import Ran
from tests.icmlora.base_models.test_gguf import write_tiny_gguf
from tests.icmlora.tiny_base import LABEL

Icm = Callable[..., Ran]
CPU = ("--device", "cpu")


@pytest.fixture
def base(mixed_template: Path) -> Path:
    return mixed_template / "base"


@pytest.fixture
def in_nf4(icm: Icm, trained: Path, base: Path, plain_gains: None) -> None:
    """A trained store whose base model is loaded in nf4, with a gain for every task that has text."""
    pytest.importorskip("bitsandbytes")
    assert icm("base", "add", LABEL, base, "--load-in", "nf4").code == 0
    assert icm("eval", "poems", *CPU).code == 0


def test_it_is_told_listed_and_taken_back(icm: Icm, trained: Path, base: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert (
        icm("base", "add", LABEL, base, "--load-in", "int8").out
        == f"set location of {LABEL} to {base}, loaded in int8\n"
    )
    assert "loaded in int8" in icm("base", "ls").out
    assert icm("base", "ls", "--json").document[0]["load_in"] == "int8"
    assert icm("base", "add", LABEL, base, "--json").document["load_in"] is None
    assert icm("base", "ls", "--json").document[0]["load_in"] is None


def test_every_figure_says_it(icm: Icm, in_nf4: None, tmp_path: Path) -> None:
    ran = icm("eval", "poems", *CPU)
    assert "measured with the base model in nf4" in ran.err
    assert [line.endswith(" nf4") for line in ran.out.splitlines() if line.startswith("retained gain")] == [True] * 2
    events = icm("eval", "poems", *CPU, "--json").events
    assert (events[0]["precision"], events[1]["precisions"]) == ("nf4", ["nf4"])
    gain = f"{events[0]['sources']['code']['retained_gain']:.3f}"
    for command in (["ls"], ["stats", "-v"], ["show", "poems"]):
        assert f"{gain} nf4" in icm(*command).out, command
    assert icm("ls", "--json").document[0]["precision"] == "nf4"
    evicted = icm("evict", "poems", "--min-gain", "0.1", "--dry-run", "--json", *CPU).events[0]
    assert (evicted["precision"], evicted["status"]) == ("nf4", "would_evict")
    icm("materialize", "poems", "-o", tmp_path / "out", "--source", "code")
    assert " nf4 |" in (tmp_path / "out" / "README.md").read_text()
    icm("export", tmp_path / "fleet.icm")
    assert icm("ls", "--from", tmp_path / "fleet.icm", "--json").document[0]["precision"] == "nf4"
    icm("report", "-o", tmp_path / "fleet.html")
    assert "measured with the base model in nf4" in (tmp_path / "fleet.html").read_text()


def test_full_precision_goes_unsaid(icm: Icm, trained: Path, plain_gains: None) -> None:
    ran = icm("eval", "poems", *CPU)
    shown = (ran.out, ran.err, icm("stats", "-v").out, icm("show", "poems").out)
    assert not any("float32" in text for text in shown)
    assert icm("ls", "--json").document[0]["precision"] == "float32"


def test_a_gguf_file_is_refused(icm: Icm, trained: Path, tmp_path: Path) -> None:
    before = icm("base", "ls").out
    ran = icm("base", "add", LABEL, write_tiny_gguf(tmp_path / "tiny.gguf"), "--load-in", "nf4")
    assert (ran.code, "the weights in a GGUF file are already quantised" in ran.err) == (ExitCode.FAILED, True)
    assert icm("base", "ls").out == before


def test_without_bitsandbytes_nothing_is_stored(
    icm: Icm, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("icmlora.base_models.finding.lookup.find_spec", lambda name: None)
    ran = icm("base", "add", LABEL, base, "--load-in", "nf4")
    assert ran.code == ExitCode.FAILED
    assert "hint: install the extra: pip install 'icm-lora[quantized]'" in ran.err
    assert not (tmp_path / "store").exists()


def test_memory_that_runs_out_in_a_command_is_one_clear_error(
    icm: Icm, started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr("icmlora.base_models.kinds.causal_lm.CausalLM.context_state", measure)
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({"text": f"geese {number}"}) + "\n" for number in range(8)))
    ran = icm("generate", "geese", "--samples", samples, "-o", tmp_path / "out", *CPU, "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "out_of_memory")
    assert ran.error["message"] == "this machine ran out of memory"
