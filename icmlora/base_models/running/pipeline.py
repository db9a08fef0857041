"""Generate images with a diffusers pipeline, with or without an adapter file.

    model_index.json ──only classes of diffusers and transformers──▶ pipeline ──prompt, seed──▶ image
    NAME.safetensors ──load_lora_weights──────────────────────────────▲

Works offline, from safetensors only, and runs no code from the folder. Noise comes from the CPU generator, so a seed
gives the same noise on every device.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from icmlora.adapter.metrics import dw_norm
from icmlora.adapter.model import Adapter, LoraModule
from icmlora.base_models.finding.lookup import PIPELINE, FoundBase
from icmlora.base_models.load import quiet_loading
from icmlora.errors import BaseModelUnsuited, DataError
from icmlora.io.devices import inference_dtype

Pixels = NDArray[np.uint8]
"""An image: height, width, and RGB from 0 to 255."""

_LIBRARIES = ("diffusers", "transformers")
_SLOT = "icm"


@dataclass(frozen=True)
class Drawing:
    """Settings for image generation."""

    steps: int = 20  # denoising steps
    seeds: int = 2  # images per prompt; seeds count from 0
    size: int | None = None  # width and height in pixels; None for the pipeline's default


class Pipeline:
    """A diffusers pipeline in memory.

    Args:
        found: The pipeline on disk.
        device: Target device.

    Raises:
        BaseModelNotFound: It cannot be loaded, or it needs code from other packages.
        BaseModelUnsuited: It is not a diffusers pipeline.
        DataError: diffusers is not installed.
    """

    def __init__(self, found: FoundBase, device: torch.device) -> None:
        if not found.is_pipeline:
            fact = f"base model {found.label!r} is not a diffusers pipeline, so it cannot generate images"
            raise BaseModelUnsuited(
                fact, hint=f"run `icm base add {found.label} PATH` with a folder that contains {PIPELINE}"
            )
        diffusers = _diffusers()
        self.label = found.label
        _check_classes(found, diffusers)
        # "fp16" if a part has only weights of that variant.
        parts = {file.parent for file in found.weights}
        is_fp16 = (all(".fp16" in file.name for file in found.weights if file.parent == part) for part in parts)
        with quiet_loading(found, "diffusers pipeline", library="diffusers"), _quiet():
            self._pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
                found.path,
                torch_dtype=inference_dtype(device),
                use_safetensors=True,
                local_files_only=True,
                variant="fp16" if any(is_fp16) else None,
            )
            self._pipe.set_progress_bar_config(disable=True)
            self._pipe.to(device)

    def draw(self, prompt: str, seed: int, how: Drawing) -> Pixels:
        """Generate one image, uint8 of shape (height, width, 3).

        Raises:
            DataError: The output is not an image (a video, for example), or the safety checker removed it.
        """
        size = {} if how.size is None else {"height": how.size, "width": how.size}
        noise = torch.Generator("cpu").manual_seed(seed)
        with torch.no_grad(), _quiet():
            done = self._pipe(prompt, num_inference_steps=how.steps, generator=noise, output_type="np", **size)
        if any(getattr(done, "nsfw_content_detected", None) or ()):
            hint = "use other --prompts"
            raise DataError(f"the safety checker of {self.label!r} removed the image", hint=hint)
        values = np.asarray(getattr(done, "images", np.nan))
        if values.ndim != 4 or values.shape[-1] != 3 or not np.isfinite(values).all():
            raise DataError(f"the pipeline {self.label!r} generated no image with finite values")
        pixels: Pixels = np.clip(np.rint(values[0] * 255), 0, 255).astype(np.uint8)
        return pixels

    @contextmanager
    def adapted(self, file: Path) -> Iterator[float]:
        """Load an adapter into the pipeline inside the block.

        Yields:
            The norm of the loaded dW: smaller than the adapter's norm if diffusers skips parts of it.

        Raises:
            DataError: diffusers cannot load it, or finds nothing to load.
        """
        from peft.tuners.lora import LoraLayer

        try:
            try:
                with _quiet():
                    self._pipe.load_lora_weights(
                        file.parent,
                        weight_name=file.name,
                        adapter_name=_SLOT,
                        use_safetensors=True,
                        local_files_only=True,
                    )
            except Exception as error:
                # Deliberately broad: for an unknown file, the converters may raise any exception.
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise DataError(f"diffusers cannot load it: {first}") from error
            modules: list[LoraModule] = []
            for part, network in self._pipe.components.items():
                for name, layer in network.named_modules() if isinstance(network, torch.nn.Module) else ():
                    if isinstance(layer, LoraLayer) and _SLOT in layer.lora_A:
                        factors: tuple[Any, Any] = layer.lora_A[_SLOT], layer.lora_B[_SLOT]
                        a, b = (factor.weight.flatten(1) for factor in factors)
                        modules.append(LoraModule(f"{part}.{name}", a, b * layer.scaling[_SLOT]))
            norm = dw_norm(Adapter(self.label, None, (), tuple(modules))) if modules else 0.0
            if norm == 0.0:
                raise DataError("diffusers found nothing to load in it")
            yield norm
        finally:
            self._pipe.unload_lora_weights()


def rmse(one: Pixels, other: Pixels) -> float:
    """Return the root mean square difference of two images (height, width, 3), with values scaled to 0 to 1."""
    difference = (one.astype(np.float64) - other) / 255
    return float(np.sqrt(np.mean(difference**2)))


def _diffusers() -> Any:
    import icmlora.io.quiet_bitsandbytes  # noqa: F401

    try:
        import diffusers
        import PIL  # noqa: F401
    except ImportError as error:
        hint = "install the extra: pip install 'icm-lora[diffusion]'"
        raise DataError("generating images needs diffusers, which is not installed", hint=hint) from error
    return diffusers


def _check_classes(found: FoundBase, diffusers: Any) -> None:
    """Raise `BaseModelUnsuited` if a pipeline would run code from outside diffusers and transformers."""
    hint = f"use a pipeline whose parts all come from {' and '.join(_LIBRARIES)}"
    index = json.loads((found.path / PIPELINE).read_bytes())
    made = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(made, type) and issubclass(made, diffusers.DiffusionPipeline)):
        fact = f"base model {found.label!r} cannot be run: diffusers has no pipeline {index.get('_class_name')!r}"
        raise BaseModelUnsuited(fact, path=found.path, hint=hint)
    for part, named in index.items():
        library = named[0] if isinstance(named, list) and named else None
        if library is None or library in _LIBRARIES:
            continue
        # Some classes belong to a pipeline's own module, such as the safety checker in `stable_diffusion`.
        is_own = isinstance(library, str) and hasattr(diffusers.pipelines, library)
        if not is_own or (found.path / part / f"{library}.py").exists():
            fact = f"base model {found.label!r} cannot be run: its part {part!r} comes from {library!r}"
            raise BaseModelUnsuited(fact, path=found.path, hint=hint)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence diffusers and transformers inside the block; this module checks for relevant problems itself."""
    libraries = (_diffusers().utils.logging, transformers_logging)
    levels = [logging.get_verbosity() for logging in libraries]
    bars = [logging for logging in libraries if logging.is_progress_bar_enabled()]
    for logging in libraries:
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # Argument names differ between the supported versions of diffusers, which warn about old ones.
            warnings.simplefilter("ignore")
            yield
    finally:
        for logging, level in zip(libraries, levels, strict=True):
            logging.set_verbosity(level)
        for logging in bars:
            logging.enable_progress_bar()
