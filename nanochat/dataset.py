"""Text sources by name: each becomes a folder of parquet shards, the last of which is validation."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.shards import list_shards, read_documents, shard_fingerprint

__all__ = ["Dataset", "open_dataset", "read_documents"]


@dataclass(frozen=True)
class Dataset:
    """Shards in name order under a stable id: what a run trains and validates on."""

    name: str
    dataset_id: str
    shards: tuple[Path, ...]

    @property
    def train_shards(self):
        return self.shards[:-1]

    @property
    def val_shards(self):
        return self.shards[-1:]


def open_dataset(name):
    """The Dataset of a folder of parquet shards. Errors: UserError when it cannot be used as it stands."""
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"no dataset {str(name)!r}: not a folder")
    return _open_shards(folder.resolve().name, folder)


def _open_shards(name, folder):
    shards = tuple(list_shards(folder))
    if len(shards) < 2:
        raise UserError(f"{folder} holds {len(shards)} parquet shards; at least 2 are needed, "
                        "as the last in name order is the validation split")
    digest = hashlib.sha256("\n".join(shard_fingerprint(shard) for shard in shards).encode())
    return Dataset(name, f"{name}-{digest.hexdigest()[:8]}", shards)
