"""The standard library of the running Python as a corpus: about 30 MB without a download.

Its modules come first, then the language reference of `help()`, then as many of the library's tests
as fit. Source code is cut into documents of a few definitions. Nothing that depends on the machine
is read: no installed packages, no build configuration.
"""

import ast
import os
import re
import sysconfig
import textwrap
from pathlib import Path

CORPUS_CHARS = 30_000_000
_TOPICS = "pydoc_data/topics.py"
_OTHER_FOLDERS = re.compile(r"site-packages|dist-packages|lib-dynload|__pycache__|config-.*"
                            r"|encodings")  # tables of character codes
_OTHER_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|(site|user)customize\.py")
_TEST_FOLDERS = {"test", "tests", "idle_test"}
RULES = 1  # raise it when the same files give other documents
# The start of a definition with its comments and decorators, after a blank line
_BLOCK = re.compile(r"\n(?=\n(?:[@#]|def |class |async def |if __name__|\w+ *=))")
_METHOD = re.compile(r"\n(?=\n    (?:[@#]|def |class |async def ))")
_MIN_CHARS, _MAX_CHARS = 800, 3_000


def corpus_documents():
    """Yield the documents in a fixed order, about `CORPUS_CHARS` characters in all."""
    root = library_folder()
    n_chars = 0
    for path in _files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few of the library's tests have another encoding
            continue
        is_topics = path.relative_to(root).as_posix() == _TOPICS
        for document in topics(text) if is_topics else cut_code(text):
            letters = sum(map(str.isalpha, document)) + document.count(" ")
            if letters <= 0.6 * len(document):  # a table of numbers, escapes or symbols
                continue
            if n_chars + len(document) > CORPUS_CHARS:
                return
            n_chars += len(document)
            yield document


def library_folder():
    return Path(sysconfig.get_path("stdlib"))


def cut_code(text):
    """Return pieces of source code, cut at definitions, of 800 to about 3,000 characters.

    Methods that are cut out of a large class lose their indentation.
    """
    pieces, current = [], ""
    for block in _BLOCK.split(text):
        for part in _METHOD.split(block) if len(block) > _MAX_CHARS else [block]:
            current = f"{current}\n{part}" if current else part
            if len(current) >= _MIN_CHARS:
                pieces.append(current)
                current = ""
    if len(current) < _MIN_CHARS / 4 and pieces:  # too short for a document
        pieces[-1] += "\n" + current
    else:
        pieces.append(current)
    pieces = [piece.strip("\n") + "\n" for piece in pieces if piece.strip()]
    return [textwrap.dedent(piece) if piece.startswith(" ") else piece for piece in pieces]


def topics(text):
    """Return the entries of pydoc_data/topics.py, which assigns a dictionary literal."""
    [assignment] = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return list(ast.literal_eval(assignment.value).values())


def _files(root):
    """Return the modules and texts, sorted, and then the library's tests."""
    modules, tests = [], []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _OTHER_FOLDERS.fullmatch(name)]
        is_test = bool(_TEST_FOLDERS & set(Path(folder).relative_to(root).parts))
        suffixes = ".py" if is_test else (".py", ".txt")
        paths = [Path(folder, name) for name in names
                 if name.endswith(suffixes) and not _OTHER_FILES.fullmatch(name)]
        (tests if is_test else modules).extend(paths)
    return sorted(modules) + sorted(tests)
