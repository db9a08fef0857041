"""Build one task of the domain fleet after the other: text, adapter, losses, card."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.domain_fleet.pieces import PIECE, take
from tests.benchmarks.domain_fleet.tasks import SCHEDULE, DomainTask
from tests.benchmarks.example_fleet.card import Recipe, write_card
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import Schedule
from tests.benchmarks.example_fleet.texts import Text
from tests.benchmarks.example_fleet.train import load_base, lora_config, nats_per_token, train

_MEASURED = 4
"""Held-out texts that a card's losses are measured on: they say that training worked, a study measures again."""


class Builder:
    """Builds tasks on one base model.

    Args:
        base: Its Hugging Face folder.
        packages: Where the texts come from.
        fleet: Folder that gets one folder a task.
        schedule: How each task is trained.
    """

    def __init__(self, base: Path, packages: Packages, fleet: Path, schedule: Schedule = SCHEDULE) -> None:
        self._base = base
        self._packages = packages
        self._fleet = fleet
        self._schedule = schedule
        self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base, local_files_only=True)

    def build(self, task: DomainTask, text: Text) -> bool:
        """Build a task unless it is there; returns whether it was built.

        The folder gets its name when it is complete, so a task is whole or absent, however a run ends.
        """
        if (self._fleet / task.name).exists():
            return False
        started = time.monotonic()
        part = self._fleet / f".{task.name}.part"
        shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped
        part.mkdir()
        before, after = self._fill(part, task, text)
        part.rename(self._fleet / task.name)
        print(f"{task.name}: {before:.3f} -> {after:.3f} nats, {time.monotonic() - started:.0f} s", flush=True)
        return True

    def _fill(self, folder: Path, task: DomainTask, text: Text) -> tuple[float, float]:
        """Write everything a task's folder holds; returns nats per token of the base model and with the adapter."""
        pieces = take(text.documents(self._packages), self._tokenizer)
        pieces.write(folder)
        torch.manual_seed(task.seed)
        model = get_peft_model(load_base(self._base, torch.bfloat16), lora_config(task))
        train(model, pieces.tokens, task, self._schedule, folder)
        bare = load_base(self._base, torch.bfloat16)
        before = nats_per_token(bare, self._tokenizer, folder / "eval.jsonl", PIECE, _MEASURED)
        adapted = PeftModel.from_pretrained(bare, str(folder))
        after = nats_per_token(adapted, self._tokenizer, folder / "eval.jsonl", PIECE, _MEASURED)
        write_card(folder / "README.md", Recipe("domain", task, text, self._schedule), before, after)
        return before, after


def write_index(fleet: Path, tasks: Sequence[DomainTask]) -> None:
    """Write tasks.json, which says of every task what a study has to know, and whole at any moment."""
    rows = [asdict(task) | {"alpha": task.alpha, "source": DOMAINS[task.name].source} for task in tasks]
    part = fleet / f".tasks-{os.getpid()}.json"
    part.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    part.replace(fleet / "tasks.json")
