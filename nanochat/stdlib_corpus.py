"""A corpus that needs no download: the running Python's standard library, cut into documents of a few definitions.

About 30 MB: modules first, then the language reference that `help()` shows, then as many of the library's own
tests as fit. Nothing machine-dependent is read: no installed packages, no build configuration.
"""

import ast
import hashlib
import os
import platform
import re
import sysconfig
import textwrap
from pathlib import Path

from nanochat.common import UserError

CORPUS_CHARS = 30_000_000
_TOPICS = "pydoc_data/topics.py"
_LEFT_OUT_FOLDERS = re.compile(r"site-packages|dist-packages|lib-dynload|__pycache__|config-.*"
                               r"|encodings")  # tables of character codes
_LEFT_OUT_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|sitecustomize\.py|usercustomize\.py")
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_RULES = "1"  # raise it when the documents change for the same files
# Where a definition begins, with its comments and decorators: after a blank line, at the margin or in a class.
_BLOCK = re.compile(r"\n(?=\n(?:[@#]|def |class |async def |if __name__|\w+ *=))")
_METHOD = re.compile(r"\n(?=\n    (?:[@#]|def |class |async def ))")
_MIN_CHARS, _MAX_CHARS = 800, 3_000


def corpus_name():
    return f"stdlib-{platform.python_version()}"


def corpus_key():
    """8 hex digits that differ whenever this installation's files (names and sizes) or our rules do."""
    root = library_folder()
    listing = [f"{path.relative_to(root).as_posix()} {path.stat().st_size}" for path in _files(root)]
    return hashlib.sha256("\n".join([_RULES, *listing]).encode()).hexdigest()[:8]


def corpus_documents():
    """Yield the documents, about `CORPUS_CHARS` characters in all, in a fixed order."""
    root, chars = library_folder(), 0
    for path in _files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few of the library's tests are in other encodings on purpose
            continue
        is_topics = path.relative_to(root).as_posix() == _TOPICS
        for document in topics(text) if is_topics else cut_code(text):
            if not _readable(document):
                continue
            if chars + len(document) > CORPUS_CHARS:
                return
            chars += len(document)
            yield document
    if chars == 0:
        raise UserError(f"this Python's library ({root}) holds no source code; use another --dataset, "
                        "or a Python that came with its .py files")


def library_folder():
    return Path(sysconfig.get_paths()["stdlib"])


def cut_code(text):
    """Cut source code at definitions: pieces of 800 to about 3,000 characters, definitions whole where they fit.

    Methods cut out of a large class are moved to the left margin.
    """
    pieces, current = [], ""
    for block in _BLOCK.split(text):
        for part in _METHOD.split(block) if len(block) > _MAX_CHARS else [block]:
            current = f"{current}\n{part}" if current else part
            if len(current) >= _MIN_CHARS:
                pieces.append(current)
                current = ""
    if len(current) < _MIN_CHARS / 4 and pieces:  # the tail of a module rarely stands alone
        pieces[-1] += "\n" + current
    else:
        pieces.append(current)
    pieces = [piece.strip("\n") + "\n" for piece in pieces if piece.strip()]
    return [textwrap.dedent(piece) if piece.startswith(" ") else piece for piece in pieces]


def topics(text):
    """The entries of the language reference in pydoc_data/topics.py; [] when it is not a dictionary literal."""
    try:
        values = [ast.literal_eval(node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    except (SyntaxError, ValueError):
        return []
    return [entry for value in values if isinstance(value, dict) for entry in value.values() if isinstance(entry, str)]


def _files(root):
    """Sorted: modules and texts first, the library's tests after them."""
    modules, tests = [], []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _LEFT_OUT_FOLDERS.fullmatch(name)]
        is_test = bool(_TEST_FOLDERS & set(Path(folder).relative_to(root).parts))
        for name in names:
            if name.endswith(".py" if is_test else (".py", ".txt")) and not _LEFT_OUT_FILES.fullmatch(name):
                (tests if is_test else modules).append(Path(folder, name))
    return sorted(modules) + sorted(tests)


def _readable(document):
    """True for prose and code, False for tables of numbers, escapes or symbols."""
    letters = sum(map(str.isalpha, document))
    return letters + document.count(" ") > 0.6 * len(document)
