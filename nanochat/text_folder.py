"""A folder of text: the split of each file, and the documents in it.

Text files (.txt, .text, .md, .markdown, .rst), JSON lines (.jsonl, .ndjson), .json and .parquet are
read, in subfolders and through links, also as .gz, .bz2, .zst or .lz4. Every other file is counted
as left out. Line ends become LF. Separator tokens of corpora end a document and are not text;
`</s>` is text, because it is also an HTML tag. Long texts are cut into pieces.
"""

import codecs
import contextlib
import io
import json
import os
import re
from collections import Counter, namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, base_dir
from nanochat.tokenizer import SPECIAL_TOKENS

SKIP_BAD = 0.001  # one unusable sample in a thousand costs no training
KINDS = {".txt": "text", ".text": "text", ".md": "text", ".markdown": "text", ".rst": "text",
         ".jsonl": "line", ".ndjson": "line", ".json": "value", ".parquet": "row"}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test",
               **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"),
                               "validation")}
SEPARATORS = ("<|endoftext|>", "<|startoftext|>", "<|begin_of_text|>", "<|end_of_text|>",
              *SPECIAL_TOKENS)

_SEPARATOR = re.compile(rf"\n*(?:{'|'.join(map(re.escape, SEPARATORS))})\n*")
_CUTS = (  # where to cut a text, the best place first
    re.compile(r"\n[^\S\n]*\n+"),  # blank line
    re.compile("[\n\v\f\x1c-\x1e\x85\u2028\u2029]"),  # line end
    re.compile(r"[.!?]['\")\]’”]*\s|[。！？]"),  # sentence end
    re.compile(r"\s"),
)
_PIECE_CHARS = 20_000
_MIN_PIECE_CHARS = 1_000
_BLOCK_CHARS = 1 << 20
_MAX_SAMPLE_CHARS = 1 << 26
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before its beginning,
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # which is that of UTF-16
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view",
               "null")

# name: path relative to the folder; split: "" if no name gives one
TextFile = namedtuple("TextFile", "path name n_bytes kind compression split")


class TextFolder:
    """The files below a folder: those to read, by name, and a count of the others per reason."""

    def __init__(self, folder):
        self.files = []
        self.left_out = Counter()
        self.left_out_bytes = 0
        read = set()  # resolved paths: a link to a file that is read already would double its text
        links_last = sorted(_walk(Path(folder)), key=lambda item: item[0].is_symlink()
                            or item[0].parent.resolve() != item[0].parent.absolute())
        for path, problem in links_last:
            name = path.relative_to(folder).as_posix()
            n_bytes = path.stat().st_size if path.is_file() else 0
            stem, suffix = os.path.splitext(name)
            compression = COMPRESSIONS.get(suffix.lower())
            if compression:
                stem, inner = os.path.splitext(stem)
                suffix = inner + suffix
            kind = KINDS.get((inner if compression else suffix).lower())
            if "/." in f"/{name}":
                problem = "hidden"
            elif not problem and (kind is None or (kind == "row" and compression)):
                problem = suffix.lower() or "without suffix"
            elif not problem and path.resolve() in read:
                problem = "link to a file in the folder"
            if problem:
                self.leave_out(problem, n_bytes)
            else:
                read.add(path.resolve())
                split = named_split(stem)
                self.files.append(TextFile(path, name, n_bytes, kind, compression, split))
        self.files.sort(key=lambda file: file.name)

    @property
    def expected_bytes(self):
        """Return the approximate size of the text, about three times that of a compressed file."""
        return sum(file.n_bytes * (3 if file.compression or file.kind == "row" else 1)
                   for file in self.files)

    def split(self, name):
        """Return the files of a split. Files without the name of a split are for training."""
        return [file for file in self.files if (file.split or "train") == name]

    def leave_out(self, problem, n_bytes):
        self.left_out[problem] += 1
        self.left_out_bytes += n_bytes

    def left_out_lines(self):
        """Return a line that counts the files that are not read, if there are any."""
        if not self.left_out:
            return []
        counts = ", ".join(f"{n:,} {problem}" for problem, n in self.left_out.most_common())
        n_bytes = self.left_out_bytes
        share = n_bytes / max(1, n_bytes + sum(file.n_bytes for file in self.files))
        return [f"left out: {counts} ({n_bytes / 1e6:.1f} MB, {share:.0%} of the folder)"]


