"""Parquet shards of documents: one string column `text`, a document a row. Read, check, identify."""

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import DIGESTS, UserError, matches_checksum

_TEXT_TYPES = (pa.string(), pa.large_string())


def list_shards(folder):
    """The folder's parquet files in name order; the last is the validation shard."""
    return sorted(path for path in Path(folder).glob("*.parquet") if not path.name.startswith("."))


def open_shard(path):
    """Open a shard as a pyarrow ParquetFile. Errors: UserError when it is damaged or has no string column `text`."""
    if Path(path).is_fifo():  # to open it waits for a writer
        raise _damaged(path, "it is a FIFO")
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)  # where its writer added any
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    schema = file.schema_arrow
    if "text" not in schema.names:
        file.close()
        raise UserError(f"{path} has no column `text` (its columns: {', '.join(schema.names) or 'none'}); "
                        "rename the column that holds the documents")
    if schema.field("text").type not in _TEXT_TYPES:
        file.close()
        raise UserError(f"{path}: column `text` is of type {schema.field('text').type}, not string; convert it")
    return file


def read_documents(path):
    """Yield the documents of a shard in order; null and blank ones are left out.

    Errors: UserError when the shard is damaged, has no string column `text`, or holds blank documents only.
    """
    found = False
    if not matches_checksum(path):
        raise _damaged(path, f"its bytes differ from those noted in {DIGESTS}")
    with open_shard(path) as file:
        try:
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if text and not text.isspace():
                        found = True
                        yield text
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _damaged(path, error) from None
    if not found:
        raise UserError(f"{path} holds no document with text in it; remove or replace it")


def sample_documents(shards, max_chars, doc_cap=None, tally=None):
    """Yield documents of the shards in order, each cut at `doc_cap` characters, until `max_chars` are reached.

    tally: a Counter that is told the `documents` so far, their characters `yielded`, and those they are long (`whole`).
    """
    tally = Counter() if tally is None else tally
    for shard in shards:
        for document in read_documents(shard):
            tally.update(documents=1, yielded=len(document[:doc_cap]), whole=len(document))
            yield document[:doc_cap]
            if tally["yielded"] >= max_chars:
                return


def row_count(path):
    """Rows of a shard, blank ones among them."""
    with open_shard(path) as file:
        return file.metadata.num_rows


def shard_fingerprint(path):
    """Short hex digest of a shard: its name, size and parquet footer (which holds sizes and statistics of all pages).

    Reads the end of the file alone, so that thousands of shards take seconds. Errors: as `open_shard`.
    """
    path = Path(path)
    open_shard(path).close()  # whatever is not a readable shard is named here
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(size - 8)
        footer_bytes = int.from_bytes(file.read(4), "little")
        file.seek(size - 8 - footer_bytes)
        footer = file.read(footer_bytes)
    return hashlib.sha256(f"{path.name}\n{size}\n".encode() + footer).hexdigest()[:16]


def shard_key(path):
    """Short hex digest of a shard: its fingerprint and first 64 KiB, as the footers of small shards may agree."""
    fingerprint = shard_fingerprint(path)
    with open(path, "rb") as file:
        return hashlib.sha256(fingerprint.encode() + file.read(1 << 16)).hexdigest()[:16]


def _damaged(path, error):
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{path} is damaged or not parquet ({reason}); delete it and prepare or download it again")
