"""Texts are cut into documents as promised, and no document is both trained on and held out."""

import json
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, strategies as st
from transformers import PreTrainedTokenizerFast

from tests.benchmarks.domain_fleet.cutting import dictionary, entries, gathered, manual, quotations, without_heads
from tests.benchmarks.domain_fleet.pieces import HELD_OUT, PIECE, SAMPLES, separate, take
from tests.benchmarks.domain_fleet.rdata import strings
from tests.benchmarks.domain_fleet.roff import plain
from tests.benchmarks.domain_fleet.wiki import articles
from tests.icmlora.tiny_base import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def numbered(count: int, words: int = 60) -> list[str]:
    return [f"document {i}: " + f"word{i} " * words for i in range(count)]


@given(st.lists(st.text("ab \n", max_size=40)), st.integers(1, 100))
def test_gathering_loses_no_entry_and_keeps_their_order(texts: list[str], size: int) -> None:
    kept = [text.strip("\n") for text in texts if text.strip()]
    assert "|".join(gathered(texts, "|", size)) == "|".join(kept)


def test_gathered_documents_reach_their_size() -> None:
    documents = gathered(["x" * 30] * 10, size=100)
    assert [len(document) >= 100 for document in documents] == [True, True, False]


def test_lines_that_many_files_share_are_dropped_from_their_beginnings() -> None:
    files = [f"# Copyright {year}\n# Free software\n\ncode = {year}\n# Free software\n" for year in range(10)]
    assert without_heads(files)[3] == "code = 3\n# Free software"


def test_a_first_line_of_its_own_is_kept() -> None:
    assert without_heads(["import os\n# Copyright of nobody", "import re"]) == [
        "import os\n# Copyright of nobody",
        "import re",
    ]


def test_quotations_are_read_without_colours_indexes_and_second_encodings(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/games/fortunes"
    folder.mkdir(parents=True)
    (folder / "wise").write_text("\x1b[1mOne\x1b[0m.\n%\nTwo.\n%\n", "utf-8")
    (folder / "wise.dat").write_bytes(b"\x00\x01")
    (folder / "wise-u8").write_text("One again.\n", "utf-8")
    assert quotations(tmp_path) == ["One.\n\nTwo."]


def test_entries_begin_where_the_pattern_is() -> None:
    text = "".join(f"X: {i}\nK: C\n{'abc ' * 600}\n" for i in range(3))
    assert [document[:4] for document in entries([text], r"X:")] == ["X: 0", "X: 1", "X: 2"]


def test_a_dictionary_is_cut_at_headwords(tmp_path: Path) -> None:
    (tmp_path / "d.dict").write_text("".join(f"word{i}\n   {'a meaning ' * 250}\n" for i in range(3)), "utf-8")
    assert [document.split("\n")[0] for document in dictionary(tmp_path / "d.dict")] == ["word0", "word1", "word2"]


def test_a_manual_page_becomes_plain_text() -> None:
    source = '.\\" a comment\n.SH NAME\n.B ls\n\\- list \\fIfiles\\fP\n.TP\n.BR \\-a ", all"\nit\\(aqs \\e\n'
    assert plain(source) == "\nNAME\nls\n- list files\n\n-a,all\nit's \\\n"


def test_only_manual_pages_of_the_language_are_read(tmp_path: Path) -> None:
    for language in ("de", "fr"):
        folder = tmp_path / "usr/share/man" / language / "man1"
        folder.mkdir(parents=True)
        (folder / "ls.1").write_text(f".SH {language}\n", "utf-8")
    assert manual(tmp_path, "fr") == ["\nfr\n"]


def test_strings_are_read_from_an_r_database() -> None:
    serialised = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(text)) + text for text in (b"It is", b"a truth"))
    stream = zlib.compress(b"X\n" + serialised)
    database = struct.pack(">i", len(stream)) + stream
    assert strings(database + database) == [["It is", "a truth"]] * 2


def test_an_article_loses_its_markup() -> None:
    markup = (
        "{{Infobox {{nested}} x}}'''Ale''' is a [[beer|drink]]<ref>1</ref>.[[File:a.png|a [[b]] c]] " + "Ale. " * 500
    )
    dump = f"<page><title>Ale</title><text bytes='9'>{markup}</text></page><title>Mild</title><text>#REDIRECT</text>"
    (article,) = articles(dump)
    assert article.startswith("Ale\nAle is a drink. Ale. Ale.")


def test_no_document_is_in_both_parts() -> None:
    documents = numbered(64)
    train, held_out = separate(documents)
    assert sorted(train + held_out) == sorted(document.strip() for document in documents)
    assert not set(train) & set(held_out)


def test_held_out_documents_that_repeat_the_training_text_are_left_out() -> None:
    shared = "".join(f"a long line number {i} that every document has\n" for i in range(9))
    assert separate([f"{shared}and a long last line of its own, which is {i}" for i in range(32)])[1] == []


def test_samples_come_from_the_training_text_and_held_out_pieces_do_not(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = take(numbered(160), tokenizer)
    text = tokenizer.decode(pieces.tokens)
    assert (len(pieces.samples), len(pieces.held_out)) == (SAMPLES, HELD_OUT)
    assert all(sample in text for sample in pieces.samples)
    assert not any(piece in text for piece in pieces.held_out)


def test_pieces_have_their_number_of_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = take(numbered(160), tokenizer)
    assert {len(tokenizer(text).input_ids) for text in pieces.samples + pieces.held_out} == {PIECE}


def test_each_held_out_piece_is_of_another_document_if_there_are_enough(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = take(numbered(160), tokenizer)
    assert len({piece.split()[1] for piece in pieces.held_out}) == HELD_OUT


def test_few_documents_give_several_held_out_pieces_each(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = take(numbered(24, words=400), tokenizer)
    assert len(pieces.held_out) == HELD_OUT


def test_pieces_are_written_a_line_each(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pieces = take(numbered(160), tokenizer)
    pieces.write(tmp_path)
    lines = (tmp_path / "eval.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == pieces.held_out
