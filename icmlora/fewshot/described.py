"""Generate a task's samples with the base model, from a description (Self-Instruct, arXiv 2212.10560).

sentence ──chat template, or a plain prompt──▶ base model ──▶ texts, sampled one token after the other
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from icmlora.base_models.examples.context import SEPARATOR, TaskContext
from icmlora.base_models.examples.prompts import Prompt
from icmlora.base_models.reading import given_prompts
from icmlora.errors import DataError

if TYPE_CHECKING:
    from icmlora.base_models.modality import BaseModel

_ASKED = "Write one example of the following. Write only the example itself, without a title or any comment.\n\n{about}"
_PLAIN = "{about}\n\nExample:\n"
_MIN_CHARACTERS = 24  # of a text with any content


def described_samples(base: BaseModel, about: str, count: int, tokens: int, *, seed: int = 0) -> list[str]:
    """Generate at most `count` different texts of at most `tokens` tokens with the base model.

    Raises:
        DataError: The base model writes nothing.
    """
    from icmlora.base_models.kinds.continuations import variants

    prompt = Prompt(_PLAIN.format(about=about.strip()))
    if getattr(base.tokenizer, "chat_template", None):
        asked = {"role": "user", "content": _ASKED.format(about=about.strip())}
        answered = {"role": "assistant", "content": "..."}  # shows where the answer begins
        (prompt,) = given_prompts(base, [{"messages": [asked, answered]}])
    written = variants(base, prompt, count, tokens, seed=seed)
    texts = [text for text in dict.fromkeys(text.strip() for text in written) if len(text) >= _MIN_CHARACTERS]
    if not texts:
        raise DataError(f"{base.label} wrote no text for this description", hint="add samples with --samples FILE")
    return texts


def described_context(about: str) -> TaskContext:
    """Return the description itself as a context: texts generated from it add nothing."""
    return TaskContext(f"{about.strip()}{SEPARATOR}", ({"role": "system", "content": about.strip()},))
