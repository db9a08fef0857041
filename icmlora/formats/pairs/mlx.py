"""Adapters of MLX-LM: folders with adapters.safetensors and MLX-LM's adapter_config.json.

    model.layers.0.self_attn.q_proj.lora_a (in, r)   .lora_b (r, out)    dW = scale * lora_b^T @ lora_a^T
    model.layers.0.self_attn.q_proj.m (out,)         DoRA's row lengths, kept exactly
    model.layers.0.mlp.switch_mlp.up_proj.lora_a (E, r, in), .lora_b (E, out, r)    experts, not transposed

The configuration contains all training options, with one scale and one r. Copies that training saves every few steps
(`0000100_adapters.safetensors`) are skipped.

MLX-LM keeps the row order of transformers and, inside the blocks, mostly the names; it refuses to load an adapter with
a module that the model lacks.

Source: ml-explore/mlx-lm, lora.py, tuner/lora.py, tuner/dora.py and tuner/utils.py (`load_adapters`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.format import (
    AdapterBytes,
    AdapterFormat,
    AdapterSummary,
    Buffer,
    ConfigFacts,
    Extras,
    FolderFormat,
    FoundAdapter,
    LoadedAdapter,
    RunnableAdapter,
    Template,
    Texts,
)
from icmlora.formats.noted_form import bad_note
from icmlora.formats.pairs.ab_pairs import (
    TASK_TYPE,
    LoraPair,
    PairForm,
    SortedPairs,
    check_orientation,
    original_only,
    sort_pairs,
    summary_of,
)
from icmlora.formats.peft.config import MAX_CONFIG_BYTES, MAX_LABEL, MAX_RANK
from icmlora.io.files import read_regular
from icmlora.io.safetensors import RawTensor, TensorHeader, encode, read_header
from icmlora.io.strict_json import parse_object
from registry.names import escape

if TYPE_CHECKING:
    from icmlora.adapter.model import Adapter
    from icmlora.formats.discovery.tree import Folder

CONFIG_NAME = FolderFormat.config_name
WEIGHTS_NAME = "adapters.safetensors"
_DEFAULT_SCALE = 20.0  # MLX-LM's default
_MAX_SCALE = 1e30
_KINDS = ("lora", "dora")
# MLX-LM looks up the key in each block. It computes experts together, from one tensor.
_MODULE = re.compile(
    r"(?P<model>model\.|model\.language_model\.|language_model\.model\.)(?P<block>layers\.\d+)\."
    r"(?P<key>(?!.*\.\d+(\.|$)).+)"
)


@dataclass(frozen=True)
class MlxConfig:
    """The fields of an MLX-LM configuration that define the meaning of its tensors."""

    base_model: str | None
    kind: str  # lora, dora or full
    rank: int | None
    scale: float

    @classmethod
    def parse(cls, data: bytes) -> MlxConfig:
        """Read a configuration.

        Raises:
            AdapterRefused: It is damaged, or has a value that MLX-LM does not accept.
        """
        fields = parse_object(data, what=CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
        if fields.get("peft_type") is not None:
            hint = "copy the configuration that MLX-LM wrote into the folder of the weights"
            raise AdapterRefused(f"{CONFIG_NAME} is PEFT's, not MLX-LM's", kind="config", hint=hint)
        kind = fields.get("fine_tune_type", "lora")
        if not isinstance(kind, str):
            raise _wrong("fine_tune_type", kind)
        parameters = fields.get("lora_parameters") or {}
        if not isinstance(parameters, dict):
            raise _wrong("lora_parameters", parameters)
        rank = parameters.get("rank")
        if rank is not None and (type(rank) is not int or not 0 < rank <= MAX_RANK):
            raise _wrong("rank", rank)
        return cls(_label(fields), kind, rank, _scale(parameters))


class MlxFormat(FolderFormat):
    """The format of `mlx_lm.lora`."""

    name = "mlx"
    about = "a folder with adapters.safetensors and adapter_config.json, as MLX-LM saves it"
    weights_name = WEIGHTS_NAME
    watched = frozenset({CONFIG_NAME, WEIGHTS_NAME})

    def find(self, folder: Folder) -> list[FoundAdapter]:
        """Return the adapter of a folder, unless its configuration is PEFT's."""
        return [paths for paths in super().find(folder) if not _is_pefts(folder.files[CONFIG_NAME])]

    def refuse(self, folder: Folder) -> list[AdapterRefused]:
        """Report weights without a configuration."""
        if WEIGHTS_NAME not in folder.files or CONFIG_NAME in folder.files:
            return []
        hint = f"copy its {CONFIG_NAME} into the same folder"
        path = folder.files[WEIGHTS_NAME]
        return [AdapterRefused(f"there is no {CONFIG_NAME}, so the scale is unknown", kind="mlx", path=path, hint=hint)]

    def read_config(self, config: bytes) -> ConfigFacts:
        """Read `adapter_config.json`."""
        return ConfigFacts(MlxConfig.parse(config).base_model, None, TASK_TYPE)

    def _summary(self, config: bytes, weights: Buffer) -> AdapterSummary:
        return _summary(*_parse(config, weights), weights)

    def _load(self, config: bytes, weights: bytes) -> LoadedAdapter:
        from icmlora.formats.pairs.ab_tensors import read_pairs

        parsed, header, pairs = _parse(config, weights)
        return read_pairs(weights, _summary(parsed, header, pairs, weights), pairs, lambda rank: parsed.scale)

    def _run(self, config: bytes, weights: bytes) -> RunnableAdapter:
        """Read an adapter with DoRA's row lengths; experts have other names in transformers and are refused."""
        from icmlora.io.tensors import decode_float32

        parsed, _, pairs = _parse(config, weights)
        if experts := [pair.module for pair in pairs.pairs if len(pair.a.shape) == 3]:
            raise _cannot_run(f"transformers uses other names for the experts of {experts[0]}")
        adapter = self._load(config, weights).adapter
        lengths = {extra.name.removesuffix(".m"): extra for extra in pairs.extras if extra.name.endswith(".m")}
        if odd := next((extra for extra in pairs.extras if extra not in lengths.values()), None):
            raise _cannot_run(f"it has a tensor {odd.name}")
        modules = {module.name for module in adapter.modules}
        if (lengths or parsed.kind == "dora") and (odd_module := min(modules ^ lengths.keys(), default=None)):
            fact = f"DoRA needs factors and row lengths for each module, but {odd_module} has only one of the two"
            raise AdapterRefused(fact, kind="missing-half")
        values = decode_float32(weights, TensorHeader(tuple(lengths.values()), {}))
        return RunnableAdapter(adapter, magnitudes={name: values[one.name] for name, one in lengths.items()})

    def _fresh(self, adapter: Adapter, metadata: Texts, dtype: str) -> AdapterBytes:
        return encode_mlx(RunnableAdapter(adapter), metadata=metadata, dtype=dtype)

    def _alike(
        self, adapter: Adapter, like: Template, dtype: str | None, rank: int | None, extras: Extras, metadata: Texts
    ) -> AdapterBytes:
        from icmlora.formats.pairs.ab_tensors import write_pairs

        form, config = PairForm.parse(like), like.config
        largest = max(shape.rank for shape in like.layout)
        if rank is None and MlxConfig.parse(config).rank not in (None, largest):
            rank = largest  # MLX-LM supports only one rank for all modules
        if rank is not None:  # with scale 1; the scale moves into the factors
            fields = parse_object(config, what=CONFIG_NAME, max_bytes=MAX_CONFIG_BYTES)
            fields["lora_parameters"] = {**(fields.get("lora_parameters") or {}), "rank": rank, "scale": 1.0}
            config = (json.dumps(fields, indent=4) + "\n").encode()
        scale = MlxConfig.parse(config).scale
        tensors = write_pairs(
            adapter,
            like,
            form,
            turned=lambda module: (module not in form.experts,) * 2,
            suffix="",
            scale=lambda rank: scale,
            dtype=dtype,
            rank=rank,
        )
        found = form.own.get("metadata", {})
        is_text = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
        if form.own.keys() - {"metadata"} or not is_text:
            raise bad_note()
        return AdapterBytes(encode(tensors | dict(extras), dict(found)), config)


