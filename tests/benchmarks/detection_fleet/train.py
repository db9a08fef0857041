"""Train one adapter of NanoDet-g: LoRA on all its convolutions, with the last five steps as checkpoints."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from icmlora.base_models.examples.examples import parse_examples
from icmlora.base_models.examples.media_archive import read_examples
from tests.benchmarks.detection_fleet.loader import load
from tests.benchmarks.detection_fleet.nanodet import CONVOLUTIONS, NAME

BATCH = 8
CHECKPOINTS = 5


@dataclass(frozen=True)
class Task:
    """An adapter to train. Its name is that of its class unless it is one of several."""

    of: str
    rank: int = 4
    seed: int = 0

    @property
    def is_variant(self) -> bool:
        """Whether it is another adapter of a class that has one."""
        return (self.rank, self.seed) != (Task.rank, Task.seed)

    @property
    def name(self) -> str:
        """What the task is called."""
        rank = "" if self.rank == Task.rank else f"-r{self.rank}"
        return f"{self.of}-detection{rank}" + (f"-seed{self.seed}" if self.seed else "")


def train(base: Path, task: Task, images: Path, folder: Path, steps: int) -> None:
    """Train an adapter on the rows in `images` and write it, final step and checkpoints."""
    draw = random.Random(task.seed)
    detector = load(base, torch.device("cpu"), torch.float32)
    scenes = list(parse_examples(read_examples(images), detector.example))
    config = LoraConfig(r=task.rank, lora_alpha=task.rank, target_modules=list(CONVOLUTIONS))
    detector.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster
    torch.manual_seed(task.seed)  # after the network: its constructor draws numbers too
    model = get_peft_model(detector.model, config)  # type: ignore[arg-type]
    model.peft_config["default"].base_model_name_or_path = NAME
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps)
    for step in range(1, steps + 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = detector.loss(draw.sample(scenes, BATCH)) / BATCH
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        if steps - CHECKPOINTS <= step < steps:
            _save(model, folder / f"checkpoint-{step}")
        if step % 20 == 0:
            print(f"{task.name}: step {step}, loss {loss.item():.3f}", flush=True)
    _save(model, folder)


def _save(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card names nothing that is true of this model
