"""What is derived from tasks: after any sequence of operations the rows, the files and a small model agree."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from registry.errors import GeneratorConflict, LastCopy
from registry.records import CodeLimits, GeneratorRecord, NewResidual
from registry.store import Store
from tests.registry.examples import (
    BASE,
    code,
    code_of,
    evaluation,
    eviction,
    generator,
    ingest,
    new_store,
    vector,
)

TASKS = ("rust", "html", "sql")
NAMES = st.sampled_from(TASKS)
DATA = st.sampled_from([b"a", b"bb", b"ccc"])


@dataclass
class Version:
    """What a generator has: task -> (code, residual)."""

    files: dict[str, tuple[bytes, bytes | None]] = field(default_factory=dict)
    start: bytes | None = None


class DerivedModel(RuleBasedStateMachine):
    """Three tasks that stay; generators, codes, residuals, vectors and runs that come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp()) / "store"
        self.store: Store = new_store(self.root)
        self.versions: dict[int, Version] = {}  # by version
        self.current = 0
        self.made = 0
        self.vectors: dict[tuple[str, int], bytes] = {}
        self.evicted: set[str] = set()
        self.checkpoint: bytes | None = None

    @initialize()
    def ingest(self) -> None:
        for name in TASKS:
            ingest(self.store, name, samples=b"samples")

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root.parent)

    def record(self, version: int) -> GeneratorRecord:
        """Return the row of a generator of the model."""
        return next(row for row in self.store.generators.all() if row.version == version)

    def relied_on(self) -> dict[str, tuple[bytes, bytes | None]]:
        """Return the codes of evicted tasks, which nobody may lose."""
        present = self.versions.get(self.current, Version()).files
        return {name: files for name, files in present.items() if name in self.evicted}

    @rule(covered=st.sets(NAMES), ends_the_run=st.booleans())
    def train(self, covered: set[str], ends_the_run: bool) -> None:
        running = self.store.runs.running(BASE)
        run_id = running.id if ends_the_run and running is not None else None
        new = generator(self.store, sorted(covered), data=b"trained %d" % self.made, train_run_id=run_id)
        if not self.evicted <= covered:
            with pytest.raises(LastCopy):
                self.store.generators.add(new)
            return
        self.made += 1
        self.current = self.store.generators.add(new).version
        self.versions[self.current] = Version({name: (f"code of {name}".encode(), None) for name in covered})
        if run_id is not None:
            self.checkpoint = None

    @precondition(lambda self: self.current)
    @rule(fresh=st.sets(NAMES, max_size=2), data=DATA)
    def extend(self, fresh: set[str], data: bytes) -> None:
        parent, codes = self.record(self.current), [code(self.store, name, data=data) for name in sorted(fresh)]
        new = replace(generator(self.store, data=b"longer %d" % self.made, parent_id=parent.id), codes=codes)
        before = self.versions[self.current]
        if any(before.files[name] != (data, None) for name in fresh & self.evicted):
            with pytest.raises(LastCopy):
                self.store.generators.extend(new)
            return
        self.made += 1
        self.current = self.store.generators.extend(new).version
        self.versions[self.current] = Version(before.files | dict.fromkeys(fresh, (data, None)), before.start)

    @precondition(lambda self: self.current)
    @rule(name=NAMES, data=DATA)
    def replace_code(self, name: str, data: bytes) -> None:
        new, files = code(self.store, name, data=data), self.versions[self.current].files
        if name in self.evicted:
            with pytest.raises(LastCopy):
                self.store.codes.replace(self.record(self.current).id, new)
            return
        assert self.store.codes.replace(self.record(self.current).id, new) is not None
        files[name] = (data, None)

    @precondition(lambda self: self.versions.get(self.current, Version()).files.keys() - self.evicted)
    @rule(pick=st.data(), data=st.none() | DATA)
    def replace_residual(self, pick: st.DataObject, data: bytes | None) -> None:
        files = self.versions[self.current].files
        name = pick.draw(st.sampled_from(sorted(files.keys() - self.evicted)))
        new = None if data is None else NewResidual(self.store.blobs.put(data), 0.001)
        assert self.store.codes.replace_residual(code_of(self.store, name), new, CodeLimits(max_error=0.1)) is not None
        files[name] = (files[name][0], data)

    @precondition(lambda self: self.current)
    @rule(data=DATA)
    def learn_a_start(self, data: bytes) -> None:
        self.store.generators.set_start(self.record(self.current).id, self.store.blobs.put(data))
        self.versions[self.current].start = data

    @precondition(lambda self: self.versions)
    @rule(pick=st.data())
    def roll_back(self, pick: st.DataObject) -> None:
        version = pick.draw(st.sampled_from(sorted(self.versions)))
        target, before = self.versions[version], self.versions[self.current].files
        if self.relied_on().items() <= target.files.items():
            lost = self.store.generators.make_current(self.record(version).id)
            assert lost == sorted(before.keys() - target.files.keys())
            self.current = version
        else:
            with pytest.raises(LastCopy):
                self.store.generators.make_current(self.record(version).id)

    @precondition(lambda self: self.versions)
    @rule(pick=st.data())
    def forget(self, pick: st.DataObject) -> None:
        version = pick.draw(st.sampled_from(sorted(self.versions)))
        record = self.record(version)
        if version == self.current:
            with pytest.raises(GeneratorConflict):
                self.store.generators.forget(record)
            return
        assert self.store.generators.check_forgettable(record) == len(self.versions[version].files)
        assert self.store.generators.forget(record) == len(self.versions.pop(version).files)

    @precondition(lambda self: self.versions.get(self.current, Version()).files.keys() - self.evicted)
    @rule(pick=st.data())
    def evict(self, pick: st.DataObject) -> None:
        names = sorted(self.versions[self.current].files.keys() - self.evicted)
        name = pick.draw(st.sampled_from(names))
        assert self.store.originals.evict(eviction(self.store, name)) == len(f"weights of {name}")
        self.evicted.add(name)

    @rule(name=NAMES, support_set=st.integers(0, 2), data=DATA)
    def make_a_vector(self, name: str, support_set: int, data: bytes) -> None:
        is_new = self.vectors.get((name, support_set)) != data
        assert self.store.vectors.add([vector(self.store, name, support_set, data=data)]) == is_new
        self.vectors[name, support_set] = data

    @precondition(lambda self: self.current)
    @rule(name=NAMES, nats=st.floats(0.1, 9.0))
    def measure(self, name: str, nats: float) -> None:
        generator_id = self.record(self.current).id
        assert self.store.evaluations.add([evaluation(name, nats=nats, generator_id=generator_id)]) == 1
        found = [row for row in self.store.evaluations.all(name) if row.generator_id == generator_id]
        assert [row.value for row in found if row.rung == "code"] == [nats]

    @rule(data=DATA, again=st.booleans())
    def checkpoint_a_run(self, data: bytes, again: bool) -> None:
        running = self.store.runs.running(BASE)
        if running is None or again:
            running = self.store.runs.start(BASE, {"seed": 1})
        self.store.runs.save_checkpoint(running.id, step=running.step + 1, weights=data, optimizer=data * 2)
        self.checkpoint = data

    @rule()
    def prune(self) -> None:
        self.store.prune(grace=0)
        assert list(self.store.verify(read_data=True)) == []

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = new_store(self.root)

    @invariant()
    def generators_codes_and_residuals_are_those_of_the_model(self) -> None:
        rows, read = self.store.generators.all(), self.store.blobs.read
        assert [row.version for row in rows] == sorted(self.versions)
        assert [row.version for row in rows if row.is_current] == ([self.current] if self.current else [])
        for row in rows:
            expected = self.versions[row.version]
            assert (None if row.start is None else read(row.start)) == expected.start
            assert expected.files == {
                code.task: (read(code.blob), None if code.residual is None else read(code.residual.blob))
                for code in self.store.codes.all(row.id)
            }

    @invariant()
    def vectors_and_the_run_are_those_of_the_model(self) -> None:
        found = {(row.task, row.support_set): self.store.blobs.read(row.blob) for row in self.store.vectors.all()}
        assert found == self.vectors
        running = self.store.runs.running(BASE)
        weights = None if running is None else running.weights
        assert (None if weights is None else self.store.blobs.read(weights)) == self.checkpoint

    @invariant()
    def no_evicted_task_is_without_its_code(self) -> None:
        assert {row.final.task for row in self.store.tasks.summaries() if row.final.is_evicted} == self.evicted
        assert self.relied_on().keys() == self.evicted

    @invariant()
    def nothing_is_wrong_and_every_byte_is_on_the_bill(self) -> None:
        assert not [finding for finding in self.store.verify(read_data=True) if finding.is_problem]
        usage = self.store.usage()
        assert usage.total == sum(path.lstat().st_size for path in self.root.rglob("*") if path.is_file())
        assert self.store.prune(grace=0, dry_run=True).freed_bytes == usage.unreferenced


TestDerivedModel = DerivedModel.TestCase
TestDerivedModel.settings = settings(stateful_step_count=14, suppress_health_check=list(HealthCheck))
TestDerivedModel.pytestmark = pytest.mark.slow
