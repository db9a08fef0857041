"""The line that this project was asked for: `icm train --device cuda`."""

from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import Ran


def test_the_first_training_step_which_ended_in_an_error_about_bfloat16_on_every_card_is_made(
    icm: Callable[..., Ran], mixed: Path
) -> None:
    ran = icm("train", "--device", "cuda", "--steps", 1, "--no-eval", "--refine", 0)
    assert "BFloat16" not in ran.err  # index_add_(): self (BFloat16) and source (Float) must have the same scalar type
    assert ran.code == 0, ran.err