def _is_pefts(config: Path) -> bool:
    """Return whether a configuration is PEFT's; an unreadable one counts as MLX-LM's, and is refused later."""
    try:
        return b'"peft_type"' in read_regular(config, max_bytes=MAX_CONFIG_BYTES)
    except AdapterRefused:
        return False


def _parse(config: bytes, weights: Buffer) -> tuple[MlxConfig, TensorHeader, SortedPairs]:
    parsed, header = MlxConfig.parse(config), read_header(weights)
    if parsed.kind not in _KINDS:
        return parsed, header, SortedPairs((), header.tensors)
    pairs = sort_pairs(header.tensors, "", lambda name, a, b: LoraPair(name, a, b, *(len(a.shape) == 2,) * 2))
    if parsed.rank is None:
        check_orientation(pairs.pairs)
    for pair in pairs.pairs:
        if parsed.rank is not None and pair.rank != parsed.rank:
            fact = f"{pair.a.name} has rank {pair.rank}, but {CONFIG_NAME} states {parsed.rank}"
            hint = "copy the configuration of the same training run; MLX-LM cannot load it either"
            if parsed.rank in pair.a.shape:
                hint = "lora_a is (in, r) for MLX-LM and lora_b (r, out): convert the adapter again"
            raise AdapterRefused(fact, kind="rank", hint=hint)
    return parsed, header, pairs


