"""Pickles of tensors become safetensors in a process of their own; everything else is refused in one line."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.discovery import pickle_child
from icmlora.formats.discovery.discovery import find_tasks
from icmlora.formats.discovery.pickled import LIMITS, PickleReader
from icmlora.io.safetensors import RawTensor, encode, read_header
from icmlora.io.sandbox import SandboxLimits
from tests.icmlora.adapter_files import config, factors, write_adapter

FEW = replace(LIMITS, memory=64 << 20, seconds=1)


def converted(source: Path, limits: SandboxLimits = FEW) -> dict[str, torch.Tensor]:
    target = source.parent / "converted.safetensors"
    with PickleReader(limits) as reader:
        reader.convert(source, target, source.name)
    read_header(target.read_bytes())
    return load_file(target)


def saved(folder: Path, found: Any, **options: Any) -> Path:
    path = folder / "adapter_model.bin"
    torch.save(found, path, **options)
    return path


def pickled(folder: Path, data: bytes) -> Path:
    path = folder / "adapter_model.bin"
    path.write_bytes(data)
    return path


class RunsCommand:
    """Unpickles to a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_tensors_come_through_exactly(tmp_path: Path, zipped: bool) -> None:
    types = torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool
    given = {f"{name}.{dtype}": tensor.to(dtype) for name, tensor in factors().items() for dtype in types}
    whole = torch.arange(12.0).reshape(3, 4)
    given |= {"a": whole, "b": whole, "c": whole.T, "d": whole[:, 1], "e": whole[0, 0]}  # of one storage
    given["f"] = torch.nn.Parameter(torch.ones(3))
    found = converted(saved(tmp_path, OrderedDict(given), _use_new_zipfile_serialization=zipped))
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in given.items())


@pytest.mark.slow
def test_the_bytes_are_those_that_icm_would_write_and_the_header_says_what_it_was_made_from(tmp_path: Path) -> None:
    source = saved(tmp_path, {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int64)})
    with PickleReader() as reader:
        reader.convert(source, tmp_path / "out", "adapter_model.bin")
    tensors = {"a": RawTensor("I64", (3,), bytes(24)), "b": RawTensor("F32", (2,), struct.pack("<2f", 1, 1))}
    facts = {"converted_from": "adapter_model.bin", "converted_from_sha256": digest(source), "format": "pt"}
    assert (tmp_path / "out").read_bytes() == encode(tensors, facts)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = saved(tmp_path, {"a": RunsCommand(f"touch {mark}")})
    with pytest.raises(UnsafeInput, match="runs code") as refused:
        converted(source)
    assert (refused.value.kind, refused.value.path, mark.exists()) == ("pickle", str(source), False)


@pytest.mark.slow
def test_a_bare_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(UnsafeInput, match="runs code"):
        converted(pickled(tmp_path, pickle.dumps(RunsCommand(f"touch {mark}"))))
    assert not mark.exists()


@pytest.mark.parametrize(
    "found",
    [
        [torch.ones(1)],
        {"a": 1.0},
        {"a": {"b": torch.ones(1)}},
        {1: torch.ones(1)},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(2, dtype=torch.complex64)},
        {"a": torch.empty(2, device="meta")},
        torch.ones(1),
        "text",
    ],
    ids=["list", "number", "nested", "number-as-name", "sparse", "complex", "meta", "tensor", "text"],
)
def test_only_tensors_by_name_count(found: Any) -> None:
    assert pickle_child._plain(found) is None


@pytest.mark.slow
def test_anything_but_tensors_by_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInput, match="more than named tensors"):
        converted(saved(tmp_path, {"a": {"b": torch.ones(1)}}))


@pytest.mark.one_case
@pytest.mark.parametrize("data", [b"", b"PK\x03\x04" + bytes(40)], ids=["empty", "zip"])
def test_damage_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UnsafeInput, match="damaged"):
        converted(pickled(tmp_path, data))


def test_a_git_lfs_pointer_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused) as refused:
        converted(pickled(tmp_path, b"version https://git-lfs.github.com/spec/v1\n"))
    assert refused.value.kind == "lfs"


