"""The four lines that this project was asked for, word for word, on the adapters in the repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Ran

_ROOT = Path(__file__).parents[3]


def bytes_of_codes(icm: Callable[..., Ran], *store: object) -> int:
    return sum(task["code_size"] for task in icm(*store, "ls", "--json").document)


@pytest.mark.slow
def test_on_a_card_the_codes_take_as_many_bytes_as_on_the_cpu(
    icm: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loras").symlink_to(_ROOT / "docs" / "example-fleet")
    monkeypatch.chdir(tmp_path)

    for line in ("ingest ./loras", "train --device cuda", "materialize rust -o adapter/", "stats"):
        assert icm(*line.split()).code == 0

    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    other = tmp_path / "other"
    for line in ("ingest ./loras", "train --device cpu"):
        assert icm("--store", other, *line.split()).code == 0
    assert bytes_of_codes(icm) == pytest.approx(bytes_of_codes(icm, "--store", other), rel=0.005)