def _summary(parsed: MlxConfig, header: TensorHeader, pairs: SortedPairs, weights: Buffer) -> AdapterSummary:
    facts = ConfigFacts(parsed.base_model, None, TASK_TYPE)
    if parsed.kind not in _KINDS:
        fact = f"fine_tune_type is {escape(parsed.kind, 48)}: whole layers, not a LoRA"
        return original_only(facts, header, (), fact, does_nothing=not header.tensors)
    if not pairs.pairs:
        reason = "has no LoRA factors" if header.tensors else "does nothing: it holds no tensors"
        return original_only(facts, header, (), reason, does_nothing=not header.tensors)
    form = {"metadata": dict(header.metadata)} if header.metadata else {}
    return summary_of(facts, header, pairs, weights, form=form, does_nothing=parsed.scale == 0.0)


def _label(fields: Mapping[str, Any]) -> str | None:
    label = fields.get("model")
    if label is None or label == "":
        return None
    if not isinstance(label, str):
        raise _wrong("model", label)
    if len(label) > MAX_LABEL:
        raise UnsafeInput(f"model has {len(label):,} characters", kind="limits")
    return label


def _scale(parameters: Mapping[str, Any]) -> float:
    scale = parameters.get("scale")
    if scale is None and "alpha" in parameters:
        hint = "set scale = alpha / rank; MLX-LM needs `scale` to load it"
        raise AdapterRefused("lora_parameters has alpha, but no scale", kind="config", hint=hint)
    if scale is None:
        return _DEFAULT_SCALE
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= _MAX_SCALE:
        raise _wrong("scale", scale)
    return float(scale)


def _wrong(key: str, value: object) -> AdapterRefused:
    return AdapterRefused(f"{key} is {escape(repr(value), 48)}, which MLX-LM does not accept", kind="config")


def _cannot_run(what: str) -> AdapterRefused:
    hint = "evaluate it where it was trained; icm can still store and write it"
    return AdapterRefused(f"icm cannot run it: {what}", kind="cannot-run", hint=hint)


def encode_mlx(adapter: RunnableAdapter, *, metadata: Mapping[str, str], dtype: str = "float32") -> AdapterBytes:
    """Serialise an adapter as weights and configuration, deterministically.

    Args:
        adapter: The adapter.
        metadata: Short facts for the header of the weights.
        dtype: "bfloat16", "float16" or "float32", the default for training in MLX-LM.

    Raises:
        AdapterRefused: A part cannot be stored in an MLX adapter, or a value overflows the type.
    """
    from icmlora.formats.factors import fitted
    from icmlora.io.tensors import dtype_name, raw_tensor

    other = replace(adapter, magnitudes={}).beyond_lora()
    if other is not None:
        fact = f"an MLX adapter holds only LoRA factors and DoRA magnitudes, but this one also has {other}"
        raise AdapterRefused(fact, kind="extras", hint="write it with --format peft, and merge it with PEFT")
    modules, kind = adapter.adapter.modules, dtype_name(dtype)
    rank = max(module.a.shape[0] for module in modules)  # lower ranks are padded with zeros
    keys: set[str] = set()
    tensors: dict[str, RawTensor] = {}
    for module in modules:
        place, key = _place(module.name)
        a, b = fitted(module, rank, module.a.shape[1], module.b.shape[0])
        values = {"lora_a": a.T, "lora_b": b.T}
        if module.name in adapter.magnitudes:
            values["m"] = adapter.magnitudes[module.name]
        named = {f"{place}.{key}.{leaf}": value for leaf, value in values.items()}
        if named.keys() & tensors.keys():
            raise AdapterRefused(f"two modules would both be {place}.{key}", kind="layers")
        tensors |= {name: raw_tensor(name, value, kind) for name, value in named.items()}
        keys.add(key)
    fields = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        # The scale is already in lora_b. Readers of this file that ignore the scale get the same result.
        "lora_parameters": {"dropout": 0.0, "keys": sorted(keys), "rank": rank, "scale": 1.0},
        "model": adapter.adapter.base_model,
        "num_layers": -1,  # all; a module without tensors in the file has no effect
    }
    config = (json.dumps(fields, indent=4, sort_keys=True) + "\n").encode()
    return AdapterBytes(encode(tensors, {"format": "mlx", **metadata}), config)


def _place(module: str) -> tuple[str, str]:
    """Return the name of a module's block in MLX-LM, and the module's name in the block."""
    match = _MODULE.fullmatch(module)
    if match is None:
        fact = f"{escape(module, 120)}: an MLX adapter cannot hold this module"
        raise AdapterRefused(
            fact, kind="layers", hint="MLX holds only linear layers named model.layers.N.…, without experts"
        )
    # MLX-LM has its own name for the text model in a larger model.
    model = "model" if match["model"] == "model." else "language_model.model"
    return f"{model}.{match['block']}", match["key"]


MLX: AdapterFormat = MlxFormat()
