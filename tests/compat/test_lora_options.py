from tests.compat import lora_options
from tests.compat.suite import CaseTests


class TestLoraOptions(CaseTests):
    cases = lora_options.CASES
