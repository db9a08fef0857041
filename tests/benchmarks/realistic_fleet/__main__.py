"""Build a fleet of adapters as people train them, with transformers' Trainer and PEFT's own defaults.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.realistic_fleet --work W --fleet F [--only A,B]

Each folder of F gets a PEFT adapter, samples.jsonl (64 pieces of its training text) and eval.jsonl (16 held-out
pieces); F/tasks.json says how each was trained, and its losses. Tasks that are there are skipped, and one that was
stopped goes on from its last checkpoint. Ten to sixty minutes a task on one core; packages and base models take 10 GB
in W. Many of the texts are copyleft and Gemma has terms of its own: F is for you, not for publication.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.domain_fleet.pieces import PIECE, take
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.train import load_base, nats_per_token
from tests.benchmarks.realistic_fleet.bases import base_folder
from tests.benchmarks.realistic_fleet.tasks import TASKS, RealisticTask, Recipe

_LENGTH = 256  # tokens of a window
_SAVED = 10  # steps from one checkpoint to the next

_Task = TypeVar("_Task", bound=Recipe)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of the training text, at even distances."""

    def __init__(self, tokens: torch.Tensor, count: int) -> None:
        self._tokens, self._count = tokens, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * (len(self._tokens) - _LENGTH) // max(1, self._count - 1)
        window = self._tokens[start : start + _LENGTH]
        return {"input_ids": window, "labels": window}


def train(
    recipe: Recipe, base: Path, data: Dataset[Any], folder: Path, collate: Callable[[list[Any]], Any] | None = None
) -> None:
    """Train and save one adapter; the seed is the clock's, so nobody can draw its initial A again.

    Args:
        recipe: How.
        base: Folder of the base model.
        data: The examples, with labels.
        folder: Where the adapter goes. Checkpoints are there too, and a training that was stopped goes on from them.
        collate: Makes a batch of examples; by default they have to be of one length.
    """
    torch.seed()
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(base, torch.bfloat16), config)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, recipe.steps // 33),
        logging_steps=10,
        save_steps=_SAVED,
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=int.from_bytes(os.urandom(4), "little"),
        data_seed=0,  # the same order after a stop
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train(resume_from_checkpoint=any((folder / "run").glob("checkpoint-*")))
    config.base_model_name_or_path = recipe.base_model
    model.save_pretrained(str(folder))
    shutil.rmtree(folder / "run", ignore_errors=True)


def build(task: RealisticTask, work: Path, fleet: Path) -> None:
    """Build one task; its folder gets its name when it is complete."""
    started = time.monotonic()
    base = base_folder(task.base_model, work)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    part = fleet / f".{task.name}.part"
    part.mkdir(parents=True, exist_ok=True)
    pieces = take(DOMAINS[task.domain].documents(Packages(work)), tokenizer)
    pieces.write(part)
    train(task, base, Windows(pieces.tokens, task.steps * task.batch), part)
    bare = load_base(base, torch.bfloat16)
    before = nats_per_token(bare, tokenizer, part / "eval.jsonl", PIECE)
    after = nats_per_token(PeftModel.from_pretrained(bare, str(part)), tokenizer, part / "eval.jsonl", PIECE)
    part.rename(fleet / task.name)
    record(fleet, task, before, after)
    print(f"{task.name}: {before:.3f} -> {after:.3f} nats, {time.monotonic() - started:.0f} s", flush=True)


def record(fleet: Path, task: RealisticTask, before: float, after: float) -> None:
    """Add a task to tasks.json, which is whole at any moment."""
    path = fleet / "tasks.json"
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    rows.append(asdict(task) | {"alpha": task.alpha, "nats_of_base": before, "nats": after})
    part = fleet / ".tasks.json"
    part.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def build_all(tasks: Sequence[_Task], build: Callable[[_Task, Path, Path], None], description: str | None) -> None:
    """Build the tasks that the command line asks for and that are not there, in their order."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of packages and base models")
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--only", default=",".join(task.name for task in tasks), help="names, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work, fleet, wanted = arguments.work.resolve(), arguments.fleet.resolve(), set(arguments.only.split(","))
    for task in tasks:
        if task.name in wanted and not (fleet / task.name).exists():
            build(task, work, fleet)


if __name__ == "__main__":
    build_all(TASKS, build, __doc__)
