"""Rows of tokens in batches: a state exact to the row, batches prepared ahead in a thread.

A RowPlanner decides what each row holds; of the micro-batches of an optimizer step, made from that one sequence, rank
r of W gets r, r + W, ...: a step has the same rows on any number of ranks, and so a state goes on with any.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import numpy as np
import torch

from nanochat.packing import RowPlanner
from nanochat.tokens import damaged

# Batches are handed over in groups: one by one, small batches would spend a third of their time on the handing over.
GROUP_TOKENS, GROUP_BATCHES = 1 << 16, 32
GROUPS_AHEAD = 3


class TokenLoader:
    """Endless iterator over (inputs, targets), each (batch_rows, sequence_len) int64 on `device`, contiguous.

    targets are inputs one position later. int64 for both: cross-entropy demands it of targets, and a batch is
    half a megabyte. On CUDA the copy leaves from pinned memory and does not block.
    shuffle=False takes the documents as they lie: a new loader of the validation split serves the same rows each time.
    crop: as RowPlanner has it; validation leaves it at "drop". step_batches: micro-batches of all ranks in a step, at
    least one a rank; left out, one each.
    Errors: UserError for shards without documents, a state of other documents, a token outside the vocabulary.
    """

    def __init__(self, shards, batch_rows, sequence_len, seed=0, *, rank=0, world_size=1, step_batches=None,
                 device="cpu", shuffle=True, crop="drop", state=None):
        step_batches = step_batches or world_size
        assert batch_rows >= 1 and sequence_len >= 1 and 0 <= rank < world_size <= step_batches
        self._planner = RowPlanner(shards, sequence_len + 1, seed, shuffle, crop, state)
        self._shards, self._batch_rows, self._sequence_len = shards, batch_rows, sequence_len
        self._own = slice(rank * batch_rows, (rank + 1) * batch_rows)
        # how many rows to plan for each batch of this rank, the first of which are for the ranks below; with its last
        # batch of a step what is left of the step: the state is that of all ranks
        n_own = n_batches_of_rank(step_batches, rank, world_size)
        counts = [world_size] * (n_own - 1) + [step_batches - world_size * (n_own - 1)]
        self._n_planned = cycle([n * batch_rows for n in counts])
        self._device = torch.device(device)
        self._pinned = self._device.type == "cuda"
        self._delivered = self._planner.snapshot(), *self._planner.counts()
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
    def distinct_tokens(self):
        """Different tokens of the split, as (document, position), in the rows of all ranks up to the last batch."""
        return self._delivered[2]

    @property
    def epochs(self):
        """Passes over these: tokens of documents served / distinct_tokens; 1.0 until one comes again, 0.0 at first."""
        return self._delivered[1] / max(1, self.distinct_tokens)

    def state_dict(self):
        """JSON-able state after the batch delivered last, equal on all ranks when a step is over; `state=` takes it."""
        return self._planner.state_dict(*self._delivered)

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
        """Plan a micro-batch of every rank, fill this rank's."""
        plan = [self._planner.next_row() for _ in range(next(self._n_planned))]
        rows = fill_rows(self._shards, plan[self._own], self._sequence_len + 1)
        batch = torch.empty(2, self._batch_rows, self._sequence_len, dtype=torch.int64, pin_memory=self._pinned)
        batch.numpy()[0] = rows[:, :-1]
        batch.numpy()[1] = rows[:, 1:]
        return batch, (self._planner.snapshot(), *self._planner.counts())


def n_batches_of_rank(n_batches, rank, world_size):
    """How many of `n_batches` micro-batches are rank's, when they are dealt out in turn."""
    return len(range(rank, n_batches, world_size))


def fill_rows(shards, plan, row_tokens):
    """(len(plan), row_tokens) token ids in the shards' dtype; every row begins with BOS.

    Errors: UserError naming the token id, the document and the file when an id is outside the vocabulary.
    """
    rows = np.empty((len(plan), row_tokens), shards[0].tokens.dtype)
    for row, segments in zip(rows, plan, strict=True):
        at = 0
        for shard, document, start, length in segments:
            first = shards[shard].offsets[document] + start
            row[at:at + length] = shards[shard].tokens[first:first + length]
            if start:
                row[at] = shards[shard].bos_id
            at += length
    if rows.max() >= shards[0].vocab_size or (rows[:, 0] != shards[0].bos_id).any():
        _name_bad_token(shards, plan)
    return rows


def _name_bad_token(shards, plan):
    for shard, document, start, length in (segment for segments in plan for segment in segments):
        file = shards[shard]
        tokens = file.tokens[file.offsets[document]:][:start + length]
        if tokens.max() >= file.vocab_size:
            raise damaged(file.path, f"document {document} holds token id {tokens.max()}, "
                                     f"the vocabulary ends at {file.vocab_size - 1}")
        if tokens[0] != file.bos_id:
            raise damaged(file.path, f"document {document} begins with token id {tokens[0]}, not BOS {file.bos_id}")
    raise AssertionError("every segment is sound, the rows were not")
