"""For `pytest -p tests.device.as_mps`: this session runs on a stand-in for MPS."""

from tests.device.session import begin

begin("mps")