def test_a_pickle_that_never_ends_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInput, match="more than 1 s") as refused:
        converted(never_ending(tmp_path))
    assert refused.value.kind == "limits"


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    limits = replace(LIMITS, seconds=0, wall_seconds=0)
    with pytest.raises(UnsafeInput, match="takes more than 0 s"):
        converted(saved(tmp_path, factors()), limits)


@pytest.mark.slow
def test_a_pickle_cannot_take_more_memory_than_its_size_allows(tmp_path: Path) -> None:
    # A storage that unpacks to a thousand times its size.
    source = tmp_path / "adapter_model.bin"
    torch.save({"a": torch.zeros(100 << 20, dtype=torch.uint8)}, source)
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (tmp_path / "bomb").replace(source)
    assert source.stat().st_size < 1 << 20
    with pytest.raises(UnsafeInput, match="needs more than 64 MiB") as refused:
        converted(source)
    assert refused.value.kind == "limits"


@pytest.mark.slow
def test_a_view_far_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInput, match="far larger than the file"):
        converted(saved(tmp_path, {"a": torch.ones(1).expand(1 << 40)}))


def never_ending(folder: Path) -> Path:
    """Write a pickle of a dictionary whose key is a tuple of tuples of tuples: hashing it takes 2^60 steps."""
    doubled = b"".join(b"q%ch%c\x86" % (number, number) for number in range(60))
    return torch_zip(folder, b"\x80\x02})" + doubled + b"K\x01s.")


def torch_zip(folder: Path, data: bytes) -> Path:
    """Write a PyTorch file with this pickle in it."""
    path = folder / "adapter_model.bin"
    torch.save({}, folder / "plain")
    with zipfile.ZipFile(folder / "plain") as plain, zipfile.ZipFile(path, "w") as changed:
        for name in plain.namelist():
            changed.writestr(name, data if name.endswith("data.pkl") else plain.read(name))
    return path


# Many of them


@pytest.mark.slow
def test_a_pickle_that_is_stopped_does_not_take_the_next_one_with_it(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    endless, good = never_ending(tmp_path), saved(tmp_path / "good", factors())
    with PickleReader(FEW) as reader:
        with pytest.raises(UnsafeInput, match="more than 1 s"):
            reader.convert(endless, tmp_path / "out", "adapter_model.bin")
        reader.convert(good, tmp_path / "out", "adapter_model.bin")
    assert load_file(tmp_path / "out").keys() == factors().keys()


@pytest.mark.slow
def test_after_a_hanging_process_was_ended_the_next_pickle_is_read(tmp_path: Path) -> None:
    source = saved(tmp_path, factors())
    with PickleReader(replace(LIMITS, wall_seconds=0, seconds=0)) as reader:
        with pytest.raises(UnsafeInput, match="takes more than 0 s"):
            reader.convert(source, tmp_path / "out", "adapter_model.bin")
        reader.limits = FEW
        reader.convert(source, tmp_path / "out", "adapter_model.bin")
    assert load_file(tmp_path / "out").keys() == factors().keys()


# Finding them


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_found_only_if_it_is_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(config())
    torch.save(factors(), tmp_path / name)
    (refused,) = find_tasks([tmp_path]).refused
    assert (refused.kind, "--read-bin" in (refused.hint or "")) == ("pickle", True)
    found = find_tasks([tmp_path], read_bin=True)
    assert (found.tasks[0].final.pickle, found.refused) == (name, ())


def test_a_pickle_next_to_safetensors_is_passed_over(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "rust")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    (task,) = find_tasks([tmp_path], read_bin=True).tasks
    assert (task.final.weights.name, task.final.pickle, task.not_kept) == ("adapter_model.safetensors", None, ())


def test_a_pickle_without_configuration_stays_refused(tmp_path: Path) -> None:
    torch.save(factors(), tmp_path / "adapter_model.bin")
    found = find_tasks([tmp_path], read_bin=True)
    assert (found.tasks, [error.kind for error in found.refused]) == ((), ["pickle"])


def test_a_link_to_a_pickle_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "rust"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(config())
    torch.save(factors(), tmp_path / "elsewhere")
    (folder / "adapter_model.bin").symlink_to(tmp_path / "elsewhere")
    found = find_tasks([folder], read_bin=True)
    assert (found.tasks, "symlink" in {error.kind for error in found.refused}) == ((), True)
