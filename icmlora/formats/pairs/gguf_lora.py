"""LoRA adapters for llama.cpp: one GGUF file, in the format of llama.cpp's convert_lora_to_gguf.py.

    model.layers.0.self_attn.q_proj   A (r, in)  ──▶  blk.0.attn_q.weight.lora_a
                                      B (out, r) ──▶  blk.0.attn_q.weight.lora_b, rows in llama.cpp's order

    what llama.cpp adds:  dW = alpha / r * lora_b @ lora_a,   alpha once in the file, r of each lora_b

Names come from the tables of the `gguf` package. The architecture must match the base model's, or llama.cpp does not
load the adapter. `with_base_names` does the reverse, for an adapter that was ingested as a GGUF file.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and convert_hf_to_gguf.py (`LlamaModel.permute`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import torch

from icmlora.adapter.layout import target_modules
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.errors import AdapterRefused, BaseModelMismatch, BaseModelUnsuited
from icmlora.formats.format import RunnableAdapter
from icmlora.formats.pairs.gguf_file import GgufValue, encode_gguf_file
from icmlora.io.safetensors import RawTensor
from icmlora.io.tensors import dtype_name, raw_tensor
from registry.names import escape

# Architecture in config.json -> llama.cpp's name. For other architectures, llama.cpp may reorder or split weights; each
# of these was run with llama.cpp (tests/benchmarks/llama_cpp).
_ARCHITECTURES: Mapping[str, str] = {
    "CohereForCausalLM": "command-r",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GraniteForCausalLM": "granite",
    "Lfm2ForCausalLM": "lfm2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "OlmoForCausalLM": "olmo",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
# Here rotary embeddings rotate adjacent rows of a head; transformers rotates row i of the two halves.
_NEIGHBOURING = frozenset({"granite", "llama", "olmo", "smollm3"})
# Names of a block's linear layers in transformers; exceptions by architecture.
_LAYERS: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_LAYERS: Mapping[str, Mapping[str, str]] = {
    "lfm2": {
        "attn_output": "self_attn.out_proj",
        "ffn_gate": "feed_forward.w1",
        "ffn_up": "feed_forward.w3",
        "ffn_down": "feed_forward.w2",
        "shortconv.in_proj": "conv.in_proj",
        "shortconv.out_proj": "conv.out_proj",
    },
    "phi3": {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "starcoder2": {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
}
_BLOCK = re.compile(r"blk\.(\d{1,5})\.(.+)", re.ASCII)
# For the text model in a larger model, llama.cpp uses the names of the standalone text model.
_INNER = (("model.language_model.", "model."), ("language_model.", ""))
_MERGE = "write it with --format peft, merge it into its base model with PEFT, and convert the whole model"


@dataclass(frozen=True)
class GgufBase:
    """The facts about a base model that are needed to write an adapter for it."""

    architecture: str  # llama.cpp's name
    layers: int
    heads: tuple[int, int] | None = None  # heads of queries and keys, if llama.cpp reorders their rows
    prefix: str = field(default="model.", compare=False)  # prefix of the blocks in transformers

    @classmethod
    def of_config(cls, config: Mapping[str, object]) -> GgufBase:
        """Read a `config.json`.

        Raises:
            BaseModelUnsuited: The architecture is not supported, or a count is missing.
        """
        named = config.get("architectures")
        name = named[0] if isinstance(named, list) and named else None
        text = config.get("text_config", config)
        if not isinstance(name, str) or name not in _ARCHITECTURES or not isinstance(text, dict):
            raise _unknown(name, _ARCHITECTURES)
        found = cls._of(_ARCHITECTURES[name], text, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return found if text is config else replace(found, prefix=_INNER[0][0])

    @classmethod
    def of_file(cls, path: Path) -> GgufBase:
        """Read the header of a base model's GGUF file; raises as `of_config` does."""
        try:
            fields = gguf.GGUFReader(path).fields
            name = fields[gguf.Keys.General.ARCHITECTURE].contents()
            keys = (gguf.Keys.LLM.BLOCK_COUNT, gguf.Keys.Attention.HEAD_COUNT, gguf.Keys.Attention.HEAD_COUNT_KV)
            facts = {key: fields[full].contents() for key in keys if (full := key.format(arch=name)) in fields}
        except (OSError, ValueError, LookupError) as error:
            raise BaseModelUnsuited(f"the GGUF file cannot be read: {error}", path=path) from error
        if name not in _ARCHITECTURES.values():
            raise _unknown(name, dict.fromkeys(_ARCHITECTURES.values()))
        return cls._of(name, facts, *keys)

    @classmethod
    def _of(cls, architecture: str, facts: Mapping[str, object], layers: str, heads: str, kv_heads: str) -> GgufBase:
        if architecture not in _NEIGHBOURING:
            return cls(architecture, _count(facts, layers))
        queries = _count(facts, heads)
        keys = queries if facts.get(kv_heads) is None else _count(facts, kv_heads)
        return cls(architecture, _count(facts, layers), (queries, keys))


