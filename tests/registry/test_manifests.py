"""Manifests: each state survives writing and reading, and nothing else is read."""

import json
import pickle
import zlib
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given, strategies as st

from registry.encoding import decode, encode, files_of, packed, read, read_shared, unpacked, written
from registry.errors import DamagedStore
from registry.manifests import (
    BaseLabel,
    BaseRecord,
    Code,
    CodeLimits,
    Extra,
    File,
    Generator,
    Measurement,
    Part,
    Removed,
    Run,
    State,
    StoredAdapter,
    Task,
    Vector,
)

DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
FILES = st.builds(File, DIGESTS, st.integers(0, 2**40))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(TEXTS, st.one_of(st.none(), st.booleans(), st.integers(), NUMBERS, TEXTS), max_size=3)
LAYOUT = st.lists(st.tuples(TEXTS, *[st.integers(1, 9)] * 3), max_size=3).map(tuple)


def maybe(values: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | values


ADAPTERS = st.builds(
    StoredAdapter,
    weights=FILES,
    config=FILES,
    card=maybe(FILES),
    initial=maybe(FILES),
    extras=st.lists(st.builds(Extra, blob=FILES, file=maybe(TEXTS), size=st.integers(0, 99)), max_size=2).map(tuple),
    step=maybe(st.integers(0, 99)),
    source=TEXTS,
    evicted_at=maybe(TEXTS),
    is_generated=st.booleans(),
    tensors_key=maybe(DIGESTS),
    dtype=TEXTS,
    rank_max=st.integers(1, 99),
    parameters=st.integers(1, 10**9),
    target_modules=st.lists(TEXTS, max_size=3).map(tuple),
    layout=LAYOUT,
    original_only=maybe(TEXTS),
)
VECTORS = st.builds(
    Vector,
    view=st.sampled_from(["adapted", "context"]),
    support_set=st.integers(0, 9),
    blob=FILES,
    dim=st.integers(1, 99),
    extractor=JSON,
)
CODES = st.builds(
    Code,
    blob=FILES,
    generator=FILES,
    squared_error=maybe(NUMBERS),
    effect=maybe(NUMBERS),
    asked=maybe(st.builds(CodeLimits, keep=maybe(NUMBERS), refined=st.integers(0, 9), is_kept=st.booleans())),
)
MEASURED = st.builds(
    Measurement,
    source=st.sampled_from(["base", "original", "code"]),
    generator=maybe(DIGESTS),
    data=DIGESTS,
    value=NUMBERS,
    count=st.integers(1, 99),
    utf8_bytes=st.integers(1, 99),
    retained_gain=maybe(NUMBERS),
    settings=JSON,
    others=st.dictionaries(TEXTS, NUMBERS, max_size=2),
)
TASKS = st.builds(
    Task,
    name=TEXTS,
    version=st.integers(1, 99),
    seq=st.integers(0, 2**50),
    base_model=TEXTS,
    final=ADAPTERS,
    checkpoints=st.lists(ADAPTERS, max_size=2).map(tuple),
    samples=maybe(FILES),
    vectors=st.lists(VECTORS, max_size=2).map(tuple),
    code=maybe(CODES),
    measured=st.lists(MEASURED, max_size=2).map(tuple),
    tags=st.lists(TEXTS, max_size=2).map(tuple),
    note=maybe(TEXTS),
    aliases=st.dictionaries(TEXTS, st.integers(1, 9), max_size=2),
)
STATES = st.one_of(
    TASKS,
    st.builds(
        Generator,
        base_model=TEXTS,
        version=st.integers(1, 9),
        blob=FILES,
        start=maybe(FILES),
        config=JSON,
        metrics=JSON,
    ),
    st.builds(
        BaseRecord,
        name=TEXTS,
        labels=st.lists(st.builds(BaseLabel, label=TEXTS, reason=st.just("told")), max_size=2).map(tuple),
    ),
    st.builds(Run, base_model=TEXTS, config=JSON, weights=maybe(FILES), codes=st.lists(FILES, max_size=2).map(tuple)),
    st.builds(Removed, of=st.just("task"), name=TEXTS),
)


def read_again(state: State) -> State:
    data, documents, _ = encode(state)

    def shared(kind: type[Part], file: File) -> dict[str, object]:
        assert len(documents[str(file)]) == file.size
        return dict(read_shared(kind, documents[str(file)]))

    return decode(data, shared)


@given(STATES)
def test_a_state_survives_writing_and_reading(state: State) -> None:
    again = read_again(state)
    assert again == state
    assert encode(again).data == encode(state).data, "the same state has the same digest"


@given(TASKS)
def test_all_files_of_a_task_but_evicted_weights_are_needed(task: Task) -> None:
    needed = {file for _, file in files_of(encode(task).body)}
    for adapter in task.adapters:
        assert {adapter.config, *(extra.blob for extra in adapter.extras)} <= needed
        assert adapter.is_evicted or set(adapter.evictable) <= needed
    assert {vector.blob for vector in task.vectors} <= needed
    assert task.code is None or {task.code.blob, task.code.generator} <= needed


def small(**changes: object) -> Task:
    adapter = StoredAdapter(
        weights=File("a" * 64, 100),
        config=File("b" * 64, 10),
        source="/loras/dog",
        dtype="F32",
        rank_max=8,
        parameters=50,
        target_modules=("q_proj",),
        layout=(("layers.0.q_proj", 8, 16, 16),),
    )
    return replace(Task(name="dog", base_model="base", final=adapter), **changes)


def test_keys_of_a_newer_version_survive_a_rewrite() -> None:
    task = small()
    data, documents, _ = encode(task)
    body = unpacked(data)
    body["colour"] = "red"
    body["final"]["weight_watchers"] = [1, 2]
    newer = decode(packed(body), lambda kind, file: read_shared(kind, documents[str(file)]))
    assert isinstance(newer, Task)
    rewritten = unpacked(encode(replace(newer, note="seen")).data)
    assert rewritten["colour"] == "red"
    assert rewritten["final"]["weight_watchers"] == [1, 2]
    assert rewritten["note"] == "seen"


def test_tasks_of_one_shape_share_its_description() -> None:
    one, other = small(), small(name="cat", note="another")
    assert encode(one).documents == encode(other).documents
    assert encode(one).data != encode(other).data


@pytest.mark.parametrize(
    "body",
    [
        [],
        {},
        {"type": "task/2"},
        {"type": "poem/1"},
        {"type": "task/1", "name": "dog"},
        {"type": "removed/1", "of": "task", "name": 3},
        {"type": "base/1", "name": "x", "seq": "1"},
        {"type": "base/1", "name": "x", "seq": True},
        {"type": "base/1", "name": "x", "labels": [{"label": "y", "reason": "guess"}]},
        {"type": "generator/1", "base_model": "x", "blob": "../../etc/passwd:3", "config": {}, "metrics": {}},
        {"type": "generator/1", "base_model": "x", "blob": "a" * 64 + ":-3", "config": {}, "metrics": {}},
    ],
)
def test_other_json_is_refused(body: object) -> None:
    with pytest.raises(DamagedStore):
        decode(packed(body), lambda kind, file: {})


@pytest.mark.parametrize("data", [b"", b"{}", zlib.compress(b"{"), zlib.compress(b"{}") + b"more"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedStore):
        decode(data, lambda kind, file: {})


def test_a_flipped_bit_never_reads_as_another_state() -> None:
    data = encode(small()).data
    digest = sha256(data).hexdigest()
    flipped = (
        bytes(byte ^ (1 << bit if at == place else 0) for at, byte in enumerate(data))
        for place in range(len(data))
        for bit in (0, 7)
    )
    assert all(sha256(other).hexdigest() != digest for other in flipped)


def test_a_file_reference_is_its_digest() -> None:
    file = File("ab" * 32, 7)
    again = pickle.loads(pickle.dumps(file))
    assert (again, again.size) == ("ab" * 32, 7)
    assert json.dumps(file) == json.dumps("ab" * 32)


def test_the_latest_measurement_on_the_tasks_own_text_counts() -> None:
    def measured(data: str, value: float) -> Measurement:
        return Measurement(source="code", generator="g", data=data, value=value, count=1, utf8_bytes=1, settings={})

    task = small(eval_data=File("e" * 64, 1))
    task = replace(task, measured=(measured("e" * 64, 1.0), measured("f" * 64, 2.0)))
    latest = task.latest("code", "g")
    assert latest is not None
    assert latest.value == 1.0
    replaced = task.with_measured(measured("e" * 64, 3.0))
    assert [one.value for one in replaced] == [2.0, 3.0]


def test_a_file_in_a_field_for_a_digest_is_written_as_a_digest() -> None:
    network = File("ab" * 32, 7)
    measured = Measurement(source="code", generator=network, data="x", value=1.0, count=1, utf8_bytes=1, settings={})
    assert read(Measurement, written(measured)).generator == network
