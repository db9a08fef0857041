"""Every named baseline: bytes out, the same adapter back from nothing but these bytes, more error for fewer bytes."""

from __future__ import annotations

import pytest

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.baselines.baseline import Baseline
from icmlora.baselines.catalogue import EXAMPLES, baseline_named
from icmlora.errors import CodeError, UnknownBaseline
from tests.icmlora.small_fleet import make_adapter, same

NAMES = [
    *EXAMPLES,
    "1bit",
    "2bitg8f",
    "svd2-nf4",
    "mean4-3bit+svd2-4bit",
    "loraquant3-50",
    "loraquant2f",
    "jd4x2-int8",
    "jd8diag",
]
# From more bytes to fewer, within one method.
LADDERS = [
    ("bf16", "int8", "nf4", "3bit", "2bit", "1bit"),
    ("svd4", "svd2", "svd1"),
    ("svd2-int8", "svd2-4bit", "svd2-3bit", "svd2-2bit", "svd2-1bit"),
    ("loraquant3-99", "loraquant2-70", "loraquant2-10"),
    ("mean16+svd4", "mean16+svd2", "mean16+svd1", "mean16"),
    ("jd16", "jd8", "jd4", "jd2"),
    ("jd8x3", "jd8"),
    ("jd16diag", "jd8diag", "jd2diag"),
]


@pytest.fixture(scope="module")
def fleet() -> dict[str, Adapter]:
    """Tasks of different ranks and modules."""
    return {
        "a": make_adapter(0, rank=4),
        "b": make_adapter(1, rank=8),
        "c": make_adapter(2, rank=4, kinds=("q_proj", "v_proj", "down_proj")),
        "d": make_adapter(3, rank=2, layers=(1,)),
    }


def errors(baseline: Baseline, fleet: dict[str, Adapter]) -> tuple[float, int]:
    """Return the mean squared error and all bytes of a fleet."""
    shared = baseline.prepare(fleet)
    codes = {task: baseline.encode(adapter, shared) for task, adapter in fleet.items()}
    lost = [squared_error(fleet[task], baseline.decode(code, shared)) for task, code in codes.items()]
    return sum(lost) / len(lost), len(shared) + sum(map(len, codes.values()))


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_comes_back_from_its_bytes_alone(name: str, fleet: dict[str, Adapter]) -> None:
    shared = baseline_named(name).prepare(fleet)
    code = baseline_named(name).encode(fleet["b"], shared)
    decoded = baseline_named(name).decode(code, shared)
    assert decoded.base_model == fleet["b"].base_model
    assert {module.name for module in decoded.modules} <= {
        module.name for task in fleet.values() for module in task.modules
    }
    assert squared_error(fleet["b"], decoded) < 1.05
    assert same(decoded, baseline_named(name).decode(code, shared))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_fleet_gives_the_same_bytes(name: str, fleet: dict[str, Adapter]) -> None:
    one, two = baseline_named(name), baseline_named(name)
    shared = one.prepare(fleet)
    assert shared == two.prepare(fleet)
    assert one.encode(fleet["c"], shared) == two.encode(fleet["c"], shared)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_that_the_fleet_did_not_have_is_encoded_too(name: str, fleet: dict[str, Adapter]) -> None:
    baseline = baseline_named(name)
    shared = baseline.prepare(fleet)
    assert baseline.decode(baseline.encode(make_adapter(9), shared), shared).modules


@pytest.mark.parametrize("name", [name for name in NAMES if name != "mean16"])
@pytest.mark.parametrize("change", [b"", b"\0\0"])
def test_bytes_that_are_missing_or_left_over_are_refused(name: str, change: bytes, fleet: dict[str, Adapter]) -> None:
    baseline = baseline_named(name)
    shared = baseline.prepare(fleet)
    code = baseline.encode(fleet["a"], shared)
    with pytest.raises(CodeError):
        baseline.decode(code + change if change else code[:-1], shared)


@pytest.mark.parametrize("ladder", LADDERS, ids=lambda ladder: ladder[0])
def test_fewer_bytes_cost_more_error(ladder: tuple[str, ...], fleet: dict[str, Adapter]) -> None:
    figures = [errors(baseline_named(name), fleet) for name in ladder]
    assert [error for error, _ in figures] == sorted(error for error, _ in figures)
    assert [size for _, size in figures] == sorted((size for _, size in figures), reverse=True)


@pytest.mark.parametrize("name", ["bf16", "int8", "svd8", "mean16", "jd32"])
def test_what_keeps_nearly_everything_loses_nearly_nothing(name: str) -> None:
    fleet = {"only": make_adapter(0, rank=4)}
    assert errors(baseline_named(name), fleet)[0] < 1e-4


@pytest.mark.parametrize(("short", "full"), [("svd", "svd4-bf16"), ("mean", "mean16"), ("jd", "jd16x1-bf16")])
def test_a_short_name_stands_for_a_usual_setting(short: str, full: str) -> None:
    assert baseline_named(short) == baseline_named(full)


@pytest.mark.parametrize(
    "name", ["", "int4", "5bit", "svd0", "svd4-", "mean4+jd2", "mean4+", "loraquant1", "jd4x0", "INT8"]
)
def test_an_unknown_name_is_refused_with_some_that_exist(name: str) -> None:
    with pytest.raises(UnknownBaseline) as caught:
        baseline_named(name)
    assert "svd2-3bit" in str(caught.value.hint)
