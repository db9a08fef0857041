from pathlib import Path

import pytest

from icmlora import Fleet
from tests.compat import extras, seam
from tests.compat.bases import base_model, label_of
from tests.compat.suite import CaseTests, extras_of, load_into


class TestExtras(CaseTests):
    cases = extras.CASES


@pytest.mark.parametrize("name", ["lm-head-target", "embedding-target"])
def test_what_peft_copies_from_a_base_model_that_is_there_takes_a_few_bytes(tmp_path: Path, name: str) -> None:
    (case,) = (case for case in extras.CASES if case.name == name)
    case.build(tmp_path / "in" / name)
    fleet = Fleet(tmp_path / "store")
    base_model("llama")[0].save_pretrained(tmp_path / "base")
    fleet.add_base_model(label_of("llama"), tmp_path / "base")
    seam.ingest(fleet, tmp_path / "in")
    assert seam.train(fleet) == {}
    fleet.materialize(name, tmp_path / "out", source="code")
    assert seam.extras_bytes(fleet.show(name)) < 300 < sum(map(len, extras_of(tmp_path / "in" / name).values()))
    assert extras_of(tmp_path / "out") == extras_of(tmp_path / "in" / name)
    assert load_into(case, tmp_path / "out")[1] == ([], [])
