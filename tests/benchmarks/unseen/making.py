"""What `icm generate` makes of a task's samples in the studies of contexts, and what that took."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icmlora.base_models.examples.context import TaskContext
from icmlora.base_models.kinds.likelihood import Scored
from icmlora.base_models.modality import BaseModel
from icmlora.fewshot.context_choice import ContextScorer, choose_context
from icmlora.fewshot.start import FewShotStart
from icmlora.fleet.context import Context
from icmlora.fleet.few_shot.context_choice import usable_samples
from icmlora.fleet.few_shot.from_samples import Made, make_from
from icmlora.fleet.few_shot.generated import GenerateOptions
from tests.benchmarks.unseen.rows import RANK


@dataclass(frozen=True)
class Timed:
    """What was made, and in how many seconds."""

    made: Made
    seconds: float

    def note(self) -> dict[str, Any]:
        """Return time, length of the context, and what the guard measured and recommends."""
        context, guard = self.made.context, self.made.guard
        return {
            "seconds": self.seconds,
            "tokens": 0 if context is None else context.tokens,
            "guard": None if guard is None else asdict(guard) | {"recommended": guard.recommended},
        }


def made_of(
    lines: Sequence[str], samples: Sequence[Scored], base: BaseModel, start: FewShotStart, distil: int, tokens: int
) -> Timed:
    """Make an adapter and its context from lines of JSON, of which `samples` are the token ids."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        options = GenerateOptions(path, count=len(lines), distil=distil, rank=RANK, context_tokens=tokens)
        began = time.monotonic()
        made = make_from(Context(Path(folder)), base, start, options, path.read_bytes(), samples)
    return Timed(made, round(time.monotonic() - began, 1))


def context_of(lines: Sequence[str], prompted: ContextScorer, tokens: int) -> TaskContext:
    """Choose a context from lines of JSON for the base model alone, such as where `icm generate` keeps none."""
    data = "".join(f"{line}\n" for line in lines).encode()
    usable = usable_samples(prompted, data, None, len(lines))
    return choose_context(prompted, usable, tokens, total=len(usable)).context
