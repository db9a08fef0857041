from tests.compat import damaged
from tests.compat.suite import CaseTests


class TestDamaged(CaseTests):
    cases = damaged.CASES
