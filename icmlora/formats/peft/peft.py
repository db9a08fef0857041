"""PEFT LoRA folders: adapter_config.json + adapter_model.safetensors + README.md.

Checking, decoding and writing are imported by the methods that need them: to write an original back, the file names
are enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused, located
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterPaths,
    AdapterSummary,
    Buffer,
    ConfigFacts,
    LoadedAdapter,
    RunnableAdapter,
    Template,
)

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder
    from icmlora.io.safetensors import RawTensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
# What trainers save next to an adapter and serving needs. A trainer's own state is not part of an adapter.
COMPANIONS = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
        *("generation_config.json", "value_head.safetensors"),
    }
)


class PeftFormat:
    """The format of PEFT's `save_pretrained`."""

    name = "peft"
    about = "a folder with adapter_config.json and adapter_model.safetensors, as PEFT saves it"
    is_for_images = False
    suffix = None
    companions = COMPANIONS
    watched = frozenset({CONFIG_NAME, WEIGHTS_NAME, CARD_NAME})

    def find(self, folder: Folder) -> list[AdapterPaths]:
        """Find the adapter of a folder; there is at most one."""
        files = folder.files
        if CONFIG_NAME not in files or WEIGHTS_NAME not in files:
            return []
        companions = {name: path for name, path in files.items() if name in COMPANIONS}
        paths = files[WEIGHTS_NAME], files[CONFIG_NAME], files.get(CARD_NAME)
        return [AdapterPaths(folder.path, *paths, companions)]

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Report a configuration without weights."""
        if CONFIG_NAME not in folder.files:
            return []
        hint = f"copy {WEIGHTS_NAME} into the same folder"
        path = folder.files[CONFIG_NAME].parent
        return [AdapterRefused(f"there is no {WEIGHTS_NAME}", kind="no-weights", path=path, hint=hint)]

    def read_config(self, config: bytes) -> ConfigFacts:
        """Read `adapter_config.json`."""
        from icmlora.formats.peft.config import read_facts

        return read_facts(config)

    def inspect(
        self, config: bytes, weights: Buffer, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> AdapterSummary:
        """Check an adapter's two files and summarise them."""
        from icmlora.formats.peft.check import check_adapter

        if initial is None:
            return check_adapter(config, weights, path=path).summary
        from icmlora.formats.peft.initial import marked

        converted = _converted(config, bytes(weights), initial, path)
        return marked(check_adapter(*converted, path=path).summary, weights)

    def read(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> LoadedAdapter:
        """Read an adapter's factors, and its extras as they are."""
        from icmlora.formats.peft.tensors import read_adapter

        return read_adapter(*_converted(config, weights, initial, path), path=path)

    def runnable(
        self, config: bytes, weights: bytes, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> RunnableAdapter:
        """Read an adapter, and sort its extras by what they do to the base model."""
        from icmlora.formats.peft.runnable import read_runnable

        return read_runnable(*_converted(config, weights, initial, path), path=path)

    def encode(
        self,
        adapter: Adapter,
        *,
        card: str,
        metadata: Mapping[str, str],
        like: Template | None = None,
        dtype: str | None = None,
        pad_rank: int | None = None,
        extras: Mapping[str, RawTensor] | None = None,
    ) -> AdapterBytes:
        """Write an adapter's three files."""
        from icmlora.formats.peft.tensors import refuse_special, write_fresh, write_like

        extras = extras or {}
        if like is not None and like.details:
            from icmlora.formats.peft.initial import converted_form  # few adapters have a form to be noted

            like = converted_form(like)
        if like is not None and pad_rank is not None:
            refuse_special(like)
            # A decoded adapter has its generator's label, which may be another one of the same base model.
            facts = self.read_config(like.config)
            adapter = replace(adapter, base_model=facts.base_model or "", revision=facts.revision)
        if like is None or pad_rank is not None:
            weights, config = write_fresh(adapter, dtype or "bfloat16", metadata, extras, rank=pad_rank)
        else:
            weights, config = write_like(adapter, like, dtype, extras)
        return AdapterBytes(weights, config, card.encode())

    def lay_out(self, files: AdapterBytes, name: str) -> dict[str, bytes]:
        """Name the files as PEFT does; without its configuration a folder is not an adapter, so that comes last."""
        card = {} if files.card is None else {CARD_NAME: files.card}
        return {WEIGHTS_NAME: files.weights, **card, **files.companions, CONFIG_NAME: files.config}


def _converted(config: bytes, weights: bytes, initial: bytes | None, path: str | Path | None) -> tuple[bytes, bytes]:
    """Return configuration and weights, with the initial weights taken off where they are given."""
    if initial is None:
        return config, weights
    from icmlora.formats.peft.initial import convert

    with located(path):
        return convert(config, weights, initial)


PEFT: AdapterFormat = PeftFormat()
