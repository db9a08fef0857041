"""Every kind of base model that sees or hears is given what the rows name, or refuses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import WhisperFeatureExtractor, WhisperProcessor

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples import examples_for
from icmlora.base_models.lookup import inspect_base
from icmlora.base_models.media_archive import pack_rows
from icmlora.base_models.modality import BaseModel
from icmlora.errors import BaseModelUnsuited, DataError
from tests.icmlora.base_models.media_kinds import MEDIA_KINDS, write_moonshine
from tests.icmlora.base_models.tiny_kinds import KINDS, Kind, captions, image_file, pairs, sound_file, tokenizer
from tests.icmlora.tiny_base import write_tiny_base

ALL = MEDIA_KINDS | {name: kind for name, kind in KINDS.items() if kind.media is not None}
LIMIT = 64


def load(write: Callable[[Path], Path], folder: Path) -> BaseModel:
    found = inspect_base("tiny", write(folder / "base"))
    return modality_of(found).load(found, device=torch.device("cpu"))


def losses(base: BaseModel, kind: Kind, media: Callable[[str], bytes]) -> list[float]:
    examples = examples_for(base, pack_rows(kind.rows(), media)).items
    with torch.no_grad():
        return [float(base.modality.loss(base, [item])) for item in base.modality.prepare(base, examples, LIMIT)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ALL.values(), ids=lambda kind: kind.name)
def test_another_picture_or_sound_changes_the_loss(kind: Kind, tmp_path: Path) -> None:
    base, media = load(kind.write, tmp_path), kind.media
    assert media is not None
    own = losses(base, kind, media)
    other = losses(base, kind, lambda name: media(f"{int(name.partition('.')[0]) + 1}.{name.partition('.')[2]}"))
    assert len(own) == len(other) == len(kind.rows())
    assert all(one != two for one, two in zip(own, other, strict=True))


def test_a_row_with_a_picture_is_no_example_of_a_model_that_is_run_on_text(tmp_path: Path) -> None:
    base = load(write_tiny_base, tmp_path)
    found = examples_for(base, pack_rows([*pairs()[:2], *captions()], image_file))
    assert (len(found), found.skipped) == (2, 9)
    assert "has an image, and icm runs this base model, a causal language model, without it" in str(found.reason)
    with pytest.raises(DataError, match="none of its 9 rows can be used"):
        examples_for(base, pack_rows(captions(), image_file))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_with_the_processor_of_another_is_refused_by_name(tmp_path: Path) -> None:
    base = load(write_moonshine, tmp_path)
    features = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    odd = replace(base, processor=WhisperProcessor(features, tokenizer()))
    with pytest.raises(
        BaseModelUnsuited, match=r"what WhisperProcessor makes of a recording .* is not what base model"
    ):
        losses(odd, MEDIA_KINDS["moonshine"], sound_file)
