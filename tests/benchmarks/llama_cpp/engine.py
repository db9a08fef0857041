"""A real llama.cpp in this process: the package `xllamacpp`, which holds its server as it was built.

    pip install xllamacpp

Prompts and answers are token numbers, so that no difference between two tokenizers counts.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import gguf
import torch


@dataclass(frozen=True)
class Answer:
    """What a model wrote, greedily, and the logarithm of each token's probability."""

    tokens: list[int]
    logprobs: list[tuple[int, float]]  # by token; llama.cpp leaves out the end of a text inside of a character
    never: Sequence[int]  # tokens that were not allowed


def engine_version() -> str:
    """Say which llama.cpp it is; the last part of the number is its build."""
    return f"xllamacpp {version('xllamacpp')}"


def of_llama_cpp(model: Path, adapter: Path | None, prompts: Sequence[Sequence[int]], count: int) -> list[Answer]:
    """Let llama.cpp answer prompts with a number of tokens, with an adapter or without."""
    import xllamacpp  # only this study needs it

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, 0
    params.cpuparams.n_threads = 1
    # By default llama.cpp keeps keys and values in float16, which transformers does not.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)  # it listens on a free port of this machine until it is deleted
    address = f"{server.listening_address}/completion"
    return [_asked(address, {"prompt": list(prompt), "n_predict": count, **_GREEDY}) for prompt in prompts]


_GREEDY = {
    **{"samplers": ["top_k"], "top_k": 1, "ignore_eos": True},
    **{"n_probs": 1, "return_tokens": True, "cache_prompt": False},
}


def _asked(address: str, question: Mapping[str, object]) -> Answer:
    data, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, data, kind)) as response:
        found = json.load(response)
    steps = found["completion_probabilities"]
    never = [bias["token"] for bias in found["generation_settings"]["logit_bias"]]  # what ends a text
    return Answer(found["tokens"], [(step["id"], step["logprob"]) for step in steps], never)


@torch.no_grad()
def of_transformers(model: Any, prompts: Sequence[Sequence[int]], count: int, never: Sequence[int]) -> list[Answer]:
    """Let transformers, with PEFT if the model has an adapter, answer the same and `never` write some tokens."""
    answers = []
    for prompt in prompts:
        logprobs: list[tuple[int, float]] = []
        read, past = list(prompt), None
        for _ in range(count):
            output = model(torch.tensor([read]), past_key_values=past, use_cache=True)
            chances, past = output.logits[0, -1].double().log_softmax(-1), output.past_key_values
            allowed = chances.clone()
            allowed[never] = -torch.inf
            read = [int(allowed.argmax())]
            logprobs.append((read[0], float(chances[read[0]])))
        answers.append(Answer([token for token, _ in logprobs], logprobs, never))
    return answers


def equal(one: Sequence[Answer], other: Sequence[Answer]) -> bool:
    """Return whether two engines wrote the same tokens."""
    return [answer.tokens for answer in one] == [answer.tokens for answer in other]


def largest_difference(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    """Return how far two engines are apart in the log probabilities that both give, up to the first other token."""
    differences = [0.0]
    for mine, theirs in zip(one, other, strict=True):
        same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(mine.logprobs, theirs.logprobs, strict=False))
        differences += [abs(x - y) for (_, x), (_, y) in same]
    return round(max(differences), 6)


def widen(source: Path, target: Path) -> None:
    """Write a GGUF model with all weights in float32: the same values, which llama.cpp then does not round again."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
