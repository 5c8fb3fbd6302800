"""A folder of .txt, .md, .jsonl and .jsonl.gz files, or of one .parquet file, as a stream of documents."""

import gzip
import hashlib
import zlib
from collections import Counter
from pathlib import Path

from nanochat.data.shards import list_shards, read_documents
from nanochat.errors import UserError
from nanochat.files import parse_json, sha256_of

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")
_PIECE_CHARS = 20_000  # longer text files are cut at a blank line into documents of about this size
_MAX_LINE_BYTES, _MAX_GZIP_RATIO = 1 << 26, 300  # of JSON lines: what is beyond is no text but an attack on memory
_RULES = "1"  # raise it when the documents change for the same files


def list_text_files(folder):
    """A folder's only parquet file, or its text files, sorted: those of subfolders too, hidden ones left out."""
    return list_shards(folder) or sorted(path for path in _visible_files(folder) if path.name.endswith(SUFFIXES))


def other_suffixes(folder):
    """The commonest suffixes of the folder's files in words, such as "12 .rst, 3 .html"; "" without files."""
    suffixes = Counter(path.suffix or "without suffix" for path in _visible_files(folder))
    return ", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common(3))


def folder_key(folder):
    """8 hex digits over the names and contents of the files: reads them all once."""
    listing = [f"{path.relative_to(folder).as_posix()} {sha256_of(path)}" for path in list_text_files(folder)]
    return hashlib.sha256("\n".join([_RULES, *listing]).encode()).hexdigest()[:8]


def expected_bytes(folder):
    """About how much text there is: file sizes, compressed ones counted threefold."""
    return sum(path.stat().st_size * (3 if path.suffix in (".gz", ".parquet") else 1)
               for path in list_text_files(folder))


def folder_documents(folder):
    """Yield the documents: one a row of .parquet or a line of .jsonl (its "text"), texts whole or cut at blank lines.

    Errors: UserError with file and line for what is not UTF-8, not JSON or has no "text".
    """
    for path in list_text_files(folder):
        if path.suffix == ".parquet":
            yield from read_documents(path)
        elif ".jsonl" in path.name:
            yield from _lines_of_json(path)
        else:
            yield from cut_text(_decode(path.read_bytes(), path))


def cut_text(text, piece_chars=_PIECE_CHARS):
    """Cut a text into pieces whose concatenation it is: each ends at the first blank line after `piece_chars`."""
    pieces, start = [], 0
    while len(text) - start > piece_chars:
        blank = text.find("\n\n", start + piece_chars)
        if blank < 0:
            break
        pieces.append(text[start:blank + 2])
        start = blank + 2
    return [*pieces, text[start:]] if start < len(text) else pieces


def _visible_files(folder):
    return (path for path in Path(folder).rglob("*") if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _lines_of_json(path):
    number = n_bytes = 0
    most = max(_MAX_LINE_BYTES, _MAX_GZIP_RATIO * path.stat().st_size)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number, n_bytes = number + 1, n_bytes + len(line)
                if len(line) > _MAX_LINE_BYTES or n_bytes > most:
                    raise UserError(f"{path}, line {number}: a line of more than {_MAX_LINE_BYTES >> 20} MiB, or a "
                                    f"file that unpacks to more than {_MAX_GZIP_RATIO} times its size; split it")
                if line.strip():
                    yield _text_of(line, path, number)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip after line {number} ({error}); replace the file") from None


def _text_of(line, path, number):
    try:
        value = parse_json(_decode(line, f"{path}, line {number}").encode())
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); mend or remove that line") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise UserError(f'{path}, line {number}: no string under "text"; every line must be like {{"text": "..."}}')
    return value["text"]


def _decode(data, where):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
