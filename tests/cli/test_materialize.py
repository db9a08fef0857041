"""`icm materialize`."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from icm_cli.errors import ExitCode
from icmlora.adapter.metrics import squared_error
from icmlora.formats.discovery.folder import load_adapter
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran, modules_of
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.tiny_base import LABEL, tiny_model

Icm = Callable[..., Ran]
SOURCES = ("original", "code", "recalled")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def blob_of(store: Path, task: str, source: str) -> str:
    """Return the blob that a source cannot do without."""
    with Store.open(store) as opened:
        known = opened.task(task)
    assert known.code is not None
    return {"original": known.final.weights, "code": known.code.blob, "recalled": known.vectors[0].blob}[source]


@pytest.mark.one_case
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("task", ["poems", "rules", "silent"])
def test_peft_loads_every_key(icm: Icm, trained: Path, tmp_path: Path, task: str, source: str) -> None:
    assert icm("materialize", task, "-o", tmp_path / "out", "--source", source).code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # which PEFT gives for a missing key
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name].float()) for name in stored)


def test_what_peft_adds_to_the_weights_is_what_was_trained(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("materialize", "rules", "-o", tmp_path / "out", "--source", "code")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(tiny_model(), tmp_path / "out").merge_and_unload()
    adapter = load_adapter(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    change = model.get_submodule(name).weight - tiny_model().get_submodule(name).weight
    module = next(module for module in adapter.modules if module.name == name)
    torch.testing.assert_close(change, module.b @ module.a, rtol=1e-4, atol=1e-5)


def test_an_original_comes_back_byte_for_byte(icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path) -> None:
    icm("materialize", "poems", "-o", tmp_path / "out")
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors")
    given = {name: (mixed_template / "loras" / "poems" / name).read_bytes() for name in names}
    assert content(tmp_path / "out") == given


def test_an_original_without_a_card_gets_one(icm: Icm, trained: Path, tmp_path: Path) -> None:
    done = icm("materialize", "silent", "-o", tmp_path / "out", "--json").document
    assert done["weights"] in (tmp_path / "out" / "README.md").read_text()


def test_a_code_keeps_what_it_says(icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path) -> None:
    done = icm(
        "materialize", "rules", "-o", tmp_path / "out", "--source", "code", "--dtype", "float32", "--json"
    ).document
    original = load_adapter(mixed_template / "loras" / "rules")
    assert squared_error(original, load_adapter(tmp_path / "out")) == pytest.approx(done["squared_error"], rel=1e-3)
    assert done["relative_error"] ** 2 == pytest.approx(done["squared_error"])


def test_the_card_says_where_it_comes_from(icm: Icm, trained: Path, tmp_path: Path) -> None:
    done = icm("materialize", "rules", "-o", tmp_path / "out", "--source", "code", "--json").document
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(
        text in card
        for text in (
            done["generator"],
            "| source | code |",
            f"| relative error | {done['relative_error']:.4f} |",
            "| retained gain | not measured |",
        )
    )


def test_the_header_of_a_padded_adapter_says_where_it_comes_from(icm: Icm, trained: Path, tmp_path: Path) -> None:
    done = icm("materialize", "rules", "-o", tmp_path / "out", "--source", "code", "--pad-rank", 8, "--json").document
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", framework="pt") as file:
        assert done["generator"] in file.metadata().values()


@pytest.mark.parametrize("rank", [0, -1, "x"])
def test_a_rank_that_is_no_positive_number_is_wrong_usage(
    icm: Icm, trained: Path, tmp_path: Path, rank: object
) -> None:
    assert icm("materialize", "rules", "-o", tmp_path / "out", "--pad-rank", rank).code == ExitCode.USAGE


@pytest.mark.slow
def test_a_rank_below_that_of_the_adapter_is_refused(icm: Icm, trained: Path, tmp_path: Path) -> None:
    ran = icm("materialize", "rules", "-o", tmp_path / "out", "--source", "code", "--pad-rank", 3, "--json")
    assert (ran.code != 0, "rank 3 is too small" in ran.error["message"]) == (True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_the_json_document_keeps_its_names(icm: Icm, trained: Path, tmp_path: Path, source: str) -> None:
    document = icm("materialize", "poems", "-o", tmp_path / "out", "--source", source, "--json").document
    names = {"task", "output", "source", "generator", "relative_error", "squared_error", "retained_gain", "weights"}
    names |= {"recognized", "format", "left_out", "precision", "claimed"}
    assert (set(document), document["source"]) == (names, source)


def test_quiet_prints_the_folder(icm: Icm, trained: Path, tmp_path: Path) -> None:
    assert icm("materialize", "poems", "-o", tmp_path / "out", "-q").out == f"{tmp_path / 'out'}\n"


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    script = "import sys; from icm_cli.app import run; [run(line.split()) for line in sys.argv[1:]]"
    for number in (1, 2):
        commands = [f"materialize rules -q --source {source} -o {tmp_path}/{source}{number}" for source in SOURCES]
        environment = os.environ | {"OMP_NUM_THREADS": str(number), "PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", script, *commands], env=environment, check=True)
    for source in SOURCES:
        assert content(tmp_path / f"{source}1") == content(tmp_path / f"{source}2")


def test_a_seed_samples_and_the_same_seed_samples_the_same(icm: Icm, trained: Path, tmp_path: Path) -> None:
    for name, options in (("a", ["--seed", 1]), ("b", ["--seed", 1]), ("mean", ["--source", "recalled"])):
        assert icm("materialize", "poems", "-o", tmp_path / name, *options).code == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert b"sampled with seed 1" in content(tmp_path / "a")["README.md"]
    assert content(tmp_path / "a") != content(tmp_path / "mean")


@pytest.mark.parametrize("source", ["original", "code"])
def test_a_seed_for_what_is_not_sampled_is_wrong_usage(icm: Icm, trained: Path, tmp_path: Path, source: str) -> None:
    assert icm("materialize", "poems", "-o", tmp_path / "out", "--source", source, "--seed", 1).code == ExitCode.USAGE
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_generated_adapter_has_the_task_type_of_its_original(icm: Icm, mixed: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "seq", task_type="SEQ_2_SEQ_LM"), "--device", "cpu")
    icm("train", "--no-eval", "--refine", "0", "--steps", 2)
    for source in ("code", "recalled"):
        icm("materialize", "seq", "-o", tmp_path / source, "--source", source)
        assert json.loads((tmp_path / source / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("source", SOURCES)
def test_a_damaged_blob_is_exit_13_and_nothing_is_written(icm: Icm, trained: Path, tmp_path: Path, source: str) -> None:
    damage(trained, blob_of(trained, "rules", source))
    ran = icm("materialize", "rules", "-o", tmp_path / "new" / "out", "--source", source, "--json")
    assert (ran.code, ran.error["kind"], ran.out) == (ExitCode.DAMAGED, "damaged_blob", "")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_refused_without_force(icm: Icm, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    ran = icm("materialize", "poems", "-o", tmp_path / "out", "--json")
    assert (ran.code, "--force" in ran.error["hint"]) == (ExitCode.FAILED, True)
    assert content(tmp_path / "out") == {"mine": b"mine"}


def test_force_replaces_the_adapter_and_its_card(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("materialize", "rules", "-o", tmp_path / "out", "--source", "code")
    assert icm("materialize", "silent", "-o", tmp_path / "out", "--force").code == 0
    icm("materialize", "silent", "-o", tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--source", "code", "--max-error", 0.7], ExitCode.DONE),
        (["--source", "code", "--max-error", 0.01], ExitCode.TOO_LOSSY),
        (["--source", "code", "--max-error", "nan"], ExitCode.USAGE),
        (["--source", "recalled", "--max-error", 0.7], ExitCode.TOO_LOSSY),
        (["--source", "original", "--max-error", 0], ExitCode.DONE),
        (["--max-error", "-1"], ExitCode.USAGE),
    ],
)
def test_a_limit_on_the_error_is_kept(
    icm: Icm, trained: Path, tmp_path: Path, options: list[object], code: ExitCode
) -> None:
    assert icm("materialize", "poems", "-o", tmp_path / "out", *options).code == code
    assert (tmp_path / "out").exists() == (code == ExitCode.DONE)


@pytest.mark.parametrize(("share", "code"), [(1.001, ExitCode.DONE), (0.999, ExitCode.TOO_LOSSY)])
def test_the_limit_is_a_relative_error(icm: Icm, trained: Path, tmp_path: Path, share: float, code: ExitCode) -> None:
    error = next(row["relative_error"] for row in icm("ls", "--json").document if row["name"] == "poems")
    ran = icm("materialize", "poems", "-o", tmp_path / "out", "--source", "code", "--max-error", error * share)
    assert ran.code == code


@pytest.mark.parametrize("source", ["code", "recalled"])
def test_before_the_first_training_the_hint_names_it(icm: Icm, mixed: Path, tmp_path: Path, source: str) -> None:
    ran = icm("materialize", "poems", "-o", tmp_path / "out", "--source", source, "--json")
    assert (ran.code, "icm train" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_generating_without_vectors_names_the_command_that_makes_them(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("ingest", write_lora(tmp_path / "extra", seed=9), "--no-vectors")
    ran = icm("materialize", "extra", "-o", tmp_path / "out", "--source", "recalled", "--json")
    assert (ran.code, "icm vectors" in ran.error["hint"]) == (ExitCode.FAILED, True)


def test_a_module_that_the_generator_does_not_know_is_an_error_not_damage(
    icm: Icm, trained: Path, tmp_path: Path
) -> None:
    icm("ingest", write_lora(tmp_path / "wide", rank=16), "--device", "cpu")
    ran = icm("materialize", "wide", "-o", tmp_path / "out", "--source", "recalled", "--json")
    assert (ran.code, ran.error["kind"]) == (ExitCode.FAILED, "not_covered")


def test_neither_base_model_nor_gpu_is_asked_for(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr("icmlora.base_models.kinds.causal_lm.CausalLM.load", never)
    monkeypatch.setattr("torch.cuda.is_available", never)
    for source in SOURCES:
        assert icm("materialize", "poems", "-o", tmp_path / source, "--source", source).code == 0


def test_hostile_names_are_printed_escaped(icm: Icm, trained: Path, tmp_path: Path) -> None:
    ran = icm("materialize", "poems\x1b[31m\u202e", "-o", tmp_path / "a\x1b]0;title\x07")
    assert ran.code == ExitCode.FAILED
    assert not {"\x1b", "\u202e", "\x07"} & set(ran.out + ran.err)
    done = icm("materialize", "poems", "-o", tmp_path / "b\x1b[31m")
    assert done.code == 0
    assert "\x1b" not in done.out + done.err


def test_a_hostile_base_model_label_stays_one_line_of_the_card(icm: Icm, tmp_path: Path) -> None:
    label = "acme/x`\n\n# Trusted\n[click](http://evil)"
    icm("ingest", write_lora(tmp_path / "odd", base_model_name_or_path=label), "--no-vectors")
    icm("materialize", "odd", "-o", tmp_path / "out")
    body = (tmp_path / "out" / "README.md").read_text().split("---\n")[2]
    assert "\n# Trusted" not in body


@pytest.mark.one_case
@pytest.mark.parametrize("source", ["code", "recalled"])
@pytest.mark.parametrize("task", ["poems", "rules", "silent"])
def test_a_decoded_adapter_has_the_form_of_its_original_and_no_more_bytes(
    icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path, task: str, source: str
) -> None:
    icm("materialize", task, "-o", tmp_path / "out", "--source", source)
    given, written = mixed_template / "loras" / task, tmp_path / "out"
    name = "adapter_config.json"
    assert (written / name).read_bytes() == (given / name).read_bytes()
    name = "adapter_model.safetensors"
    assert (written / name).stat().st_size == (given / name).stat().st_size
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (mixed_template / "loras" / task, tmp_path / "out")
    )
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }


def test_the_configuration_of_a_padded_adapter_is_the_plain_one(icm: Icm, trained: Path, tmp_path: Path) -> None:
    icm("materialize", "rules", "-o", tmp_path / "out", "--source", "code", "--pad-rank", 8)
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(fields["target_modules"]) == ["down_proj", "k_proj", "q_proj"]
    assert (fields["lora_alpha"], fields["base_model_name_or_path"]) == (fields["r"], LABEL)


# llama.cpp and MLX-LM


@pytest.mark.parametrize(("form", "name"), [("gguf", "a.gguf"), ("mlx", "a")])
@pytest.mark.parametrize(("source", "origin"), [("original", "its original"), ("code", "its code")])
def test_a_converted_adapter_is_announced_as_such(
    icm: Icm, trained: Path, tmp_path: Path, form: str, name: str, source: str, origin: str
) -> None:
    ran = icm("materialize", "rules", "--format", form, "--source", source, "-o", tmp_path / name)
    assert (ran.code, ran.out) == (0, f"{tmp_path / name}\n")
    assert f"wrote rules from {origin}, converted to {form}" in ran.err
    assert "byte for byte" not in ran.err


def test_the_document_names_the_format_and_the_file(icm: Icm, trained: Path, tmp_path: Path) -> None:
    done = icm("materialize", "rules", "--format", "gguf", "-o", tmp_path / "a.gguf", "--json").document
    assert (done["format"], done["output"], done["source"]) == ("gguf", str(tmp_path / "a.gguf"), "original")
    assert icm("materialize", "rules", "-o", tmp_path / "a", "--json").document["format"] == "peft"


def test_files_that_are_left_out_are_told(icm: Icm, trained: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "spoken", seed=9)
    (folder / "tokenizer.json").write_text("{}")
    assert icm("ingest", folder, "--no-vectors").code == 0
    ran = icm("materialize", "spoken", "--format", "mlx", "-o", tmp_path / "out")
    assert "skipped extra files, which only --format peft writes: tokenizer.json" in ran.err
    done = icm("materialize", "spoken", "--format", "mlx", "-o", tmp_path / "again", "--json").document
    assert done["left_out"] == ["tokenizer.json"]


def test_a_bundle_writes_for_llama_cpp_with_the_base_model_that_is_named(
    icm: Icm, trained: Path, mixed_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    icm("export", tmp_path / "fleet.icm")
    monkeypatch.setenv("ICM_STORE", str(tmp_path / "none"))
    words = ("materialize", "rules", "--from", tmp_path / "fleet.icm", "--format", "gguf", "-o", tmp_path / "a.gguf")
    missing = icm(*words, "--json")
    assert (missing.code, "--base-model PATH" in missing.error["hint"]) == (ExitCode.FAILED, True)
    assert icm(*words, "--base-model", mixed_template / "base").code == 0
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "onnx"),
        ("--from", "fleet.icm", "--source", "network"),
        ("--format", "gguf", "--base-model", "somewhere"),
        ("--from", "fleet.icm", "--base-model", "somewhere"),
        ("--from", "fleet.icm", "--format", "mlx", "--base-model", "somewhere"),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_together_are_wrong_usage(
    icm: Icm, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    icm("export", "fleet.icm")
    assert icm("materialize", "rules", "-o", tmp_path / "a.gguf", *words).code == ExitCode.USAGE
    assert not (tmp_path / "a.gguf").exists()


def test_writing_an_original_as_it_is_needs_neither_torch_nor_gguf(trained: Path, tmp_path: Path) -> None:
    assert not {"torch", "gguf"} & modules_of("materialize", "poems", "-o", str(tmp_path / "out"))
