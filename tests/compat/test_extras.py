from tests.compat import extras
from tests.compat.suite import CaseTests


class TestExtras(CaseTests):
    cases = extras.CASES
