"""Adapters in a single file, in the namings of the image world."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors import safe_open
from safetensors.torch import load

from icmlora.adapter.metrics import squared_error
from icmlora.adapter.model import Adapter
from icmlora.errors import AdapterRefused
from icmlora.formats.catalogue import format_named
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.discovery.folder import load_adapter, save_adapter
from icmlora.formats.format import AdapterFormat, Template
from icmlora.formats.images.comfyui import COMFYUI
from icmlora.formats.images.diffusers import DIFFUSERS
from icmlora.formats.images.kohya import KOHYA, dotted, flattened
from icmlora.formats.images.lycoris import LYCORIS
from icmlora.formats.images.xlabs import XLABS
from tests.icmlora.formats.single_files import (
    HEADER,
    Tensors,
    convolution,
    file_bytes,
    kohya,
    linear,
    values,
    write,
)

Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
NAMINGS: list[tuple[AdapterFormat, Tensors]] = [
    (KOHYA, kohya(Q, "lora_te1_text_model_encoder_layers_0_mlp_fc1")),
    (LYCORIS, {name.replace("lora_", "lycoris_", 1): tensor for name, tensor in kohya(Q).items()}),
    (DIFFUSERS, linear("unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight")),
    (DIFFUSERS, linear("unet.up.to_q.lora.down.weight", "unet.up.to_q.lora.up.weight")),
    (
        DIFFUSERS,
        linear("text_encoder.a.fc1.lora_linear_layer.down.weight", "text_encoder.a.fc1.lora_linear_layer.up.weight"),
    ),
    (DIFFUSERS, linear("unet.a.processor.to_q_lora.down.weight", "unet.a.processor.to_q_lora.up.weight")),
    (DIFFUSERS, linear("mid_block.a.processor.to_q_lora.down.weight", "mid_block.a.processor.to_q_lora.up.weight")),
    (COMFYUI, linear("diffusion_model.blocks.0.q.lora_A.weight", "diffusion_model.blocks.0.q.lora_B.weight")),
    (COMFYUI, linear("diffusion_model.x.0.q.lora_down.weight", "diffusion_model.x.0.q.lora_up.weight")),
    (
        XLABS,
        linear("double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight"),
    ),
]
IDS = [f"{form.name}-{next(iter(tensors))}" for form, tensors in NAMINGS]


def template_of(form: AdapterFormat, data: bytes) -> Template:
    summary = form.inspect(b"", data)
    return Template(b"", summary.layout, summary.dtype, summary.template)


def again(form: AdapterFormat, data: bytes) -> bytes:
    """Read an adapter and write it in its own form."""
    loaded = form.read(b"", data)
    return form.encode(loaded.adapter, card="", metadata={}, like=template_of(form, data), extras=loaded.extras).weights


def refusal(tensors: Tensors, metadata: dict[str, str] | None = None, form: AdapterFormat = KOHYA) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as raised:
        form.inspect(b"", file_bytes(tensors, metadata))
    return raised.value


def dw(adapter: Adapter, module: str) -> torch.Tensor:
    found = next(one for one in adapter.modules if one.name == module)
    return found.b @ found.a


@pytest.mark.parametrize(("form", "tensors"), NAMINGS, ids=IDS)
def test_a_file_is_found_by_its_content(tmp_path: Path, form: AdapterFormat, tensors: Tensors) -> None:
    write(tmp_path / "any name.safetensors", tensors)
    (task,) = find_adapters([tmp_path]).tasks
    assert (task.final.format.name, task.name) == (form.name, "any-name")


@pytest.mark.parametrize(("form", "tensors"), NAMINGS, ids=IDS)
def test_writing_in_the_form_of_the_original_gives_its_tensors_and_header_again(
    form: AdapterFormat, tensors: Tensors
) -> None:
    data = again(form, file_bytes(tensors, HEADER | {"ss_network_alpha": "4"}))
    written = load(data)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(written[name], tensor, rtol=1e-6, atol=0)
    size = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + size])["__metadata__"] == HEADER | {"ss_network_alpha": "4"}


@pytest.mark.parametrize(("form", "tensors"), NAMINGS, ids=IDS)
def test_a_fresh_file_holds_the_same_adapter(form: AdapterFormat, tensors: Tensors) -> None:
    adapter = form.read(b"", file_bytes(tensors)).adapter
    files = form.encode(adapter, card="", metadata={"icm_task": "dog"}, dtype="float32")
    assert squared_error(adapter, form.read(b"", files.weights).adapter) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_alpha_over_the_rank_is_the_scale(dtype: torch.dtype) -> None:
    tensors = kohya(Q, alpha=2.0, dtype=dtype)
    adapter = KOHYA.read(b"", file_bytes(tensors)).adapter
    expected = 2.0 / 4 * tensors[f"{Q}.lora_up.weight"].float() @ tensors[f"{Q}.lora_down.weight"].float()
    torch.testing.assert_close(dw(adapter, dotted(Q)), expected)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_an_alpha_or_with_0_the_scale_is_1(alpha: float | None) -> None:
    tensors = kohya(Q, alpha=alpha)
    adapter = KOHYA.read(b"", file_bytes(tensors)).adapter
    expected = tensors[f"{Q}.lora_up.weight"] @ tensors[f"{Q}.lora_down.weight"]
    torch.testing.assert_close(dw(adapter, dotted(Q)), expected)


def test_an_alpha_that_is_a_whole_number_comes_back_as_one() -> None:
    tensors = kohya(Q) | {f"{Q}.alpha": torch.tensor(16)}
    written = load(again(KOHYA, file_bytes(tensors)))
    assert (written[f"{Q}.alpha"].dtype, int(written[f"{Q}.alpha"])) == (torch.int64, 16)


def test_a_convolution_keeps_its_kernel() -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = convolution(stem)
    data = file_bytes(tensors)
    adapter = KOHYA.read(b"", data).adapter
    expected = torch.einsum(
        "or,rikl->oikl", tensors[f"{stem}.lora_up.weight"].flatten(1), tensors[f"{stem}.lora_down.weight"]
    )
    torch.testing.assert_close(dw(adapter, dotted(stem)), 1.5 / 3 * expected.flatten(1))
    assert load(again(KOHYA, data))[f"{stem}.lora_down.weight"].shape == (3, 4, 3, 3)


def test_a_convolution_in_three_factors_is_read_as_two() -> None:
    stem = "lora_unet_conv_in"
    up, mid, down = values(5, 3, 1, 1), values(3, 3, 2, 2), values(3, 4, 1, 1)
    tensors = {f"{stem}.lora_up.weight": up, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_down.weight": down}
    data = file_bytes(tensors)
    expected = torch.einsum("oi,ijkl,jn->onkl", up.flatten(1), mid, down.flatten(1)).flatten(1)
    torch.testing.assert_close(dw(KOHYA.read(b"", data).adapter, stem), expected)
    torch.testing.assert_close(dw(KOHYA.read(b"", again(KOHYA, data)).adapter, stem), expected)


def test_the_configuration_in_the_header_of_diffusers_sets_the_scale() -> None:
    tensors = linear("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight")
    config = {"unet.r": 4, "unet.lora_alpha": 12, "unet.peft_type": "LORA"}
    data = file_bytes(tensors, {"lora_adapter_metadata": json.dumps(config)})
    adapter = DIFFUSERS.read(b"", data).adapter
    expected = 3.0 * tensors["unet.mid.to_q.lora_B.weight"] @ tensors["unet.mid.to_q.lora_A.weight"]
    torch.testing.assert_close(dw(adapter, "unet.mid.to_q"), expected)
    torch.testing.assert_close(load(again(DIFFUSERS, data)), load(data))


def test_what_is_not_lora_is_kept_exactly() -> None:
    extra = {f"{Q}.dora_scale": values(5, 1), "lora_unet_norm.diff": values(7)}
    written = load(again(KOHYA, file_bytes(kohya(Q) | extra)))
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "LoHa"),
        (("lokr_w1", "lokr_w2_a", "lokr_w2_b"), "LoKr"),
        (("oft_blocks",), "OFT"),
    ],
)
def test_another_method_is_kept_as_its_original_only(tmp_path: Path, keys: tuple[str, ...], method: str) -> None:
    path = write(tmp_path / "x.safetensors", {f"lora_unet_x.{key}": values(4, 4) for key in keys} | kohya(Q))
    (task,) = find_adapters([tmp_path]).tasks
    summary = task.final.format.inspect(b"", path.read_bytes())
    assert (task.final.format.name, summary.original_only) == ("lycoris", f"it is {method}, not plain LoRA")


def test_factors_that_are_transposed_are_refused() -> None:
    tensors = kohya(Q, alpha=None)
    swapped = {name: tensor.T for name, tensor in tensors.items()}
    assert (refusal(swapped).kind, "transposed or swapped" in refusal(swapped).message) == ("shape", True)


def test_factors_of_square_layers_that_are_transposed_are_refused() -> None:
    tensors = linear(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight", rank=2, inputs=8, outputs=8)
    swapped = {name: tensor.T for name, tensor in tensors.items()}
    assert (refusal(swapped).kind, "are transposed" in refusal(swapped).message) == ("shape", True)


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_a_missing_half_is_refused(half: str) -> None:
    tensors = kohya(Q)
    del tensors[f"{Q}.{half}.weight"]
    assert (refusal(tensors).kind, f"no {half} of" in refusal(tensors).message) == ("missing-half", True)


def test_alphas_of_some_modules_only_are_refused() -> None:
    tensors = kohya(Q, "lora_unet_conv_in")
    del tensors[f"{Q}.alpha"]
    assert refusal(tensors).kind == "alpha"


def test_alphas_that_the_header_knows_of_and_the_file_lost_are_refused() -> None:
    error = refusal(kohya(Q, alpha=None), HEADER)
    assert (error.kind, "alpha 2 at rank 4" in error.message) == ("alpha", True)


def test_an_alpha_that_is_not_finite_is_refused() -> None:
    assert refusal(kohya(Q, alpha=float("inf"))).kind == "alpha"


def test_two_namings_in_one_file_are_refused(tmp_path: Path) -> None:
    mixed = kohya(Q) | linear("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight")
    path = write(tmp_path / "mixed.safetensors", mixed)
    (task,) = find_adapters([tmp_path]).tasks
    with pytest.raises(AdapterRefused, match="two naming schemes") as raised:
        task.final.format.inspect(b"", path.read_bytes())
    assert raised.value.kind == "two-namings"


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(file_bytes(kohya(Q))[:-10])
    (task,) = find_adapters([tmp_path]).tasks
    with pytest.raises(AdapterRefused, match="but the file has"):
        task.final.format.inspect(b"", path.read_bytes())


def test_an_adapter_of_zeros_does_nothing() -> None:
    tensors = {name: torch.zeros_like(tensor) if "up" in name else tensor for name, tensor in kohya(Q).items()}
    assert KOHYA.inspect(b"", file_bytes(tensors)).does_nothing


@given(st.from_regex(r"lora_(unet|te1)(_[a-z]{1,4}\d?|_\d{1,3}|_0)*_[a-z]{1,3}", fullmatch=True))
def test_the_flattened_name_of_a_dotted_one_is_the_name_in_the_file(stem: str) -> None:
    assert flattened(dotted(stem)) == stem


@pytest.mark.slow
@given(st.data())
def test_an_adapter_of_any_ranks_alphas_and_types_comes_back(data: st.DataObject) -> None:
    tensors: Tensors = {}
    for number in range(data.draw(st.integers(1, 4))):
        stem = f"lora_unet_blocks_{number}_attn_to_q"
        rank = data.draw(st.integers(1, 5))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        factors = linear(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", rank=rank, seed=number)
        tensors |= {name: tensor.to(dtype) for name, tensor in factors.items()}
        tensors[f"{stem}.alpha"] = torch.tensor(data.draw(st.sampled_from([0.5, 1.0, 4.0, 8.0])), dtype=dtype)
    data_in = file_bytes(tensors)
    written = load(again(KOHYA, data_in))
    for name, tensor in tensors.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(written[name].float(), tensor.float(), rtol=2**-7, atol=0)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_adapter_or_refused(data: bytes) -> None:
    with pytest.raises(AdapterRefused):
        KOHYA.inspect(b"", data)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=20), min_size=1, max_size=4))
def test_any_header_comes_back_word_for_word(metadata: dict[str, str]) -> None:
    data = again(KOHYA, file_bytes(kohya(Q), metadata))
    size = struct.unpack("<Q", data[:8])[0]
    assert json.loads(data[8 : 8 + size])["__metadata__"] == metadata


class TestRuns:
    def header(self, name: str = "dog", started: str = "17") -> dict[str, str]:
        return {"ss_output_name": name, "ss_training_started_at": started}

    def test_files_of_one_training_are_one_task_and_its_checkpoints(self, tmp_path: Path) -> None:
        for number, name in enumerate(("dog-000010", "dog-step00000500", "dog")):
            write(tmp_path / f"{name}.safetensors", kohya(Q, seed=number), self.header())
        (task,) = find_adapters([tmp_path]).tasks
        assert [(found.step, found.is_final) for found in task.adapters] == [(10, False), (500, False), (None, True)]
        assert task.name == "dog"

    def test_files_that_only_look_like_checkpoints_are_tasks(self, tmp_path: Path) -> None:
        write(tmp_path / "dog-000001.safetensors", kohya(Q, seed=1), self.header("dog-000001", "1"))
        write(tmp_path / "dog-000002.safetensors", kohya(Q, seed=2), self.header("dog-000002", "2"))
        write(tmp_path / "dog-000003.safetensors", kohya(Q, seed=3))
        assert [task.name for task in find_adapters([tmp_path]).tasks] == ["dog-000001", "dog-000002", "dog-000003"]

    def test_a_lone_checkpoint_is_a_task_under_its_own_name(self, tmp_path: Path) -> None:
        write(tmp_path / "dog-000010.safetensors", kohya(Q), self.header())
        assert [task.name for task in find_adapters([tmp_path]).tasks] == ["dog-000010"]


class TestFolders:
    def test_each_file_is_a_task_with_its_pictures_and_notes(self, tmp_path: Path) -> None:
        for number, name in enumerate(("dog", "dog.v2")):
            write(tmp_path / f"{name}.safetensors", kohya(Q, seed=number))
            (tmp_path / f"{name}.preview.png").write_bytes(b"png")
        (tmp_path / "dog.civitai.info").write_text("{}")
        tasks = {task.name: sorted(task.final.companions) for task in find_adapters([tmp_path]).tasks}
        assert tasks == {"dog": ["civitai.info", "preview.png"], "dog.v2": ["preview.png"]}

    def test_the_file_of_the_hub_is_named_after_its_folder(self, tmp_path: Path) -> None:
        tensors = linear("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight")
        path = write(tmp_path / "corgi" / "pytorch_lora_weights.safetensors", tensors)
        (path.parent / "README.md").write_text("card")
        (task,) = find_adapters([tmp_path]).tasks
        assert (task.name, task.final.card is not None) == ("corgi", True)

    def test_a_file_in_the_cache_of_the_hub_is_found_through_its_link(self, tmp_path: Path) -> None:
        tensors = linear("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight")
        repository = tmp_path / "models--acme--corgi"
        blob = write(repository / "blobs" / ("0" * 64), tensors)
        place = repository / "snapshots" / ("1" * 40) / "pytorch_lora_weights.safetensors"
        place.parent.mkdir(parents=True)
        place.symlink_to(blob)
        assert [task.name for task in find_adapters([tmp_path]).tasks] == ["corgi"]

    def test_a_file_that_no_format_knows_is_reported_next_to_those_that_are_read(self, tmp_path: Path) -> None:
        write(tmp_path / "dog.safetensors", kohya(Q))
        write(tmp_path / "bare.safetensors", linear("x.0.q.lora_A.weight", "x.0.q.lora_B.weight"))
        found = find_adapters([tmp_path])
        assert ([task.name for task in found.tasks], [error.kind for error in found.refused]) == (["dog"], ["bare"])

    def test_other_files_next_to_adapters_are_named(self, tmp_path: Path) -> None:
        write(tmp_path / "dog.safetensors", kohya(Q))
        (tmp_path / "prompts.docx").write_text("x")
        (task,) = find_adapters([tmp_path]).tasks
        assert [path.name for path in task.not_kept] == ["prompts.docx"]


def test_every_format_is_known_by_its_name() -> None:
    for form in (KOHYA, LYCORIS, DIFFUSERS, COMFYUI, XLABS):
        assert format_named(form.name) is form


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(again(KOHYA, file_bytes(kohya(Q), HEADER)))
    with safe_open(path, "pt") as file:
        assert file.metadata() == HEADER


class TestLoading:
    def test_an_adapter_is_loaded_from_its_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "dog.safetensors", kohya(Q))
        assert [module.name for module in load_adapter(path).modules] == [dotted(Q)]

    def test_a_folder_of_several_files_has_to_be_told_which(self, tmp_path: Path) -> None:
        for number, name in enumerate(("cat", "dog")):
            write(tmp_path / f"{name}.safetensors", kohya(Q, seed=number))
        with pytest.raises(AdapterRefused, match=r"several adapters: cat\.safetensors, dog\.safetensors"):
            load_adapter(tmp_path)

    def test_an_adapter_is_saved_as_a_file(self, tmp_path: Path) -> None:
        adapter = load_adapter(write(tmp_path / "dog.safetensors", kohya(Q)))
        save_adapter(adapter, tmp_path / "copy.safetensors", adapter_format="kohya", dtype="float32")
        assert squared_error(adapter, load_adapter(tmp_path / "copy.safetensors")) < 1e-12

    def test_a_file_that_is_no_adapter_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.txt"
        path.write_text("x")
        with pytest.raises(AdapterRefused, match="is not an adapter"):
            load_adapter(path)
