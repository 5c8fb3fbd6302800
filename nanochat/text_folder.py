"""A folder of text: the split of each file, and the documents in it.

Text files (.txt, .text, .md, .markdown, .rst), JSON lines (.jsonl, .ndjson) and .parquet are read,
in subfolders, also as .gz, .bz2, .zst or .lz4. Every other file is counted as left out, and so is a
link to a folder. Line ends become LF. Separator tokens of corpora end a document and are not text;
`</s>` is text, because it is also an HTML tag. Long texts are cut into pieces.
"""

import codecs
import io
import json
import re
from collections import Counter, namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, base_dir
from nanochat.tokenizer import SPECIAL_TOKENS

VAL_SHARE = 0.05
SPLITS = {"train": "training", "validation": "validation", "test": "test, not used"}
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test",
               **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"),
                               "validation")}
SEPARATORS = ("<|endoftext|>", "<|startoftext|>", "<|begin_of_text|>", "<|end_of_text|>",
              *SPECIAL_TOKENS)

_COMPRESSIONS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4"}
_NAME = re.compile(r"(.+)\.(parquet|(?:txt|text|md|markdown|rst|jsonl|ndjson)"
                   rf"(?:\.({'|'.join(_COMPRESSIONS)}))?)", re.IGNORECASE | re.DOTALL)
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
_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",  # before its beginning,
         codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # which is that of UTF-16

# name: path relative to the folder; kind: "jsonl", "txt", ...; split: "" if no name gives one
TextFile = namedtuple("TextFile", "path name n_bytes kind compression split")


class TextFolder:
    """The files below a folder: those to read, by name, and a count of the others per reason."""

    def __init__(self, folder):
        self.files = []
        self.left_out = Counter()
        read = set()  # resolved paths: a link to a file that is read already would double its text
        for path, problem in sorted(_walk(Path(folder)), key=lambda item: item[0].is_symlink()):
            name = path.relative_to(folder).as_posix()
            match = _NAME.fullmatch(name)
            if not problem and "/." in f"/{name}":
                problem = "hidden"
            elif not problem and not match:
                problem = path.suffix.lower() or "without suffix"
            elif not problem and path.resolve() in read:
                problem = "link to a file in the folder"
            if problem:
                self.left_out[problem] += 1
                continue
            read.add(path.resolve())
            stem, kind, compression = match.groups()
            compression = _COMPRESSIONS.get((compression or "").lower())
            kind = kind.lower().partition(".")[0]
            file = TextFile(path, name, path.stat().st_size, kind, compression, named_split(stem))
            self.files.append(file)
        self.files.sort(key=lambda file: file.name)

    def split(self, name):
        """Return the files of a split. Files without the name of a split are for training."""
        return [file for file in self.files if (file.split or "train") == name]

    def account(self):
        """Return lines that name the files of each split and count those that are not read."""
        lines = []
        for split, title in SPLITS.items():
            names = [file.name for file in self.split(split)]
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            if names:
                lines.append(f"{title}: {', '.join(names[:3])}{more}")
            elif split == "validation" and self.split("train"):
                lines.append(f"validation: {VAL_SHARE:.0%} of the training text, chosen by hash")
        if self.left_out:
            counts = ", ".join(f"{n:,} {problem}" for problem, n in self.left_out.most_common())
            lines.append(f"left out: {counts}")
        return lines

    def documents(self):
        """Yield (split, UTF-8 bytes) of each document that has text in it.

        Rows and lines longer than 2 % of the text are cut, too: otherwise one document could be the
        complete validation split. Raise UserError for a file or sample that is damaged or no text.
        """
        n_bytes = sum(file.n_bytes * (3 if file.compression or file.kind == "parquet" else 1)
                      for file in self.files)  # about
        # A power of two, so that CRLF line ends, which make a file longer, do not change the cuts.
        row_chars = max(_MIN_PIECE_CHARS, 1 << (n_bytes // 200).bit_length())
        readers = {"parquet": _read_parquet, "jsonl": _read_json, "ndjson": _read_json}
        for file in self.files:
            read = readers.get(file.kind, _read_text)
            piece_chars = row_chars if file.kind in readers else min(_PIECE_CHARS, row_chars)
            n_samples = 0
            try:
                for blocks in read(file):
                    for text in split_text(blocks, piece_chars):
                        data = _encode(text)
                        if text and not text.isspace():
                            yield file.split or "train", data
                    n_samples += 1
            except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
                unit = "row" if file.kind == "parquet" else "line"
                where = f", {unit} {n_samples + 1}" if file.kind in readers else ""
                raise unreadable(f"{file.path}{where}", error) from None


def _walk(folder):
    """Yield (path, problem) per file below a folder; problem: "" if the file can be read."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path.is_symlink() or path.resolve() == base_dir().resolve()):
            yield path, "link to a folder" if path.is_symlink() else "cache folder"
        elif path.is_dir():
            yield from _walk(path)
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


def _open_text(file):
    """Return a stream of characters, decompressed, with LF line ends."""
    stream = open(file.path, "rb")  # noqa: SIM115 (the wrapper closes it)
    if file.compression:
        stream = io.BufferedReader(pa.CompressedInputStream(stream, file.compression))
    start = stream.peek(4)
    encoding = next((name for bom, name in _BOMS.items() if start.startswith(bom)), "utf-8-sig")
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=None)


def _encode(text):
    """Return the UTF-8 bytes of a text. Raise ValueError if it is damaged or not text."""
    if 10 * text.count("\0") > len(text):
        raise ValueError("NUL characters: damaged, binary, or UTF-16 without a byte order mark")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":  # a byte that surrogateescape let through
            raise ValueError(f"not UTF-8 after {text[:error.start][-40:]!r}") from None
        return text.encode("utf-8", "replace")  # half of a character, from a JSON escape


def _read_text(file):
    with _open_text(file) as stream:
        yield iter(lambda: stream.read(_BLOCK_CHARS), "")


def _read_json(file):
    with _open_text(file) as stream:
        for line in stream:
            value = json.loads(line) if line.strip() else None
            text = value.get("text", value) if isinstance(value, dict) else value
            if not isinstance(text, str | None):
                raise ValueError('no string under "text"; lines must be like {"text": "..."}')
            yield [_clean(text or "")]


def _read_parquet(file):
    for data in parquet_rows(file.path):
        yield [_clean((data or b"").decode("utf-8", "surrogateescape"))]


def _clean(text):
    """Return a text with LF line ends and without a byte order mark."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def parquet_rows(path):
    """Yield the UTF-8 bytes, or None, of each row of the column `text` of a parquet file."""
    # through a handle, because pyarrow takes some paths for URLs
    with open(path, "rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        names = parquet.schema_arrow.names
        if "text" not in names:
            raise ValueError(f"it has no column `text`, but {', '.join(names) or 'none'}")
        for batch in parquet.iter_batches(batch_size=1024, columns=["text"]):
            yield from batch.column(0).cast(pa.large_binary()).to_pylist()


def unreadable(path, error):
    """Return the UserError for a file that cannot be read."""
    reason = (str(getattr(error, "strerror", None) or error) or type(error).__name__).splitlines()
    return UserError(f"cannot read {path} ({reason[0]}); repair or remove it")
