"""What is fitted to the tasks of a fold that are not held out: icm's start, the fleet's mean, one LoRA for all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import get_peft_model

from icmlora.adapter.arithmetic import mean_adapter
from icmlora.adapter.model import Adapter
from icmlora.base_models.examples.examples import plain
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.fewshot.meta_training import MetaConfig, meta_train
from icmlora.fewshot.start import FewShotStart, untrained_fewshot_start
from icmlora.fewshot.start_file import fewshot_start_from_bytes, fewshot_start_to_bytes, mean_code
from icmlora.formats.discovery.folder import load_adapter
from icmlora.generator.codec.codec import Codec
from icmlora.generator.config import config_for
from icmlora.generator.files.network_file import generator_to_bytes
from icmlora.generator.network.cvae import CVAE
from icmlora.task_vectors.extraction import extract_context
from icmlora.training.initialisation import fresh_network
from tests.benchmarks.adapters_alone import AdaptersAlone
from tests.benchmarks.example_fleet.tasks import Schedule, Task
from tests.benchmarks.example_fleet.train import load_base, lora_config, train
from tests.benchmarks.unseen.fleet import SAMPLE_TOKENS, StudyTask

MULTITASK = Schedule(steps=160, batch=2, length=128, learning_rate=2e-3, warmup=5)
"""Of the one LoRA for all: twice the steps of a task's own."""
MULTITASK_RANK = 16
_MEAN_RANK = 64


@dataclass(frozen=True, eq=False)
class Episodes(AdaptersAlone):
    """The tasks that are not held out, for meta-training and for a network's statistics."""

    members: Sequence[StudyTask]
    base: BaseModel

    def __iter__(self) -> Iterator[Adapter]:
        """Read all adapters, one after the other."""
        return (task.adapter() for task in self.members)

    def tasks(self) -> int:
        """Return the number of tasks."""
        return len(self.members)

    def samples(self, task: int) -> Sequence[Scored]:
        """Return a task's samples."""
        return self.members[task].samples(self.base)

    def load(self, task: int, checkpoint: int | None = None) -> Adapter:
        """Read a task's adapter."""
        return self.members[task].adapter()


def fit_start(base: BaseModel, members: Sequence[StudyTask], episodes: int, seed: int, stored: Path) -> FewShotStart:
    """Learn a start as `icm train --few-shot` does, and read it back from its file.

    The generator that codes its mean has the statistics of these tasks and is not trained: its prediction of a mean
    over all tasks would be worth little.
    """
    fleet = Episodes(members, base)
    codec = _codec(fleet)
    if not stored.exists():
        start = untrained_fewshot_start(fleet, codec.config.slots)
        code = mean_code(start, codec)
        start = replace(start, adapter=codec.decode(code))
        for at, learned in meta_train(base, start, fleet, MetaConfig(episodes=episodes, seed=seed)):
            start = learned
            print(f"  episode {at.number}: {members[at.task].name} from {at.support}: {at.loss:.3f}", flush=True)
        stored.write_bytes(fewshot_start_to_bytes(start, code))
    return fewshot_start_from_bytes(stored.read_bytes(), codec.decode)


def _codec(fleet: Episodes) -> Codec:
    layouts = (adapter.layout for adapter in fleet)
    config = config_for(next(iter(fleet)).base_model, layouts, tasks=fleet.tasks(), condition_size=0, quality=4)
    net: CVAE = fresh_network(config, fleet, 0)
    return Codec.of(generator_to_bytes(net))


def fit_mean(members: Sequence[StudyTask]) -> Adapter:
    """Return the mean dW of these tasks."""
    return mean_adapter((task.adapter() for task in members), _MEAN_RANK)


def fit_multitask(base_folder: Path, base: BaseModel, members: Sequence[StudyTask], seed: int, folder: Path) -> Adapter:
    """Train one LoRA on the samples of all these tasks, or read the one that was trained."""
    if not (folder / "adapter_config.json").exists():
        rows = [scored.ids for task in members for scored in task.samples(base)]
        _train(base_folder, rows, MULTITASK, MULTITASK_RANK, seed, folder)
    return load_adapter(folder)


def fit_fresh(base_folder: Path, rows: Sequence[list[int]], steps: int, rank: int, seed: int) -> Adapter:
    """Train a LoRA from scratch on some samples."""
    schedule = Schedule(steps=steps, batch=2, length=SAMPLE_TOKENS, learning_rate=2e-3, warmup=5)
    with tempfile.TemporaryDirectory() as folder:
        _train(base_folder, rows, schedule, rank, seed, Path(folder) / "adapter")
        return load_adapter(Path(folder) / "adapter")


def _train(
    base_folder: Path, rows: Sequence[list[int]], schedule: Schedule, rank: int, seed: int, folder: Path
) -> None:
    torch.manual_seed(seed)
    order = torch.randperm(len(rows)).tolist()
    tokens = torch.tensor([token for number in order for token in rows[number]])
    task = Task(folder.name, rank=rank, seed=seed)
    model = get_peft_model(load_base(base_folder, torch.bfloat16), lora_config(task))
    train(model, tokens, task, schedule, folder)


def support_set_vectors(base: BaseModel, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the context vectors of some texts, one support set a row."""
    return np.stack([vector.values.numpy() for vector in extract_context(base, plain(texts))])
