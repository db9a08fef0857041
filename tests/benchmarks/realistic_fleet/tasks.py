"""The tasks of the realistic fleet: adapters as people train them, on three base models.

All linear layers, ranks 16 and 32, dropout, a cosine schedule, hundreds of steps, float32 files as PEFT writes them,
and a seed that nobody knows.
"""

from dataclasses import dataclass, field

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
GEMMA = "google/gemma-3-270m"
QWEN = "Qwen/Qwen2.5-Coder-1.5B-Instruct"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an adapter is trained on one base model."""

    name: str = field(kw_only=False)  # of its folder
    base_model: str
    rank: int
    steps: int
    learning_rate: float
    batch: int = 1  # examples in a step

    @property
    def alpha(self) -> int:
        """LoRA alpha: twice the rank, as most recipes have it."""
        return 2 * self.rank


@dataclass(frozen=True)
class RealisticTask(Recipe):
    """One adapter: its text domain and recipe; an example is a window of 256 tokens."""

    domain: str  # key of its text in `domain_fleet.domains.DOMAINS`


TASKS = (
    RealisticTask("python", "python", base_model=SMOLLM2, rank=16, steps=300, learning_rate=2e-4, batch=2),
    RealisticTask("gemma-german-quotes", "german-quotes", base_model=GEMMA, rank=16, steps=300, learning_rate=2e-4),
    RealisticTask("recipes-en", "recipes-en", base_model=SMOLLM2, rank=32, steps=300, learning_rate=2e-4, batch=2),
    RealisticTask("gemma-verilog", "verilog", base_model=GEMMA, rank=32, steps=300, learning_rate=2e-4),
    RealisticTask("chess-pgn", "chess-pgn", base_model=SMOLLM2, rank=16, steps=300, learning_rate=5e-4),
    RealisticTask("gemma-bible-kjv", "bible-kjv", base_model=GEMMA, rank=16, steps=300, learning_rate=2e-4),
    RealisticTask("german-quotes", "german-quotes", base_model=SMOLLM2, rank=32, steps=300, learning_rate=2e-4),
    RealisticTask("legal-licences", "legal-licences", base_model=SMOLLM2, rank=16, steps=300, learning_rate=2e-4),
    RealisticTask(
        "qwen-german-quotes", "german-quotes", base_model=QWEN, rank=16, steps=100, learning_rate=2e-4, batch=2
    ),
    RealisticTask("qwen-python", "python", base_model=QWEN, rank=16, steps=100, learning_rate=2e-4, batch=2),
    RealisticTask("qwen-chess-pgn", "chess-pgn", base_model=QWEN, rank=16, steps=100, learning_rate=2e-4, batch=2),
    RealisticTask("qwen-recipes-en", "recipes-en", base_model=QWEN, rank=16, steps=100, learning_rate=2e-4, batch=2),
)
"""In the order in which they are built, so that a stopped run leaves tasks of several base models."""
