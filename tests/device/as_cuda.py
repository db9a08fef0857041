"""For `pytest -p tests.device.as_cuda`: this session runs on a stand-in for CUDA."""

from tests.device.session import begin

begin("cuda")
