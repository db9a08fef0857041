from tests.compat import architectures
from tests.compat.suite import CaseTests


class TestArchitectures(CaseTests):
    cases = architectures.CASES
