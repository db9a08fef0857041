"""MLX-LM adapters: what MLX-LM computes with them, their form, and what is refused or kept as it is."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load, save

from icmlora.adapter.metrics import squared_error
from icmlora.errors import AdapterRefused
from icmlora.formats.discovery.discovery import find_adapters
from icmlora.formats.format import AdapterBytes, Template
from icmlora.formats.pairs.mlx import MlxFormat

MLX = MlxFormat()
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.switch_mlp.up_proj"


def config(kind: str = "lora", **parameters: Any) -> bytes:
    """Return a configuration with some of what MLX-LM notes."""
    fields = {"fine_tune_type": kind, "model": "org/model", "num_layers": 16, "iters": 100, "train": True}
    rank = {"rank": 2, "dropout": 0.0, "scale": 10.0}
    return json.dumps(fields | {"lora_parameters": rank | parameters}).encode()


def tensors(seed: int = 0, rank: int = 2) -> dict[str, torch.Tensor]:
    """Return the factors of two modules: A (8, r) and B (r, 6)."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"lora_a": (8, rank), "lora_b": (rank, 6)}
    names = [(name, half) for name in (Q0, DOWN1) for half in shapes]
    return {f"{name}.{half}": torch.randn(shapes[half], generator=random) for name, half in names}


def experts() -> dict[str, torch.Tensor]:
    return {f"{EXPERTS}.lora_a": torch.randn(3, 2, 8), f"{EXPERTS}.lora_b": torch.randn(3, 6, 2)}


def again(configuration: bytes, weights: bytes, **options: Any) -> AdapterBytes:
    """Read an adapter and write it in its own form."""
    loaded, summary = MLX.read(configuration, weights), MLX.inspect(configuration, weights)
    like = Template(configuration, summary.layout, summary.dtype, summary.template)
    return MLX.encode(loaded.adapter, card="", metadata={"icm": "1"}, like=like, extras=loaded.extras, **options)


def same(one: bytes, other: bytes) -> bool:
    left, right = load(one), load(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("scale", "factor"), [({"scale": 0.5}, 0.5), ({"scale": 3}, 3.0), ({"scale": None}, 20.0)])
def test_the_update_is_what_mlx_lm_adds(scale: dict[str, Any], factor: float) -> None:
    made = tensors()
    for module in MLX.read(config(**scale), save(made)).adapter.modules:
        a, b = made[f"{module.name}.lora_a"], made[f"{module.name}.lora_b"]
        torch.testing.assert_close(module.b @ module.a, factor * (a @ b).T)


def test_a_summary_says_what_the_configuration_says() -> None:
    summary = MLX.inspect(config(), save(tensors()))
    assert (summary.base_model, summary.task_type, summary.rank_max) == ("org/model", "CAUSAL_LM", 2)
    assert [tuple(shape) for shape in summary.layout] == [(Q0, 2, 8, 6), (DOWN1, 2, 8, 6)]
    assert (summary.original_only, summary.template) == (None, "")


def test_experts_are_modules_of_their_own_and_are_joined_again() -> None:
    made = experts()
    weights = save(made)
    modules = {module.name: module for module in MLX.read(config(scale=1.0), weights).adapter.modules}
    assert list(modules) == [f"{EXPERTS}.{expert}" for expert in range(3)]
    for expert in range(3):
        module = modules[f"{EXPERTS}.{expert}"]
        wanted = made[f"{EXPERTS}.lora_b"][expert] @ made[f"{EXPERTS}.lora_a"][expert]
        torch.testing.assert_close(module.b @ module.a, wanted)
    assert same(again(config(scale=1.0), weights).weights, weights)


@pytest.mark.slow
@given(
    rank=st.integers(1, 4),
    seed=st.integers(0, 3),
    scale=st.sampled_from([0.5, 1.0, 8.0]),
    metadata=st.dictionaries(st.sampled_from(["format", "by"]), st.text(max_size=8)),
    wide=st.sets(st.sampled_from(sorted(tensors()))),
)
def test_an_adapter_in_its_own_form_is_the_same(
    rank: int, seed: int, scale: float, metadata: dict[str, str], wide: set[str]
) -> None:
    halves = {name: one if name in wide else one.half() for name, one in tensors(seed, rank).items()}
    weights, configuration = save(halves, metadata), config(rank=rank, scale=scale)
    written = again(configuration, weights)
    assert written.config == configuration
    assert same(written.weights, weights)
    assert MLX.inspect(configuration, written.weights) == MLX.inspect(configuration, weights)


def test_an_adapter_of_scale_zero_is_written_as_zeros() -> None:
    summary = MLX.inspect(config(scale=0.0), save(tensors()))
    assert (summary.does_nothing, summary.original_only) == (True, "does nothing: B @ A is zero in every module")


@pytest.mark.parametrize("rank", [2, 5])
def test_one_rank_for_all_modules_is_noted_in_the_configuration(rank: int) -> None:
    weights = save(tensors())
    padded = again(config(), weights, pad_rank=rank)
    fields = json.loads(padded.config)
    assert fields["lora_parameters"] == {"rank": rank, "dropout": 0.0, "scale": 1.0}
    assert fields["iters"] == 100
    before, after = MLX.read(config(), weights).adapter, MLX.read(padded.config, padded.weights).adapter
    assert squared_error(before, after) < 1e-12
    assert {module.a.shape[0] for module in after.modules} == {rank}


def test_dora_is_kept_exactly_and_runs() -> None:
    lengths = {f"{name}.m": torch.rand(6) for name in (Q0, DOWN1)}
    weights = save(tensors() | lengths)
    assert sorted(MLX.read(config("dora"), weights).extras) == sorted(lengths)
    assert same(again(config("dora", scale=8.0), weights).weights, weights)
    found = MLX.runnable(config("dora"), weights).magnitudes
    assert {f"{name}.m": value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in lengths.items()
    }


