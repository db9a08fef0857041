"""What a Hugging Face Trainer leaves beside adapters: folders of checkpoints and a note of the best one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from icmlora.errors import AdapterRefused
from icmlora.files import read_regular

STATE_NAME = "trainer_state.json"

# transformers' own pattern, with a bound on the digits.
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})", re.ASCII)
_BEST = re.compile(rb'"best_model_checkpoint"\s*:\s*("(?:[^"\\]|\\.)*")')
_MAX_STATE_BYTES = 64 * 1024 * 1024


def step_of(folder_name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for any other folder."""
    match = _CHECKPOINT.fullmatch(folder_name)
    return int(match[1]) if match else None


def best_step(state: Path) -> int | None:
    """Return the step of the best checkpoint that `trainer_state.json` notes, or None.

    The note is a path on the machine that trained, so only its last part counts. The file is searched, not parsed:
    trainers write NaN into it, which is no JSON.
    """
    try:
        match = _BEST.search(read_regular(state, max_bytes=_MAX_STATE_BYTES))
        noted = json.loads(match[1]) if match else ""
    except (AdapterRefused, ValueError):
        return None
    return step_of(noted.replace("\\", "/").rstrip("/").rpartition("/")[2])
