"""Documents packed best-fit into rows of tokens, and batches of rows prepared ahead in a thread.

RowPlanner decides from document lengths which part of which document fills each row. TokenLoader
reads the rows and serves them in batches. The micro-batches of an optimizer step are dealt out
to the ranks in turn, so a step has the same rows, and a checkpoint the same loader state, with any
number of ranks.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import accumulate, cycle, repeat

import numpy as np
import torch

from nanochat.common import UserError

BUFFER_DOCUMENTS = 1000  # upstream's buffer for best-fit packing

# The thread hands over groups of batches: small batches would spend a third of their time on it.
GROUP_TOKENS, GROUP_BATCHES = 1 << 16, 32
GROUPS_AHEAD = 3


class TokenLoader(Iterator, AbstractContextManager):
    """Endless iterator over (inputs, targets), each (batch_rows, sequence_len) int64 on `device`.

    Targets are the inputs one position later. crop: see RowPlanner. step_batches: micro-batches
    per optimizer step of all ranks together (default: one per rank). Raises UserError if the
    shards hold no documents, and if `state` belongs to other documents, seed or crop rule.
    """

    def __init__(self, shards, batch_rows, sequence_len, seed=0, *, rank=0, world_size=1,
                 step_batches=None, device="cpu", crop="drop", state=None):
        step_batches = step_batches or world_size
        assert batch_rows >= 1 and sequence_len >= 1 and 0 <= rank < world_size <= step_batches
        self._shards = shards
        self._shape = 2, batch_rows, sequence_len
        self._planner = RowPlanner(shards, sequence_len + 1, seed, crop, state=state)
        self._delivered = self._planner.snapshot()

        # Rows to plan per batch of this rank: a batch for every rank, and with the last batch of
        # a step the rest of the step, so that the state is the same on all ranks.
        self._own_rows = slice(rank * batch_rows, (rank + 1) * batch_rows)
        n_earlier = n_batches_of_rank(step_batches, rank, world_size) - 1
        n_planned = [world_size] * n_earlier + [step_batches - world_size * n_earlier]
        self._n_planned_rows = cycle([n * batch_rows for n in n_planned])

        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        # Without a current device, the thread would create a context on GPU 0 to pin memory.
        first_call = (torch.cuda.set_device, (torch.cuda.current_device(),)) if self._pinned else ()
        self._thread = ThreadPoolExecutor(1, "loader", *first_call)
        n_batches = -(-GROUP_TOKENS // (batch_rows * sequence_len))
        self._group_batches = min(GROUP_BATCHES, n_batches)
        self._ready = deque()
        self._ahead = deque(self._thread.submit(self._make_group) for _ in range(GROUPS_AHEAD))

    def __next__(self):
        if not self._ready:
            self._ready.extend(self._ahead.popleft().result())
            self._ahead.append(self._thread.submit(self._make_group))
        batch, self._delivered = self._ready.popleft()
        return batch.to(self._device, non_blocking=self._pinned).unbind(0)

    @property
    def distinct_tokens(self):
        """Return the number of tokens that the first pass gave to all ranks."""
        return self._delivered["distinct_tokens"]

    @property
    def epochs(self):
        """Return tokens served / distinct tokens: 1.0 in the first pass, 0.0 before it begins."""
        return self._delivered["served_tokens"] / max(1, self.distinct_tokens)

    def state_dict(self):
        """Return the JSON-able state after the last batch, equal on all ranks after a step."""
        return self._planner.state_dict(self._delivered)

    def __exit__(self, *_):
        self._thread.shutdown(cancel_futures=True)

    def _make_group(self):
        return [self._make_batch() for _ in range(self._group_batches)]

    def _make_batch(self):
        """Plan one micro-batch per rank, read the rows of this rank."""
        plan = [self._planner.next_row() for _ in range(next(self._n_planned_rows))]
        rows = fill_rows(self._shards, plan[self._own_rows], self._planner.row_tokens)
        batch = torch.empty(self._shape, dtype=torch.int64, pin_memory=self._pinned)
        batch.numpy()[0] = rows[:, :-1]
        batch.numpy()[1] = rows[:, 1:]
        return batch, self._planner.snapshot()


def n_batches_of_rank(n_batches, rank, world_size):
    """Return how many of n_batches micro-batches a rank gets when they are dealt out in turn."""
    return len(range(rank, n_batches, world_size))


def fill_rows(shards, plan, row_tokens):
    """Return the token ids of planned rows, (len(plan), row_tokens) in the shards' dtype.

    Every row begins with BOS; BOS also fills the rest of a row that is planned shorter.
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
    return rows


