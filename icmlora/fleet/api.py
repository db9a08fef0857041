"""The public face of a fleet: one method per use case, each a call into the file of that name.

    fleet = Fleet("store", on_event=print)
    fleet.ingest(["loras"])
    fleet.train(device="cuda")
    fleet.materialize("dog-detection", "adapter")

A method imports what it needs when it is called, so that `import icmlora` and listing tasks never load torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context, Event, ignore

if TYPE_CHECKING:
    from icmlora.fleet.ingest import Conflict, IngestReport
    from icmlora.fleet.vectors import VectorReport


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

    def ingest(
        self,
        paths: Sequence[str | Path],
        *,
        name: str | None = None,
        samples: str | Path | None = None,
        texts: bool = True,
        skip_bad: bool = False,
        on_conflict: Conflict = "fail",
        restore: bool = False,
        dry_run: bool = False,
    ) -> IngestReport:
        """Take adapters into the store, which is created if necessary. Ingesting the same again changes nothing.

            report = fleet.ingest(["loras"])
            print(report.new, "new adapters,", report.known, "known")

        Args:
            paths: PEFT folders, training runs with checkpoint-N folders, or folders of those at any depth.
            name: Name for the task, if exactly one is found. By default a task is named after its folder.
            samples: Samples for the task as JSON lines, if exactly one is found. By default the `samples.jsonl` next
                to its adapter.
            texts: Also ingest the `samples.jsonl` and `eval.jsonl` found next to adapters.
            skip_bad: Report refused inputs and continue. By default the first one ends the ingest.
            on_conflict: If the store has a task of that name with another adapter: `skip`, `replace` or `fail`.
            restore: Bring evicted originals back. By default they stay evicted.
            dry_run: Check everything and report what would change, but write nothing.

        Returns:
            What was recorded and what was refused, task by task.

        Raises:
            AdapterRefused: An input was refused, nothing was found, or everything was refused.
            TaskConflict: A task has another adapter in the store and `on_conflict` is `fail`.
        """
        from icmlora.fleet.ingest import IngestRequest, ingest

        request = IngestRequest(
            paths=tuple(map(Path, paths)),
            name=name,
            samples=None if samples is None else Path(samples),
            texts=texts,
            skip_bad=skip_bad,
            on_conflict=on_conflict,
            restore=restore,
            dry_run=dry_run,
        )
        return ingest(self._context, request)

    def extract_vectors(self, tasks: Sequence[str] = (), *, device: str = "auto", again: bool = False) -> VectorReport:
        """Extract and store task vectors: the base model's hidden states on samples, with and without the adapter.

        Args:
            tasks: Names of tasks; all if empty.
            device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
            again: Also extract the vectors of tasks that already have some.

        Returns:
            Which tasks got vectors, and which did not.

        Raises:
            BaseModelNotFound: A base model is not on this machine. Tasks of the other base models are done first.
            BaseModelMismatch: An adapter does not fit its base model.
            DeviceUnavailable: The device does not exist.
        """
        from icmlora.fleet.vectors import VectorRequest, extract_vectors

        return extract_vectors(self._context, VectorRequest(tasks, device, again))

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
