"""The bill equals the files."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from registry.storage.folder import RESERVE_BYTES
from registry.store import Store
from tests.registry.examples import BASE, generator, ingest, vector
from tests.registry.pairs import lose
from tests.shared import paths_of


@pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")
def test_each_use_has_its_bytes(store: Store) -> None:
    ingest(store, "rust", steps=[80], samples=b"samples", eval_data=b"eval", card=b"card")
    store.vectors.add([vector(store, "rust")])
    store.generators.add(generator(store, ["rust"], data=b"first one"))
    store.generators.add(generator(store, ["rust"], data=b"now"))
    run = store.runs.start(BASE, {})
    store.runs.save_checkpoint(run.id, step=1, weights=b"w", optimizer=b"oo")
    store.blobs.put(b"orphan!")
    usage = store.usage()
    assert usage.originals == len(b"weights of rust") + len(b'{"r": 8}') + len(b"card")
    assert usage.checkpoints == len(b"weights of rust at 80")
    assert usage.generators == len(b"now")
    assert usage.codes == len(b"code of rust")
    assert usage.vectors == len(b"vector")
    assert usage.texts == len(b"samples") + len(b"eval")
    assert usage.old_generators == len(b"first one")
    assert usage.training == 3
    assert usage.unreferenced == len(b"orphan!")
    assert usage.overhead == RESERVE_BYTES + len("icm store 2\n") + paths_of(store).lock.stat().st_size
    assert usage.database == paths_of(store).database.stat().st_size


def test_bytes_with_two_uses_count_once(store: Store) -> None:
    ingest(store, "rust", weights=b"shared")
    ingest(store, "html", weights=b"shared")
    assert store.usage().originals == len(b"shared") + len(b'{"r": 8}')


def test_a_missing_blob_costs_nothing(store: Store) -> None:
    ingest(store, "rust")
    lose(store, store.tasks.final("rust").weights)
    assert store.usage().originals == len(b'{"r": 8}')


@pytest.mark.skipif(shutil.which("du") is None, reason="there is no du")
@pytest.mark.kept_in("sqlite", "folder", reason="the files of a store folder")
def test_the_total_is_what_du_says_of_the_files(store: Store) -> None:
    ingest(store, "rust", steps=[80, 90], samples=b"samples")
    store.generators.add(generator(store, ["rust"]))
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
