"""Build a fleet of fifty-two small adapters, one a text domain, for studies that leave tasks out.

usage: OMP_NUM_THREADS=1 python -m tests.benchmarks.domain_fleet --work W --fleet F [--base B] [--part I/N] [--only A,B]

Each folder of F gets a PEFT adapter, samples.jsonl (64 pieces of its training text), eval.jsonl (16 held-out pieces)
and a card; F/tasks.json lists name, group, family, rank, targets and seed of all of them. Tasks that are there are
skipped, so a stopped run goes on, and processes with `--part 1/2` and `--part 2/2` share the work. About a minute and
a half a task on one core; packages of 300 MB are kept in W. Many of the texts are copyleft: F is for you, not for
publication.
"""

import argparse
import os
from pathlib import Path

import torch

from tests.benchmarks.domain_fleet.build import Builder, write_index
from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.domain_fleet.tasks import TASKS, DomainTask
from tests.benchmarks.example_fleet.__main__ import make_base
from tests.benchmarks.example_fleet.packages import Packages


def part(text: str) -> slice:
    """Read I/N: every N-th task from the I-th, so that all parts together go through the list in its order."""
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 1 <= I <= N")
    return slice(int(number) - 1, None, int(parts))


def named(text: str) -> list[DomainTask]:
    """Read names separated by commas; the tasks stay in the order of the list."""
    names = set(text.split(","))
    if unknown := names - set(DOMAINS):
        raise argparse.ArgumentTypeError(f"no task is called {', '.join(sorted(unknown))}")
    return [task for task in TASKS if task.name in names]


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of downloaded packages")
    parser.add_argument("--fleet", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--base", type=Path, help="Hugging Face folder of the base model (default: made in WORK)")
    parser.add_argument("--part", type=part, default=slice(None), help="I/N: every N-th task from the I-th")
    parser.add_argument("--only", type=named, default=list(TASKS), help="names, separated by commas")
    return parser.parse_args(arguments)


def main() -> None:
    """Build what the command line asks for."""
    arguments = parsed(None)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    work, fleet = arguments.work.resolve(), arguments.fleet.resolve()
    fleet.mkdir(parents=True, exist_ok=True)
    write_index(fleet, TASKS)
    builder = Builder(arguments.base or make_base(work), Packages(work), fleet)
    for task in arguments.only[arguments.part]:
        builder.build(task, DOMAINS[task.name])


if __name__ == "__main__":
    main()
