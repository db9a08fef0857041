"""Train the example fleet: one small LoRA adapter per task, each folder as a trainer leaves it.

usage: python -m tests.benchmarks.example_fleet.train BASE WORK FLEET

BASE is SmolLM2-135M-Instruct as a Hugging Face folder; WORK and FLEET are the folders `build_text` wrote. A task that
has an adapter card in FLEET is done and is skipped, so a stopped run goes on where it was. About five minutes a task on
one CPU thread; set OMP_NUM_THREADS=1 (two busy threads are slower than one).
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tests.benchmarks.example_fleet.card import Recipe, write_card
from tests.benchmarks.example_fleet.tasks import BASE_MODEL, SCHEDULE, TASKS, Schedule, Task
from tests.benchmarks.example_fleet.texts import TEXTS

DATA_SEED = 0  # of the order of the text; one for all tasks, so that only Task.seed differs


def batches(tokens: torch.Tensor, schedule: Schedule, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield random windows of `tokens`, each (schedule.batch, schedule.length), for ever."""
    while True:
        starts = torch.randint(len(tokens) - schedule.length, (schedule.batch,), generator=generator)
        yield torch.stack([tokens[start : start + schedule.length] for start in starts.tolist()])


def lora_config(task: Task) -> LoraConfig:
    """The PEFT configuration of a task."""
    return LoraConfig(
        r=task.rank,
        lora_alpha=task.alpha,
        target_modules=list(task.targets),
        use_rslora=task.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_MODEL,
    )


def train(model: PeftModel, tokens: torch.Tensor, task: Task, schedule: Schedule, folder: Path) -> None:
    """Run the optimiser over random windows of `tokens`; leaves the checkpoints and the final adapter in `folder`."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=schedule.learning_rate, weight_decay=0.0)
    windows = batches(tokens, schedule, torch.Generator().manual_seed(DATA_SEED))
    model.train()
    for step in range(1, schedule.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        window = next(windows)
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"  {task.name} step {step}: loss {loss.item():.3f}", flush=True)
        if step in task.checkpoints:
            save(model, folder / f"checkpoint-{step}")
    save(model, folder)


def save(model: PeftModel, folder: Path) -> None:
    """Write the adapter as PEFT does, in bfloat16, with the set of target modules in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    half = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = BASE_MODEL
    config.inference_mode = True
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text("utf-8"))
    written["target_modules"] = sorted(written["target_modules"])  # PEFT writes a set in hash order
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def nats_per_token(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, length: int, texts: int | None = None
) -> float:
    """Mean negative log-likelihood over every predicted token of a JSONL file's first texts, each cut to `length`."""
    model.eval()
    total, count = 0.0, 0
    for line in path.read_text("utf-8").splitlines()[:texts]:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :length]
        predicted = ids.shape[1] - 1
        total += model(input_ids=ids, labels=ids).loss.item() * predicted
        count += predicted
    return total / count


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load the base model from a local folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def run(task: Task, base: Path, text: Path, fleet: Path) -> None:
    """Train, measure and write one task; the folder's card is written last and marks it as done."""
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    folder = fleet / task.name
    for left in folder.glob("checkpoint-*"):
        shutil.rmtree(left)
    tokens = tokenizer(text.read_text("utf-8"), return_tensors="pt").input_ids[0]
    torch.manual_seed(task.seed)
    train(get_peft_model(load_base(base, torch.bfloat16), lora_config(task)), tokens, task, SCHEDULE, folder)
    exact = load_base(base, torch.float32)
    before = nats_per_token(exact, tokenizer, folder / "eval.jsonl", SCHEDULE.length)
    adapted = PeftModel.from_pretrained(exact, str(folder))
    after = nats_per_token(adapted, tokenizer, folder / "eval.jsonl", SCHEDULE.length)
    write_card(folder / "README.md", Recipe("example", task, TEXTS[task.name], SCHEDULE), before, after)
    print(f"{task.name}: {before:.3f} -> {after:.3f} nats per token, {time.monotonic() - started:.0f} s", flush=True)


def main(base: Path, work: Path, fleet: Path) -> None:
    """Train every task that has no card yet and record the package versions."""
    for task in TASKS:
        if not (fleet / task.name / "README.md").exists():
            run(task, base, work / "text" / f"{task.name}.txt", fleet)
    path = fleet / "packages.json"
    versions = json.loads(path.read_text("utf-8"))
    versions |= {f"pypi:{name}": version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    path.write_text(json.dumps(versions, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
