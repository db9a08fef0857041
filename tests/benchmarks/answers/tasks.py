"""The tasks with exact answers: what is asked, where the rows come from, and how each adapter is trained.

Texts come from Debian, PyPI and npm packages, as those of the classification study; as there, they stay in the work
folder. Arithmetic and logic are drawn by reasoning-gym (PyPI, Apache-2.0), which is no dependency of the project: pip
installs it with what it needs into the work folder, and a child process with that folder on its path draws the rows.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.answers.rows import Row, Rows, classified, divided
from tests.benchmarks.classification.tasks import TASKS as CLASSIFIERS
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.texts import files
from tests.benchmarks.realistic_fleet.tasks import QWEN, SMOLLM2, Recipe

REASONING_GYM = "reasoning-gym==0.1.25"
_DRAWN = 4000
_DRAW = """import json, sys, reasoning_gym
rows = reasoning_gym.create_dataset(sys.argv[1], size=int(sys.argv[2]), seed=1234)
print(json.dumps([[row["question"], str(row["answer"])] for row in rows if row["answer"] is not None]))
"""
_COUNTRY = {
    "capital": "What is the capital of {}?",
    "region": "On which continent is {}?",
    "demonym": "What are people from {} called?",
    "subregion": "In which subregion is {}?",
    "currencies": "What is the currency code of {}?",
    "callingCodes": "What is the calling code of {}?",
    "tld": "What is the internet domain of {}?",
}


@dataclass(frozen=True, kw_only=True)
class AnswerTask(Recipe):
    """One adapter: its rows and its recipe; an example is a chat of one question and its answer."""

    name: str
    rows: Callable[[Path], Rows]
    """Makes the rows, with a work folder for packages."""
    rank: int = 16
    steps: int = 150
    learning_rate: float = 5e-4
    batch: int = 4


def _class_of(classifier: str, question: str, characters: int = 160) -> Callable[[Path], Rows]:
    """Pieces of the texts of a task of the classification study, with a question."""
    (documents,) = (task.documents for task in CLASSIFIERS if task.name == classifier)
    return lambda work: classified(documents(Packages(work)), question, characters)


def _countries(work: Path) -> Rows:
    rows = []
    for text in files(Packages(work).unpacked("pypi:countryinfo==1.0.1"), r"countryinfo/data/.*\.json$"):
        facts = json.loads(text)
        for key, question in _COUNTRY.items():
            fact = facts.get(key)
            answer = fact[0] if isinstance(fact, list) and fact else fact
            if facts.get("name") and answer:
                rows.append(Row(question.format(facts["name"]), str(answer)))
    return divided(rows)


def _drawn(generator: str) -> Callable[[Path], Rows]:
    """Rows that a generator of reasoning-gym draws."""

    def rows(work: Path) -> Rows:
        path = {"PYTHONPATH": str(_reasoning_gym(work)), "PYTHONHASHSEED": "0"}
        command = [sys.executable, "-c", _DRAW, generator, str(_DRAWN)]
        drawn = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | path, text=True, check=True).stdout
        return divided(Row(question.strip(), answer.strip()) for question, answer in json.loads(drawn))

    return rows


def _reasoning_gym(work: Path) -> Path:
    folder = work / "reasoning-gym"
    if not folder.exists():
        part = work / ".reasoning-gym.part"
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--target", part, REASONING_GYM], check=True)
        part.rename(folder)
    return folder


_DISEASE = _class_of("which-disease", "With which letter does the ICD-10 code begin?")
_PART_OF_SPEECH = _class_of("part-of-speech", "Which part of speech is defined here: noun, verb, adj or adv?")
_SMALL: dict[str, Callable[[Path], Rows]] = {
    "part-of-speech": _PART_OF_SPEECH,
    "which-language": _class_of("which-language", "Which language is this text in?", 80),
    "syllogism": _drawn("syllogism"),
    "country-facts": _countries,
    "spam-or-ham": _class_of("spam-or-ham", "Is this mail spam or ham?", 240),
    "family-relationships": _drawn("family_relationships"),
    "which-disease": _DISEASE,
    "which-program": _class_of("which-program", "Which language is this code in?"),
    "number-filtering": _drawn("number_filtering"),
    "letter-counting": _drawn("letter_counting"),
    "gcd": _drawn("gcd"),
    "which-author": _class_of("which-author", "Which author wrote this?"),
}
_LARGE = {"qwen-which-disease": _DISEASE, "qwen-part-of-speech": _PART_OF_SPEECH}

TASKS = (
    *(AnswerTask(name=name, base_model=SMOLLM2, rows=rows) for name, rows in _SMALL.items()),
    *(
        AnswerTask(name=name, base_model=QWEN, rows=rows, steps=100, learning_rate=2e-4)
        for name, rows in _LARGE.items()
    ),
)
"""In the order in which they are trained."""
