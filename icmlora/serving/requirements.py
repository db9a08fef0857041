"""Each engine's requirements for an adapter's configuration, from the source code of `CHECKED_VERSIONS`.

Engines reject some violations themselves. For others, they load the adapter but give wrong answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

EngineName = Literal["vllm", "sglang"]
CHECKED_VERSIONS: Mapping[EngineName, str] = {"vllm": "0.33", "sglang": "0.5"}
"""The versions whose source code icm's assumptions were checked against."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank`."""

Config = Mapping[str, object]

_VLLM_REFUSES = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
_VLLM_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})
_VLLM_WHOLE = frozenset({"classifier", "score"})
# Ignored by SGLang, which would use a wrong scale, wrong ranks, or omit these layers.
_SGLANG_IGNORES = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "layer_replication")


def config_problem(engine: EngineName, config: Config) -> str | None:
    """Return why an engine cannot serve an adapter with this `adapter_config.json`, or None if it can."""
    found = _vllm(config) if engine == "vllm" else _sglang(config)
    return next(iter(found), None)


def largest_rank(config: Config) -> int:
    """Return the largest rank in a configuration; 0 if there is none."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def _vllm(config: Config) -> Iterable[str]:
    yield from (f"vLLM does not support {name}" for name in _VLLM_REFUSES if config.get(name))
    yield from _bias("vLLM", config)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _VLLM_INITS:
        yield f"vLLM does not support init_lora_weights {init!r}"
    whole = config.get("modules_to_save")
    if isinstance(whole, list) and (others := sorted({str(name) for name in whole} - _VLLM_WHOLE)):
        yield f"vLLM does not support modules_to_save {', '.join(others)}"
    if config.get("trainable_token_indices"):
        yield "vLLM does not support trainable_token_indices"
    if largest_rank(config) > VLLM_RANKS[-1]:
        yield f"rank {largest_rank(config)} is above {VLLM_RANKS[-1]}, the largest rank that vLLM supports"


def _sglang(config: Config) -> Iterable[str]:
    if config.get("use_dora"):
        yield "SGLang does not support use_dora"
    yield from (f"SGLang ignores {name}" for name in _SGLANG_IGNORES if config.get(name))
    yield from _bias("SGLang", config)
    if config.get("trainable_token_indices"):
        yield "SGLang does not support trainable_token_indices"
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield "SGLang does not support a pattern in target_modules"
    if isinstance(targets, list) and ("q_proj" in targets) != ("v_proj" in targets):
        yield "SGLang needs q_proj and v_proj together"


def _bias(engine: str, config: Config) -> Iterable[str]:
    if config.get("bias", "none") != "none":
        yield f"{engine} does not support bias {config['bias']!r}"