def encode_gguf(
    adapter: RunnableAdapter, base: GgufBase, *, task: str = "", metadata: Mapping[str, str], dtype: str = "float32"
) -> bytes:
    """Serialise an adapter as a GGUF file, deterministically.

    Args:
        adapter: The adapter.
        base: Its base model.
        task: Its name, which llama.cpp's server lists.
        metadata: Key to text, for the header. llama.cpp ignores unknown keys.
        dtype: "bfloat16", "float16" or "float32", the default of llama.cpp's own converter.

    Raises:
        AdapterRefused: A part cannot be stored in a GGUF adapter, or a value overflows the type.
        BaseModelMismatch: A module does not fit the heads of the base model.
    """
    other = adapter.beyond_lora()
    if other is not None:
        fact = f"a GGUF adapter holds only LoRA factors, but this one also has {other}"
        raise AdapterRefused(fact, kind="extras", hint=_MERGE)
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == base.architecture)
    names = gguf.get_tensor_name_map(architecture, base.layers)
    modules = adapter.adapter.modules
    rank = max(module.a.shape[0] for module in modules)
    general, own, label = gguf.Keys.General, gguf.Keys.Adapter, adapter.adapter.base_model
    keys: dict[str, str | int | float] = {
        general.ARCHITECTURE: base.architecture,
        general.TYPE: gguf.GGUFType.ADAPTER,
        general.NAME: task,
        own.TYPE: "lora",
        own.LORA_ALPHA: float(rank),
        own.LORA_TASK_NAME: task,
        **({general.BASE_MODEL_COUNT: 1, general.BASE_MODEL_NAME.format(id=0): label} if label else {}),
        **dict(sorted(metadata.items())),
    }
    tensors: dict[str, RawTensor] = {}
    for module in modules:
        target = _target(module.name, names, base)
        if f"{target}.lora_a" in tensors:
            raise AdapterRefused(f"two modules would both be {target}", kind="layers")
        b = _reordered(module, base, ("q_proj", "k_proj"), (2, -1))
        # llama.cpp multiplies by alpha / r, where alpha is the largest rank; the scale is already in B.
        factors = module.a, b * (module.a.shape[0] / rank)
        for half, factor in zip("ab", factors, strict=True):
            name = f"{target}.lora_{half}"
            tensors[name] = raw_tensor(name, factor, dtype_name(dtype))
    return encode_gguf_file({key: GgufValue.of(one) for key, one in keys.items() if one != ""}, tensors)


def with_base_names(adapter: Adapter, architecture: str, base: GgufBase) -> RunnableAdapter:
    """Return an adapter from a GGUF file with transformers' names and row order.

    Args:
        adapter: The adapter with llama.cpp's names and row order.
        architecture: The architecture in its file.
        base: Its base model.

    Raises:
        BaseModelMismatch: It is for another architecture, or a module does not fit the heads of the base model.
        AdapterRefused: It has modules other than linear layers inside the blocks.
    """
    if architecture != base.architecture:
        fact = f"the adapter is for {escape(architecture, 80)!r}, but its base model is {base.architecture!r}"
        raise BaseModelMismatch(fact, hint="run `icm base add NAME PATH` to set the base model of stored tasks")
    modules = tuple(
        LoraModule(_source(one.name, base), one.a, _reordered(one, base, ("attn_q", "attn_k"), (-1, 2)))
        for one in adapter.modules
    )
    targets = target_modules(module.name for module in modules)
    return RunnableAdapter(replace(adapter, modules=modules, target_modules=targets))


def _source(target: str, base: GgufBase) -> str:
    """Return transformers' name for the module of a weight in llama.cpp."""
    match = _BLOCK.fullmatch(target)
    layers = {**_LAYERS, **_OTHER_LAYERS.get(base.architecture, {})}
    if match is None or match[2] not in layers or int(match[1]) >= base.layers:
        fact = f"{escape(target, 120)}: icm does not know the transformers name of this module of {base.architecture}"
        raise AdapterRefused(fact, kind="layers", hint="use `--format gguf` to write it unchanged")
    return f"{base.prefix}layers.{match[1]}.{layers[match[2]]}"


def _reordered(module: LoraModule, base: GgufBase, kinds: tuple[str, str], halves: tuple[int, int]) -> torch.Tensor:
    """Return B (out, r) with the rows of each head in the other program's order, if the orders differ.

    Args:
        module: The module.
        base: Its base model.
        kinds: Suffixes of the names of queries and keys.
        halves: Shape of the rows of a head; its two dimensions are swapped.
    """
    b, kind = module.b, module.name.rpartition(".")[2]
    if base.heads is None or kind not in kinds:
        return b
    heads = base.heads[kinds.index(kind)]
    if len(b) % (2 * heads):
        fact = f"{module.name} has {len(b)} outputs, which do not divide into the {heads} heads of its base model"
        raise BaseModelMismatch(fact)
    return b.reshape(heads, *halves, b.shape[1]).transpose(1, 2).reshape(b.shape)


def _target(module: str, names: gguf.TensorNameMap, base: GgufBase) -> str:
    """Return llama.cpp's name for the weight of a module."""
    inner = next((new + module.removeprefix(old) for old, new in _INNER if module.startswith(old)), module)
    target: str | None = names.get_name(f"{inner}.weight", try_suffixes=(".weight",))
    # Outside the blocks are embeddings and the output layer. If tied, they are one tensor in llama.cpp.
    if target is None or not target.startswith("blk."):
        fact = f"{escape(module, 120)}: a GGUF adapter for {base.architecture} cannot hold this module"
        raise AdapterRefused(fact, kind="layers", hint="GGUF holds only linear layers inside the model's blocks")
    return target


def _count(facts: Mapping[str, object], key: str) -> int:
    value = facts.get(key)
    if type(value) is not int or not 0 < value < 2**16:
        raise BaseModelUnsuited(f"the base model's {key} is {escape(repr(value), 48)}, not a positive whole number")
    return value


def _unknown(name: object, known: Iterable[str]) -> BaseModelUnsuited:
    fact = f"icm cannot write GGUF adapters for the architecture {escape(str(name), 80)!r}"
    return BaseModelUnsuited(fact, hint=f"supported architectures: {', '.join(known)}")
