"""Work on one corpus shared out over processes and torchrun ranks: the tasks are the same however many do them."""

import contextlib
import hashlib
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nanochat.errors import UserError
from nanochat.files import atomic_path

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_corpus = None    # of a worker process


def run_tasks(documents, tasks, processes, ranks, shared_path):
    """The results of tasks [(function, argument)], in order: function(documents, argument). None on ranks but 0.

    Each rank does its share in `processes` workers and leaves the results beside shared_path, where rank 0 waits for
    them. Workers have one thread each, so sums come out bit for bit the same. function: of a module, by its name; it
    returns a tuple of numbers and arrays.
    """
    own = list(range(ranks.rank, len(tasks), ranks.world_size))
    results = dict(zip(own, _run_own(documents, [tasks[i] for i in own], processes, ranks), strict=True))
    if ranks.world_size > 1:
        what = (documents.vocab_size, [(function.__name__, argument) for function, argument in tasks])
        digest = hashlib.sha256(documents.hashes.tobytes() + repr(what).encode()).hexdigest()
        parts = [Path(f"{shared_path}.{digest[:12]}.rank{rank}") for rank in range(ranks.world_size)]
        if not ranks.is_main:
            arrays = {f"{task}.{place}": value for task in own for place, value in enumerate(results[task])}
            with atomic_path(parts[ranks.rank]) as path, open(path, "wb") as file:
                np.savez(file, **arrays)
            return None
        for part in parts[1:]:
            while not part.exists():  # renamed into place when whole
                time.sleep(0.2)
            with np.load(part, allow_pickle=False) as arrays:
                for name, value in arrays.items():  # in the order in which they were written
                    results.setdefault(int(name.split(".")[0]), []).append(value if value.ndim else value.item())
            part.unlink()
    return [results[i] for i in range(len(tasks))]


def _run_own(documents, tasks, processes, ranks):
    spawn = multiprocessing.get_context("spawn")
    with _single_threads(), ProcessPoolExecutor(processes, spawn, _take_corpus, (documents,)) as pool:
        futures = [pool.submit(_work, *task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), total=len(tasks), desc="statistics", unit="task",
                               disable=not ranks.is_main):
                future.result()  # what failed is raised at once
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UserError("a worker process was killed, most likely for lack of memory; use fewer --processes "
                            "or a smaller --max-tokens") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _take_corpus(documents):
    global _corpus
    _corpus = documents


def _work(function, argument):
    return function(_corpus, argument)


@contextlib.contextmanager
def _single_threads():
    """Processes started within have single-threaded linear algebra: no contention, and one order of summation."""
    before = dict(os.environ)
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
