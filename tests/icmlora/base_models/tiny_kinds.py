"""Tiny random base models of every kind that transformers knows and icm runs, each with examples as JSON lines."""

from __future__ import annotations

import io
import json
import random
import struct
import wave
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from icmlora.base_models.examples.media_archive import pack_rows

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>", "<image>")
CLASSES = {0: "red", 1: "green", 2: "blue"}
COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220))
RATE = 16_000


@dataclass(frozen=True)
class Kind:
    """One kind of base model: how to write one, its examples, and modules that an adapter can change."""

    name: str
    write: Callable[[Path], Path]
    rows: Callable[[], list[dict[str, Any]]]
    modules: tuple[str, ...]
    media: Callable[[str], bytes] | None = None

    @property
    def examples(self) -> bytes:
        """Return its examples as the store keeps them."""
        rows = self.rows()
        return _lines(rows) if self.media is None else pack_rows(rows, self.media)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Make a tokenizer of single bytes that ends every text with `</s>`, as T5's and BART's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *alphabet))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, **options)


VOCABULARY = len(SPECIAL) + 256
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def save(folder: Path, model: Any, *others: Any) -> Path:
    """Save a model whose random weights say something, and what prepares its inputs."""
    # Random weights as small as these models begin with say nearly the same about everything.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(folder, BertForMaskedLM(BertConfig(**_TEXT, **_SMALL, max_position_embeddings=128)), tokenizer())


def write_bert_classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**_TEXT, **_SMALL, max_position_embeddings=128, id2label=CLASSES)
    return save(folder, BertForSequenceClassification(config), tokenizer())


def write_bert_without_head(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(folder, BertModel(BertConfig(**_TEXT, **_SMALL, max_position_embeddings=128)), tokenizer())


def write_t5(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return save(folder, T5ForConditionalGeneration(T5Config(**_TEXT, **sizes, decoder_start_token_id=0)), tokenizer())


def _bart_sizes() -> dict[str, Any]:
    sizes: dict[str, Any] = {"d_model": 32, "max_position_embeddings": 128}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 2, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 64}
    return sizes


def write_bart(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BartConfig(**_TEXT, **_bart_sizes(), decoder_start_token_id=2, forced_eos_token_id=None)
    return save(folder, BartForConditionalGeneration(config), tokenizer())


def write_vit(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ViTConfig(**_SMALL, image_size=32, patch_size=8, id2label=CLASSES)
    return save(folder, ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32}))


def write_yolos(folder: Path) -> Path:
    torch.manual_seed(0)
    config = YolosConfig(
        **_SMALL, image_size=[64, 64], patch_size=16, num_detection_tokens=6, id2label=CLASSES, auxiliary_loss=False
    )
    processor = YolosImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    return save(folder, YolosForObjectDetection(config), processor)


def write_florence(folder: Path) -> Path:
    torch.manual_seed(0)
    text = _TEXT | _bart_sizes() | {"model_type": "bart", "decoder_start_token_id": 2, "forced_eos_token_id": None}
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": [8, 16, 16, 32],
        "num_heads": [2, 2, 2, 4],
        "num_groups": [2, 2, 2, 4],
        "window_size": 4,
        "projection_dim": 32,
    }
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=SPECIAL.index("<image>"))
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False, image_seq_length=5)
    texts = tokenizer(extra_special_tokens={"image_token": "<image>"})
    processor = Florence2Processor(image_processor=images, tokenizer=texts, num_additional_image_tokens=1)
    return save(folder, Florence2ForConditionalGeneration(config), processor)


def write_whisper(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {name: value for name, value in _bart_sizes().items() if name != "max_position_embeddings"}
    config = WhisperConfig(
        **_TEXT, **sizes, decoder_start_token_id=1, max_source_positions=50, max_target_positions=64, num_mel_bins=16
    )
    features = WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=RATE)
    return save(folder, WhisperForConditionalGeneration(config), WhisperProcessor(features, tokenizer()))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def texts() -> list[dict[str, Any]]:
    return [{"text": f"{'more ' * (number % 3)}text number {number}"} for number in range(12)]


def pairs() -> list[dict[str, Any]]:
    return [{"prompt": f"say {number}: ", "completion": f"it is {number} " * (1 + number % 3)} for number in range(12)]


def labelled_texts() -> list[dict[str, Any]]:
    names = list(CLASSES.values())
    return [{"text": f"{names[n % 3]} things {n}", "label": names[n % 3]} for n in range(12)]


def numbered_texts() -> list[dict[str, Any]]:
    return [{"text": f"{'ab'[n % 2] * 9} {n}", "label": n % 2} for n in range(12)]


def labelled_images() -> list[dict[str, Any]]:
    return [{"image": f"{n}.png", "label": CLASSES[n % 3]} for n in range(12)]


def scenes() -> list[dict[str, Any]]:
    rows = []
    for n in range(8):
        _, box = _scene(n)
        rows.append({"image": f"{n}.png", "boxes": [box], "labels": [n % 3]})
    return rows


def captions() -> list[dict[str, Any]]:
    return [{"image": f"{n}.png", "prompt": "what? ", "completion": f"a {CLASSES[n % 3]} thing"} for n in range(9)]


def utterances() -> list[dict[str, Any]]:
    return [{"audio": f"{n}.wav", "text": f"tone {n}"} for n in range(8)]


def _scene(number: int) -> tuple[Image.Image, list[int]]:
    draw = random.Random(number)
    image = Image.new("RGB", (64, 64), (128, 128, 128))
    x, y, side = draw.randrange(20), draw.randrange(20), draw.randrange(20, 40)
    ImageDraw.Draw(image).rectangle((x, y, x + side, y + side), fill=COLOURS[number % 3])
    return image, [x, y, side, side]


@lru_cache
def image_file(name: str) -> bytes:
    """Return a PNG with one coloured square, whose colour is the number in its name modulo three."""
    stream = io.BytesIO()
    _scene(int(name.partition(".")[0]))[0].save(stream, "PNG")
    return stream.getvalue()


@lru_cache
def sound_file(name: str) -> bytes:
    """Return half a second of noise that is the file's own."""
    draw = random.Random(name)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(b"".join(struct.pack("<h", draw.randrange(-9000, 9000)) for _ in range(RATE // 2)))
    return stream.getvalue()


_IN_BERT = ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense")
_IN_T5 = ("decoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.v")
_IN_YOLOS = tuple(f"vit.encoder.layer.{layer}.attention.attention.query" for layer in (0, 1))
_IN_WHISPER = tuple(f"model.{half}.layers.{layer}.fc2" for half in ("encoder", "decoder") for layer in (0, 1))
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "bert",
            write_bert,
            texts,
            ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"),
        ),
        Kind(
            "bert-classifier",
            write_bert_classifier,
            labelled_texts,
            _IN_BERT,
        ),
        Kind(
            "t5",
            write_t5,
            pairs,
            ("decoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.0.SelfAttention.v"),
        ),
        Kind("bart", write_bart, pairs, ("model.decoder.layers.0.self_attn.q_proj", "model.encoder.layers.1.fc1")),
        Kind("vit", write_vit, labelled_images, ("vit.layers.0.attention.q_proj", "vit.layers.1.mlp.fc2"), image_file),
        Kind("yolos", write_yolos, scenes, _IN_YOLOS, image_file),
        Kind(
            "florence",
            write_florence,
            captions,
            ("model.language_model.decoder.layers.0.self_attn.q_proj", "model.language_model.encoder.layers.1.fc1"),
            image_file,
        ),
        Kind("whisper", write_whisper, utterances, _IN_WHISPER, sound_file),
    )
}
