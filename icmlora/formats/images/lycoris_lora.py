"""Convert LyCORIS' LoHa, LoKr and full differences to LoRA: dW of each module, then its largest singular values.

    LoHa   dW = alpha / r * (w1_a @ w1_b) * (w2_a @ w2_b)        LoKr   dW = alpha / r * kron(w1, w2)
    full   dW = diff                                             LoCon  dW = alpha / r * up @ down

OFT, GLoRA, IA3 and DoRA depend on the base model's weights, which a file does not have; they are refused by name.

Source: KohakuBlueleaf/LyCORIS, lycoris/functional, which computes dW.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from icmlora.errors import AdapterRefused, DataError
from icmlora.formats.file_header import of_lora
from icmlora.formats.images.families import base_of
from icmlora.formats.images.single_file_check import scalar
from icmlora.formats.images.single_file_names import NUMBERS, other_method
from icmlora.io.finite import check_finite
from icmlora.io.safetensors import TensorHeader, encode, read_header
from icmlora.io.tensors import decode_float32, raw_tensor

if TYPE_CHECKING:
    from torch import Tensor

_Parts = Mapping[str, "Tensor"]

_EXACT = 512
"""Maximum number of rows or columns for a full decomposition, which takes less than a second."""
_OVERSAMPLING, _ITERATIONS = 16, 8
"""For larger matrices: extra singular values and iterations, to get the requested values exactly."""
_MAX_VALUES = 1 << 28
"""Maximum number of values of one dW: 1 GiB, four times the largest layer of Flux."""
# LoHa and LoKr fold the kernel of a convolution into its input. In Stable Diffusion's UNets, these layers have kernels
# of 3 x 3 and 1 x 1; `proj_in` and `proj_out` are convolutions in version 1 only, which is detected by the header or by
# the width of the text encoder.
_KERNEL_3 = re.compile(
    r".*_(resnets_\d+_conv[12]|(down|up)samplers_\d+_conv|in_layers_2|out_layers_3|blocks_\d+_\d+_(op|conv)|conv_in"
    r"|conv_out|input_blocks_0_0|out_2)"
)
_KERNEL_1 = re.compile(r".*_(conv_shortcut|skip_connection)")
_KERNEL_1_OF_V1 = re.compile(r".*_attentions_\d+_proj_(in|out)")
_TEXT_OF_V1 = re.compile(r".*_attn2_to_[kv]")
_V1, _V1_WIDTH = "stable-diffusion-v1", 768


class LowRank(NamedTuple):
    """The result of a conversion to LoRA.

    Attributes:
        weights: A LoCon file, float32, with the same module names and alpha = r.
        errors: Module -> ||dW' - dW||^2 and ||dW||^2.
    """

    weights: bytes
    errors: Mapping[str, tuple[float, float]]


def low_rank(weights: bytes, rank: int) -> LowRank:
    """Return the LoRA of a given rank that is closest to a LyCORIS adapter.

    Args:
        weights: The file of the adapter.
        rank: Maximum rank of a module.

    Raises:
        AdapterRefused: The file is damaged, or a part of it is not a weight change.
        DataError: lycoris-lora is not installed.
    """
    header = read_header(weights)
    check_finite(weights, header)
    modules = _modules(weights, header)
    text = next((stem for stem in modules if _TEXT_OF_V1.fullmatch(stem.replace(".", "_"))), None)
    is_v1 = base_of(header.metadata, {}).label == _V1
    is_v1 = is_v1 or (text is not None and _delta(text, modules[text]).shape[1] == _V1_WIDTH)
    tensors, errors, ranks = {}, {}, []
    for stem, parts in modules.items():
        delta = _delta(stem, parts)
        kernel = tuple(delta.shape[2:]) or _kernel(stem, delta.shape[1], is_v1)
        flat = delta.flatten(1)
        a, b = _largest(flat, rank)
        errors[stem] = float((flat - b @ a).double().square().sum()), float(flat.double().square().sum())
        ranks.append(len(a))
        shaped = a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))
        for name, values in zip(("lora_down.weight", "lora_up.weight"), shaped, strict=True):
            tensors[f"{stem}.{name}"] = raw_tensor(name, values, "F32")
        tensors[f"{stem}.alpha"] = raw_tensor("alpha", torch.tensor(float(len(a))), "F32")
    return LowRank(encode(tensors, {"format": "pt", **of_lora(header.metadata, ranks)}), errors)


def format_of_lora(weights: bytes) -> str:
    """Return the format of the result of `low_rank`, according to the module names."""
    header = read_header(weights)
    has_dots = any("." in _split(info.name)[0] for info in header.tensors)
    return "comfyui" if has_dots else "lycoris"


def _modules(weights: bytes, header: TensorHeader) -> dict[str, dict[str, Tensor]]:
    """Return the parts of each module by name; refuse anything but weight changes."""
    for info in header.tensors:
        what = "DoRA" if info.name.endswith(".dora_scale") else other_method(info.name)
        if what in ("DoRA", "OFT", "GLoRA", "IA3"):
            fact = f"{info.name} belongs to {what}, and computing its dW needs the base model's weights"
            raise AdapterRefused(fact, kind="other-method", hint=_KEEP)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    factors = tuple(info for info in header.tensors if not info.name.endswith(".alpha"))
    for name, values in decode_float32(weights, TensorHeader(factors, {})).items():
        stem, part = _split(name)
        if part in _PARTS:
            parts[stem][part] = values
        elif part != "diff_b" or values.any():
            fact = f"{name} is not a weight change, so LoRA cannot represent it"
            raise AdapterRefused(fact, kind="extras", hint=_KEEP)
    for info in header.tensors:
        stem, part = _split(info.name)
        if part == "alpha" and stem in parts:
            if info.shape not in ((), (1,)) or info.dtype not in NUMBERS:
                raise AdapterRefused(f"{info.name} is {info.dtype} {list(info.shape)}, not one number", kind="alpha")
            parts[stem][part] = torch.tensor(scalar(weights, info))
    return dict(parts)


def _split(name: str) -> tuple[str, str]:
    """Return module and part of a tensor; a module's name may have dots, as in ai-toolkit."""
    stem, _, part = name.removesuffix(".weight").rpartition(".")
    return stem, part + name[len(name.removesuffix(".weight")) :]


