"""Adapters for the tiny base model, of mixed ranks and targets, and stores of them in every state a command meets."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from icm_cli.app import run
from tests.cli.fleet import write_texts
from tests.icmlora.tiny_base import HIDDEN, LABEL, write_tiny_base

STEPS = 12
EPISODES = 2
SUBJECTS = {"apples": "red apples", "pears": "green pears", "trains": "night trains", "ships": "tall ships"}
"""Tasks that differ in what their samples are about."""
WIDTHS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "mlp.down_proj": (2 * HIDDEN, HIDDEN),
}


def write_lora(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 2,
    alpha: float = 2,
    targets: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj"),
    **config: object,
) -> Path:
    """Write a random adapter as a PEFT folder, without texts."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(2):
        for target in targets:
            inputs, outputs = WIDTHS[target]
            name = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, inputs, generator=random)
            tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(outputs, rank, generator=random)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": LABEL,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [target.rpartition(".")[2] for target in targets],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def write_mixed_fleet(root: Path) -> Path:
    """Write three tasks.

    poems     rank 2, q and v, two checkpoints, samples, held-out text, a card
    rules     rank 4, q, k and down, alpha 8, samples, held-out text
    silent    rank 1, v, no text at all
    """
    write_lora(root / "poems", seed=1)
    for step in (10, 20):
        write_lora(root / "poems" / f"checkpoint-{step}", seed=step)
    (root / "poems" / "README.md").write_text("# poems\n")
    write_lora(
        root / "rules", seed=2, rank=4, alpha=8, targets=("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    )
    write_lora(root / "silent", seed=3, rank=1, alpha=1, targets=("self_attn.v_proj",))
    for name in ("poems", "rules"):
        write_texts(root / name, count=16)
        write_texts(root / name, "eval.jsonl", count=2)
    return root


def write_subject(folder: Path, *, seed: int = 0) -> Path:
    """Write a task called as one of `SUBJECTS`, with samples for four support sets."""
    write_lora(folder, seed=seed)
    subject = SUBJECTS[folder.name]
    lines = [json.dumps({"text": f"{subject} number {number} of {subject}"}) for number in range(32)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def icm_quietly(store: Path | str, *arguments: object) -> None:
    """Run one command on a store and insist that it succeeds."""
    code = run(["--store", str(store), "-q", *map(str, arguments)])
    assert code == 0, arguments


def build_ingested(folder: Path, *, vectors: bool) -> Path:
    """Make `folder` with base/, loras/ and a store of them, with or without task vectors, and return the store."""
    write_mixed_fleet(folder / "loras")
    store = folder / "store"
    icm_quietly(store, "base", "add", LABEL, write_tiny_base(folder / "base"))
    icm_quietly(store, "ingest", folder / "loras", *(["--device", "cpu"] if vectors else ["--no-vectors"]))
    return store


def train_store(store: Path, *options: object) -> None:
    """Train a store's generator in a second, without measuring anything."""
    icm_quietly(store, "train", "--no-eval", "--refine", "0", "--device", "cpu", "--steps", STEPS, *options)
