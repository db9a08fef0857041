from tests.compat import layers
from tests.compat.suite import CaseTests


class TestLayers(CaseTests):
    cases = layers.CASES
