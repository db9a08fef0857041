"""The command line that the studies of unseen tasks share."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.benchmarks.unseen.folds import FOLDS


def study_parser(prog: str, about: str | None, *, most: int | None, episodes: int) -> argparse.ArgumentParser:
    """Return a parser of what every study asks for; `most` and `episodes` are defaults."""
    parser = argparse.ArgumentParser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the domain fleet")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--work", type=Path, required=True, help="what is kept between runs")
    parser.add_argument("--most", type=int, default=most, help="only the first tasks of the list")
    parser.add_argument("--folds", type=numbers, default=list(range(FOLDS)), help="which folds (default all)")
    parser.add_argument("--episodes", type=int, default=episodes, help=f"of meta-training (default {episodes})")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def numbers(text: str) -> list[int]:
    """Read whole numbers, separated by commas; none of an empty text."""
    return [int(part) for part in text.split(",") if part]
