"""Make stores of the realistic fleet, for `python -m tests.benchmarks.rate_distortion` to measure.

usage: python -m tests.benchmarks.realistic_fleet.stores --work W --fleet F [--only NAME] [--qualities 4,0.99]

For each base model, W/stores/NAME/plain-4 has a generator and the plain codes of the default quality, and refined-Q the
codes that `icm encode --quality Q` makes of it, or `--keep Q` where Q is a share such as 0.99. Prints how long each
command took. A store that is there is kept.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from icm_cli.errors import ExitCode
from tests.benchmarks.performance.commands import icm, process
from tests.benchmarks.rate_distortion.summary import REFINED
from tests.benchmarks.realistic_fleet.bases import base_folder
from tests.benchmarks.realistic_fleet.tasks import GEMMA, QWEN, SMOLLM2, TASKS

NAMES = {SMOLLM2: "smollm2", GEMMA: "gemma", QWEN: "qwen"}


def make_stores(root: Path, base_model: str, base: Path, folders: Sequence[Path], qualities: Sequence[str]) -> None:
    """Train a generator on all adapters of a base model, and encode them at each quality.

    Args:
        root: Folder of the stores.
        base_model: The name that the adapters give it.
        base: Its folder.
        folders: The adapters.
        qualities: Of the codes, as `icm encode` takes them, or shares of the effect to keep.
    """
    plain = root / "plain-4"
    if not plain.exists():
        part = root / ".part"
        shutil.rmtree(part, ignore_errors=True)
        _timed(part, "base", "add", base_model, str(base))
        _timed(part, "ingest", *map(str, folders))
        _timed(part, "train", "--no-eval", "--refine", "0")
        part.rename(plain)
    for quality in qualities:
        place = root / f"{REFINED}{quality}"
        if not place.exists():
            part = root / f".{place.name}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(plain, part)
            if is_share(quality):  # of which a code may fall short
                _timed(part, "encode", "--keep", quality, "--json", also=ExitCode.PARTLY)
            else:
                _timed(part, "encode", "--quality", quality, "--json")
            part.rename(place)


def is_share(quality: str) -> bool:
    """Say whether a quality is a share of the effect, such as 0.99, and not one of icm's levels."""
    return "." in quality


def _timed(store: Path, *words: str, also: int = 0) -> None:
    began = time.monotonic()
    process(icm(*words, store=store), also)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"store": store.parent.name, "command": words[:3], "seconds": seconds}), flush=True)


def main() -> None:
    """Make the stores of the base models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of packages, base models and stores")
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--only", choices=list(NAMES.values()), help="one base model (default: all)")
    parser.add_argument("--qualities", default="4,5", help="qualities or shares to keep (default 4,5)")
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(options.work / "cache")
    for base_model, name in NAMES.items():
        if options.only in (None, name):
            trained = (options.fleet / task.name for task in TASKS if task.base_model == base_model)
            folders = [folder for folder in trained if folder.exists()]
            base = base_folder(base_model, options.work)
            make_stores(options.work / "stores" / name, base_model, base, folders, options.qualities.split(","))


if __name__ == "__main__":
    main()