class RowPlanner:
    """Plan rows of `row_tokens` tokens (at least 2) from document lengths.

    A row repeatedly takes the longest buffered document that fits into its remaining space, the
    oldest of equal length. If none fits, a document is cropped to fill the space: under "drop"
    (upstream's rule) the shortest, and its rest is lost for this epoch; under "carry" the oldest,
    so that rows of one document lie far apart, and its rest returns to the buffer as the youngest
    entry, with BOS in front. An epoch under "carry" serves every token once.

    The buffer holds up to BUFFER_DOCUMENTS documents, under "carry" of one epoch only. The rows
    depend on (documents, seed, crop) only. n_docs: plan one pass over the first n_docs documents
    instead of endless epochs; the last row may be shorter, and the rows after it are empty.
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
        # Sorted (length, -arrival, shard, document, start, epoch): of equal length, oldest last.
        self._buffer = []
        self._by_age = OrderedDict()  # {-arrival: entry}, the oldest first
        self._n_arrivals = 0
        if state is not None:
            self._restore(state)
        self._refill()

    def next_row(self):
        """Return the next row as segments (shard, document, start, length).

        A segment is tokens start .. start + length - 1 of the document. If start > 0, its first
        token has been served before, and BOS replaces it.
        """
        row = []
        space = self.row_tokens
        while space and self._buffer:
            entry = self._buffer.pop(self._choose(space))
            available, arrival, shard, document, start, epoch = entry
            del self._by_age[arrival]
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
        """Return the state for state_dict(), cheap enough for every batch."""
        return {"documents": self.order.fingerprint, "crop": self.crop,
                "epoch": self.order.epoch, "position": self.order.position,
                "buffer": list(self._by_age.values()),
                "served_tokens": self._served_tokens, "distinct_tokens": self._distinct_tokens}

    @staticmethod
    def state_dict(snapshot):
        """Return a snapshot in JSON-able form."""
        return {**snapshot, "buffer": [list(entry[2:]) for entry in snapshot["buffer"]]}

    def _restore(self, state):
        same_rows = (state["documents"], state["crop"]) == (self.order.fingerprint, self.crop)
        if not same_rows or any(len(entry) != 4 for entry in state["buffer"]):
            raise UserError("the data loader's state belongs to other documents, another seed, "
                            "another --crop or an earlier version of this program; resume with "
                            "the text, tokenizer and flags of the run, or start it again")
        self._served_tokens = state["served_tokens"]
        self._distinct_tokens = state["distinct_tokens"]
        self.order.seek(state["epoch"], state["position"])
        for shard, document, start, epoch in state["buffer"]:
            self._put(self.order.length(shard, document) - start, shard, document, start, epoch)

    def _choose(self, space):
        """Return the buffer index of the entry that the packing rule takes next."""
        # Arrivals are negated: (length, 1) sorts after all entries of that length.
        at = bisect_right(self._buffer, (space, 1)) - 1
        if at >= 0:
            return at
        if self._carries:
            return bisect_left(self._buffer, next(iter(self._by_age.values())))
        return bisect_right(self._buffer, (self._buffer[0][0], 1)) - 1

    def _refill(self):
        while len(self._buffer) < self.buffer_size and self.order.position != self._pass_docs:
            if self._carries and self._buffer and self.order.position == self.order.n_docs:
                return
            drawn = self.order.draw()
            self._put(*drawn, 0, self.order.epoch)

    def _put(self, length, shard, document, start, epoch):
        entry = length, -self._n_arrivals, shard, document, start, epoch
        self._n_arrivals += 1
        insort(self._buffer, entry)
        self._by_age[entry[1]] = entry


class DocumentOrder:
    """The endless order of documents: per epoch the shards shuffled, and the documents per shard.

    It sorts raw draws of a seeded generator, which numpy keeps stable, unlike its shuffles.
    """

    def __init__(self, shards, seed, shuffle):
        self._shards = shards
        self._seed = seed
        self._shuffle = shuffle
        # first_documents: per shard, the index of its first document in the split.
        *self.first_documents, self.n_docs = accumulate((x.n_docs for x in shards), initial=0)
        if not self.n_docs:
            raise UserError("the split has no documents: no shards, or empty shards")
        identity = [seed if shuffle else None]
        identity += [(shard.path.name, shard.n_docs, shard.n_tokens) for shard in shards]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.seek(0, 0)

    def draw(self):
        """Return (length, shard, document) of the next document."""
        drawn = next(self._rest, None)
        if drawn is None:
            self.seek(self.epoch + 1, 0)
            drawn = next(self._rest)
        self.position += 1
        return drawn

    def seek(self, epoch, position):
        """Continue after the first `position` documents of `epoch`."""
        self.epoch, self.position = epoch, position
        self._rest = self._rest_of_epoch(position)

    def _rest_of_epoch(self, position):
        for shard in self._permutation(len(self._shards), 0).tolist():
            n_docs, offsets = self._shards[shard].n_docs, self._shards[shard].offsets
            documents = self._permutation(n_docs, 1 + shard)[position:]
            position = max(0, position - n_docs)
            yield from zip(np.diff(offsets)[documents].tolist(), repeat(shard), documents.tolist())

    def length(self, shard, document):
        start, end = self._shards[shard].offsets[document : document + 2]
        return int(end - start)

    def _permutation(self, n, stream):
        if not self._shuffle:
            return np.arange(n)
        generator = np.random.PCG64(np.random.SeedSequence((self._seed, self.epoch, stream)))
        return np.argsort(generator.random_raw(n), kind="stable")
