"""Call the model loaders of transformers without their progress bars, and turn whatever they raise into one error."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from transformers.utils import logging as transformers_logging

from icmlora.base_models.lookup import FoundBase
from icmlora.errors import BaseModelNotFound


@contextmanager
def quiet_loading(found: FoundBase, kind: str = "causal language model") -> Iterator[None]:
    """Load in the block without progress bars of the library; turn its many exceptions into `BaseModelNotFound`."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        # The GGUF reader draws its own bar on stderr whatever the library's setting is.
        with redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        # Deliberately broad: for a damaged file the loaders raise whatever their parsing runs into.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelNotFound(
            f"base model {found.label!r} cannot be loaded as a {kind}: {first}",
            path=found.path,
            hint="the folder must be a complete text model that transformers knows, with its tokenizer",
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
