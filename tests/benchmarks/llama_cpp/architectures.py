"""Whether llama.cpp computes with icm's adapters what PEFT computes, for every architecture that icm writes them for.

    python -m tests.benchmarks.llama_cpp.architectures --llama-cpp FOLDER [NAME ...]

FOLDER has llama.cpp's sources: `conversion/`, whose converter makes the base models, and `gguf-py/`. The source
distribution of llama-cpp-python has them under vendor/llama.cpp. The models are random, of three layers, in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from icmlora.base_models.finding.lookup import read_config
from icmlora.formats.pairs.gguf_lora import GgufBase, encode_gguf
from icmlora.formats.peft.peft import CONFIG_NAME, PEFT, WEIGHTS_NAME
from tests.benchmarks.llama_cpp.engine import (
    engine_version,
    equal,
    largest_difference,
    of_llama_cpp,
    of_transformers,
)
from tests.benchmarks.llama_cpp.tiny_models import MODELS, adapted, write_model

RESULT = Path(__file__).parents[1] / "results" / "llama_cpp_architectures.json"
_PROMPTS = [list(range(20 + start, 60 + start, 3)) for start in (0, 7, 50)]
_TOKENS = 32


def convert(sources: Path, folder: Path, target: Path) -> None:
    """Convert a model in a process of its own: llama.cpp's sources bring a `gguf` package of their own."""
    paths = os.pathsep.join(map(str, (sources, sources / "gguf-py")))
    command = [sys.executable, Path(__file__).with_name("convert.py"), folder, target]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, check=True)


def compare(name: str, sources: Path, place: Path) -> dict[str, object]:
    """Run one architecture in both, without and with an adapter."""
    model = write_model(name, place / "base")
    convert(sources, place / "base", place / "base.gguf")
    base = of_llama_cpp(place / "base.gguf", None, _PROMPTS, _TOKENS)
    plain = of_transformers(model, _PROMPTS, _TOKENS, base[0].never)
    tuned = of_transformers(adapted(model, place / "peft"), _PROMPTS, _TOKENS, base[0].never)
    files = (place / "peft" / CONFIG_NAME, place / "peft" / WEIGHTS_NAME)
    adapter = PEFT.runnable(*(file.read_bytes() for file in files))
    data = encode_gguf(adapter, GgufBase.of_config(read_config(place / "base")), metadata={})
    (place / "adapter.gguf").write_bytes(data)
    found = of_llama_cpp(place / "base.gguf", place / "adapter.gguf", _PROMPTS, _TOKENS)
    return {
        "modules": len(adapter.adapter.modules),
        "base_equal": equal(base, plain),
        "adapter_equal": equal(found, tuned),
        "adapter_changes": not equal(tuned, plain),
        "base_difference": largest_difference(base, plain),
        "adapter_difference": largest_difference(found, tuned),
    }


def main() -> None:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.llama_cpp.architectures")
    parser.add_argument("names", nargs="*", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder with llama.cpp's sources")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    given = parser.parse_args()
    architectures: dict[str, object] = {}
    for name in given.names:
        with tempfile.TemporaryDirectory() as folder:
            architectures[name] = compare(name, given.llama_cpp, Path(folder))
        print(name, json.dumps(architectures[name]), flush=True)
    result = {"engine": engine_version(), "tokens": _TOKENS, "prompts": len(_PROMPTS), "architectures": architectures}
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
