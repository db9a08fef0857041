"""The domain fleet as the study reads it: tasks that were built, their adapters, samples and held-out text."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import Example, parse_examples
from icmlora.base_models.finding.lookup import inspect_base
from icmlora.base_models.kinds.causal_lm import CausalLM
from icmlora.base_models.kinds.likelihood import Scored, tokenized
from icmlora.base_models.modality import BaseModel
from icmlora.base_models.running.lora_hooks import Factors, factors_of
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from tests.benchmarks.example_fleet.tasks import BASE_MODEL

SAMPLE_TOKENS = 128
"""Tokens of a sample or held-out text that are read."""
TEXTS = 6
"""Held-out texts of a task."""


@dataclass(frozen=True)
class StudyTask:
    """A task of the domain fleet, in a folder of its own."""

    folder: Path
    group: str
    family: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    def adapter(self) -> Adapter:
        """Read its own adapter."""
        return load_adapter(self.folder)

    @cached_property
    def texts(self) -> list[str]:
        """Its samples, which its own adapter was trained on."""
        return [example.text for example in parse_examples((self.folder / "samples.jsonl").read_bytes())]

    def samples(self, base: BaseModel) -> list[Scored]:
        """Return its samples as token ids."""
        return tokenized(base.tokenizer, [Example("", text) for text in self.texts], SAMPLE_TOKENS)

    def held_out(self, base: BaseModel) -> list[Example]:
        """Return its held-out texts, cut to what is scored."""
        examples = parse_examples((self.folder / "eval.jsonl").read_bytes())[:TEXTS]
        ids = [base.tokenizer(example.text)["input_ids"][:SAMPLE_TOKENS] for example in examples]
        return [Example("", base.tokenizer.decode(row)) for row in ids]


def load_study_base(folder: Path) -> BaseModel:
    """Load the base model of the fleet in bfloat16."""
    return CausalLM().load(inspect_base(BASE_MODEL, folder), dtype=torch.bfloat16, fingerprint="study")


def reloaded(adapter: Adapter | None) -> Factors:
    """Return an adapter's factors as they are in bfloat16 after it was written and read back; none of no adapter."""
    if adapter is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder) / "adapter", dtype="bfloat16")
        return factors_of(load_adapter(Path(folder) / "adapter"))


def built_tasks(fleet: Path, most: int | None = None) -> list[StudyTask]:
    """Return the tasks whose folder is there, in the order of the list, the first `most` of them."""
    rows = json.loads((fleet / "tasks.json").read_text("utf-8"))
    tasks = [StudyTask(fleet / row["name"], row["group"], row["family"]) for row in rows]
    return [task for task in tasks if task.folder.is_dir()][:most]
