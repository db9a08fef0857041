"""The tasks of the domain fleet: which text domain, which LoRA recipe, and what may not be told apart in a study.

The first twelve are a fleet of their own: every rank, both target sets, four seeds, three languages, code, maths,
markup, literature, reference works and data.
"""

from dataclasses import dataclass

from tests.benchmarks.example_fleet.tasks import QKVO, Schedule, Task

SCHEDULE = Schedule(steps=80, batch=2, length=128, learning_rate=2e-3, warmup=5)
"""Of every task; about 20,000 tokens, a minute or two on one CPU thread."""

GROUPS = ("language", "code", "maths", "markup", "literature", "reference", "data")


@dataclass(frozen=True, kw_only=True)
class DomainTask(Task):
    """A task, and where its text belongs."""

    group: str
    """One of GROUPS: what kind of text it is."""
    family: str
    """Near-duplicates share it: a study that leaves tasks out leaves out whole families, or it measures memory."""


TASKS = (
    DomainTask("polish-quotes", rank=8, group="language", family="polish"),
    DomainTask("erlang", rank=16, seed=7, group="code", family="erlang"),
    DomainTask("svg-icons", rank=4, group="markup", family="svg"),
    DomainTask("japanese-man", rank=8, seed=1002, targets=QKVO, group="language", family="japanese"),
    DomainTask("melville", rank=8, group="literature", family="novels"),
    DomainTask("genbank", rank=8, seed=7, targets=QKVO, group="data", family="genbank"),
    DomainTask("kotlin", rank=4, seed=1002, group="code", family="kotlin"),
    DomainTask("french-man", rank=16, group="language", family="french"),
    DomainTask("icd10-codes", rank=8, seed=1003, group="reference", family="icd10"),
    DomainTask("coq", rank=16, targets=QKVO, group="maths", family="coq"),
    DomainTask("jargon-file", rank=4, rslora=True, group="reference", family="computing"),
    DomainTask("go", rank=8, group="code", family="go"),
    DomainTask("arabic-quran", rank=8, seed=7, group="language", family="arabic"),
    DomainTask("latex-stats", rank=8, group="maths", family="tex"),
    DomainTask("shakespeare", rank=8, seed=1002, group="literature", family="early-modern"),
    DomainTask("verilog", rank=4, targets=QKVO, group="code", family="verilog"),
    DomainTask("german-quotes", rank=8, group="language", family="german"),
    DomainTask("chess-pgn", rank=8, targets=QKVO, group="data", family="chess"),
    DomainTask("legal-licences", rank=16, group="reference", family="licences"),
    DomainTask("javascript", rank=8, seed=7, group="code", family="javascript"),
    DomainTask("russian-man", rank=8, group="language", family="russian"),
    DomainTask("music-abc", rank=8, seed=1003, group="data", family="abc"),
    DomainTask("recipes-en", rank=4, group="reference", family="recipes"),
    DomainTask("prolog", rank=8, seed=1002, group="code", family="prolog"),
    DomainTask("turkish-man", rank=4, seed=7, group="language", family="turkish"),
    DomainTask("html", rank=8, group="markup", family="html"),
    DomainTask("austen", rank=8, targets=QKVO, group="literature", family="novels"),
    DomainTask("emacs-lisp", rank=8, group="code", family="lisp"),
    DomainTask("chinese-quotes", rank=16, seed=1002, rslora=True, group="language", family="chinese"),
    DomainTask("metamath", rank=8, group="maths", family="metamath"),
    DomainTask("wikipedia-en", rank=8, group="reference", family="encyclopedia"),
    DomainTask("ruby", rank=4, group="code", family="ruby"),
    DomainTask("spanish-man", rank=8, group="language", family="spanish"),
    DomainTask("unicode-names", rank=8, seed=7, group="data", family="unicode"),
    DomainTask("bible-kjv", rank=8, group="literature", family="early-modern"),
    DomainTask("bash", rank=8, group="code", family="shell"),
    DomainTask("italian-quotes", rank=4, group="language", family="italian"),
    DomainTask("lilypond", rank=8, seed=1002, group="markup", family="lilypond"),
    DomainTask("wordnet-gloss", rank=8, group="reference", family="dictionary"),
    DomainTask("cpp", rank=16, group="code", family="c"),
    DomainTask("german-man", rank=8, targets=QKVO, group="language", family="german"),
    DomainTask("tex-number-theory", rank=4, seed=7, group="maths", family="tex"),
    DomainTask("rust", rank=8, group="code", family="rust"),
    DomainTask("czech-quotes", rank=8, seed=1003, group="language", family="czech"),
    DomainTask("xslt", rank=8, group="markup", family="xslt"),
    DomainTask("milton-verse", rank=16, seed=7, group="literature", family="early-modern"),
    DomainTask("python", rank=8, targets=QKVO, group="code", family="python"),
    DomainTask("spanish-quotes", rank=16, group="language", family="spanish"),
    DomainTask("foldoc", rank=8, seed=7, group="reference", family="computing"),
    DomainTask("romanian-man", rank=8, seed=1002, group="language", family="romanian"),
    DomainTask("russian-quotes", rank=4, group="language", family="russian"),
    DomainTask("gcide", rank=8, group="reference", family="dictionary"),
)
