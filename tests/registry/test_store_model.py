"""A real store and a dictionary: after any sequence of operations they agree."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from registry.errors import TaskConflict, TaskNotFound
from registry.records import OnConflict
from registry.storage.blobs.content import digest_of
from tests.registry.children import KILLED, run
from tests.registry.examples import eviction, generator, new_store, offer
from tests.registry.pairs import DEFAULT, overwrite, pair

NAMES = st.sampled_from(["rust", "Rust", "html", "sql"])
WEIGHTS = st.sampled_from([b"one", b"two", b"three"])
FRESH = b"fresh"
STEPS = st.sets(st.integers(1, 3), max_size=3)


class StoreModel(RuleBasedStateMachine):
    """Operations on a store and on a dictionary: lower-case name -> (weights, steps)."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp()) / "store"
        self.store = new_store(self.root)
        self.model: dict[str, tuple[bytes, set[int]]] = {}
        self.coded: set[str] = set()
        self.evicted: set[str] = set()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root.parent)

    def forget(self, key: str) -> None:
        """Note that a task has no code any more, and that its original, if there is one, is another."""
        self.coded.discard(key)
        self.evicted.discard(key)

    @rule(name=NAMES, weights=WEIGHTS, steps=STEPS, on_conflict=st.sampled_from(["skip", "replace", "fail"]))
    def ingest(self, name: str, weights: bytes, steps: set[int], on_conflict: OnConflict) -> None:
        offered = offer(self.store, name, weights=weights, steps=sorted(steps), on_conflict=on_conflict)
        key = name.lower()
        known = self.model.get(key)
        if known is not None and known[0] != weights:
            if on_conflict == "fail":
                with pytest.raises(TaskConflict):
                    self.store.tasks.ingest([offered])
                return
            assert self.store.tasks.ingest([offered])[0].status == ("skipped" if on_conflict == "skip" else "replaced")
            if on_conflict == "replace":
                self.model[key] = (weights, steps)
                self.forget(key)
            return
        before = known[1] if known else set()
        assert self.store.tasks.ingest([offered])[0].new == len(steps - before) + (known is None)
        self.model[key] = (weights, before | steps)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name.lower() in self.model:
            self.store.tasks.remove([name], last_copies=[name])
            del self.model[name.lower()]
            self.forget(name.lower())
        else:
            with pytest.raises(TaskNotFound):
                self.store.tasks.remove([name], last_copies=[name])

    @rule(data=st.sampled_from([b"generator 1", b"generator 2"]))
    def train(self, data: bytes) -> None:
        self.store.generators.add(generator(self.store, sorted(self.model), data=data))
        self.coded = set(self.model)

    @precondition(lambda self: self.coded - self.evicted)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.coded - self.evicted)))
        self.store.originals.evict(eviction(self.store, name))
        self.evicted.add(name)

    @precondition(lambda self: self.evicted)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.evicted)))
        weights, steps = self.model[name]
        offered = offer(self.store, name, weights=weights, steps=sorted(steps))
        assert self.store.tasks.ingest([replace(offered, restore=True)])[0].restored >= 1
        self.evicted.remove(name)

    @rule()
    def prune(self) -> None:
        self.store.prune(grace=0)
        assert self.store.prune(grace=0).freed_bytes == 0
        assert [finding.kind for finding in self.store.verify()] == []

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = new_store(self.root)

    @precondition(lambda self: self.model.keys() - self.evicted)
    @rule(data=st.data())
    def damage_and_ingest_again(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.keys() - self.evicted)))
        overwrite(self.store, self.store.tasks.final(name).weights, lambda data: b"damaged")
        assert any(finding.is_problem for finding in self.store.verify(read_data=True))
        self.store.blobs.put(self.model[name][0])

    @precondition(lambda self: "s3" not in pair.parts)  # of which a fork of this process uses none
    @rule(point=st.sampled_from(["blob-renamed", "rows-before-commit"]), name=NAMES)
    def crash_before_the_commit(self, point: str, name: str) -> None:
        def ingest() -> None:
            with new_store(self.root) as store:
                store.tasks.ingest([offer(store, name, weights=FRESH, steps=[9], on_conflict="replace")])

        self.store.close()
        status = run(ingest, failpoint=point)
        self.store = new_store(self.root)
        if status != KILLED:  # all its bytes were in the store, so it never came to the point where one is renamed
            assert status == 0
            weights, steps = self.model.get(name.lower(), (b"", set()))
            is_same = weights == FRESH
            self.model[name.lower()] = (FRESH, {9} | (steps if is_same else set()))
            if not is_same:
                self.forget(name.lower())

    @invariant()
    def the_store_and_the_dictionary_agree(self) -> None:
        found = {}
        for summary in self.store.tasks.summaries():
            steps = {a.step for a in self.store.tasks.adapters(summary.task.name) if a.step is not None}
            key, weights = summary.task.name.lower(), summary.final.weights
            assert summary.final.is_evicted == (key in self.evicted)
            found[key] = (self.model[key][0] if key in self.evicted else self.store.blobs.read(weights), steps)
            assert digest_of(found[key][0]) == weights
            assert (summary.code is not None) == (key in self.coded)
            assert summary.checkpoints + summary.evicted_checkpoints == len(steps)
        assert found == self.model

    @invariant()
    def nothing_is_wrong(self) -> None:
        assert not [finding for finding in self.store.verify(read_data=True) if finding.is_problem]

    @invariant()
    def the_bill_is_the_sum_of_the_files(self) -> None:
        usage = self.store.usage()
        assert usage.total - usage.database - usage.overhead == sum(self.store.blobs.sizes().values())
        if pair.name == DEFAULT:
            assert usage.total == sum(path.lstat().st_size for path in self.root.rglob("*") if path.is_file())


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(stateful_step_count=12, suppress_health_check=list(HealthCheck))
TestStoreModel.pytestmark = pytest.mark.slow
