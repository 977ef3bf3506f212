"""What a module's docstring is: short sentences, so that a reader sees what the file is for at the first reading."""

import ast
import re
from pathlib import Path

import pytest

import bln_train

PACKAGE = Path(bln_train.__file__).parent
MOST_WORDS = 25
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def sentences(docstring):
    """The sentences of a docstring; formulas, tables and listings, which are indented or have columns, are none."""
    prose = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        lines = [line for line in paragraph.splitlines() if not re.match(r"\s|\S.*\S {2,}\S", line)]
        prose += re.split(r"(?<=[.?!])\s+", " ".join(lines))
    return [sentence for sentence in prose if sentence.strip()]


def longest(path):
    """Words of the longest sentence of a file's docstring, and the sentence."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return max(((len(sentence.split()), sentence) for sentence in sentences(docstring)), default=(0, ""))


def test_a_long_sentence_is_found():
    text = f"Short one. {'word ' * 26}here.\n\n    formula = a b c d e\nname      what it is"
    assert [len(sentence.split()) for sentence in sentences(text)] == [2, 27]


@pytest.mark.parametrize("name", MODULES)
def test_no_sentence_is_long(name):
    words, sentence = longest(MODULES[name])
    assert words <= MOST_WORDS, f"{words} words: {sentence}"
