"""Bits per byte of a model on a split, with standard error; losses by position and by document."""

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist

from nanochat.common import UserError, atomic_path
from nanochat.dataloader import RowPlanner, fill_rows
from nanochat.distributed import Ranks
from nanochat.engine import stream

DOCUMENT_LOSSES = "validation.npz"  # file of a run's final validation, in the run's folder
MAX_RELATIVE_ERROR = 0.01  # standard error / bits per byte; a larger one is warned of


class SplitRows:
    """The rows that an evaluation scores: the first ceil(eval_tokens / sequence_len) of one pass.

    A token is scored at most once. crop="carry": the rows are packed from the leading documents
    that fill them; every token but BOS is scored. crop="drop": the rows are upstream's, without the
    rests of cropped documents; upstream would mix the end of the pass with the next.
    """

    def __init__(self, shards, sequence_len, eval_tokens, crop):
        self.shards = shards
        self.sequence_len = sequence_len
        n_docs = sum(shard.n_docs for shard in shards)
        split_tokens = sum(shard.n_tokens for shard in shards) - n_docs  # without BOS
        n_rows = None if eval_tokens >= split_tokens else -(-eval_tokens // sequence_len)
        if crop == "carry" and n_rows:
            # Best-fit packing of more documents would put the longest ones into the first rows.
            n_docs = _n_leading_documents(shards, n_rows * (sequence_len + 1))
        planner = RowPlanner(shards, sequence_len + 1, 0, crop, shuffle=False, n_docs=n_docs)
        self._first_documents = planner.order.first_documents
        self.plan = list(islice(iter(planner.next_row, []), n_rows))

    def document_index(self, shard, document):
        """Return the index of a shard's document in the split."""
        return self._first_documents[shard] + document

    def batch(self, plan, batch_rows):
        """Return (inputs, targets, documents, positions) of up to batch_rows planned rows, each
        (batch_rows, sequence_len) int64; missing rows and tokens have input BOS and target -1.

        documents: index of the target's document in the split, or -1. positions: tokens of this
        document before the target in the row, without BOS; -1 for a BOS target.
        """
        plan = plan + [[]] * (batch_rows - len(plan))
        tokens = fill_rows(self.shards, plan, self.sequence_len + 1).astype(np.int64)
        documents = np.full_like(tokens, -1)
        positions = np.full_like(tokens, -1)
        for row, segments in enumerate(plan):
            at = 0
            for shard, document, _, length in segments:
                documents[row, at : at + length] = self.document_index(shard, document)
                positions[row, at : at + length] = np.arange(-1, length - 1)
                at += length
        targets = np.where(documents < 0, -1, tokens)
        return tokens[:, :-1], targets[:, 1:], documents[:, 1:], positions[:, 1:]


@dataclass(frozen=True, eq=False)
class LossEvaluation:
    """The loss over the scored targets; special tokens count neither as nats nor as bytes."""

    bits_per_byte: float  # summed nats / (ln 2 x summed UTF-8 bytes)
    standard_error: float  # over documents; NaN if there are fewer than two
    nats_per_token: float
    n_tokens: int
    n_bytes: int
    nats_by_position: list  # mean over targets after n tokens of their document in the row, or None
    counts_by_position: list
    documents: np.ndarray  # scored documents, by their index in the split
    document_nats: np.ndarray
    document_bytes: np.ndarray

    def event_fields(self):
        """Return the fields of a `val` event."""
        error = self.standard_error if math.isfinite(self.standard_error) else None
        return {"val_bpb": self.bits_per_byte, "val_bpb_se": error, "n_tokens": self.n_tokens,
                "n_bytes": self.n_bytes}

    def describe(self):
        """Return the result in one line."""
        return (f"{self.bits_per_byte:.4f} bits per byte (standard error {self.standard_error:.4f} "
                f"over {len(self.documents):,} documents), {self.nats_per_token:.4f} nats per "
                f"token; {self.n_tokens:,} distinct tokens, {self.n_bytes:,} bytes scored")

    def warning(self):
        """Return a warning if the standard error is unknown or above 1 % of the loss, else None."""
        relative = self.standard_error / self.bits_per_byte
        if not math.isfinite(self.bits_per_byte) or relative <= MAX_RELATIVE_ERROR:
            return None
        size = "unknown" if math.isnan(relative) else f"{relative:.1%} of its loss"
        return (f"the scored validation text is small: the standard error of val_bpb is {size} "
                f"({len(self.documents):,} documents, {self.n_tokens:,} tokens); compare runs with "
                "scripts.runs --compare, which pairs documents, or add validation text")


@torch.no_grad()
def evaluate_split(model, rows, batch_rows, token_bytes, device, ranks=None, progress=iter):
    """Return the LossEvaluation of `model(inputs, targets, "none")` on SplitRows.

    batch_rows and the number of ranks only decide where a row is computed. token_bytes: UTF-8 bytes
    per token id (numpy), 0 for special tokens. progress: a progress bar for this rank's batches.
    """
    ranks = ranks or Ranks()
    n_docs = 1 + max(rows.document_index(*part[:2]) for row in rows.plan for part in row)
    by_position = np.zeros((2, rows.sequence_len))  # nats, counts
    by_document = np.zeros((2, n_docs))  # nats, bytes

    own_plan = rows.plan[ranks.rank :: ranks.world_size]
    was_training = model.training
    model.eval()
    for first in progress(range(0, len(own_plan), batch_rows)):
        batch = rows.batch(own_plan[first : first + batch_rows], batch_rows)
        inputs, targets, documents, positions = batch
        pair = torch.from_numpy(np.stack((inputs, targets))).to(device)
        nats = model(*pair, "none").float().cpu().numpy().reshape(targets.shape)

        n_bytes = np.where(targets < 0, 0, token_bytes[targets])
        scored = n_bytes > 0
        nats = nats[scored].astype(np.float64)
        np.add.at(by_position[0], positions[scored], nats)
        np.add.at(by_position[1], positions[scored], 1)
        np.add.at(by_document[0], documents[scored], nats)
        np.add.at(by_document[1], documents[scored], n_bytes[scored])
    model.train(was_training)

    if ranks.world_size > 1:
        for sums in (by_position, by_document):
            total = torch.from_numpy(sums).to(device)
            dist.all_reduce(total)
            sums[:] = total.cpu().numpy()
    nats, counts = by_position
    documents = np.flatnonzero(by_document[1])
    document_nats, document_bytes = by_document[:, documents]
    n_tokens = int(counts.sum())
    nats_per_token = float(nats.sum()) / n_tokens if n_tokens else math.nan
    means = [nats[n] / counts[n] if counts[n] else None for n in range(len(nats))]
    return LossEvaluation(
        *_bits_per_byte(document_nats, document_bytes), nats_per_token, n_tokens,
        int(document_bytes.sum()), means, counts.astype(int).tolist(), documents, document_nats,
        document_bytes.astype(np.int64))


def _bits_per_byte(nats, n_bytes):
    """Return (bits per byte, its standard error over documents by the delta method)."""
    n_docs = len(nats)
    if not n_docs:
        return math.nan, math.nan
    bits, total_bytes = nats / math.log(2), n_bytes.sum()
    ratio = bits.sum() / total_bytes
    with np.errstate(invalid="ignore"):  # infinite losses of a diverged model
        squares = ((bits - ratio * n_bytes) ** 2).sum()
    variance = squares * n_docs / (n_docs - 1) if n_docs > 1 else math.nan
    return float(ratio), float(math.sqrt(variance) / total_bytes)


def _n_leading_documents(shards, n_tokens):
    """Return how many documents from the first one hold at least n_tokens tokens, or all."""
    n_docs = 0
    for shard in shards:
        if shard.n_tokens >= n_tokens:
            return n_docs + int(np.searchsorted(shard.offsets, n_tokens))
        n_tokens -= shard.n_tokens
        n_docs += shard.n_docs
    return n_docs


def position_table(evaluation):
    """Return lines with the nats by position, at 0 and the powers of two."""
    nats, counts = evaluation.nats_by_position, evaluation.counts_by_position
    lines = ["tokens of context since BOS: nats per token"]
    for n in (0, *(2**k for k in range(len(nats).bit_length() - 1))):
        value = f"{nats[n]:.4f} ({counts[n]:,} tokens)" if counts[n] else "no tokens"
        lines.append(f"{n:6d}: {value}")
    return "\n".join(lines)


def save_document_losses(path, evaluation, dataset_id, tokenizer_id):
    """Write the nats and bytes per document of a LossEvaluation to an .npz file."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, dataset_id=dataset_id, tokenizer_id=tokenizer_id,
                 documents=evaluation.documents, nats=evaluation.document_nats,
                 n_bytes=evaluation.document_bytes)


def load_document_losses(path):
    """Return {dataset_id, documents, nats, n_bytes} of a file. Raise UserError if it is damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("dataset_id", "documents", "nats", "n_bytes")}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged files
        raise UserError(f"{path} holds no losses per document ({error}); the final validation of "
                        "a run writes them") from None


def paired_difference(a, b):
    """Return (bits per byte of `a` minus those of `b`, its standard error over documents).

    a, b: results of load_document_losses. Raise UserError if they are not of the same text.
    """
    if not all(np.array_equal(a[name], b[name]) for name in ("dataset_id", "documents", "n_bytes")):
        raise UserError(f"the two evaluations scored different text, of {a['dataset_id']} and "
                        f"{b['dataset_id']}; evaluate both with the same --dataset, "
                        "--eval-tokens, --max-seq-len, --crop and tokenizer")
    return _bits_per_byte(a["nats"] - b["nats"], a["n_bytes"])


def sample_documents(model, tokenizer, shard):
    """Return continuations of the beginnings of a shard's first two documents: [{prompt, text}]."""
    samples = []
    was_training = model.training
    model.eval()
    for document in range(min(2, shard.n_docs)):
        first, end = shard.offsets[document : document + 2]
        prompt = shard.tokens[first:end][:17].tolist()  # BOS and 16 tokens
        new = list(stream(model, prompt, 96, temperature=0.8, top_k=50, seed=document,
                          stop_ids=(tokenizer.bos_id,)))
        samples.append({"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(new)})
    model.train(was_training)
    return samples
