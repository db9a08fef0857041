"""Turn a trained network into what the store answers with: one generator file and a code per task.

    network --file--> generator --encode--> code per task
                          `---- one transaction: generator + all codes ----> current

Until that transaction the store answers with the earlier generator, or with none.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from icm_cli.workflows.events import Event, Step, StopFlag
from icm_cli.workflows.store_fleet import StoreFleet
from icmlora.errors import GeneratorError
from icmlora.generator.codec import Codec
from icmlora.generator.generator_file import generator_from_bytes, generator_to_bytes
from icmlora.training.state import TrainState
from registry.records import Asked, GeneratorRecord, NewCode, NewGenerator, TrainRunRecord

if TYPE_CHECKING:
    from registry.store import Store


@dataclass(frozen=True)
class CodeMade(Event):
    """One task is encoded; it becomes current with all the others."""

    task: str
    size: int
    dw_error: float


@dataclass(frozen=True)
class Trained(Event):
    """A generator and its codes are current.

    `start_dropped` says that the generator before knew where adapters for unseen tasks start: its start is a code of
    that generator, so this one has none. `left_out` says which tasks have no code, and why: they keep their originals.
    """

    base_model: str
    version: int
    generator: str
    generator_size: int
    tasks: int
    codes_size: int
    metrics: dict[str, object]
    start_dropped: bool
    left_out: Mapping[str, str]


def publish(
    store: Store,
    fleet: StoreFleet,
    state: TrainState,
    run: TrainRunRecord,
    previous: GeneratorRecord | None,
    metrics: dict[str, object],
    stop: StopFlag,
) -> Generator[Event, None, Trained | None]:
    """Write the generator, encode every task under the file as it is read back, and make both current.

    Args:
        store: The open store.
        fleet: What was trained on.
        state: The trained network.
        run: The training run, which is done with this.
        previous: The generator that training started from.
        metrics: What training measured; stored with the generator.
        stop: Looked at between tasks.

    Returns:
        What became current, or None if the user stopped; then nothing is.

    Raises:
        GeneratorError: No task could be encoded.
    """
    started = time.monotonic()
    data = generator_to_bytes(state.net)
    blob = store.put_blob(data)
    codec = Codec(generator_from_bytes(data))
    codes: list[NewCode] = []
    known, left_out = 0, dict(fleet.left_out)
    for task, name in enumerate(fleet.names):
        if stop.requested:
            return None
        initial = fleet.initial(task)
        try:
            encoded = codec.encode(fleet.load(task, None), fleet.mean_vectors(task), initial)
        except GeneratorError as error:  # such as an adapter of numbers too small to be divided
            left_out[name] = str(error)
            continue
        known += initial is not None
        code = store.put_blob(encoded.data)
        size, asked = len(encoded.data), Asked(tolerance=codec.config.tolerance)
        codes.append(NewCode(fleet.final(task), code, 8.0 * size, encoded.dw_error, asked))
        yield CodeMade(name, len(encoded.data), encoded.dw_error)
        yield Step(task + 1, fleet.tasks(), f"encoding {name}")
    must_have_codes(codes, left_out)
    metrics = metrics | {"encode_seconds": round(time.monotonic() - started, 3), "initial_a_known": known}
    config = json.loads(state.net.config.to_json()) | {"train": asdict(state.config)}
    parent, before = None if previous is None else previous.id, store.current_generator(run.base_model)
    record = store.add_generator(NewGenerator(run.base_model, blob, config, metrics, parent, codes, run.id))
    sizes = [code.size for code in store.codes(record.id)]
    dropped = before is not None and before.start is not None
    return Trained(run.base_model, record.version, blob, len(data), len(sizes), sum(sizes), metrics, dropped, left_out)


def must_have_codes(codes: Sequence[object], left_out: Mapping[str, str]) -> None:
    """Raise if no task of some could be encoded.

    Raises:
        GeneratorError: There are tasks that were left out, and no code.
    """
    if left_out and not codes:
        name, reason = next(iter(left_out.items()))
        hint = "`icm rm` forgets a task; their originals are as they were"
        raise GeneratorError(f"no task could be encoded; {name!r}: {reason}", hint=hint)
