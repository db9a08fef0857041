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

    rows: Callable[[Path], Rows]
    """Makes the rows, with a work folder for packages."""
    rank: int = 16
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
_SMALL: dict[str, tuple[Callable[[Path], Rows], int]] = {
    "part-of-speech": (_PART_OF_SPEECH, 200),
    "which-language": (_class_of("which-language", "Which language is this text in?", 80), 150),
    "syllogism": (_drawn("syllogism"), 150),
    "country-facts": (_countries, 150),
    "spam-or-ham": (_class_of("spam-or-ham", "Is this mail spam or ham?", 240), 150),
    "family-relationships": (_drawn("family_relationships"), 150),
    "which-disease": (_DISEASE, 150),
    "which-program": (_class_of("which-program", "Which language is this code in?"), 150),
    "number-filtering": (_drawn("number_filtering"), 150),
    "letter-counting": (_drawn("letter_counting"), 150),
    "gcd": (_drawn("gcd"), 150),
    "which-author": (_class_of("which-author", "Which author wrote this?"), 150),
}
"""Rows and steps of each."""
_LARGE = {"qwen-which-disease": _DISEASE, "qwen-part-of-speech": _PART_OF_SPEECH}

TASKS = (
    *(
        AnswerTask(name=name, base_model=SMOLLM2, rows=rows, steps=steps, learning_rate=5e-4)
        for name, (rows, steps) in _SMALL.items()
    ),
    *(
        AnswerTask(name=name, base_model=QWEN, rows=rows, steps=100, learning_rate=2e-4)
        for name, rows in _LARGE.items()
    ),
)
"""In the order in which they are trained."""
