"""Folders as trainers leave them: where their adapters are, and which of those stands for a task."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.compat.building import CONFIG, WEIGHTS, copy_adapter, rewrite, set_fields

Words = tuple[str, ...]


def _nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Tree:
    """A tree of folders with adapters."""

    name: str
    tasks: Mapping[str, Words]
    """Where the adapters are that stand for a task, and the words that have to be in its name."""
    others: Words = ()
    """Where further adapters of those tasks are, such as checkpoints; each has to be in the store as well."""
    more: Callable[[Path], None] = field(default=_nothing)
    """Writes the other files that the trainer leaves."""
    copies: Words = ()
    """Where an adapter is that is the same as another one, byte for byte."""

    def write(self, folder: Path, plain: Path, seed: int) -> dict[str, Path]:
        """Write the tree with trainings of a plain adapter; return its places."""
        places = {}
        for number, place in enumerate((*self.tasks, *self.others)):
            places[place] = copy_adapter(plain, folder / place, seed=1000 * seed + number)
        self.more(folder)
        return places


def _touch(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def _llama_factory(folder: Path) -> None:
    for run in folder.glob("saves/*/lora/*"):
        for name in ("all_results.json", "trainer_log.jsonl", "training_args.yaml", "training_loss.png"):
            (run / name).write_text("{}")
        _touch(run, "value_head.bin", "training_args.bin")


def _pissa(folder: Path) -> None:
    set_fields(folder / "myrun", init_lora_weights="pissa")
    copy_adapter(folder / "myrun", folder / "myrun/pissa_init", init_lora_weights=True)


def _unsloth(folder: Path) -> None:
    for config in folder.rglob(CONFIG):
        set_fields(config.parent, base_model_name_or_path="unsloth/tiny-llama-bnb-4bit")


def _trainer(folder: Path) -> None:
    for checkpoint in folder.glob("*/checkpoint-*"):
        _touch(checkpoint, "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
        (checkpoint / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": None, "global_step": 3}))


def _deepspeed(folder: Path) -> None:
    _touch(
        folder,
        "ds-run/checkpoint-3/global_step3/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "ds-run/checkpoint-3/global_step3/mp_rank_00_model_states.pt",
        "ds-run/checkpoint-3/zero_to_fp32.py",
        "ds-run/checkpoint-3/latest",
        "ds-run/checkpoint-3/pytorch_model_fsdp_0/__0_0.distcp",
    )


def _accelerate(folder: Path) -> None:
    _touch(
        folder, *(f"sd-lora/checkpoint-500/{name}" for name in ("optimizer.bin", "random_states_0.pkl", "scaler.pt"))
    )
    _touch(folder, "sd-lora/sampler.bin", "notes/eval_results.pkl", "notes/train.bin")


def _axolotl(folder: Path) -> None:
    _touch(folder, "proj1/outputs/lora-out/debug.log")
    (folder / "proj1/outputs/lora-out/config.json").write_text('{"model_type": "llama"}')


def _cache(folder: Path) -> None:
    """Make the places links into `blobs`, as the Hugging Face cache does."""
    for snapshot in folder.glob("models--*/snapshots/*"):
        blobs = snapshot.parent.parent / "blobs"
        blobs.mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            blob = blobs / f"{snapshot.name[:8]}-{name}"
            shutil.move(snapshot / name, blob)
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        refs = snapshot.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text("0" * 40)


def _added(folder: Path) -> None:
    """Take the prefix off the names, as `model.add_adapter` of transformers saves them."""
    rewrite(
        folder / "added", lambda tensors: {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    )


def _repeated(folder: Path) -> None:
    """Write the adapter a second time, as axolotl did."""
    inner = folder / "ax/checkpoint-100/adapter_model"
    inner.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / "ax/checkpoint-100" / name, inner / name)


def _linked(folder: Path) -> None:
    (folder / "linked/best").symlink_to("checkpoint-200")


def _samples(folder: Path) -> None:
    row = json.dumps({"text": "the quick brown fox"}) + "\n"
    (folder / "poems/samples.jsonl").write_text(row * 3 + "\n" + '{"neither": 1}\n' + row)


_ZEROS, _AS = "0" * 40, "a" * 40

TREES: tuple[Tree, ...] = (
    Tree("trl", {"sft-run": ("sft-run",)}, ("sft-run/checkpoint-1", "sft-run/checkpoint-2"), _trainer),
    Tree("trainer", {"hf-run/checkpoint-3": ("hf-run",)}, ("hf-run/checkpoint-2",), _trainer),
    Tree("deepspeed", {"ds-run": ("ds-run",)}, ("ds-run/checkpoint-3",), _deepspeed),
    Tree(
        "unsloth",
        {"alpaca/lora_model": ("alpaca",), "law/lora_model": ("law",)},
        ("alpaca/outputs/checkpoint-60", "law/outputs/checkpoint-60"),
        _unsloth,
    ),
    Tree(
        "llama-factory",
        {
            "saves/Llama-3-8B/lora/sft": ("Llama-3-8B", "sft"),
            "saves/Qwen2-7B/lora/sft": ("Qwen2-7B", "sft"),
            "saves/Llama-3-8B/lora/train_2024-05-01-10-10-10": ("train_2024-05-01-10-10-10",),
        },
        more=_llama_factory,
    ),
    Tree("llama-factory-pissa", {"myrun": ("myrun",)}, more=_pissa),
    Tree("axolotl", {"proj1/outputs/lora-out": ("proj1",), "proj2/outputs/out": ("proj2",)}, more=_axolotl),
    Tree(
        "axolotl-of-2023", {"ax/checkpoint-100": ("ax",)}, more=_repeated, copies=("ax/checkpoint-100/adapter_model",)
    ),
    Tree("qlora", {"qlora/checkpoint-200/adapter_model": ("qlora",)}, ("qlora/checkpoint-100/adapter_model",)),
    Tree("seeds", {f"{task}/seed{seed}": (task, f"seed{seed}") for task in ("chat", "code") for seed in (0, 1)}),
    Tree(
        "epochs",
        {"runA/epoch_2": ("runA",), "runB/epoch_2": ("runB",)},
        ("runA/epoch_1", "runB/epoch_1"),
    ),
    Tree("best-and-last", {"sql/best": ("sql",), "sql/last": ("sql", "last")}),
    Tree("unets", {"task0/unet": ("task0",), "task1/unet": ("task1",)}),
    Tree(
        "hub-cache",
        {
            f"models--acme--lora0/snapshots/{_ZEROS}": ("lora0",),
            f"models--acme--lora1/snapshots/{_ZEROS}": ("lora1",),
            f"models--acme--lora0/snapshots/{_AS}": ("lora0", _AS[:7]),
        },
        more=_cache,
    ),
    Tree(
        "named-adapters",
        {
            "named1": ("named1",),
            "named1/french": ("french",),
            "named2": ("named2",),
            "named2/french": ("named2", "french"),
        },
    ),
    Tree("add-adapter", {"added": ("added",)}, more=_added),
    Tree("accelerate", {"good": ("good",)}, more=_accelerate),
    Tree("link", {"linked/checkpoint-200": ("linked",)}, ("linked/checkpoint-100",), _linked),
    Tree("odd-samples", {"poems": ("poems",)}, more=_samples),
    Tree(
        "odd-names", {"my lora (v2)": ("my", "lora"), "a+b": (), "r=8,lr=1e-4": (), "2024-05-01_run": ("2024-05-01",)}
    ),
)
