"""Everything about one task. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from icm_cli.workflows.nearby import nearest_tasks
from icm_cli.workflows.opening import Place
from icmlora.errors import IcmLoraError
from icmlora.generator.code import Code, generator_of
from icmlora.generator.epochs import epochs_of
from icmlora.initial_a import InitialA
from icmlora.vector_space import Neighbour
from registry.errors import DamagedStore
from registry.records import (
    AdapterRecord,
    CodeRecord,
    EvaluationRecord,
    GeneratorRecord,
    TaskRecord,
    VectorRecord,
)

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class TaskDetails:
    """Everything that the store knows of a task.

    Attributes:
        adapters: Checkpoints by step, the final adapter last.
        nearest: The nearest tasks by their vectors, at most five; none without vectors, or with too few to compare.
        generator: The current generator of its base model, if there is one.
        code: Its code under that generator, if it has one.
        initial: Where the A that its training began with was drawn, if the code knows.
        evaluations: All measurements, latest of each kind.
    """

    task: TaskRecord
    adapters: tuple[AdapterRecord, ...]
    vectors: tuple[VectorRecord, ...]
    nearest: tuple[Neighbour, ...]
    generator: GeneratorRecord | None
    code: CodeRecord | None
    initial: InitialA | None
    evaluations: tuple[EvaluationRecord, ...]

    @property
    def final(self) -> AdapterRecord:
        """The adapter that stands for the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)


def describe_task(place: Place, name: str) -> TaskDetails:
    """Return everything about one task.

    Raises:
        TaskNotFound: There is no such task; the error names the closest ones.
    """
    with place.open(read_only=True) as store:
        task = store.task(name)
        generator = store.current_generator(task.base_model)
        code = None if generator is None else store.code(task.name, generator.id)
        vectors = tuple(store.vectors(task.name))
        return TaskDetails(
            task=task,
            adapters=tuple(store.adapters(task.name)),
            vectors=vectors,
            nearest=nearest_tasks(store, task) if vectors else (),
            generator=generator,
            code=code,
            initial=None if generator is None or code is None else _initial(store, generator, code),
            evaluations=tuple(store.evaluations(task.name)),
        )


def _initial(store: Store, generator: GeneratorRecord, code: CodeRecord) -> InitialA | None:
    """Read it from the code; where a file is damaged nothing is known, and `icm verify` says that it is damaged."""
    try:
        data, epochs = store.read_blob(code.blob), epochs_of(store.read_blob(generator.blob))
        config = next((epoch.config for epoch in epochs if epoch.digest == generator_of(data)), None)
        return None if config is None else Code.from_bytes(data, config).head.initial
    except (DamagedStore, IcmLoraError):
        return None
