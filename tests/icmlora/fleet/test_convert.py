"""`icmlora.convert`: other formats, ranks, sizes and number formats, and what they cost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from icmlora import AdapterRefused, BaseModelNotFound, Cancelled, DataError, Event, OutputExists, convert, load_adapter
from icmlora.adapter.metrics import squared_error
from icmlora.fleet.context import Progress
from icmlora.fleet.convert.convert import AdapterConverted
from icmlora.fleet.results import Report
from icmlora.formats import catalogue
from tests.cli.tiny_fleet import write_lora
from tests.icmlora.fleet.kept_tasks import write_loha
from tests.icmlora.fleet.test_converting import assert_equal, wanted, written
from tests.icmlora.formats.image_deltas import dw_by_diffusers, dw_of
from tests.icmlora.formats.image_files import diffusers_file, kohya_file
from tests.icmlora.formats.single_files import convolution, kohya as kohya_tensors, write
from tests.icmlora.formats.tiny_pipelines import tiny_sd15
from tests.icmlora.formats.toy_format import ToyFormat
from tests.icmlora.tiny_base import write_tiny_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WIDE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
with_files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of rank 6 with a card, a tokenizer and a header of its own."""
    folder = write_lora(tmp_path / "poems", seed=1, rank=6, alpha=3, targets=WIDE, my_note="mine")
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "trainer": "mine"})
    (folder / "README.md").write_text("# poems\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ToyFormat:
    """A format of single files in addition to those of the catalogue."""
    known = ToyFormat()
    monkeypatch.setattr(catalogue, "FORMATS", [*catalogue.FORMATS, known])
    return known


def only(report: Report[AdapterConverted]) -> AdapterConverted:
    (one,) = report.done
    assert report.failed == []
    return one


def error_of(before: Path, after: Path) -> float:
    return math.sqrt(squared_error(load_adapter(before), load_adapter(after)))


def ranks_of(folder: Path) -> list[int]:
    return [shape.rank for shape in load_adapter(folder).layout]


def test_a_rank_is_the_largest_that_a_module_has(adapter: Path, tmp_path: Path) -> None:
    done = only(convert(adapter, tmp_path / "out", rank=2))
    assert set(ranks_of(tmp_path / "out")) == {2}
    assert (done.rank, done.from_format, done.format) == (2, "peft", "peft")
    assert done.size == (tmp_path / "out" / WEIGHTS).stat().st_size < done.before == (adapter / WEIGHTS).stat().st_size


@pytest.mark.slow
@with_files
@given(size=st.integers(4500, 14000), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_the_reported_error_is_that_of_the_file(adapter: Path, tmp_path: Path, size: int, dtype: str) -> None:
    done = only(convert(adapter, tmp_path / "out", size=size, dtype=dtype, force=True))
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == done.size <= size
    assert done.relative_error == pytest.approx(error_of(adapter, tmp_path / "out"), abs=1e-6)


@pytest.mark.slow
@with_files
@given(sizes=st.tuples(st.integers(4500, 16000), st.integers(4500, 16000)))
def test_more_bytes_never_have_a_larger_error(adapter: Path, tmp_path: Path, sizes: tuple[int, int]) -> None:
    less, more = (only(convert(adapter, tmp_path / "out", size=size, force=True)) for size in sorted(sizes))
    assert (more.relative_error or 0) <= (less.relative_error or 0) + 1e-7
    assert less.size <= more.size


def test_a_size_is_better_than_the_rank_of_the_same_bytes(adapter: Path, tmp_path: Path) -> None:
    by_rank = only(convert(adapter, tmp_path / "rank", rank=2))
    by_size = only(convert(adapter, tmp_path / "size", size=by_rank.size + 100))
    assert len(set(ranks_of(tmp_path / "size"))) > 1
    assert (by_size.relative_error or 1) < (by_rank.relative_error or 0)


def test_what_is_not_about_ranks_stays(adapter: Path, tmp_path: Path) -> None:
    only(convert(adapter, tmp_path / "out", size=8000))
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "trainer": "mine"}
    fields = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (fields["my_note"], fields["target_modules"]) == ("mine", [name.rpartition(".")[2] for name in WIDE])
    for name in ("README.md", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()


def test_heads_are_carried_bit_by_bit(adapter: Path, tmp_path: Path) -> None:
    head = {"base_model.model.lm_head.weight": torch.randn(7, 5).half()}
    save_file(load_file(adapter / WEIGHTS) | head, adapter / WEIGHTS)
    only(convert(adapter, tmp_path / "out", rank=1))
    (name, values), tensors = head.popitem(), load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(tensors[name], values)


@pytest.mark.parametrize(
    "change", [{"rank": 6}, {"rank": 64}, {"size": 10**9}, {"dtype": "float32"}, {"adapter_format": "peft"}]
)
def test_an_adapter_that_needs_no_change_keeps_its_bytes(adapter: Path, tmp_path: Path, change: dict[str, int]) -> None:
    done = only(convert(adapter, tmp_path / "out", **change))  # type: ignore[arg-type]
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()
    }
    assert (done.relative_error, done.size) == (0.0, done.before)


def test_a_number_format_costs_what_its_rounding_costs(adapter: Path, tmp_path: Path) -> None:
    done = only(convert(adapter, tmp_path / "out", dtype="bfloat16"))
    assert 1e-4 < (done.relative_error or 0) < 1e-2
    assert done.size < 0.6 * done.before


def test_for_mlx_and_back_to_what_it_was(adapter: Path, tmp_path: Path) -> None:
    done = only(convert(adapter, tmp_path / "mlx", adapter_format="mlx"))
    assert_equal(written(tmp_path / "mlx", tmp_path), wanted(adapter))
    assert (done.format, done.relative_error, set(done.left_out)) == ("mlx", 0.0, {"README.md", "tokenizer.json"})


def test_for_mlx_a_size_is_met_with_one_rank(adapter: Path, tmp_path: Path) -> None:
    done = only(convert(adapter, tmp_path / "mlx", adapter_format="mlx", size=9000))
    assert done.size <= 9000
    only(convert(adapter, tmp_path / "same", rank=done.rank))
    assert_equal(written(tmp_path / "mlx", tmp_path), wanted(tmp_path / "same"))
    assert done.relative_error == pytest.approx(error_of(adapter, tmp_path / "same"), abs=1e-6)


def test_an_adapter_of_mlx_lm_states_the_rank_that_it_is_cut_to(adapter: Path, tmp_path: Path) -> None:
    only(convert(adapter, tmp_path / "mlx", adapter_format="mlx"))
    done = only(convert(tmp_path / "mlx", tmp_path / "rank", rank=2))
    stated = json.loads((tmp_path / "rank" / CONFIG).read_text())["lora_parameters"]["rank"]
    assert (stated, done.rank) == (2, 2)
    assert done.relative_error == pytest.approx(error_of(tmp_path / "mlx", tmp_path / "rank"), abs=1e-6)


def test_a_gguf_file_comes_back_as_the_peft_adapter_that_it_was_made_from(adapter: Path, tmp_path: Path) -> None:
    base, file = write_tiny_base(tmp_path / "base"), tmp_path / "poems.gguf"
    only(convert(adapter, file, adapter_format="gguf", base_model=base))
    for name in ("peft", "mlx"):
        only(convert(file, tmp_path / name, adapter_format=name, base_model=base))
        assert error_of(adapter, tmp_path / name) < 1e-5
    with pytest.raises(BaseModelNotFound) as refused:
        convert(file, tmp_path / "none", adapter_format="peft")
    assert "--base-model" in str(refused.value.hint)


def test_what_another_number_format_costs_a_gguf_file_is_measured(adapter: Path, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    done = only(convert(adapter, tmp_path / "a.gguf", adapter_format="gguf", base_model=base, rank=3, dtype="bfloat16"))
    cut = only(convert(adapter, tmp_path / "cut", rank=3))
    assert done.relative_error >= cut.relative_error
    assert done.relative_error == pytest.approx(cut.relative_error, rel=1e-2)


def test_for_llama_cpp_with_the_configuration_of_the_base_model(adapter: Path, tmp_path: Path) -> None:
    base, file = write_tiny_base(tmp_path / "base"), tmp_path / "poems.gguf"
    done = only(convert(adapter, file, adapter_format="gguf", base_model=base))
    assert_equal(written(file, tmp_path), wanted(adapter))
    smaller = only(convert(adapter, tmp_path / "small.gguf", adapter_format="gguf", base_model=base, size=9000))
    assert smaller.size <= 9000 < done.size
    assert (smaller.relative_error or 0) > 0


def test_an_adapter_of_mlx_is_cut_and_becomes_one_of_peft(adapter: Path, tmp_path: Path) -> None:
    only(convert(adapter, tmp_path / "mlx", adapter_format="mlx"))
    cut = only(convert(tmp_path / "mlx", tmp_path / "small", size=9000))
    assert (cut.format, cut.size <= 9000) == ("mlx", True)
    back = only(convert(tmp_path / "small", tmp_path / "peft", adapter_format="peft"))
    assert back.relative_error == pytest.approx(0, abs=1e-6)
    assert cut.relative_error == pytest.approx(error_of(adapter, tmp_path / "peft"), abs=1e-6)


def test_an_adapter_of_llama_cpp_is_cut_and_becomes_one_of_peft(adapter: Path, tmp_path: Path) -> None:
    base, file = write_tiny_base(tmp_path / "base"), tmp_path / "poems.gguf"
    only(convert(adapter, file, adapter_format="gguf", base_model=base))
    cut = only(convert(file, tmp_path / "small.gguf", size=9000))
    assert (cut.format, cut.size <= 9000) == ("gguf", True)
    for source, error in ((file, 0.0), (tmp_path / "small.gguf", cut.relative_error)):
        only(convert(source, tmp_path / "peft", adapter_format="peft", base_model=base, force=True))
        assert error_of(adapter, tmp_path / "peft") == pytest.approx(error, abs=1e-6)
    with pytest.raises(BaseModelNotFound):
        convert(file, tmp_path / "peft", adapter_format="peft", force=True)


def test_without_the_base_model_llama_cpp_gets_nothing(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelNotFound) as refused:
        convert(adapter, tmp_path / "poems.gguf", adapter_format="gguf")
    assert "--base-model" in str(refused.value.hint)
    assert not (tmp_path / "poems.gguf").exists()


def test_what_has_no_place_in_another_format_is_refused_by_name(adapter: Path, tmp_path: Path) -> None:
    save_file(load_file(adapter / WEIGHTS) | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, adapter / WEIGHTS)
    with pytest.raises(AdapterRefused, match=r"lm_head\.weight") as refused:
        convert(adapter, tmp_path / "mlx", adapter_format="mlx")
    assert refused.value.kind == "extras"
    assert not (tmp_path / "mlx").exists()


def test_another_format_has_ranks_of_its_own_too(adapter: Path, tmp_path: Path, toy: ToyFormat) -> None:
    only(convert(adapter, tmp_path / "toys", adapter_format="toy"))
    file = tmp_path / "toys" / "poems.toy"
    done = only(convert(file, tmp_path / "small", adapter_format="peft", size=9000))
    assert len(set(ranks_of(tmp_path / "small"))) > 1
    assert done.relative_error == pytest.approx(error_of(adapter, tmp_path / "small"), abs=1e-6)


@pytest.mark.parametrize("name", ["sd15", "flux", "convolutions"])
def test_a_file_of_kohya_is_cut_to_a_size_and_keeps_all_else(tmp_path: Path, name: str) -> None:
    if name == "convolutions":
        tensors = convolution("lora_unet_conv1") | convolution("lora_unet_conv2", rank=5) | kohya_tensors("lora_unet_a")
        file = write(tmp_path / "conv.safetensors", tensors, {"ss_network_dim": "3", "note": "Grüße"})
    else:
        file = kohya_file(name)
    out = tmp_path / "small.safetensors"
    done = only(convert(file, out, size=int(0.85 * file.stat().st_size)))
    assert (done.relative_error or 0) > 0
    assert (done.format, done.size) == ("kohya", out.stat().st_size)
    with safe_open(file, framework="pt") as before, safe_open(out, framework="pt") as after:
        digests = ("sshs_model_hash", "sshs_legacy_hash")  # of the tensors before
        kept = {name: text for name, text in before.metadata().items() if name not in digests}
        assert after.metadata() == kept | {"ss_network_dim": "Dynamic"}  # alphas stay, so ss_network_alpha does
        assert set(after.keys()) == set(before.keys())
        alphas = [key for key in before.keys() if key.endswith(".alpha")]  # noqa: SIM118  # not a mapping
        assert all(torch.equal(before.get_tensor(key), after.get_tensor(key)) for key in alphas)
    old, new = dw_of(file), dw_of(out)  # by the code of LyCORIS
    error = sum(float((new[key] - old[key]).square().sum()) for key in old)
    assert done.relative_error == pytest.approx(
        math.sqrt(error / sum(float(one.square().sum()) for one in old.values())), abs=1e-6
    )


def test_the_header_of_diffusers_states_the_new_ranks(tmp_path: Path) -> None:
    pipeline = tiny_sd15()
    file = diffusers_file(tmp_path, pipeline)
    done = only(convert(file, tmp_path / "small.safetensors", size=int(0.7 * file.stat().st_size)))
    before, after = dw_by_diffusers(file, tiny_sd15()), dw_by_diffusers(tmp_path / "small.safetensors", tiny_sd15())
    assert before.keys() == after.keys()
    error = sum(float((after[key] - before[key]).square().sum()) for key in before)
    assert done.relative_error == pytest.approx(
        math.sqrt(error / sum(float(one.square().sum()) for one in before.values())), abs=1e-5
    )


def test_what_belongs_to_a_file_goes_with_it(tmp_path: Path) -> None:
    write(tmp_path / "dog.safetensors", kohya_tensors("lora_unet_a", "lora_unet_b"))
    for name in ("dog.preview.png", "dog.txt", "cat.txt"):
        (tmp_path / name).write_text(name)
    only(convert(tmp_path / "dog.safetensors", tmp_path / "out" / "pup.safetensors", rank=2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "pup.preview.png",
        "pup.safetensors",
        "pup.txt",
    ]


def test_many_files_keep_their_names(tmp_path: Path) -> None:
    for name in ("ants", "more/bees"):
        write(tmp_path / "files" / f"{name}.safetensors", kohya_tensors("lora_unet_a", "lora_unet_b"))
    convert(tmp_path / "files", tmp_path / "out", rank=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ants.safetensors", "bees.safetensors"]


def test_a_format_for_images_and_one_for_language_models_have_other_names(tmp_path: Path, adapter: Path) -> None:
    file = write(tmp_path / "dog.safetensors", kohya_tensors("lora_unet_a"))
    for source, name in ((file, "peft"), (adapter, "kohya")):
        with pytest.raises(AdapterRefused, match=r"a format of .* models, and .* one of"):
            convert(source, tmp_path / "out", adapter_format=name)


@pytest.mark.parametrize("name", ["lycoris", "xlabs", "comfyui"])
def test_what_diffusers_has_no_converter_for_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "dog.safetensors", convolution("lora_unet_a"))
    with pytest.raises(AdapterRefused, match=f"no converter from kohya to {name} names") as refused:
        convert(file, tmp_path / "out.safetensors", adapter_format=name)
    assert refused.value.hint == "it can be converted to diffusers"
    assert not (tmp_path / "out.safetensors").exists()


def test_a_format_of_one_file_is_not_written_under_the_name_of_another(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(DataError, match="a peft adapter is a folder"):
        convert(adapter, tmp_path / "out.safetensors", rank=2)


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """A folder of three adapters, of which one is damaged, and one more that is no LoRA."""
    for seed, name in enumerate(("ants", "bees", "cats")):
        write_lora(tmp_path / "loras" / name, seed=seed, rank=4)
    (tmp_path / "loras" / "bees" / WEIGHTS).write_bytes(b"nonsense of a few bytes")
    write_loha(tmp_path / "loras" / "hare")
    return tmp_path / "loras"


def test_one_bad_adapter_never_stops_the_others(loras: Path, tmp_path: Path) -> None:
    report = convert(loras, tmp_path / "out", rank=1)
    assert [done.name for done in report.done] == ["ants", "cats"]
    assert [failed.task for failed in report.failed] == ["bees", "hare"]
    assert set(ranks_of(tmp_path / "out" / "cats")) == {1}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ants", "cats"]


def test_it_tells_how_far_it_is_and_stops_when_asked_to(loras: Path, tmp_path: Path) -> None:
    told: list[Event] = []

    def listen(event: Event) -> None:
        told.append(event)
        if isinstance(event, AdapterConverted):
            raise Cancelled

    with pytest.raises(Cancelled) as stop:
        convert(loras, tmp_path / "out", rank=1, on_event=listen)
    assert isinstance(stop.value.report, Report)
    assert [done.name for done in stop.value.report.done] == ["ants"]
    assert Progress(0, 4, "ants") in told


def test_what_is_there_is_replaced_only_if_asked_to(adapter: Path, tmp_path: Path) -> None:
    only(convert(adapter, tmp_path / "out", rank=2))
    with pytest.raises(OutputExists):
        convert(adapter, tmp_path / "out", rank=1)
    only(convert(adapter, tmp_path / "out", rank=1, force=True))
    assert set(ranks_of(tmp_path / "out")) == {1}


def test_a_size_below_one_rank_a_module_is_refused_with_the_smallest(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=r"takes [\d,]+ bytes, more than 900") as refused:
        convert(adapter, tmp_path / "out", size=900)
    assert (refused.value.kind, (tmp_path / "out").exists()) == ("size", False)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"rank": 2, "size": 900}, {"rank": 0}, {"size": -1}, {"adapter_format": "zip"}, {"dtype": "int8"}],
    ids=str,
)
def test_wrong_arguments_are_named(adapter: Path, tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(DataError) as refused:
        convert(adapter, tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert refused.value.hint


@pytest.mark.parametrize("name", ["nowhere", "empty", "text.txt"])
def test_where_there_is_no_adapter_that_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(AdapterRefused) as refused:
        convert(tmp_path / name, tmp_path / "out", rank=1)
    assert refused.value.path == str(tmp_path / name)


@pytest.mark.parametrize("way", ["itself", "dots", "link to the folder", "link to a file", "many"])
def test_a_source_is_never_replaced_by_what_is_made_of_it(adapter: Path, tmp_path: Path, way: str) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    (tmp_path / "link").symlink_to(adapter)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / WEIGHTS).symlink_to(adapter / WEIGHTS)
    places = {"dots": adapter / ".." / "poems", "link to the folder": tmp_path / "link"}
    target = (places | {"link to a file": tmp_path / "linked"}).get(way, adapter)
    if way == "many":
        report = convert(tmp_path, tmp_path, rank=2, force=True)
        assert any("the output would overwrite the source" in failed.message for failed in report.failed)
    else:
        with pytest.raises(DataError, match="the output would overwrite the source") as refused:
            convert(adapter, target, rank=2, force=True)
        assert "another path" in (refused.value.hint or "")
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_an_adapter_in_a_single_file_is_not_replaced_by_what_is_made_of_it(tmp_path: Path) -> None:
    file, before = tmp_path / "watercolour.safetensors", kohya_file("sd15").read_bytes()
    file.write_bytes(before)
    with pytest.raises(DataError, match="the output would overwrite the source"):
        convert(file, file, rank=1, force=True)
    assert file.read_bytes() == before
