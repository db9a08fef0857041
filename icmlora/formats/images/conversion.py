"""Convert an image adapter into another program's format.

    file ──▶ factors under their own names, float32, alpha = r ──diffusers──▶ other names ──▶ file

diffusers drops unknown parts, mostly silently. So the names are converted twice: the first time with factors whose
values are the index of their module, which shows where each module ends up, before any value of the file is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from icmlora.errors import AdapterRefused
from icmlora.formats.file_header import HEADER, of_lora, with_ranks
from icmlora.formats.format import AdapterBytes, AdapterFormat
from icmlora.formats.images.diffusers import METADATA
from icmlora.formats.images.families import base_of
from icmlora.formats.images.names import diffusers_to_kohya, lycoris_to_kohya, to_diffusers
from icmlora.formats.images.single_file import SingleFileFormat
from icmlora.io.safetensors import encode
from icmlora.io.tensors import dtype_name, raw_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from icmlora.formats.images.single_file_names import Factors

_SDXL = "stable-diffusion-xl-v1-base"
Rename = Callable[[Mapping[str, "Tensor"]], dict[str, "Tensor"]]


def convert_image(
    content: AdapterBytes, source: AdapterFormat, target: AdapterFormat, *, metadata: Mapping[str, str], dtype: str
) -> AdapterBytes:
    """Convert an image adapter to another format, with the header's notes and the companions.

    Args:
        content: The adapter.
        source: Its format.
        target: The format to write: `diffusers` or `kohya`.
        metadata: Additional entries for the header.
        dtype: "bfloat16", "float16" or "float32", for the factors with their scales multiplied in.

    Raises:
        AdapterRefused: diffusers has no converter for a part of it.
        DataError: diffusers is not installed.
    """
    assert isinstance(source, SingleFileFormat)
    rename = checked_renaming(content.weights, source, target)
    try:
        factors, checked = source.named_factors(content.weights)
    except AdapterRefused as error:
        if error.kind == "original-only" and source.name == "lycoris":
            error.hint = "run `icm convert --rank N` to convert LoHa, LoKr and full differences to LoRA"
        raise
    tensors = {name: raw_tensor(name, values, dtype_name(dtype)) for name, values in rename(factors).items()}
    ranks = [one.shape[0] for name, one in tensors.items() if name.endswith(("lora_A.weight", "lora_down.weight"))]
    kept = {name: text for name, text in checked.metadata.items() if name != METADATA}
    if target.name == "kohya":
        for name in [name for name in tensors if name.endswith(".lora_down.weight")]:
            alpha = name.replace(".lora_down.weight", ".alpha")  # equal to the rank, so it does not scale the factors
            tensors[alpha] = raw_tensor(alpha, torch.tensor(float(tensors[name].shape[0])), "F32")
        header = of_lora(kept, ranks)
    else:
        header = with_ranks(kept, ranks, alphas_stay=False)
    weights = encode(tensors, {"format": "pt", **header, **metadata})
    if odd := next((one.name for one in target.inspect(b"", weights).extras if one.name != HEADER), None):
        raise AdapterRefused(f"diffusers converts a part of it to {odd}, which is not a LoRA factor", kind="layers")
    return AdapterBytes(weights, companions=content.companions)


def checked_renaming(weights: bytes, source: AdapterFormat, target: AdapterFormat) -> Rename:
    """Return the function that renames the factors of a file, tested with its names and shapes only.

    Raises:
        AdapterRefused: A part of the file would be lost, or its new name is not a module of the model.
        DataError: diffusers is not installed.
    """
    assert isinstance(source, SingleFileFormat)
    found, stated = source.look(weights)
    base = base_of(stated, {one.module: one.shape.inputs for one in found.factors})
    if target.name == "diffusers":
        rename: Rename = partial(to_diffusers, base=base)
    elif source.name == "lycoris":
        rename = lycoris_to_kohya
    else:
        rename = partial(diffusers_to_kohya, is_sdxl=base.label == _SDXL)
    if found.factors and found.other_method is None:  # another method has nothing to rename
        if found.extras:
            fact = f"{found.extras[0].name} is not a LoRA factor, so diffusers cannot convert it"
            raise AdapterRefused(fact, kind="extras", hint="leave out --format to keep it unchanged")
        _refuse_losses(found.factors, rename)
    return rename


def _refuse_losses(factors: Sequence[Factors], rename: Rename) -> None:
    """Refuse an adapter if the renaming would drop a module, or rows of a module."""
    numbered: dict[str, Tensor] = {}
    for number, one in enumerate(factors, 1):
        for name, shape in ((one.down.name, (1, *one.down.shape[1:])), (one.up.name, (one.up.shape[0], 1))):
            numbered[name] = torch.full(shape, float(number))
    rows: Counter[int] = Counter()
    for name, values in rename(numbered).items():
        if name.endswith(("lora_B.weight", "lora_up.weight")):
            rows[int(values.flatten()[0])] += len(values)
    for number, one in enumerate(factors, 1):
        if rows[number] != one.up.shape[0]:
            fact = f"diffusers has no converter for {one.module}: it would be lost"
            raise AdapterRefused(fact, kind="layers", hint="leave out --format to keep its names")
