"""A folder of .txt, .md, .jsonl and .jsonl.gz files, or of one .parquet file, as a stream of documents."""

import gzip
import hashlib
import zlib
from collections import Counter
from pathlib import Path

import pyarrow as pa

from nanochat.bad_samples import BadSamples
from nanochat.common import UserError, parse_json, sha256_of
from nanochat.shards import list_shards, open_shard

SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz")
_PIECE_CHARS = 20_000  # longer text files are cut at a blank line into documents of about this size
_MAX_SAMPLE_BYTES, _MAX_GZIP_RATIO = 1 << 26, 300  # of lines and rows: what is beyond attacks memory
_TOO_LONG = f"longer than {_MAX_SAMPLE_BYTES >> 20} MiB"
_RULES = "2"  # raise it when the documents change for the same files


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
    return hashlib.sha256("\n".join([_RULES, *listing]).encode(errors="surrogateescape")).hexdigest()[:8]


def expected_bytes(folder):
    """About how much text there is: file sizes, compressed ones counted threefold."""
    return sum(path.stat().st_size * (3 if path.suffix in (".gz", ".parquet") else 1)
               for path in list_text_files(folder))


def folder_documents(folder, bad=None):
    """Yield the documents: one a row of .parquet or a line of .jsonl (its "text"), texts whole or cut at blank lines.

    Samples (rows, lines, text files) that are not UTF-8, not JSON, without "text", longer than 64 MiB or nothing but
    NUL characters are told to `bad` (BadSamples). Errors: UserError where they are too many, and for damaged gzip.
    """
    bad = bad or BadSamples()
    for path in list_text_files(folder):
        if path.suffix == ".parquet":
            samples, text_of, cut = _rows_of_parquet(path, bad), _decode, _whole
        elif ".jsonl" in path.name:
            samples, text_of, cut = _lines_of_json(path, bad), _text_of_line, _whole
        else:
            samples, text_of, cut = [(path, path.read_bytes())], _decode, cut_text
        for where, data in samples:
            try:
                text = text_of(data)
                if "\0" in text and not text.replace("\0", "").strip():
                    raise ValueError("nothing but NUL characters")
            except UnicodeDecodeError as error:
                bad.bad(where, f"not UTF-8 at byte {error.start}")
            except ValueError as error:
                bad.bad(where, error)
            else:
                bad.good()
                yield from cut(text)
    bad.settle()


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


def _lines_of_json(path, bad):
    """(place, bytes) of every line that is not blank."""
    number = n_bytes = 0
    most = max(_MAX_SAMPLE_BYTES, _MAX_GZIP_RATIO * path.stat().st_size)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            while line := file.readline(_MAX_SAMPLE_BYTES + 1):
                number, n_bytes, is_long = number + 1, n_bytes + len(line), len(line) > _MAX_SAMPLE_BYTES
                while is_long and line and not line.endswith(b"\n") and n_bytes <= most:
                    line = file.readline(_MAX_SAMPLE_BYTES)
                    n_bytes += len(line)
                if n_bytes > most:
                    raise UserError(f"{path}, line {number}: the file unpacks to more than {_MAX_GZIP_RATIO} times its "
                                    "size; replace it")
                if is_long:
                    bad.bad(f"{path}, line {number}", _TOO_LONG)
                elif line.strip():
                    yield f"{path}, line {number}", line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip after line {number} ({error}); replace the file") from None


def _rows_of_parquet(path, bad):
    """(place, bytes) of every row that is not null or blank; what cannot be read is bad up to its row group's end."""
    with open_shard(path) as file:
        end = 0
        for group in range(file.num_row_groups):
            row, end = end, end + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=["text"]):
                    for data in batch.column(0).cast(pa.large_binary()).to_pylist():
                        row += 1
                        if data and len(data) > _MAX_SAMPLE_BYTES:
                            bad.bad(f"{path}, row {row}", _TOO_LONG)
                        elif data and not data.isspace():
                            yield f"{path}, row {row}", data
            except (pa.ArrowException, OSError) as error:
                bad.bad(f"{path}, rows {row + 1} to {end}", f"damaged ({str(error).splitlines()[0]})", end - row)


def _text_of_line(line):
    """The text of a line of JSON. Errors: ValueError that says what is wrong."""
    text = _decode(line)
    try:
        value = parse_json(text.encode())
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError('no string under "text"; every line must be like {"text": "..."}')
    return value["text"]


def _decode(data):
    return data.decode("utf-8-sig")


def _whole(text):
    return [text]
