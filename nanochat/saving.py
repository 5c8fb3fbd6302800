"""Saving off the critical path: a step waits for a copy in host memory, a thread does the rest; what is kept."""

import time
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from nanochat import checkpoint
from nanochat.distributed import GROUP_TIMEOUT, on_main


class Saver:
    """Saves a run's checkpoints in a thread, one at a time. Every rank has one, and calls `save` at the same steps.

    meta: what each checkpoint's meta holds besides the loop's state; keep: how many good checkpoints are kept besides
    the best, 0 for all. A failure is kept until `collect` waits for it: ranks must end at one step.
    """

    def __init__(self, folder, meta, model, optimizer, ranks, keep=0):
        self.folder, self.longest_sec = folder, 0.0
        self._meta, self._model, self._optimizer, self._ranks, self._keep = meta, model, optimizer, ranks, keep
        # the thread's collectives may run beside the training's, so they have a group of their own
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT) if ranks.world_size > 1 else None
        self._thread = ThreadPoolExecutor(1, "saver")
        self._saving = None

    def save(self, loop_state, prepare):
        """Begin to save; what is saved is copied when this returns: whether the weights are finite.

        prepare: called on rank 0 before anything is written. What was saved before must have been collected."""
        assert self._saving is None
        began_sec = time.monotonic()
        self._optimizer.complete_weights()
        weights = self._model.state_dict()
        # on every rank, since all end together; they have the same weights
        largest = torch.stack([torch.linalg.vector_norm(value, torch.inf).float() for value in weights.values()])
        good = bool(largest.isfinite().all())
        state = _on_host([weights if self._ranks.is_main else {}, self._optimizer.state_dict()])
        if any(value.is_cuda for value in weights.values()):
            torch.cuda.synchronize()
        self._saving = self._thread.submit(self._write, state, loop_state, prepare, began_sec)
        return good

    @property
    def has_failed(self):
        """Whether `collect(wait=True)` would raise, as far as is known by now."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def collect(self, wait):
        """{path, saved_step, good} of what has been saved since the last call, or None: nothing, or not done yet.

        Errors: with `wait`, whatever ended the saving."""
        if self._saving is None or not (wait or self._saving.done()) or (self.has_failed and not wait):
            return None
        saving, self._saving = self._saving, None
        return saving.result()

    def mark_bad(self, step):
        """Should there be a checkpoint of `step`, it is of a run that diverged. Not while one is being saved."""
        assert self._saving is None
        if self._ranks.is_main:
            checkpoint.mark_bad(self.folder, step)

    def close(self):
        """Wait until nothing is being written."""
        self._thread.shutdown()

    def _write(self, state, loop_state, prepare, began_sec):
        on_main(self._ranks, prepare, self._group)
        step = loop_state["step"]
        good = checkpoint.save_checkpoint(self.folder, step, *state, {**self._meta, "loop_state": loop_state},
                                          self._ranks, self._group)
        if self._keep and self._ranks.is_main:
            checkpoint.remove_old(self.folder, step, self._keep, loop_state.get("best_step"))
        self.longest_sec = max(self.longest_sec, time.monotonic() - began_sec)
        return {"path": str(self.folder), "saved_step": step, "good": good}


def _on_host(value):
    """A copy in host memory of all tensors in lists and dicts; on CUDA it is complete after a synchronisation.

    Copied also on a CPU, where training goes on in the same memory, and alone in their storage, which torch.save would
    write whole."""
    if torch.is_tensor(value):
        copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return copy.copy_(value, non_blocking=value.is_cuda)
    if isinstance(value, dict):
        return {name: _on_host(item) for name, item in value.items()}
    return [_on_host(item) for item in value] if isinstance(value, list) else value
