"""Every kind of base model that sees or hears is given what the rows name, or refuses them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from icmlora.base_models.catalogue import modality_of
from icmlora.base_models.examples.media_archive import pack_rows
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.reading import examples_for
from icmlora.base_models.running.attach import adapted
from icmlora.errors import BaseModelNotFound, BaseModelUnsuited, DataError
from icmlora.formats.peft.peft import CONFIG_NAME, PEFT, WEIGHTS_NAME
from tests.cli.test_kinds_of_base_models import randomise
from tests.icmlora.base_models.media_kinds import MEDIA_KINDS, SEEING, WITH_VIDEO, write_moonshine
from tests.icmlora.base_models.tiny_kinds import (
    KINDS,
    VOCABULARY,
    Kind,
    captions,
    image_file,
    pairs,
    save,
    sound_file,
    tokenizer,
)
from tests.icmlora.tiny_base import write_tiny_base

ALL = MEDIA_KINDS | {name: kind for name, kind in KINDS.items() if kind.media is not None}
HAS_VIDEO = all(find_spec(library) for library in ("torchvision", "num2words"))
_ALONE = pytest.mark.skipif(not HAS_VIDEO, reason="its processor needs the extra `video`")
EACH = [pytest.param(kind, id=name, marks=_ALONE if name in WITH_VIDEO else ()) for name, kind in ALL.items()]
LIMIT = 64


def load(write: Callable[[Path], Path], folder: Path) -> BaseModel:
    found = inspect_base("tiny", write(folder / "base"))
    return modality_of(found).load(found, device=torch.device("cpu"))


def losses(base: BaseModel, kind: Kind, media: Callable[[str], bytes]) -> list[float]:
    examples = examples_for(base, pack_rows(kind.rows(), media)).items
    with torch.no_grad():
        return [float(base.modality.loss(base, [item])) for item in base.modality.prepare(base, examples, LIMIT)]


@pytest.mark.one_case
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", EACH)
def test_another_picture_or_sound_changes_the_loss(kind: Kind, tmp_path: Path) -> None:
    base, media = load(kind.write, tmp_path), kind.media
    assert media is not None
    own = losses(base, kind, media)
    other = losses(base, kind, lambda name: media(f"{int(name.partition('.')[0]) + 1}.{name.partition('.')[2]}"))
    assert len(own) == len(other) == len(kind.rows())
    examples = examples_for(base, pack_rows(kind.rows(), media)).items
    assert base.modality.states(base, examples, LIMIT).std(dim=0).max() > 0  # its vectors differ too
    assert all(one != two for one, two in zip(own, other, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", [one for one in EACH if one.id in SEEING])
def test_an_answer_is_predicted_without_a_look_at_what_follows(kind: Kind, tmp_path: Path) -> None:
    base = load(kind.write, tmp_path)
    rows = [{"image": "0.png", "prompt": "what? ", "completion": f"a red {end}"} for end in ("bird", "fish")]
    one, other = base.modality.prepare(base, examples_for(base, pack_rows(rows, image_file)).items, LIMIT)
    first = next(place for place, (a, b) in enumerate(zip(one.targets, other.targets, strict=True)) if a != b)
    with torch.no_grad():
        mine, theirs = (base.modality.logits(base, [item])[0][-len(item.targets) :] for item in (one, other))
    torch.testing.assert_close(mine[: first + 1], theirs[: first + 1])
    assert not torch.allclose(mine[first + 1 :], theirs[first + 1 :])


def test_a_row_with_a_picture_is_no_example_of_a_model_that_is_run_on_text(tmp_path: Path) -> None:
    base = load(write_tiny_base, tmp_path)
    found = examples_for(base, pack_rows([*pairs()[:2], *captions()], image_file))
    assert (len(found), found.skipped) == (2, 9)
    assert "has an image, which icm does not support for a causal language model" in str(found.reason)
    with pytest.raises(DataError, match="none of its 9 rows is usable"):
        examples_for(base, pack_rows(captions(), image_file))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_with_the_processor_of_another_is_refused_by_name(tmp_path: Path) -> None:
    base = load(write_moonshine, tmp_path)
    features = t.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    odd = replace(base, processor=t.WhisperProcessor(features, tokenizer()))
    with pytest.raises(BaseModelUnsuited, match=r"WhisperProcessor turns a recording into .*, which base model"):
        losses(odd, MEDIA_KINDS["moonshine"], sound_file)


@pytest.mark.parametrize("alone", ["Wav2Vec2ForCTC", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Model"])
def test_wav2vec_2_without_a_decoder_is_refused_by_name(alone: str, tmp_path: Path) -> None:
    t.Wav2Vec2Config(architectures=[alone]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BaseModelUnsuited, match=r"'tiny' is of a kind that icm cannot run"):
        load(lambda folder: tmp_path, tmp_path)


@pytest.mark.skipif(HAS_VIDEO, reason="torchvision is installed")
def test_a_processor_whose_library_is_missing_is_named_before_weights_are_read(tmp_path: Path) -> None:
    base = tmp_path / "base"
    t.Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(base)
    t.Qwen2VLImageProcessor().save_pretrained(base)
    tokenizer(processor_class="Qwen2VLProcessor").save_pretrained(base)
    (base / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(BaseModelNotFound, match=r"requires the Torchvision library") as refused:
        load(lambda folder: folder, tmp_path)
    assert "icm-lora[video]" in str(refused.value.hint)


@pytest.mark.parametrize("kind", [kind for kind in MEDIA_KINDS.values() if kind.modules], ids=lambda kind: kind.name)
def test_an_adapter_of_a_convolution_with_groups_or_with_a_head_does_what_peft_makes_of_it(
    kind: Kind, tmp_path: Path
) -> None:
    base, other = load(kind.write, tmp_path), load(kind.write, tmp_path / "other")
    assert kind.media is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 4, "target_modules": list(kind.modules), "modules_to_save": ["classifier"]}
        adapter = get_peft_model(other.model, LoraConfig(**options))
        randomise(adapter)
        adapter.save_pretrained(str(tmp_path / "adapter"))
    files = [(tmp_path / "adapter" / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    alone, wanted = losses(base, kind, kind.media), losses(other, kind, kind.media)
    with adapted(base, PEFT.runnable(*files)):
        assert losses(base, kind, kind.media) == pytest.approx(wanted) != pytest.approx(alone)
    assert losses(base, kind, kind.media) == alone


def test_a_reward_model_without_a_padding_token_has_vectors(tmp_path: Path) -> None:
    def write(folder: Path) -> Path:
        config = t.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, num_labels=1)
        return save(folder, t.GPT2ForSequenceClassification(config), tokenizer())

    base = load(write, tmp_path)
    rows = "".join(json.dumps({"text": f"text {number}", "label": 0}) + "\n" for number in range(8))
    examples = examples_for(base, rows.encode()).items
    assert base.modality.states(base, examples, LIMIT).shape == (8, 32)
    assert base.modality.measure(base, examples, LIMIT).count == 8
