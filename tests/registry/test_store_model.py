"""A real store and a dictionary: after any sequence of operations they agree, and a rebuilt database agrees too."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from registry.errors import TaskConflict, TaskNotFound
from tests.registry.children import KILLED, run
from tests.registry.examples import adapter, evict, ingest, new_store, train
from tests.registry.pairs import DEFAULT, pair

NAMES = st.sampled_from(["rust", "Rust", "html", "sql"])
WEIGHTS = st.sampled_from([b"one", b"two", b"three"])
STEPS = st.sets(st.integers(1, 3), max_size=3)


class StoreModel(RuleBasedStateMachine):
    """Operations on a store and on a dictionary: lower-case name -> weights of each version."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp()) / "store"
        self.store = new_store(self.root)
        self.model: dict[str, list[bytes]] = {}
        self.coded: set[str] = set()
        self.evicted: set[str] = set()
        self.notes: dict[str, str] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root.parent)

    @rule(name=NAMES, weights=WEIGHTS, steps=STEPS)
    def ingest(self, name: str, weights: bytes, steps: set[int]) -> None:
        if name.lower() in self.model:
            with pytest.raises(TaskConflict):
                ingest(self.store, name, weights=weights, steps=sorted(steps))
            return
        ingest(self.store, name, weights=weights, steps=sorted(steps))
        self.model[name.lower()] = [weights]

    @rule(name=NAMES, weights=WEIGHTS)
    def next_version(self, name: str, weights: bytes) -> None:
        if name.lower() not in self.model:
            return
        final = adapter(self.store, weights)
        self.store.update(name, lambda known: replace(known, version=known.version + 1, final=final, code=None))
        self.model[name.lower()].append(weights)
        self.coded.discard(name.lower())
        self.evicted.discard(name.lower())

    @rule(name=NAMES, note=st.sampled_from(["a", "b"]))
    def note(self, name: str, note: str) -> None:
        if name.lower() in self.model:
            self.store.update(name, lambda known: replace(known, note=note))
            self.notes[name.lower()] = note

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name.lower() not in self.model:
            with pytest.raises(TaskNotFound):
                self.store.remove(self.store.named([name]))
            return
        self.store.remove(self.store.named([name]))
        self.store.free(names=[name])
        del self.model[name.lower()]
        self.notes.pop(name.lower(), None)
        self.coded.discard(name.lower())
        self.evicted.discard(name.lower())

    @rule(data=st.sampled_from([b"generator 1", b"generator 2"]))
    def train(self, data: bytes) -> None:
        names = sorted(set(self.model) - self.evicted)
        train(self.store, names, data=data)
        self.coded |= set(names)

    @precondition(lambda self: self.coded - self.evicted)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.coded - self.evicted)))
        evict(self.store, name)
        self.evicted.add(name)

    @rule(name=NAMES)
    def rename(self, name: str) -> None:
        if name.lower() not in self.model or "moved" in self.model:
            return
        versions = self.store.history(name)
        self.store.publish([replace(one, name="moved", manifest=None) for one in versions], remove=[versions[-1]])
        key = name.lower()
        self.model["moved"] = self.model.pop(key)
        if key in self.notes:
            self.notes["moved"] = self.notes.pop(key)
        for some in (self.coded, self.evicted):
            if key in some:
                some.remove(key)
                some.add("moved")

    @rule()
    def prune(self) -> None:
        self.store.prune(grace=0)

    @rule()
    def rebuild(self) -> None:
        self.store.rebuild()

    @rule(name=NAMES)
    def kill_a_change(self, name: str) -> None:
        """A command that is killed before its commit changes nothing."""
        if pair.name != DEFAULT:
            return

        def change() -> None:
            with new_store(self.root) as store:
                if store.find(name) is None:
                    ingest(store, name, weights=b"killed")
                else:
                    store.update(name, lambda known: replace(known, note="killed"))

        assert run(change, failpoint="rows-before-commit") == KILLED
        # Its state is complete, so a rebuild would take it: the next change of the task comes after it.
        if name.lower() in self.model:
            note = self.notes.get(name.lower())
            self.store.update(name, lambda known: replace(known, note="again"))
            self.store.update(name, lambda known: replace(known, note=note))
        else:
            ingest(self.store, name)
            self.store.remove(self.store.named([name]))

    @invariant()
    def they_agree(self) -> None:
        assert sorted(map(str.lower, self.store.names())) == sorted(self.model)
        for task in self.store.tasks():
            key = task.name.lower()
            versions = self.store.history(task.name)
            assert len(versions) == len(self.model[key]) == task.version
            assert task.note == self.notes.get(key)
            assert (task.code is not None) == (key in self.coded)
            assert task.final.is_evicted == (key in self.evicted)
            for version, weights in zip(versions, self.model[key], strict=True):
                if not version.final.is_evicted:
                    assert self.store.blobs.read(version.final.weights) == weights
                if version.code is not None:
                    self.store.blobs.read(version.code.blob)
                    self.store.blobs.read(version.code.generator)

    @invariant()
    def it_is_sound(self) -> None:
        assert not [finding for finding in self.store.verify(read_data=True) if finding.is_problem]


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    stateful_step_count=15, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
