"""PEFT LoRA folders: adapter_config.json + adapter_model.safetensors + README.md.

Methods import checking, decoding and writing when needed: restoring an original needs only the file names.

Source: huggingface/peft, utils/save_and_load.py and tuners/lora.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.errors import AdapterRefused
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterSummary,
    Buffer,
    ConfigFacts,
    Extras,
    FolderFormat,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    Texts,
)
from icmlora.formats.peft.config import read_facts

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder

CONFIG_NAME = FolderFormat.config_name
CARD_NAME = FolderFormat.card_name
WEIGHTS_NAME = "adapter_model.safetensors"
CONTEXT_TEXT_NAME = "context.txt"
CONTEXT_MESSAGES_NAME = "context.json"
CONTEXT_NAMES = frozenset({CONTEXT_TEXT_NAME, CONTEXT_MESSAGES_NAME})
"""Text prepended to the adapter's requests: `icm context`."""
# Files that trainers save next to an adapter and that serving needs. Trainer state is not part of an adapter.
COMPANIONS = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
        *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
        *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
        *("generation_config.json", "value_head.safetensors"),
        *CONTEXT_NAMES,
    }
)


class PeftFormat(FolderFormat):
    """The format of PEFT's `save_pretrained`."""

    name = "peft"
    about = "a folder with adapter_config.json and adapter_model.safetensors, as PEFT saves it"
    weights_name = WEIGHTS_NAME
    companions = COMPANIONS
    watched = frozenset({CONFIG_NAME, WEIGHTS_NAME, CARD_NAME})

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Report a configuration without weights."""
        if CONFIG_NAME not in folder.files:
            return []
        hint = f"copy {WEIGHTS_NAME} into the same folder"
        path = folder.files[CONFIG_NAME].parent
        return [AdapterRefused(f"there is no {WEIGHTS_NAME}", kind="no-weights", path=path, hint=hint)]

    def read_config(self, config: bytes) -> ConfigFacts:
        """Read `adapter_config.json`."""
        return read_facts(config)

    def inspect(
        self, config: bytes, weights: Buffer, *, path: str | Path | None = None, initial: bytes | None = None
    ) -> AdapterSummary:
        """Check and summarise an adapter's two files; a converted adapter is described as its original."""
        summary = super().inspect(config, weights, path=path, initial=initial)
        if initial is None:
            return summary
        from icmlora.formats.peft.initial import marked

        return marked(summary, weights)

    def _without_initial(self, config: bytes, weights: bytes, initial: bytes | None) -> tuple[bytes, bytes]:
        if initial is None:
            return config, weights
        from icmlora.formats.peft.initial import convert

        return convert(config, weights, initial)

    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        from icmlora.formats.peft.check import check_adapter

        return check_adapter(config, weights).summary

    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        from icmlora.formats.peft.tensors import read_adapter

        return read_adapter(config, weights)

    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        from icmlora.formats.peft.runnable import read_runnable

        return read_runnable(config, weights)

    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        from icmlora.formats.peft.tensors import write_fresh

        return AdapterBytes(*write_fresh(adapter, dtype, metadata))

    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        from icmlora.formats.peft.tensors import refuse_special, write_fresh, write_like

        if like.details:
            from icmlora.formats.peft.initial import converted_form  # few adapters have an unusual form

            like = converted_form(like)
        if rank is None:
            return AdapterBytes(*write_like(adapter, like, dtype, extras))
        refuse_special(like, extras)
        # A decoded adapter has its generator's label, which may be another label of the same base model.
        facts = self.read_config(like.config)
        adapter = replace(adapter, base_model=facts.base_model or "", revision=facts.revision)
        return AdapterBytes(*write_fresh(adapter, dtype or "bfloat16", metadata, rank=rank))


PEFT: AdapterFormat = PeftFormat()
