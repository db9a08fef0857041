"""One broken task beside good ones: every command that works on many tasks does the good ones and names the bad one."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_cli.app import run
from icm_cli.errors import ExitCode
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran
from tests.cli.tiny_fleet import STEPS, icm_quietly, write_lora, write_subject
from tests.icmlora.tiny_base import LABEL
from tests.shared import use_config_of

Icm = Callable[..., Ran]
CPU = ("--device", "cpu")
FOR_BASE = ("--base-model", LABEL)
GOOD = ("poems", "rules", "apples", "pears")


def name_of(kind: str) -> str:
    """Return what the bad task of a kind is called."""
    return f"bad-{kind.replace(' ', '-')}"


def write_bad(folder: Path, kind: str, base: str = LABEL) -> Path:
    """Write an adapter with texts of its own."""
    # Equal files are stored once: a configuration of its own is damaged for this task alone.
    own = {"lora_dropout": len(kind) / 1000}
    task = write_lora(folder / name_of(kind), seed=len(kind), base_model_name_or_path=base, **own)
    for name, count in (("samples", 16), ("eval", 2)):
        rows = [json.dumps({"text": f"{kind} has words of its own {number} in {name}"}) for number in range(count)]
        (task / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return task


def changed(task: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    file = task / "adapter_model.safetensors"
    save_file(dict(change(*pair) for pair in load_file(file).items()), file, metadata={"format": "pt"})


def write_base(store: Path, folder: Path, label: str, config: dict[str, object]) -> None:
    """Write a base model that is not one, and tell the store where it is."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    icm_quietly(store, "base", "add", label, folder)


def digest_of(store: Path, task: str, what: str) -> str:
    """Return the digest of a file of a task."""
    with Store.open(store) as opened:
        known = opened.task(task)
    assert known.code is not None
    files = {
        "weights": known.final.weights,
        "config": known.final.config,
        "code": known.code.blob,
        "vectors": known.vectors[0].blob,
        "samples": known.samples,
        "eval": known.eval_data,
    }
    return str(files[what])


DAMAGED = tuple(f"damaged {what}" for what in ("weights", "config", "code", "vectors", "samples", "eval"))
OTHERS = ("diverged", "not finite", "of other modules", "without texts", "without its base", "not run", "broken base")
FEW = ("damaged weights", "not finite")
ALL = pytest.param((*DAMAGED, *OTHERS), id="all", marks=pytest.mark.slow)
EACH = [pytest.param((kind,), id=kind, marks=pytest.mark.fault) for kind in (*DAMAGED, *OTHERS)]


def break_store(store: Path, folder: Path, kinds: Sequence[str]) -> None:
    """Ingest a task of each kind, and damage those that are to be damaged."""
    damaged = [kind for kind in kinds if kind in DAMAGED]
    for kind in damaged:
        write_bad(folder / "damaged", kind)
    if damaged:
        icm_quietly(store, "ingest", folder / "damaged", *CPU)
        icm_quietly(store, "train", "--update", "--no-eval", "--refine", "0", "--steps", STEPS, *CPU)
        for kind in damaged:
            damage(store, digest_of(store, name_of(kind), kind.split()[1]))
    for kind in kinds:
        if kind in OTHERS:
            write_other(store, folder, kind)
    if len(damaged) < len(kinds):
        icm_quietly(store, "ingest", folder / "others", "--no-vectors")


def write_other(store: Path, folder: Path, kind: str) -> None:
    """Write a task of a kind that is broken before it is ingested."""
    others = {"without its base": "other/nowhere", "not run": "other/depth", "broken base": "other/broken"}
    task = write_bad(folder / "others", kind, others.get(kind, LABEL))
    match kind:
        case "diverged":
            changed(task, lambda name, value: (name, value * 1e18))
        case "not finite":
            changed(task, lambda name, value: (name, value / 0))
        case "of other modules":
            changed(task, lambda name, value: (name.replace("self_attn", "somewhere_else"), value))
        case "without texts":
            for name in ("samples", "eval"):
                (task / f"{name}.jsonl").unlink()
        case "not run":
            config: dict[str, object] = {"model_type": "dpt", "architectures": ["DPTModel"]}
            write_base(store, folder / "depth", others[kind], config)
        case "broken base":
            write_base(store, folder / "broken", others[kind], {"model_type": "llama", "hidden_size": "wide"})