def test_dora_without_all_of_its_lengths_cannot_be_run() -> None:
    with pytest.raises(AdapterRefused, match=f"{DOWN1} has only one of the two"):
        MLX.runnable(config("dora"), save(tensors() | {f"{Q0}.m": torch.rand(6)}))


def test_experts_cannot_be_run_but_have_a_code() -> None:
    with pytest.raises(AdapterRefused, match="transformers uses other names") as error:
        MLX.runnable(config(), save(experts()))
    assert error.value.kind == "cannot-run"
    assert MLX.inspect(config(), save(experts())).original_only is None


def test_a_whole_fine_tuning_is_kept_as_it_is() -> None:
    summary = MLX.inspect(config("full"), save({"model.norm.weight": torch.ones(4)}))
    assert (summary.original_only, summary.layout) == ("fine_tune_type is full: whole layers, not a LoRA", ())
    with pytest.raises(AdapterRefused, match="only its original can be used"):
        MLX.read(config("full"), save({"model.norm.weight": torch.ones(4)}))


def turned() -> bytes:
    return save({name: tensor.T.contiguous() for name, tensor in tensors().items()})


def square() -> bytes:
    return save({f"{Q0}.lora_a": torch.randn(2, 8), f"{Q0}.lora_b": torch.randn(8, 2)})


def without(half: str) -> bytes:
    return save({name: tensor for name, tensor in tensors().items() if name != f"{Q0}.{half}"})


@pytest.mark.parametrize(
    ("weights", "configuration", "kind", "fact"),
    [
        (turned(), config(), "shape", "do not fit together"),
        (square(), config(), "rank", "has rank 8, but adapter_config.json states 2"),
        (square(), config(rank=None), "shape", "above both widths"),
        (save(tensors()), config(rank=4), "rank", "has rank 2, but adapter_config.json states 4"),
        (without("lora_a"), config(), "missing-half", f"{Q0}.lora_b has no lora_a"),
        (without("lora_b"), config(), "missing-half", f"{Q0}.lora_a has no lora_b"),
        (save({"x.lora_A.weight": torch.ones(2, 2)}), config(), "unknown-tensor", "x.lora_A.weight"),
        (save(tensors())[:-9], config(), "damaged", "fetch|its tensors end"),
        (save(tensors()), config(scale=None, alpha=16), "config", "has alpha, but no scale"),
        (save(tensors()), config(scale="20"), "config", "scale is '20'"),
        (save(tensors()), config(scale=float("1e31")), "config", "scale is 1e[+]31"),
        (save(tensors()), config(rank=2.0), "config", "rank is 2.0"),
        (save(tensors()), config(rank=True), "config", "rank is True"),
        (save(tensors()), b'{"peft_type": "LORA"}', "config", "is PEFT's, not MLX-LM's"),
        (save(tensors()), b'{"lora_parameters": [1]}', "config", "lora_parameters is"),
        (save(tensors()), b'{"model": 3}', "config", "model is 3"),
        (save(tensors()), b'{"fine_tune_type": 3}', "config", "fine_tune_type is 3"),
    ],
)
def test_what_mlx_lm_would_not_load_is_refused(weights: bytes, configuration: bytes, kind: str, fact: str) -> None:
    with pytest.raises(AdapterRefused, match=fact) as error:
        MLX.inspect(configuration, weights, path="some/folder")
    assert (error.value.kind, error.value.path) == (kind, "some/folder")


@given(data=st.binary(max_size=120))
def test_any_configuration_is_read_or_refused(data: bytes) -> None:
    with suppress(AdapterRefused):
        MLX.read_config(data)


@given(
    parameters=st.dictionaries(
        st.sampled_from(["rank", "scale", "alpha", "keys"]),
        st.none() | st.booleans() | st.integers(-5, 9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    )
)
def test_any_parameters_are_read_or_refused(parameters: dict[str, Any]) -> None:
    configuration = config(**parameters)
    try:
        summary = MLX.inspect(configuration, save(tensors()))
    except AdapterRefused:
        return
    assert summary.rank_max == 2


def test_a_file_of_mlx_with_metadata_of_null_is_read() -> None:
    weights = save(tensors())
    size = int.from_bytes(weights[:8], "little")
    header = b'{"__metadata__":null,' + weights[9 : 8 + size]
    found = MLX.inspect(config(), len(header).to_bytes(8, "little") + header + weights[8 + size :])
    assert found.layout == MLX.inspect(config(), weights).layout


def write(folder: Path, configuration: bytes | None = config(), **others: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapters.safetensors").write_bytes(save(tensors()))
    if configuration is not None:
        (folder / "adapter_config.json").write_bytes(configuration)
    for name, data in others.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    return folder


def test_a_folder_of_a_training_is_one_task_and_its_step_copies_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "rust", **{"0000100_adapters": save(tensors(1))})
    found = find_adapters([tmp_path])
    (task,) = found.tasks
    assert (task.name, task.final.format.name, len(task.adapters)) == ("rust", "mlx", 1)
    assert (found.refused, task.not_kept) == ((), ())


def test_weights_without_their_configuration_are_named(tmp_path: Path) -> None:
    write(tmp_path / "rust", None)
    (refused,) = find_adapters([tmp_path]).refused
    assert (refused.kind, "adapter_config.json" in (refused.hint or "")) == ("mlx", True)


def test_the_configuration_of_peft_makes_no_mlx_adapter(tmp_path: Path) -> None:
    write(tmp_path / "rust", b'{"peft_type": "LORA"}')
    assert find_adapters([tmp_path]).tasks == ()
