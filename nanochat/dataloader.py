"""Documents packed best-fit into rows of tokens, and batches of rows prepared ahead in a thread.

RowPlanner decides from document lengths which part of which document fills each row. TokenLoader
reads the rows and serves them in batches. The micro-batches of an optimizer step are dealt out
to the ranks in turn, so a step has the same rows, and a checkpoint the same loader state, with any
number of ranks. The rows of a validation are in loss_eval.SplitRows.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, cycle
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.tokens import damaged

BUFFER_DOCUMENTS = 1000  # upstream's buffer for best-fit packing

# The thread hands over groups of batches: small batches would spend a third of their time on it.
GROUP_TOKENS = 1 << 16
GROUP_BATCHES = 32
GROUPS_AHEAD = 3


class TokenLoader:
    """Endless iterator over (inputs, targets), each (batch_rows, sequence_len) int64 on `device`.

    Targets are the inputs one position later. On CUDA, batches are copied from pinned memory
    without blocking. crop: the rule of RowPlanner. step_batches: micro-batches per optimizer step
    of all ranks together, at least one per rank (default: one per rank).

    Raises UserError if the shards hold no documents or a token id outside the vocabulary, and if
    `state` belongs to other documents, another seed or another crop rule.
    """

    def __init__(self, shards, batch_rows, sequence_len, seed=0, *, rank=0, world_size=1,
                 step_batches=None, device="cpu", crop="drop", state=None):
        step_batches = step_batches or world_size
        assert batch_rows >= 1 and sequence_len >= 1 and 0 <= rank < world_size <= step_batches
        self._shards = shards
        self._batch_rows = batch_rows
        self._sequence_len = sequence_len
        self._planner = RowPlanner(shards, sequence_len + 1, seed, crop, state=state)

        # Rows to plan per batch of this rank: a batch for every rank, and with the last batch of
        # a step the rest of the step, so that the state is the same on all ranks.
        self._own_rows = slice(rank * batch_rows, (rank + 1) * batch_rows)
        n_earlier = n_batches_of_rank(step_batches, rank, world_size) - 1
        n_planned = [world_size] * n_earlier + [step_batches - world_size * n_earlier]
        self._n_planned_rows = cycle([n * batch_rows for n in n_planned])

        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        self._delivered = self._planner.snapshot()
        n_batches = -(-GROUP_TOKENS // (batch_rows * sequence_len))
        self._group_batches = min(GROUP_BATCHES, n_batches)
        self._thread = self._start_thread()
        self._ready = deque()
        self._ahead = deque(self._submit_group() for _ in range(GROUPS_AHEAD))

    def __iter__(self):
        return self

    def __next__(self):
        if not self._ready:
            self._ready.extend(self._next_group())
        batch, self._delivered = self._ready.popleft()
        return batch.to(self._device, non_blocking=self._pinned).unbind(0)

    @property
    def distinct_tokens(self):
        """Tokens of the text served in the first pass over it, by all ranks, to the last batch.

        Under "drop", later passes crop documents elsewhere and serve a few more that are new.
        """
        return self._delivered.distinct_tokens

    @property
    def epochs(self):
        """Tokens served / distinct tokens: 1.0 in the first pass, 0.0 before the first batch."""
        return self._delivered.served_tokens / max(1, self.distinct_tokens)

    def state_dict(self):
        """Return the JSON-able state after the last delivered batch, to be passed as `state`.

        At the end of an optimizer step it is equal on all ranks.
        """
        return self._planner.state_dict(self._delivered)

    def close(self):
        """Stop the thread. Leaving a `with` block calls it."""
        self._ready.clear()
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _start_thread(self):
        if not self._pinned:
            return ThreadPoolExecutor(1, "loader")
        # A thread without a current device would create a context on GPU 0 to pin memory.
        current = torch.cuda.current_device()
        return ThreadPoolExecutor(1, "loader", torch.cuda.set_device, (current,))

    def _submit_group(self):
        return self._thread.submit(self._make_group)

    def _make_group(self):
        return [self._next_batch() for _ in range(self._group_batches)]

    def _next_group(self):
        assert self._ahead, "the loader is closed"
        try:
            group = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._ahead.append(self._submit_group())
        return group

    def _next_batch(self):
        """Plan one micro-batch per rank, read the rows of this rank."""
        plan = [self._planner.next_row() for _ in range(next(self._n_planned_rows))]
        rows = fill_rows(self._shards, plan[self._own_rows], self._sequence_len + 1)
        shape = 2, self._batch_rows, self._sequence_len
        batch = torch.empty(shape, dtype=torch.int64, pin_memory=self._pinned)
        batch.numpy()[0] = rows[:, :-1]
        batch.numpy()[1] = rows[:, 1:]
        return batch, self._planner.snapshot()


def n_batches_of_rank(n_batches, rank, world_size):
    """Return how many of n_batches micro-batches a rank gets when they are dealt out in turn."""
    return len(range(rank, n_batches, world_size))


def fill_rows(shards, plan, row_tokens):
    """Return the token ids of planned rows, (len(plan), row_tokens) in the shards' dtype.

    Every row begins with BOS; BOS also fills the rest of a row that is planned shorter.
    Raises UserError naming the file and document of a token id outside the vocabulary.
    """
    bos_id = shards[0].bos_id
    rows = np.full((len(plan), row_tokens), bos_id, shards[0].tokens.dtype)
    for row, segments in zip(rows, plan, strict=True):
        at = 0
        for shard, document, start, length in segments:
            first = shards[shard].offsets[document] + start
            row[at : at + length] = shards[shard].tokens[first : first + length]
            if start:
                row[at] = bos_id
            at += length
    if rows.max() >= shards[0].vocab_size or (rows[:, 0] != bos_id).any():
        _raise_bad_token(shards, plan)
    return rows


def _raise_bad_token(shards, plan):
    for segments in plan:
        for shard, document, start, length in segments:
            file = shards[shard]
            first = file.offsets[document]
            tokens = file.tokens[first : first + start + length]
            if tokens.max() >= file.vocab_size:
                raise damaged(file.path, f"document {document} holds token id {tokens.max()}, "
                                         f"the vocabulary ends at {file.vocab_size - 1}")
            if tokens[0] != file.bos_id:
                raise damaged(file.path, f"document {document} begins with token id {tokens[0]}, "
                                         f"not BOS {file.bos_id}")
    raise AssertionError("the rows hold a bad token, the documents do not")


class Snapshot(NamedTuple):
    """The state of a RowPlanner; buffer: its entries, sorted by length."""

    epoch: int
    position: int
    buffer: list
    served_tokens: int
    distinct_tokens: int


class RowPlanner:
    """Plan rows of `row_tokens` tokens (at least 2) from document lengths.

    A row repeatedly takes the longest buffered document that fits into its remaining space. If
    none fits, a document is cropped to fill the space: under crop="drop" (upstream's rule) the
    shortest, and its rest is lost for this epoch; under "carry" the oldest, so that rows of one
    document lie far apart, and its rest returns to the buffer as the youngest entry, with BOS in
    front. Under "carry" an epoch therefore serves every token once. Ties go to the oldest entry.

    The buffer holds BUFFER_DOCUMENTS documents, or all documents if there are fewer. Under "carry"
    it never mixes two epochs. The sequence of rows depends on (documents, seed, crop) only.

    n_docs: plan one pass over the first n_docs documents instead of endless epochs. The last row
    may then be shorter, and the rows after it are empty.
    """

    def __init__(self, shards, row_tokens, seed, crop="drop", *, shuffle=True, n_docs=None,
                 state=None):
        assert row_tokens >= 2 and crop in ("carry", "drop")
        self.order = DocumentOrder(shards, seed, shuffle)
        self.row_tokens = row_tokens
        self.crop = crop
        self._carries = crop == "carry"
        self._pass_docs = n_docs
        self.buffer_size = min(BUFFER_DOCUMENTS, self.order.n_docs)
        self._served_tokens = 0
        self._distinct_tokens = 0
        # (length, -arrival, shard, document, start, epoch), sorted: the shortest first, among
        # equal lengths the oldest last.
        self._buffer = []
        self._by_age = deque()  # carry: entries by arrival; some have left the buffer since
        self._n_arrivals = 0
        if state is None:
            self._refill()
        else:
            self._restore(state)

    def next_row(self):
        """Return the next row as segments (shard, document, start, length).

        A segment is tokens start .. start + length - 1 of the document. If start > 0, its first
        token has been served before, and BOS replaces it.
        """
        row = []
        space = self.row_tokens
        while space and self._buffer:
            available, _, shard, document, start, epoch = self._buffer.pop(self._choose(space))
            length = min(available, space)
            row.append((shard, document, start, length))
            space -= length

            n_new = length
            if self._carries and (start > 0 or length == 1 < available):
                n_new -= 1  # BOS of a rest, or BOS of a document that will be taken up again
            self._served_tokens += n_new
            if epoch == 0:
                self._distinct_tokens += n_new

            if self._carries and available > length:
                self._put(available - length + 1, shard, document, start + length - 1, epoch)
            else:
                self._refill()
        return row

    def snapshot(self):
        """Return the state, cheap enough for every batch."""
        order = self.order
        counts = self._served_tokens, self._distinct_tokens
        return Snapshot(order.epoch, order.position, self._buffer.copy(), *counts)

    def state_dict(self, snapshot):
        """Return a snapshot in JSON-able form."""
        buffer = [list(entry[2:]) for entry in _oldest_first(snapshot.buffer)]
        return {"documents": self.order.fingerprint, "crop": self.crop, **snapshot._asdict(),
                "buffer": buffer}

    def _restore(self, state):
        if state["documents"] != self.order.fingerprint:
            raise UserError("the data loader's state belongs to other documents or another seed; "
                            "resume with the dataset, tokenizer and seed of the run")
        if state["crop"] != self.crop:
            raise UserError(f"the data loader's state was saved with --crop {state['crop']}, not "
                            f"{self.crop}; resume with --crop {state['crop']}")
        self._served_tokens = state["served_tokens"]
        self._distinct_tokens = state["distinct_tokens"]
        self.order.seek(state["epoch"], state["position"])
        for shard, document, start, epoch in state["buffer"]:
            length = self.order.length(shard, document) - start
            self._put(length, shard, document, start, epoch)

    def _choose(self, space):
        """Return the buffer index of the entry that the packing rule takes next."""
        # Arrivals are negated: (length, 1) sorts after all entries of that length.
        at = bisect_right(self._buffer, (space, 1)) - 1
        if at >= 0:
            return at
        if self._carries:
            return self._oldest()
        return bisect_right(self._buffer, (self._buffer[0][0], 1)) - 1

    def _oldest(self):
        while True:
            entry = self._by_age.popleft()
            at = bisect_left(self._buffer, entry)
            if at < len(self._buffer) and self._buffer[at] == entry:
                return at

    def _refill(self):
        while len(self._buffer) < self.buffer_size:
            if self.order.position == self._pass_docs:
                return
            if self._carries and self._buffer and self.order.position == self.order.n_docs:
                return
            length, shard, document = self.order.draw()
            self._put(length, shard, document, 0, self.order.epoch)

    def _put(self, length, shard, document, start, epoch):
        entry = length, -self._n_arrivals, shard, document, start, epoch
        self._n_arrivals += 1
        insort(self._buffer, entry)
        if self._carries:
            self._by_age.append(entry)
            if len(self._by_age) > 4 * self.buffer_size:
                self._by_age = deque(_oldest_first(self._buffer))


def _oldest_first(buffer):
    return sorted(buffer, key=lambda entry: -entry[1])


class DocumentOrder:
    """The endless order of documents: per epoch the shards shuffled, and the documents per shard.

    It depends on (documents, seed) only, with every version of numpy: numpy keeps the raw draws
    of a seeded generator stable but not its shuffles, so this class sorts raw draws.
    """

    def __init__(self, shards, seed, shuffle):
        if seed < 0:
            raise UserError(f"the seed is {seed}; use 0 or more")
        self._shards = shards
        self._seed = seed
        self._shuffle = shuffle
        n_docs_before = list(accumulate((shard.n_docs for shard in shards), initial=0))
        self.first_documents = n_docs_before[:-1]  # per shard: number of its first document
        self.n_docs = n_docs_before[-1]
        if not self.n_docs:
            raise UserError("the split has no documents: no shards, or empty shards")
        identity = [seed if shuffle else None]
        identity += [(shard.path.name, shard.n_docs, shard.n_tokens) for shard in shards]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.seek(0, 0)

    def draw(self):
        """Return (length, shard, document) of the next document."""
        while self._next == len(self._documents):
            if self._slot + 1 == len(self._shards):
                self.seek(self.epoch + 1, 0)
            else:
                self._enter(self._slot + 1)
        at = self._next
        self._next += 1
        self.position += 1
        return self._lengths[at], self._shard, self._documents[at]

    def seek(self, epoch, position):
        """Continue after the first `position` documents of `epoch`."""
        self.epoch = epoch
        self.position = position
        self._shard_order = self._permutation(len(self._shards), 0)
        ends = np.cumsum([self._shards[shard].n_docs for shard in self._shard_order])
        slot = int(np.searchsorted(ends, position, side="right"))
        self._enter(min(slot, len(ends) - 1))
        self._next = int(position - ends[self._slot] + len(self._documents))

    def length(self, shard, document):
        start, end = self._shards[shard].offsets[document : document + 2]
        return int(end - start)

    def _enter(self, slot):
        self._slot = slot
        self._next = 0
        self._shard = int(self._shard_order[slot])
        shard = self._shards[self._shard]
        documents = self._permutation(shard.n_docs, 1 + self._shard)
        self._documents = documents.tolist()
        self._lengths = np.diff(shard.offsets)[documents].tolist()

    def _permutation(self, n, stream):
        if not self._shuffle:
            return np.arange(n)
        generator = np.random.PCG64(np.random.SeedSequence((self._seed, self.epoch, stream)))
        return np.argsort(generator.random_raw(n), kind="stable")