class Samples:
    """A count of samples (lines, rows, documents of text files) and of unusable samples.

    share: largest share that may be unusable.
    """

    def __init__(self, share=SKIP_BAD):
        self.share = share
        self.n = self.n_bad = 0
        self.named = []
        self.textless = []  # (problem, size) of files without any text

    def bad(self, where, problem):
        """Count an unusable sample. Raise UserError if they are at least 100 and half of all."""
        self.n += 1
        self.n_bad += 1
        if len(self.named) < 3:
            self.named.append(f"{where}: {problem}")
        if self.n_bad >= 100 and 2 * self.n_bad > self.n:
            self.check()

    def check(self):
        """Raise UserError if too many samples are unusable."""
        if self.n_bad > self.share * self.n:
            raise UserError(f"{self.summary()}; the limit is a share of {self.share:g}: correct or "
                            "remove them, or run python -m nanochat.dataset with --skip-bad SHARE")

    def summary(self):
        return f"{self.n_bad:,} of {self.n:,} samples are unusable: {'; '.join(self.named)}"


def _walk(folder):
    """Yield (path, problem) per file below a folder; problem: "" if the file can be read."""
    pending = [(folder, (base_dir().resolve(),))]
    while pending:
        current, parents = pending.pop()
        parents = (*parents, current.resolve())
        for path in current.iterdir():
            if path.is_dir() and path.resolve() not in parents:
                pending.append((path, parents))
            elif path.is_dir():
                yield path, "parent or cache folder"
            elif path.is_file():
                yield path, ""
            else:
                yield path, "broken link" if path.is_symlink() else "special file"


def named_split(name):
    """Return the split that a path without suffix names, or "".

    The split is the first or last word of the file's name, else of a folder's. Digits, "of" and
    "part" are no words: train-00000-of-00003, wiki.valid, split=test/part-1.
    """
    for part in reversed(name.lower().split("/")):
        words = [word for word in re.split(r"[\W\d_]+", part) if word not in ("", "of", "part")]
        found = {SPLIT_WORDS.get(word) for word in words[:1] + words[-1:]}
        for split in ("test", "validation", "train"):
            if split in found:
                return split
    return ""


