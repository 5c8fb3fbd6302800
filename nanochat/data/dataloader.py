"""Documents -> rows of tokens: best-fit packing, a state exact to the row, batches prepared ahead in a thread.

A planner decides from the documents' lengths alone what each row holds: one endless sequence of rows that depends on
(documents, seed) and on nothing else. Rank r of W fills its micro-batches k*W + r from it, so that two ranks see what
one rank with twice the accumulation sees, and a run may go on with another number of ranks.
"""

import hashlib
from bisect import bisect_right, insort
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanochat.data.tokens import damaged
from nanochat.errors import UserError

BUFFER_DOCUMENTS = 1000
# Batches are handed over in groups: one by one, small batches would spend a third of their time on the handing over.
GROUP_TOKENS, GROUP_BATCHES = 1 << 16, 32
GROUPS_AHEAD = 3


class TokenLoader:
    """Endless iterator over (inputs, targets), each (batch_rows, sequence_len) int64 on `device`, contiguous.

    targets are inputs one position later. int64 for both: cross-entropy demands it of targets, and a batch is
    half a megabyte. On CUDA the copy leaves from pinned memory and does not block.
    shuffle=False takes the documents as they lie: a new loader of the validation split serves the same rows each time.
    Errors: UserError for shards without documents, a state of other documents, a token outside the vocabulary.
    """

    def __init__(self, shards, batch_rows, sequence_len, seed=0, *, rank=0, world_size=1, device="cpu",
                 shuffle=True, state=None):
        assert batch_rows >= 1 and sequence_len >= 1 and 0 <= rank < world_size
        self._planner = RowPlanner(shards, sequence_len + 1, seed, shuffle, state)
        self._shards, self._batch_rows, self._sequence_len = shards, batch_rows, sequence_len
        self._rank, self._world_size = rank, world_size
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        self._delivered = self._planner.snapshot()
        if self._pinned:  # pinning memory in a thread that knows no device would wake GPU 0
            self._thread = ThreadPoolExecutor(1, "loader", torch.cuda.set_device, (torch.cuda.current_device(),))
        else:
            self._thread = ThreadPoolExecutor(1, "loader")
        self._group_batches = min(GROUP_BATCHES, -(-GROUP_TOKENS // (batch_rows * sequence_len)))
        self._ready = deque()
        self._ahead = deque(self._thread.submit(self._prepare_group) for _ in range(GROUPS_AHEAD))

    def __iter__(self):
        return self

    def __next__(self):
        if not self._ready:
            self._ready.extend(self._next_group())
        batch, self._delivered = self._ready.popleft()
        return batch.to(self._device, non_blocking=self._pinned).unbind(0)

    @property
    def epochs(self):
        """How often the documents have been gone through as of the batch delivered last, e.g. 1.25."""
        epoch, position, buffer = self._delivered
        return epoch + (position - len(buffer)) / self._planner.order.n_docs

    def state_dict(self):
        """JSON-able state after the batch delivered last, equal on all ranks; `state=` takes it."""
        return self._planner.state_dict(self._delivered)

    def close(self):
        """Stop the preparing thread. Leaving a `with` block does so too."""
        self._ready.clear()
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _next_group(self):
        assert self._ahead, "the loader is closed"
        try:
            group = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        self._ahead.append(self._thread.submit(self._prepare_group))
        return group

    def _prepare_group(self):
        return [self._prepare() for _ in range(self._group_batches)]

    def _prepare(self):
        """Plan one micro-batch of every rank, fill this rank's."""
        plan = [self._planner.next_row() for _ in range(self._world_size * self._batch_rows)]
        rows = fill_rows(self._shards, plan[self._rank * self._batch_rows:][:self._batch_rows], self._sequence_len + 1)
        batch = torch.empty(2, self._batch_rows, self._sequence_len, dtype=torch.int64, pin_memory=self._pinned)
        batch.numpy()[0] = rows[:, :-1]
        batch.numpy()[1] = rows[:, 1:]
        return batch, self._planner.snapshot()


class RowPlanner:
    """Packs documents into rows of `row_tokens` tokens, looking at lengths only.

    A row takes, again and again, the longest buffered document that fits into what is left of it; when none fits, the
    shortest is cropped to fill it and the rest of that document is dropped. Among equals the oldest goes first.
    The buffer holds BUFFER_DOCUMENTS documents, or all there are, and is refilled after every document taken.
    """

    def __init__(self, shards, row_tokens, seed, shuffle, state=None):
        self.order = DocumentOrder(shards, seed, shuffle)
        self.row_tokens = row_tokens
        self.buffer_size = min(BUFFER_DOCUMENTS, self.order.n_docs)
        self._buffer = []  # (length, -arrival, shard, document), sorted: shortest first, oldest last among equals
        self._arrivals = 0
        if state is not None:
            self._restore(state)
        while len(self._buffer) < self.buffer_size:
            self._draw()

    def next_row(self):
        """The next row as segments (shard, document, length): the first `length` tokens of that document."""
        buffer, row, space = self._buffer, [], self.row_tokens
        while space:
            at = bisect_right(buffer, (space, 1)) - 1  # arrivals are negated, so 1 lies after all of length `space`
            if at < 0:
                at = bisect_right(buffer, (buffer[0][0], 1)) - 1
            length, _, shard, document = buffer.pop(at)
            length = min(length, space)
            row.append((shard, document, length))
            space -= length
            self._draw()
        return row

    def snapshot(self):
        """The state as cheaply as it can be taken; `state_dict` makes it JSON-able."""
        return self.order.epoch, self.order.position, self._buffer.copy()

    def state_dict(self, snapshot):
        epoch, position, buffer = snapshot
        oldest_first = sorted(buffer, key=lambda entry: -entry[1])
        return {"documents": self.order.fingerprint, "epoch": epoch, "position": position,
                "buffer": [[shard, document] for _, _, shard, document in oldest_first]}

    def _restore(self, state):
        if state["documents"] != self.order.fingerprint:
            raise UserError("the data loader's state belongs to other documents or another seed; resume with the "
                            "dataset, the tokenizer and the seed the run was started with")
        self.order.seek(state["epoch"], state["position"])
        for shard, document in state["buffer"]:
            self._put(self.order.length(shard, document), shard, document)

    def _draw(self):
        self._put(*self.order.draw())

    def _put(self, length, shard, document):
        insort(self._buffer, (length, -self._arrivals, shard, document))
        self._arrivals += 1


class DocumentOrder:
    """The endless order of documents: in every epoch the shards shuffled, and the documents inside each shard.

    Depends on (documents, seed) alone, in every version of numpy: it promises that raw draws of a seeded
    generator never change, and makes no such promise for its shuffles, so draws are sorted here.
    """

    def __init__(self, shards, seed, shuffle):
        if seed < 0:
            raise UserError(f"the seed is {seed}; use 0 or more")
        self._shards, self._seed, self._shuffle = shards, seed, shuffle
        self.n_docs = sum(shard.n_docs for shard in shards)
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


def fill_rows(shards, plan, row_tokens):
    """(len(plan), row_tokens) token ids in the shards' dtype; every row begins with BOS.

    Errors: UserError naming the token id, the document and the file when an id is outside the vocabulary.
    """
    rows = np.empty((len(plan), row_tokens), shards[0].tokens.dtype)
    for row, segments in zip(rows, plan, strict=True):
        at = 0
        for shard, document, length in segments:
            start = shards[shard].offsets[document]
            row[at:at + length] = shards[shard].tokens[start:start + length]
            at += length
    if rows.max() >= shards[0].vocab_size or (rows[:, 0] != shards[0].bos_id).any():
        _name_bad_token(shards, plan)
    return rows


def _name_bad_token(shards, plan):
    for shard, document, length in (segment for segments in plan for segment in segments):
        file = shards[shard]
        tokens = file.tokens[file.offsets[document]:][:length]
        if tokens.max() >= file.vocab_size:
            raise damaged(file.path, f"document {document} holds token id {tokens.max()}, "
                                     f"the vocabulary ends at {file.vocab_size - 1}")
        if tokens[0] != file.bos_id:
            raise damaged(file.path, f"document {document} begins with token id {tokens[0]}, not BOS {file.bos_id}")
    raise AssertionError("every segment is sound, the rows were not")