@pytest.fixture(autouse=True)
def known_base(isolated_home: None, trained_template: Path) -> None:
    """Let each test find the base model."""
    use_config_of(trained_template)


@pytest.fixture(scope="module")
def good(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained store with two tasks more, so that there is a map, and a few-shot start."""
    folder = tmp_path_factory.mktemp("good")
    use_config_of(trained_template)
    shutil.copytree(trained_template, folder / "store")
    for number, name in enumerate(("apples", "pears")):
        write_subject(folder / "more" / name, seed=50 + number)
    icm_quietly(folder / "store", "ingest", folder / "more", *CPU)
    icm_quietly(folder / "store", "train", "--update", "--no-eval", "--refine", "0", *CPU)
    icm_quietly(folder / "store", "train", "--few-shot", "--episodes", "2", *CPU)
    return folder


def called(store: Path, *arguments: object, names: Sequence[str] = ()) -> str:
    """Run a command, and insist that it worked, or worked partly and says for which tasks it did not; return stdout."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(["--store", str(store), *map(str, arguments)])
    text = out.getvalue() + err.getvalue()
    assert "bug in icm" not in text, (arguments, text)
    assert code in (ExitCode.DONE, ExitCode.PARTLY), (arguments, text)
    # An update of a base model without a generator names the base model, not each of its tasks.
    assert code == ExitCode.DONE or "bad-" in text or "has no generator to add tasks to" in text, (arguments, text)
    assert all(name in text for name in names), (arguments, names, text)
    return out.getvalue()


def told(store: Path, *arguments: str) -> dict[str, object]:
    """Return what a command says of each good task."""
    lines = [json.loads(line) for line in called(store, *arguments, *CPU, "--json").splitlines()]
    return {line["task"]: line for line in lines if line.get("task") in GOOD}


def codes(store: Path) -> set[str]:
    """Return the tasks with a code under the generator in use."""
    with Store.open(store) as opened:
        return {row.name for row in opened.rows() if row.is_coded}


COMPARED = (
    ("eval", "--source", "code"),
    ("evict", "--max-error", "0.99", "--dry-run"),
    ("encode", "--refine", "1"),
    ("vectors", "--again"),
)
"""Commands that say something of each task; none changes what a later one says."""


@pytest.fixture(scope="module")
def expected(good: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What they say without a bad task."""
    store = Path(shutil.copytree(good / "store", tmp_path_factory.mktemp("expected") / "store"))
    return [told(store, *arguments) for arguments in COMPARED]


@pytest.mark.parametrize("kinds", [pytest.param(FEW, id="few"), ALL, *EACH])
def test_what_is_done_with_the_good_tasks_is_the_same_beside_bad_ones(
    kinds: Sequence[str], good: Path, expected: list[dict[str, object]], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(good / "store", tmp_path / "store"))
    break_store(store, tmp_path / "loras", kinds)
    samples, page, bundle = good / "more" / "apples" / "samples.jsonl", tmp_path / "page.html", tmp_path / "fleet.icm"
    on_map = json.loads(called(store, "map", "--view", "context", *FOR_BASE, "--json"))["tasks"]
    assert set(GOOD) <= {task["task"] for task in on_map}
    assert "apples" in called(store, "recognize", "--samples", samples, *FOR_BASE, *CPU)
    called(store, "serve", "--print-config", "vllm", *FOR_BASE)
    for arguments in (("ls",), ("stats",), ("duplicates",), ("verify",)):
        called(store, *arguments)
    called(store, "report", "-o", page, *(f"--outputs={name}" for name in ("poems", *map(name_of, kinds))), *CPU)
    assert all(name in page.read_text() for name in GOOD)
    assert set(GOOD) <= set(json.loads(called(store, "export", bundle, *FOR_BASE, "--json"))["tasks"])
    called(store, "eval", *CPU, names=[name_of(kind) for kind in kinds])
    assert [told(store, *arguments) for arguments in COMPARED] == expected
    called(store, "generate", "new", "--samples", samples, "-o", tmp_path / "new", "--count", "8", *FOR_BASE, *CPU)
    called(store, "materialize", "poems", "-o", tmp_path / "poems", "--source", "code")


@pytest.mark.parametrize("kinds", [pytest.param((*DAMAGED, *OTHERS), id="all"), *EACH])
def test_an_update_makes_codes_of_all_good_tasks_and_names_the_bad_ones(
    kinds: Sequence[str], good: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(good / "store", tmp_path / "store"))
    break_store(store, tmp_path / "loras", kinds)
    for name in ("ships", "trains"):
        write_subject(tmp_path / "more" / name)
    icm_quietly(store, "ingest", tmp_path / "more", "--no-vectors")
    called(store, "train", "--update", *CPU, "--refine", "1", "--steps", STEPS)
    assert {"ships", "trains", *GOOD} <= codes(store)


# Tasks with a code are in the test below.
@pytest.mark.slow
@pytest.mark.parametrize("kinds", [pytest.param(OTHERS, id="all"), *EACH[len(DAMAGED) :]])
def test_a_training_takes_all_good_tasks_and_names_the_bad_ones(
    kinds: Sequence[str], good: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(good / "store", tmp_path / "store"))
    break_store(store, tmp_path / "loras", kinds)
    called(store, "train", *CPU, "--refine", "1", "--steps", STEPS)
    called(store, "train", "--few-shot", *CPU, "--episodes", "2", "--base-model", LABEL)
    assert {"silent", *GOOD} <= codes(store)


def test_a_code_whose_original_is_damaged_stays_with_its_generator(icm: Icm, good: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(good / "store", tmp_path / "store"))
    break_store(store, tmp_path / "loras", ["damaged weights"])
    ran = icm("--store", store, "train", "--no-eval", "--refine", "0", *CPU)
    assert (ran.code, "bad-damaged-weights" in ran.err) == (ExitCode.PARTLY, True)
    with Store.open(store) as opened:
        first, second = opened.generators(LABEL)
        used = {row.name: row.generator for row in opened.rows()}
    assert (used["bad-damaged-weights"], used["poems"]) == (first.blob, second.blob)


def cut_short(task: Path) -> None:
    file = task / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def without_a_partner(task: Path) -> None:
    file = task / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)


BROKEN_FILES: dict[str, Callable[[Path], object]] = {
    "cut short": cut_short,
    "without a partner": without_a_partner,
    "not finite": lambda task: changed(task, lambda name, value: (name, value / 0)),
    "without weights": lambda task: (task / "adapter_model.safetensors").unlink(),
    "of a broken configuration": lambda task: (task / "adapter_config.json").write_text("{"),
}


# It reads folders, not a store: what is bad of it are files, and neither texts nor base models are asked for.
def test_a_folder_is_converted_as_it_would_be_without_its_broken_adapters(icm: Icm, tmp_path: Path) -> None:
    for seed, name in enumerate(GOOD):
        write_lora(tmp_path / "loras" / name, seed=seed, rank=4)
    assert icm("convert", tmp_path / "loras", tmp_path / "alone", "--rank", "1").code == ExitCode.DONE
    for kind, break_it in BROKEN_FILES.items():
        break_it(write_lora(tmp_path / "loras" / name_of(kind)))
    ran = icm("convert", tmp_path / "loras", tmp_path / "beside", "--rank", "1")
    assert ran.code == ExitCode.PARTLY
    assert [kind for kind in BROKEN_FILES if name_of(kind) not in ran.err] == []
    alone, beside = ({path.name: path for path in (tmp_path / out).iterdir()} for out in ("alone", "beside"))
    assert alone.keys() == beside.keys() == set(GOOD)
    for name, folder in alone.items():
        assert all((beside[name] / file.name).read_bytes() == file.read_bytes() for file in folder.iterdir())
