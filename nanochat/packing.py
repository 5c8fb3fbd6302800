"""Documents -> rows: best-fit packing, in an order of the documents that a seed decides. No torch.

Of documents only the lengths are looked at. One endless sequence of rows, which depends on (documents, seed, crop) and
on nothing else.
"""

import hashlib
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import accumulate

import numpy as np

from nanochat.common import UserError

BUFFER_DOCUMENTS = 1000
CROPS = ("carry", "drop")  # what becomes of the rest of a document that was cropped to fill a row


class RowPlanner:
    """Packs documents into rows of `row_tokens` tokens (at least 2), looking at lengths only.

    A row takes, again and again, the longest buffered document that fits into what is left of it; when none fits, one
    is cropped to fill it. crop="drop": the shortest, and its rest is lost for this epoch. "carry": the oldest, so that
    rows of one document lie far apart, and its rest goes back into the buffer, the youngest there, with BOS in front;
    an epoch serves every token once. Among equals the oldest goes first. The buffer holds BUFFER_DOCUMENTS documents,
    or all there are, and is refilled after every document taken, under "carry" with those of one epoch at a time.
    """

    def __init__(self, shards, row_tokens, seed, shuffle, crop="drop", state=None):
        assert row_tokens >= 2 and crop in CROPS
        self.order = DocumentOrder(shards, seed, shuffle)
        self.row_tokens, self.crop = row_tokens, crop
        self.buffer_size = min(BUFFER_DOCUMENTS, self.order.n_docs)
        self._arguments = shards, row_tokens, seed, shuffle
        self._served_tokens = self._distinct_tokens = 0
        self._marks = None  # drop: the most tokens ever served of each document, once a second epoch has begun
        # (length, -arrival, shard, document, start), sorted: shortest first, the oldest last among equals
        self._buffer = []
        self._queue = deque()  # carry: the same entries by arrival, some of them gone from the buffer
        self._arrivals = 0
        if state is None:
            self._refill()
        else:
            self._restore(state)

    def next_row(self):
        """The next row as segments (shard, document, start, length): `length` tokens of that document from `start` on.

        Where start > 0 the first of them has been served already, and BOS takes its place.
        """
        buffer, row, space, carries, n_added_bos = self._buffer, [], self.row_tokens, self.crop == "carry", 0
        while space:
            at = bisect_right(buffer, (space, 1)) - 1  # arrivals are negated, so 1 lies after all of length `space`
            if at < 0:
                at = self._oldest() if carries else bisect_right(buffer, (buffer[0][0], 1)) - 1
            whole, _, shard, document, start = buffer.pop(at)
            length = min(whole, space)
            row.append((shard, document, start, length))
            space -= length
            if not carries:
                self._draw()
                continue
            n_added_bos += start > 0 or whole > length == 1  # of a document just begun, BOS alone is no progress
            if whole > length:
                self._put(whole - length + 1, shard, document, start + length - 1)
            elif not buffer or self.order.position < self.order.n_docs:
                self._refill()
        if self._marks is not None or (self.order.epoch and not carries):
            self._mark(row)
        self._served_tokens += self.row_tokens - n_added_bos
        return row

    def counts(self):
        """Tokens of documents in the rows so far (BOS put in front of a rest is none), and how many are distinct."""
        served = self._served_tokens
        if self.crop == "carry":
            return served, min(served, self.order.n_tokens)
        return served, self._distinct_tokens if self.order.epoch else served

    def snapshot(self):
        """The state as cheaply as it can be taken; `state_dict` makes it JSON-able."""
        return self.order.epoch, self.order.position, self._buffer.copy()

    def state_dict(self, snapshot, served_tokens, distinct_tokens):
        """JSON-able state of a snapshot and the counts that go with it."""
        epoch, position, buffer = snapshot
        oldest_first = sorted(buffer, key=lambda entry: -entry[1])
        return {"documents": self.order.fingerprint, "crop": self.crop, "epoch": epoch, "position": position,
                "served_tokens": served_tokens, "distinct_tokens": distinct_tokens,
                "buffer": [entry[2:] for entry in map(list, oldest_first)]}

    def _restore(self, state):
        if state["documents"] != self.order.fingerprint:
            raise UserError("the data loader's state belongs to other documents or another seed; resume with the "
                            "dataset, the tokenizer and the seed the run was started with")
        if (crop := state.get("crop", "drop")) != self.crop:
            raise UserError(f"the data loader's state is of --crop {crop}, not {self.crop}; resume with --crop {crop}")
        here = state["epoch"], state["position"]
        if "served_tokens" in state:
            self._served_tokens, self._distinct_tokens = state["served_tokens"], state["distinct_tokens"]
        else:  # of an earlier version, which did not count; every row moves the position
            self._count_again(lambda planner: (planner.order.epoch, planner.order.position) < here)
        self.order.seek(*here)
        for shard, document, start in (([*entry, 0])[:3] for entry in state["buffer"]):  # earlier versions: no start
            self._put(self.order.length(shard, document) - start, shard, document, start)

    def _refill(self):
        while len(self._buffer) < self.buffer_size:
            self._draw()

    def _draw(self):
        self._put(*self.order.draw())

    def _oldest(self):
        """Where in the buffer the entry is that has been there longest."""
        while True:
            entry = self._queue.popleft()
            at = bisect_left(self._buffer, entry)
            if at < len(self._buffer) and self._buffer[at] == entry:
                return at

    def _put(self, length, shard, document, start=0):
        entry = length, -self._arrivals, shard, document, start
        insort(self._buffer, entry)
        if self.crop == "carry":
            self._queue.append(entry)
            if len(self._queue) > 4 * self.buffer_size:  # most are gone from the buffer
                self._queue = deque(sorted(self._buffer, key=lambda entry: -entry[1]))
        self._arrivals += 1

    def _mark(self, row):
        """Count a row's distinct tokens: every segment is the beginning of its document."""
        if self._marks is None:
            self._count_again(lambda planner: planner._served_tokens < self._served_tokens)
        marks, firsts = self._marks, self.order.first_documents
        for shard, document, _, length in row:
            at = firsts[shard] + document
            if length > marks[at]:
                self._distinct_tokens += length - marks[at]
                marks[at] = length

    def _count_again(self, is_before):
        """Take over the counts of a planner that begins anew and goes on while `is_before(planner)`.

        Planning takes a hundredth of training's time, is needed after a resume in a later epoch alone, and keeps an
        entry for each document out of the state.
        """
        planner = RowPlanner(*self._arguments)
        planner._marks = array("i", bytes(4 * planner.order.n_docs))
        while is_before(planner):
            planner.next_row()
        self._marks, self._served_tokens = planner._marks, planner._served_tokens
        self._distinct_tokens = planner._distinct_tokens


