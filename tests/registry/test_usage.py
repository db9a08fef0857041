"""The bill equals the files."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import replace

import pytest

from registry.manifests import Run
from registry.storage.folder import FORMAT_TEXT, RESERVE_BYTES
from registry.store import Store
from tests.registry.examples import BASE, adapter, ingest, put, task, train, vector
from tests.registry.pairs import lose
from tests.shared import paths_of


@pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")
def test_each_use_has_its_bytes(store: Store) -> None:
    files = {"samples": put(store, b"samples"), "eval_data": put(store, b"eval")}
    final = adapter(store, b"weights of rust", card=put(store, b"card"))
    first = ingest(store, "rust", steps=[80], final=final, vectors=(vector(store),), **files)
    train(store, ["rust"], data=b"first one")
    train(store, ["rust"], data=b"now")
    store.save_run(Run(base_model=BASE, config={}, weights=put(store, b"w"), optimizer=put(store, b"oo")))
    store.prune(grace=0)
    train(store, data=b"newest")
    second = task(store, "rust", weights=b"second version").final
    store.publish([replace(store.task("rust"), version=2, final=second, checkpoints=(), code=None)])
    store.blobs.put(b"orphan!")
    usage = store.usage()
    assert usage.originals == second.weights.size + second.config.size
    assert usage.generators == len(b"newest")
    assert usage.old_generators == len(b"now")
    assert usage.vectors == len(b"vector")
    assert usage.texts == len(b"samples") + len(b"eval")
    of_first = final.weights.size + len(b"card") + first.checkpoints[0].weights.size
    assert usage.versions == of_first + len(b"code of rust")
    assert usage.training == 3
    assert usage.unreferenced == len(b"orphan!")
    assert usage.manifests > 0
    assert usage.overhead == RESERVE_BYTES + len(FORMAT_TEXT) + paths_of(store).lock.stat().st_size + gate(store)
    assert usage.database == paths_of(store).database.stat().st_size


def gate(store: Store) -> int:
    return paths_of(store).lock.with_name("lock.gate").stat().st_size


def test_codes_and_checkpoints_of_the_current_version_have_their_own(store: Store) -> None:
    ingest(store, "rust", steps=[80])
    train(store, ["rust"])
    usage = store.usage()
    assert (usage.codes, usage.checkpoints) == (len(b"code of rust"), len(b"weights of rust at 80"))
    assert usage.versions == 0


def test_bytes_with_two_uses_count_once(store: Store) -> None:
    ingest(store, "rust", weights=b"shared")
    ingest(store, "html", weights=b"shared")
    assert store.usage().originals == len(b"shared") + len(b'{"r": 8}')


def test_a_missing_blob_costs_nothing(store: Store) -> None:
    lose(store, ingest(store, "rust").final.weights)
    assert store.usage().originals == len(b'{"r": 8}')


@pytest.mark.skipif(shutil.which("du") is None, reason="there is no du")
@pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")
def test_the_total_is_that_of_du(store: Store) -> None:
    ingest(store, "rust", steps=[80, 90], samples=put(store, b"samples"))
    train(store, ["rust"])
    (paths_of(store).quarantine / "damaged").write_bytes(b"12345")
    files = [str(path) for path in paths_of(store).root.rglob("*") if path.is_file()]
    answer = subprocess.run(["du", "-bc", *files], capture_output=True, text=True, check=True)
    assert store.usage().total == int(answer.stdout.splitlines()[-1].split()[0])


@pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")
def test_the_lock_file_of_a_job_is_overhead_that_prune_does_not_promise_to_free(store: Store) -> None:
    before = store.usage()
    with store.job(BASE):
        pass
    locks = sum(path.stat().st_size for path in paths_of(store).jobs.iterdir())
    after = store.usage()
    assert (after.unreferenced, after.overhead) == (before.unreferenced, before.overhead + locks)
    assert locks > 0


def test_the_bill_reads_no_manifest_of_a_task(store: Store) -> None:
    state = ingest(store, "rust", samples=put(store, b"samples"))
    before = store.usage()
    freed = store.manifests.delete([str(state.manifest)], newest=math.inf)
    assert store.usage() == replace(before, manifests=before.manifests - freed)
