"""Refining for tests: on a tiny model, 8 texts of 24 tokens teach as much as 32 of 192, which take a second a task."""

from collections.abc import Iterator
from functools import partial

import pytest

from icmlora.fleet.encode import encode
from icmlora.fleet.few_shot import generate
from icmlora.training.refinement import RefineConfig


@pytest.fixture(scope="module", autouse=True)
def short_refining() -> Iterator[None]:
    """Refine codes on few and short texts."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (encode, generate):
            patch.setattr(module, "RefineConfig", partial(RefineConfig, samples=8, tokens=24))
        yield