class DocumentOrder:
    """The endless order of documents: in every epoch the shards shuffled, and the documents inside each shard.

    Depends on (documents, seed) alone, in every version of numpy: it promises that raw draws of a seeded
    generator never change, and makes no such promise for its shuffles, so draws are sorted here.
    """

    def __init__(self, shards, seed, shuffle):
        if seed < 0:
            raise UserError(f"the seed is {seed}; use 0 or more")
        self._shards, self._seed, self._shuffle = shards, seed, shuffle
        *self.first_documents, self.n_docs = accumulate((shard.n_docs for shard in shards), initial=0)
        self.n_tokens = sum(shard.n_tokens for shard in shards)
        if not self.n_docs:
            raise UserError("there are no documents to read: the split has no shards, or they are empty")
        identity = [seed if shuffle else None, *((shard.path.name, shard.n_docs, shard.n_tokens) for shard in shards)]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.seek(0, 0)

    def draw(self):
        """(length, shard, document) of the next document."""
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
        self.epoch, self.position = epoch, position
        self._shard_order = self._permutation(len(self._shards), 0)
        ends = np.cumsum([self._shards[shard].n_docs for shard in self._shard_order])
        slot = min(int(np.searchsorted(ends, position, side="right")), len(ends) - 1)
        self._enter(slot)
        self._next = int(position - ends[slot] + self._shards[self._shard].n_docs)

    def length(self, shard, document):
        start, end = self._shards[shard].offsets[document:document + 2]
        return int(end - start)

    def _enter(self, slot):
        self._slot, self._next = slot, 0
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