def _delta(stem: str, parts: _Parts) -> Tensor:
    """Return dW of a module: (out, in[, k, k]), or (out, in * k * k) if the kernel is unknown."""
    try:
        from lycoris.functional import locon, loha, lokr
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[diffusion]'"
        raise DataError("reading LoHa and LoKr needs lycoris-lora, which is not installed", hint=hint) from error
    made = {"locon": locon, "loha": loha, "lokr": lokr}
    _check_size(stem, parts)
    try:
        if "diff" in parts:
            return _checked(stem, parts["diff"])
        if "hada_w1_a" in parts:
            w: list[Any] = [parts.get(f"hada_{name}") for name in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")]
            scale = torch.tensor(_scale(parts, "hada_w1_b"))
            return _checked(stem, made["loha"].diff_weight(*w, gamma=scale))
        if any(part.startswith("lokr_") for part in parts):
            return _checked(stem, _kronecker(made["lokr"], parts))
        w = [parts[f"lora_{name}.weight"] for name in ("down", "up")] + [parts.get("lora_mid.weight")]
        return _checked(stem, made["locon"].diff_weight(*w, gamma=_scale(parts, "lora_down.weight")))
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise AdapterRefused(f"{stem}: its parts do not fit together: {error}"[:300], kind="shape") from error


def _kronecker(lokr: Any, parts: _Parts) -> Tensor:
    """Return dW of LoKr; both factors may be split in two, and the second may also have a core."""
    w1 = parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
    elif "lokr_t2" in parts:
        w2 = lokr.rebuild_tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        w2 = (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])
    # With two whole factors there is no rank, and LyCORIS has no scale. (Its `diff_weight` mistakes a width for the
    # rank if there is a core, so it is not used here.)
    of = next((name for name in ("lokr_w2_b", "lokr_w1_b") if name in parts), None)
    found: Tensor = lokr.make_kron(w1, w2, 1.0 if of is None else _scale(parts, of))
    return found


def _checked(stem: str, delta: Tensor) -> Tensor:
    if delta.dim() < 2:
        raise AdapterRefused(
            f"{stem}: a weight change of shape {list(delta.shape)} does not fit any layer", kind="shape"
        )
    if not delta.isfinite().all():
        raise AdapterRefused(f"{stem}: its dW exceeds float32", kind="overflow")
    return delta


def _scale(parts: _Parts, name: str) -> float:
    """Return alpha / r; a missing alpha or 0 means alpha = r."""
    alpha, rank = parts.get("alpha"), parts[name].shape[0]
    return 1.0 if alpha is None or not float(alpha) else float(alpha) / rank


def _check_size(stem: str, parts: _Parts) -> None:
    """Refuse a dW larger than any layer, which a small file can declare."""
    values = 1
    for whole, names in _HALVES.items():
        if whole in parts:
            values *= parts[whole].numel()
        elif names[1] in parts:
            a, b, core = (parts.get(name) for name in names)
            values *= 0 if a is None or b is None else a.numel() * b.numel() // max(len(b), 1) ** 2
            values *= 1 if core is None else prod(core.shape[2:])
    if values > _MAX_VALUES:
        raise AdapterRefused(f"{stem}: its dW would have {values:,} values", kind="limits")


def _kernel(stem: str, inputs: int, is_v1: bool) -> tuple[int, ...]:
    """Return the kernel of a layer by its name, if dW folds it into the input; empty for a linear layer."""
    stem = stem.replace(".", "_")
    if _KERNEL_3.fullmatch(stem) and inputs % 9 == 0:
        return (3, 3)
    return (1, 1) if _KERNEL_1.fullmatch(stem) or (is_v1 and _KERNEL_1_OF_V1.fullmatch(stem)) else ()


def _largest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of the largest singular values; deterministic."""
    rank = min(rank, *delta.shape)
    if min(delta.shape) <= max(_EXACT, rank + _OVERSAMPLING):
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=rank + _OVERSAMPLING, niter=_ITERATIONS)
            vh = v.mT
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


_PARTS = frozenset(
    {
        *("diff", "lora_up.weight", "lora_down.weight", "lora_mid.weight"),
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    }
)
# Parts whose sizes multiply: a whole matrix -> its two factors and the core between them, which may replace it.
_HALVES = {
    "": ("hada_w1_a", "hada_w1_b", "hada_t1"),
    "lokr_w1": ("lokr_w1_a", "lokr_w1_b", ""),
    "lokr_w2": ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    " ": ("lora_up.weight", "lora_down.weight", "lora_mid.weight"),
}
_KEEP = "leave out --format and --rank to keep it unchanged"
