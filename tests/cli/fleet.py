"""Small real adapters on disk, as a trainer leaves them."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

BASE = "acme/tiny"


def write_adapter(folder: Path, *, seed: int = 0, value: float | None = None, **config: object) -> Path:
    """Write a rank-2 adapter of one module; `value` replaces its first number, `config` fields of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    a = random.standard_normal((2, 8)).astype(np.float32)
    b = random.standard_normal((8, 2)).astype(np.float32)
    if value is not None:
        a[0, 0] = value
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def write_broken(folder: Path, **config: object) -> Path:
    """Write an adapter whose weights are cut off: it cannot be taken."""
    weights = write_adapter(folder, **config) / "adapter_model.safetensors"  # type: ignore[arg-type]
    weights.write_bytes(weights.read_bytes()[:40])
    return folder


def write_texts(folder: Path, name: str = "samples.jsonl", count: int = 4) -> Path:
    """Write a file of texts into a folder."""
    file = folder / name
    file.write_text("".join(json.dumps({"text": f"text number {index}"}) + "\n" for index in range(count)))
    return file


def write_run(folder: Path, *, seed: int = 0, steps: tuple[int, ...] = (80, 100)) -> Path:
    """Write what a trainer leaves: a final adapter, its checkpoints, samples, held-out text and a card."""
    write_adapter(folder, seed=seed)
    for step in steps:
        write_adapter(folder / f"checkpoint-{step}", seed=seed + step)
    write_texts(folder)
    write_texts(folder, "eval.jsonl", count=2)
    (folder / "README.md").write_text(f"# {folder.name}\n")
    return folder


def write_fleet(root: Path, names: tuple[str, ...] = ("rust", "shakespeare", "sql")) -> Path:
    """Write a folder of runs."""
    for index, name in enumerate(names):
        write_run(root / name, seed=1000 * index)
    return root
