"""The tiny base model, and samples of a task that no adapter was trained for."""

import pytest

from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from tests.icmlora.fewshot.trained_tasks import scored, texts_of
from tests.icmlora.tiny_base import load_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def samples(base: BaseModel) -> list[Scored]:
    return scored(base, texts_of("grey geese", count=4))
