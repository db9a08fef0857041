"""`icm evict` beside damage: whatever is lost of an adapter, its original stays, and the others go on."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_cli.errors import ExitCode
from registry.manifests import Task
from registry.store import Store
from tests.cli.coded import damage
from tests.cli.conftest import Ran
from tests.cli.test_evict import ALL, blob_bytes, evicted, finals, tasks_of
from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora
from tests.icmlora.tiny_base import HIDDEN

Icm = Callable[..., Ran]
BIG = 10 << 20  # bytes of a head: more than a record of references can have
PARTS = ["head", "bias", "tokenizer.json", "configuration", "code", "generator", "original"]


@pytest.fixture(scope="session")
def headed_template(trained_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained store with one task more, `headed`, that has extras of each kind; made once, not to be changed."""
    folder = tmp_path_factory.mktemp("headed")
    store = Path(shutil.copytree(trained_template, folder / "store"))
    lora = write_lora(folder / "headed", seed=5, bias="lora_only", modules_to_save=["lm_head"])
    file, random = lora / "adapter_model.safetensors", torch.Generator().manual_seed(5)
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = torch.randn(BIG // 4 // HIDDEN, HIDDEN, generator=random)
    tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.randn(HIDDEN, generator=random)
    save_file(tensors, file, metadata={"format": "pt"})
    (lora / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    icm_quietly(store, "ingest", lora, "--no-vectors")
    train_store(store, "--fresh")
    return store


@pytest.fixture
def headed(headed_template: Path, tmp_path: Path) -> Iterator[Path]:
    store = Path(shutil.copytree(headed_template, tmp_path / "store"))
    yield store
    shutil.rmtree(store)  # 20 MiB for each of many tests


def digest_of(store: Path, part: str) -> str:
    """Return the blob of one part of the task `headed`."""
    with Store.open(store) as opened:
        task = opened.task("headed")
        final, code = task.final, task.code
        assert code is not None
        head, *small = sorted((extra for extra in final.extras if extra.file is None), key=lambda extra: -extra.size)
        others = {extra.file: extra.blob for extra in final.extras if extra.file}
    assert head.packed_size > 8 << 20
    found = {"head": head.blob, "bias": small[0].blob, "configuration": final.config, "original": final.weights}
    return (found | others | {"code": code.blob, "generator": code.generator})[part]


@pytest.mark.parametrize("how", ["flipped", "missing"])
@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_that_could_not_come_back_is_named_and_kept(icm: Icm, headed: Path, part: str, how: str) -> None:
    digest, original = digest_of(headed, part), finals(headed)["headed"].weights
    if how == "flipped":
        damage(headed, digest)
    else:
        (headed / "blobs" / digest[0] / digest).unlink()
    ran = icm(*ALL, "--json")
    told = tasks_of(ran)["headed"]
    assert (ran.code, told["status"], "headed" in evicted(headed)) == (ExitCode.PARTLY, "kept", False)
    assert digest in told["reason"]
    names = {"head": "a tensor", "bias": "a tensor", "configuration": "its configuration", "tokenizer.json": part}
    assert names.get(part, "") in told["reason"]
    assert part == "original" or (headed / "blobs" / original[0] / original).is_file()
    assert evicted(headed) == (set() if part == "generator" else {"poems", "rules", "silent"})


def test_with_all_its_parts_it_goes_and_comes_back(icm: Icm, headed: Path, tmp_path: Path) -> None:
    icm("materialize", "headed", "-o", tmp_path / "before")
    assert (icm(*ALL).code, "headed" in evicted(headed)) == (0, True)
    assert icm("materialize", "headed", "-o", tmp_path / "after").code == 0
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    for name in ("base_model.model.lm_head.weight", "base_model.model.model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(before[name], after[name])


def test_an_adapter_whose_manifest_lacks_tensors_is_kept(icm: Icm, headed: Path) -> None:
    head, bias = digest_of(headed, "head"), digest_of(headed, "bias")
    with Store.open(headed) as store:

        def mixed_up(task: Task) -> Task:
            extras = tuple(
                replace(extra, file="a" if extra.blob == head else extra.file)
                for extra in task.final.extras
                if extra.blob != bias
            )
            return replace(task, final=replace(task.final, extras=extras))

        store.update("headed", mixed_up)
    assert (icm(*ALL).code, "headed" in evicted(headed)) == (ExitCode.PARTLY, False)


def test_checkpoints_stay_with_a_final_adapter_that_is_damaged(icm: Icm, trained: Path) -> None:
    damage(trained, finals(trained)["poems"].config)
    before = blob_bytes(trained)
    assert icm("evict", "--checkpoints-only", "--max-error", "0.7").code == ExitCode.PARTLY
    assert blob_bytes(trained) == before


class TestInterrupted:
    """A manifest that says "evicted" while the weights are there, as a kill leaves it."""

    @pytest.fixture
    def marked(self, icm: Icm, trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(Store, "free", lambda *_: None)
            assert icm(*ALL).code == 0
        return trained

    def test_the_next_eviction_finishes_it(self, icm: Icm, marked: Path) -> None:
        planned = icm(*ALL, "--dry-run", "--json").events[-1]
        before = blob_bytes(marked)
        ran = icm(*ALL, "--json")
        assert (ran.code, {task["status"] for task in tasks_of(ran).values()}) == (0, {"known"})
        assert planned["freed"] == ran.events[-1]["freed"] == before - blob_bytes(marked) > 0
        assert tasks_of(ran)["rules"]["left"] > 0
        assert icm(*ALL, "--json").events[-1]["freed"] == 0

    def test_so_does_prune(self, icm: Icm, marked: Path) -> None:
        before = blob_bytes(marked)
        assert icm("verify").code == 0
        icm("prune", "--grace", "0s", "--yes")
        assert blob_bytes(marked) < before
        assert icm("verify", "--read-data").code == 0


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_nothing_is_evicted_while_the_database_is_wrong(icm: Icm, trained: Path, options: tuple[str, ...]) -> None:
    with closing(sqlite3.connect(trained / "registry.db")) as connection, connection:
        connection.execute("UPDATE refs SET gain = 1 WHERE name = 'silent'")
    before = blob_bytes(trained)
    ran = icm(*ALL, "rules", *options, "--json")
    assert (ran.code, "icm verify --repair" in ran.error["hint"]) == (ExitCode.DAMAGED, True)
    assert (evicted(trained), blob_bytes(trained)) == (set(), before)
    assert icm("verify", "--repair", "--yes").code == 0
    assert icm(*ALL, "rules", *options).code == 0
