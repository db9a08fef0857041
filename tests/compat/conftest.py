"""Runs the tests of `suite` on the cases of each file, and expects the failures of `not_yet`."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.compat.suite")

from tests.compat.case import Case  # noqa: E402
from tests.compat.not_yet import NOT_YET  # noqa: E402
from tests.compat.suite import CaseTests, World, build_world  # noqa: E402

_MADE_FOR = {
    "test_it_has_its_outcome": lambda case: True,
    "test_the_original_comes_back_byte_for_byte": lambda case: case.outcome != "refused",
    "test_its_code_comes_back_in_the_mould_of_the_original": lambda case: case.outcome in ("exact", "extras"),
    "test_peft_loads_original_and_code_alike": lambda case: case.base is not None,
}


@pytest.fixture(scope="class")
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Build the adapters of all cases of a class and train on them."""
    return build_world(request.cls.cases, tmp_path_factory.mktemp("compat"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test the cases that it is made for."""
    if metafunc.cls is None or not issubclass(metafunc.cls, CaseTests):
        return
    name = metafunc.function.__name__
    cases = [case for case in metafunc.cls.cases if _MADE_FOR[name](case)]
    metafunc.parametrize("case", [_expected(name, case) for case in cases])


def _expected(test: str, case: Case) -> object:
    reason = NOT_YET.get(test, {}).get(case.name)
    marks = () if reason is None else (pytest.mark.xfail(strict=True, reason=reason),)
    return pytest.param(case, id=case.name, marks=marks)
