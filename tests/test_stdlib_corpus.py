"""The files of a Python installation that make the corpus, and how they are cut."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import stdlib_corpus
from nanochat.stdlib_corpus import corpus_documents, cut_code, topics

SENTENCE = "A sentence that is long enough to be a document of its own.\n"


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "library_folder", lambda: tmp_path)

    def add(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return add


def test_only_what_is_the_same_on_every_machine_is_read(library):
    for name in ("zlib.py", "a/b.py", "LICENSE.txt", "test/test_a.py",
                 "idlelib/idle_test/test_b.py"):
        library(name, f"# {name}\n" + SENTENCE)
    for name in ("site-packages/x.py", "dist-packages/x.py", "a/__pycache__/x.py",
                 "config-3.11-x/python-config.py", "_sysconfigdata__linux_.py", "sitecustomize.py",
                 "test/data.txt", "a/readme.rst", "encodings/cp1.py"):
        library(name, f"# {name}\n" + SENTENCE)
    found = [document.split("\n")[0].removeprefix("# ") for document in corpus_documents()]
    assert found == ["LICENSE.txt", "a/b.py", "zlib.py", "idlelib/idle_test/test_b.py",
                     "test/test_a.py"]


def test_files_that_are_not_utf8_and_tables_of_numbers_are_left_out(library):
    library("latin.py", b"# coding: latin-1\n# caf\xe9\n" + SENTENCE.encode())
    library("table.py", "TABLE = [" + "0x3f, 0x7f, " * 400 + "]\n")
    library("text.py", SENTENCE)
    assert list(corpus_documents()) == [SENTENCE]


def test_corpus_ends_at_its_size(library, monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "CORPUS_CHARS", 1000)
    for i in range(50):
        library(f"m{i:02d}.py", SENTENCE)
    assert 1000 - len(SENTENCE) < sum(map(len, corpus_documents())) <= 1000


def test_code_is_cut_at_definitions():
    body = "    x = x + 1\n" * 60 + "    return x\n"
    functions = [f"@cache\ndef f{i}(x):\n{body}" for i in range(40)]
    pieces = cut_code("import os\n\n\n" + "\n\n".join(functions))
    starts = ("import os", "@cache\ndef f")
    assert len(pieces) > 10 and all(piece.startswith(starts) for piece in pieces)
    assert all(800 <= len(piece) < 3_000 for piece in pieces)


def test_large_classes_are_cut_at_methods():
    methods = [f"    def m{i}(self):\n" + "        self.x = 1\n" * 30 for i in range(60)]
    pieces = cut_code("class Large:\n\n" + "\n".join(methods))
    assert len(pieces) > 10
    assert pieces[0].startswith("class Large:\n\n    def m0(self):\n        self")
    assert all(re.match(r"def m\d+\(self\):\n    self", piece) for piece in pieces[1:])


LINES = ["def f():\n", "    x = 1\n", "\n", "class A:\n", "    def g(self):\n", "@d\n", "# c\n",
         "    " + "y" * 700 + "\n", "z = 3\n", "text " * 300 + "\n"]


@given(st.lists(st.sampled_from(LINES)).map("".join))
def test_cutting_loses_nothing_but_blank_space(text):
    assert "".join("".join(cut_code(text)).split()) == "".join(text.split())


def test_topics_are_entries_of_the_dictionary():
    assert topics("topics = {'a': 'One.\\n', 'b': 'Two.'}\n") == ["One.\n", "Two."]
