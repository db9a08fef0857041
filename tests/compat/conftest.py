"""Runs the tests of `suite` on the cases of each file, and expects the failures of `not_yet`."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.compat.suite")

from tests.compat.case import Case  # noqa: E402
from tests.compat.not_yet import NOT_YET  # noqa: E402
from tests.compat.suite import CaseTests, World, build_world  # noqa: E402
from tests.quick import quick_codes  # noqa: E402

__all__ = ["quick_codes"]

_MADE_FOR = {
    "test_it_has_its_outcome": lambda case: True,
    "test_the_original_comes_back_byte_for_byte": lambda case: case.outcome != "refused",
    "test_its_code_comes_back_in_the_mould_of_the_original": lambda case: case.outcome in ("exact", "extras"),
    "test_peft_loads_original_and_code_alike": lambda case: case.base is not None,
}


@pytest.fixture(scope="class")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Build the adapters of all cases of a class that are tested in this session, and train on them."""
    tested = {
        item.callspec.params["case"].name for item in request.session.items if getattr(item, "cls", None) is request.cls
    }
    cases = tuple(case for case in request.cls.cases if case.name in tested)
    return build_world(cases, tmp_path_factory.mktemp("compat"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the cases that it is made for."""
    if metafunc.cls is None or not issubclass(metafunc.cls, CaseTests):
        return
    name = metafunc.function.__name__
    cases = [case for case in metafunc.cls.cases if _MADE_FOR[name](case)]
    quick = _first_of_each(metafunc.cls.cases)
    metafunc.parametrize("case", [_marked(name, case, case.name in quick) for case in cases])


def _first_of_each(cases: tuple[Case, ...]) -> set[str]:
    """Return the first case of each heading of the page and each outcome: those that `make test` runs."""
    first = {(case.group, case.outcome): case.name for case in reversed(cases)}
    return set(first.values())


def _marked(test: str, case: Case, quick: bool) -> object:
    marks = [] if quick else [pytest.mark.slow]
    reason = NOT_YET.get(test, {}).get(case.name)
    if reason is not None:
        marks.append(pytest.mark.xfail(strict=True, reason=reason))
    return pytest.param(case, id=case.name, marks=marks)
