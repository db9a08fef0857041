"""Whether MLX-LM computes with icm's adapters what PEFT computes, for random models of many architectures.

    pip install mlx-lm "mlx[cpu]"          (on a Mac: pip install mlx-lm)
    python -m tests.benchmarks.mlx_adapters [NAME ...] [--real BASE PEFT MLX]

MLX-LM's own loader reads the folder and refuses tensors that the model does not have. All is in float32. Fields that
MLX-LM reads and transformers does not write, or writes elsewhere, are added to the configuration of the base model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from icmlora.errors import AdapterRefused
from icmlora.formats.pairs.mlx import encode_mlx
from icmlora.formats.peft.peft import CONFIG_NAME, PEFT, WEIGHTS_NAME
from tests.benchmarks.llama_cpp.tiny_models import MODELS, adapted, write_model

RESULT = Path(__file__).parent / "results" / "mlx.json"
_ADDED = {
    **{"block_dim": 64, "block_multiple_of": 1, "block_ffn_dim_multiplier": 1.0},  # LFM2
    "num_experts": 4,  # Qwen3-MoE
}
_TOKENS = list(range(20, 100, 2))


def of_mlx(folder: Path, adapter: Path | None) -> NDArray[np.float32]:
    """Return MLX-LM's logits, shape (tokens, vocabulary)."""
    from mlx import core  # only this study needs it
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
    return np.array(model(core.array([_TOKENS])).astype(core.float32))[0]


@torch.no_grad()
def of_transformers(model: Any) -> NDArray[np.float32]:
    """Return the same of transformers, with PEFT if the model has an adapter."""
    found: NDArray[np.float32] = model(torch.tensor([_TOKENS])).logits[0].float().numpy()
    return found


def compare(name: str, place: Path, *, use_dora: bool = False) -> dict[str, object]:
    """Run one architecture in both, without and with an adapter."""
    base, peft, mlx = place / "base", place / "peft", place / "mlx"
    model = write_model(name, base)
    complete(base / "config.json")
    plain = of_transformers(model)
    tuned = of_transformers(adapted(model, peft, use_dora=use_dora))
    adapter = PEFT.runnable(*((peft / file).read_bytes() for file in (CONFIG_NAME, WEIGHTS_NAME)))
    mlx.mkdir()
    try:
        made = encode_mlx(adapter, metadata={})
    except AdapterRefused as refused:
        return {"refused": str(refused)}
    (mlx / "adapters.safetensors").write_bytes(made.weights)
    (mlx / "adapter_config.json").write_bytes(made.config)
    return {"modules": len(adapter.adapter.modules), **differences(base, mlx, plain, tuned)}


def compare_real(base: Path, peft: Path, mlx: Path, place: Path) -> dict[str, object]:
    """Compare a model and an adapter that `icm materialize` wrote in both forms; the model's folder is not changed."""
    copy = place / "base"
    copy.mkdir()
    for file in base.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "config.json").unlink()
    shutil.copy(base / "config.json", copy / "config.json")
    complete(copy / "config.json")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = of_transformers(model)
    return differences(copy, mlx, plain, of_transformers(PeftModel.from_pretrained(model, peft).eval()))


def complete(config: Path) -> None:
    """Add what MLX-LM looks for to the configuration of a model."""
    fields = json.loads(config.read_text())
    text = fields.get("text_config", fields)
    rope = text.get("rope_parameters", {})
    rope = rope.get("full_attention", rope)
    added = {"vocab_size": text["vocab_size"], **_ADDED, **rope}
    for part in (fields, text):
        part.update(added)
    config.write_text(json.dumps(fields))


def differences(base: Path, mlx: Path, plain: NDArray[np.float32], tuned: NDArray[np.float32]) -> dict[str, float]:
    """Return the largest differences of logits between the engines, and what the adapter changes in them."""
    return {
        "base_difference": _largest(of_mlx(base, None) - plain),
        "adapter_difference": _largest(of_mlx(base, mlx) - tuned),
        "adapter_effect": _largest(tuned - plain),
    }


def _largest(values: NDArray[np.float32]) -> float:
    return round(float(np.abs(values).max()), 6)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.mlx_adapters")
    parser.add_argument("names", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument(
        "--real", nargs=3, type=Path, metavar="FOLDER", help="a base model, its adapter for PEFT and MLX"
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    found: dict[str, object] = {}
    for name, use_dora in [(name, False) for name in given.names] + [("LlamaForCausalLM", True)]:
        title = f"{name}, DoRA" if use_dora else name
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[title] = compare(name, Path(folder), use_dora=use_dora)
            except (Exception, SystemExit) as error:  # of MLX-LM; a model or an adapter that it does not load
                found[title] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(title, json.dumps(found[title]), flush=True)
    if given.real:
        with tempfile.TemporaryDirectory() as folder:
            found["real"] = compare_real(*given.real, Path(folder))
        print("real", json.dumps(found["real"]), flush=True)
    packages = {name: version(name) for name in ("mlx", "mlx-lm", "peft", "transformers")}
    given.output.write_text(json.dumps({"packages": packages, "architectures": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
