from tests.compat import other_methods
from tests.compat.suite import CaseTests


class TestOtherMethods(CaseTests):
    cases = other_methods.CASES
    test_its_code_comes_back_in_the_mould_of_the_original = None  # they have no codes
