"""The parts of the benchmark that measure nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.performance.figures import Figure, seconds, table
from tests.benchmarks.performance.machine import describe_fleet, describe_machine, peak_memory, weight_files
from tests.benchmarks.performance.runs import alternate, ratio


def test_cases_take_turns_after_one_unmeasured_run_of_each() -> None:
    calls: list[str] = []
    timed = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=2)
    assert calls == ["a", "b"] * 3
    assert [len(timings) for timings in timed.values()] == [2, 2]


def test_a_slow_moment_that_meets_both_cases_leaves_the_ratio_as_it_is() -> None:
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == 0.5


def test_a_figure_of_times_is_their_median() -> None:
    assert seconds("x", [3.0, 1.0, 2.0]).value == 2.0


def test_a_promise_is_kept_on_its_side_of_the_limit() -> None:
    assert Figure("x", 0.6, "ratio", 0.5, "at least").is_met
    assert Figure("x", 0.6, "s", 0.5).is_met is False
    assert Figure("x", 0.6, "s").is_met is None


def test_the_table_says_what_is_not_kept() -> None:
    shown = table([Figure("help", 0.6, "s", 0.5), Figure("memory", 2**30, "bytes", 2**32)])
    assert "| help | 0.600 s | below 0.500 s | NO |" in shown
    assert "| memory | 1.00 GiB | below 4.00 GiB | yes |" in shown


def test_the_machine_is_described_without_its_name() -> None:
    machine = describe_machine()
    assert machine["processor"]
    assert platform.node() not in str(machine)


def test_a_fleet_is_described_by_its_size_alone(tmp_path: Path) -> None:
    (tmp_path / "html" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "html" / "adapter_model.safetensors").write_bytes(bytes(2**20))
    (tmp_path / "html" / "checkpoint-1" / "adapter_model.safetensors").write_bytes(bytes(2**20))
    assert describe_fleet(weight_files(tmp_path)) == "2 weight files, 2.0 MiB"


def test_the_peak_of_a_child_does_not_count_its_parents_memory() -> None:
    held = bytearray(os.urandom(1)) * 2**28
    command = "from tests.benchmarks.performance.machine import peak_memory; print(peak_memory())"
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=root, check=True)
    assert int(found.stdout) < len(held) < peak_memory()
