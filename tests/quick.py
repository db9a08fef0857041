"""What use cases cost on a tiny model, and need not: made small or once, for tests of what comes of them.

- Codes are refined in 40 steps on 8 texts of 24 tokens: as good as more steps on more text, which take seconds a task.
- The draws of 10,000 seeds, among which the beginning of a training is looked for, are the same for every store.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest

from icmlora.fleet.encode import search
from icmlora.fleet.few_shot import generating as generate
from icmlora.fleet.resources import adapter_source, loading
from icmlora.generator.initial_a.search import SeedSearch
from icmlora.training.refinement import FOR_SHARE, RefineConfig

_SEEDS = SeedSearch()


@pytest.fixture(scope="module", autouse=True)
def quick_codes() -> Iterator[None]:
    """Refine codes on few and short texts, generated ones in few steps, and draw what a seed gives once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "REFINE_STEPS", 40)
        patch.setattr(search, "FOR_SHARE", replace(FOR_SHARE, samples=8, tokens=24))
        patch.setattr(generate, "RefineConfig", partial(RefineConfig, steps=12, samples=8, tokens=24))
        for searching in (adapter_source, loading):
            patch.setattr(searching, "SeedSearch", lambda: _SEEDS)
        yield
