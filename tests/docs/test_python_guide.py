"""The examples of docs/guides/python.md run in order, on a small fleet of the names that the page uses."""

import re
from pathlib import Path

import pytest

from tests.cli.fleet import write_texts
from tests.cli.tiny_fleet import write_lora
from tests.docs.pages import ROOT
from tests.icmlora.tiny_base import write_tiny_base

GUIDE = ROOT / "docs" / "guides" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Run every example of the page in one program, in a folder that holds what the page speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hub"))
    for steps in ("SMALL_STEPS_PER_TASK", "MIN_SMALL_STEPS"):
        monkeypatch.setattr(f"icmlora.training.config.{steps}", 10)
    write_tiny_base(Path("base"))
    for seed, name in enumerate(("dog-detection", "street-signs", "ripe-fruit"), start=1):
        write_lora(Path("loras") / name, seed=seed)
        write_texts(Path("loras") / name, count=16)
        write_texts(Path("loras") / name, "eval.jsonl", count=2)
    write_texts(tmp_path, "cats.jsonl")
    names: dict[str, object] = {}
    for example in EXAMPLES:
        exec(compile(example, str(GUIDE), "exec"), names)
    return names


@pytest.mark.usefixtures("ran")
def test_every_example_of_the_page_runs_and_writes_what_it_says() -> None:
    for folder in ("adapter", "cat-adapter", "from-bundle", "copy"):
        assert (Path(folder) / "adapter_model.safetensors").is_file()
    assert not Path("elsewhere").exists()


def test_the_page_shows_every_part_of_the_library_that_it_promises() -> None:
    text = "".join(EXAMPLES)
    for name in ("ingest", "train", "encode", "materialize", "load", "generate", "evaluate", "stats", "export_bundle"):
        assert f"fleet.{name}(" in text