def folder_documents(folder, samples):
    """Yield (split, UTF-8 bytes) of each document of a TextFolder that has text in it.

    Rows and lines longer than 2 % of the text are cut, too: otherwise one document could be the
    complete validation split. Raise UserError for damaged files and for too many unusable samples.
    """
    # A power of two, so that CRLF line ends, which make a file longer, do not change the cuts.
    row_chars = max(_MIN_PIECE_CHARS, 1 << (folder.expected_bytes // 200).bit_length())
    text_chars = min(_PIECE_CHARS, row_chars)
    for file in folder.files:
        read = {"text": _read_text, "row": _read_parquet}.get(file.kind, _read_json)
        piece_chars = text_chars if file.kind == "text" else min(row_chars, _MAX_SAMPLE_CHARS)
        try:
            for where, blocks in read(file, samples):
                for text in split_text(blocks, piece_chars):
                    try:
                        data = _encode(text)
                    except ValueError as error:
                        samples.bad(where, error)
                        continue
                    samples.n += 1
                    if text and not text.isspace():
                        yield file.split or "train", data
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(file.path, error) from None
    samples.check()


def split_text(blocks, piece_chars):
    """Yield the documents of a text that arrives in blocks of any length.

    Separators and the line ends around them are dropped. A document of more than twice
    `piece_chars` is cut into pieces of one to two times that.
    """
    rest = ""
    follows_separator = False
    for block in blocks:
        rest += block.lstrip("\n") if follows_separator and not rest else block
        if "<|" in rest:
            *documents, rest = _SEPARATOR.split(rest)
            follows_separator = follows_separator or bool(documents)
            for document in documents:
                yield from split_text([document], piece_chars)
        start = 0
        while len(rest) - start > 2 * piece_chars + 64:  # the start of a separator is not cut
            end = _cut_place(rest, start + piece_chars, start + 2 * piece_chars)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


def _cut_place(text, start, end):
    for pattern in _CUTS:
        if match := pattern.search(text, start, end):
            return match.end()
    return end


def _encode(text):
    """Return a text's UTF-8 bytes. Raise ValueError if it is damaged or not text."""
    if 10 * text.count("\0") > len(text):
        raise ValueError("NUL characters: damaged, binary, or UTF-16 without a byte order mark")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # a byte that surrogateescape let through
            raise ValueError("not UTF-8") from None
        return text.encode("utf-8", "replace")  # half of a character, written as a JSON escape


def _open_text(file):
    """Return a stream of characters, decompressed, with LF line ends."""
    stream = open(file.path, "rb")  # noqa: SIM115 (the wrapper closes it)
    if file.compression:
        stream = io.BufferedReader(pa.CompressedInputStream(stream, file.compression))
    start = stream.peek(4)
    encoding = next((name for bom, name in _BOMS.items() if start.startswith(bom)), "utf-8-sig")
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=None)


def _read_text(file, samples):
    with _open_text(file) as stream:
        yield file.path, iter(lambda: stream.read(_BLOCK_CHARS), "")


def _read_json(file, samples):
    """Yield the text of each JSON value. A .json file whose first value has none is metadata."""
    with _open_text(file) as stream:
        values = (_json_lines if file.kind == "line" else _json_values)(stream)
        for number, value in enumerate(values, start=1):
            where = f"{file.path}, {file.kind} {number}"
            text = value.get("text", value) if isinstance(value, dict) else value
            if isinstance(text, str):
                yield where, [_clean(text)]
            elif isinstance(value, ValueError):
                samples.bad(where, f"not JSON ({value})")
            elif number == 1 and file.kind == "value":
                samples.textless.append((".json without text", file.n_bytes))
                return
            elif text is not None:
                samples.bad(where, 'no string under "text"; samples must be like {"text": "..."}')


def _json_lines(stream):
    """Yield the value of each line: None if it is blank, a ValueError if it is not JSON."""
    while line := stream.readline(_MAX_SAMPLE_CHARS):
        is_long = len(line) == _MAX_SAMPLE_CHARS
        while is_long and line and not line.endswith("\n"):
            line = stream.readline(_MAX_SAMPLE_CHARS)
        try:
            if is_long:
                raise ValueError(f"longer than {_MAX_SAMPLE_CHARS:,} characters")
            yield json.loads(line) if line.strip() else None
        except ValueError as error:
            yield error
        except RecursionError:
            yield ValueError("nested too deeply")


def _json_values(stream):
    """Yield the elements of a JSON array, or values that follow one another."""
    decoder = json.JSONDecoder()
    between = re.compile(r"[\s,]*")
    text = stream.read(_BLOCK_CHARS).lstrip()
    end = "]" if text.startswith("[") else ""
    at = len(end)
    while True:
        at = between.match(text, at).end()
        try:
            value, at = decoder.raw_decode(text, at)
            yield value
        except (ValueError, RecursionError):
            more = stream.read(max(_BLOCK_CHARS, len(text) - at))  # all is decoded about twice
            if not more:
                break
            text = text[at:] + more
            at = 0
    if text[at:].strip() != end:
        raise OSError(f"not JSON at {text[at:at + 30]!r}")


def _read_parquet(file, samples):
    with open_parquet(file.path) as parquet:
        if problem := text_column_problem(parquet):
            samples.textless.append((f".parquet with {problem}", file.n_bytes))
            return
        for number, data in enumerate(parquet_rows(parquet), start=1):
            if data:
                text = data.decode("utf-8", "surrogateescape")
                yield f"{file.path}, row {number}", [_clean(text)]


def _clean(text):
    """Return a text with LF line ends and without a byte order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


@contextlib.contextmanager
def open_parquet(path):
    """Open a parquet file through a handle, because pyarrow takes some paths for URLs."""
    with open(path, "rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        yield parquet


def text_column_problem(parquet):
    """Return why a parquet file has no column of documents, or ""."""
    schema = parquet.schema_arrow
    if "text" not in schema.names:
        return f"no column `text` (its columns: {', '.join(schema.names) or 'none'})"
    column_type = schema.field("text").type
    if str(getattr(column_type, "value_type", column_type)) in _TEXT_TYPES:  # of a dictionary
        return ""
    return f"a column `text` of type {column_type}"


def parquet_rows(parquet):
    """Yield the UTF-8 bytes, or None, of each row of the column `text`."""
    for batch in parquet.iter_batches(batch_size=1024, columns=["text"]):
        yield from batch.column(0).cast(pa.large_binary()).to_pylist()


def damaged(path, error):
    """Return the UserError for a file that cannot be read."""
    reason = (str(getattr(error, "strerror", None) or error) or type(error).__name__).splitlines()
    return UserError(f"{path} is damaged or unreadable ({reason[0]}); replace or remove it")
