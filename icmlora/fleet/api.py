"""The public face of a fleet: one method per use case, each a call into the file of that name.

    fleet = Fleet("store", on_event=print)
    fleet.ingest(["loras"])
    fleet.train(device="cuda")
    fleet.materialize("dog-detection", "adapter")

A method imports what it needs when it is called, so that `import icmlora` and listing tasks never load torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from icmlora.fleet.context import Context, Event, ignore


class Fleet:
    """The tasks of a store, and everything that can be done with them.

    Args:
        path: The store folder.
        cache: Folder for what can be made again (base models converted from GGUF); `icm` inside the Hugging Face home
            by default.
        lock_timeout: Seconds to wait for another process.
        command: What this process does, as others see it when they have to wait.
        on_event: Called with a `Progress` after each unit of work, and with what each use case has to tell. To stop,
            raise `Cancelled` in it: what was finished is kept.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        cache: str | Path | None = None,
        lock_timeout: float = 30.0,
        command: str = "icm",
        on_event: Callable[[Event], None] = ignore,
    ) -> None:
        self._context = Context(
            Path(path), _default_cache() if cache is None else Path(cache), lock_timeout, command, on_event
        )

    @property
    def path(self) -> Path:
        """The store folder."""
        return self._context.path

    # ingest, vectors

    # materialize, bundles

    # train, update, few-shot starts, generators

    # generate

    # encode

    # evaluate

    # evict, pin

    # tasks: list, show, remove

    # base models

    # stats, map

    # verify, prune, doctor


def _default_cache() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "icm"
