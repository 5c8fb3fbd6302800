"""Training protocols (profiles) and the sets of flags that are compared (candidates)."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, base_dir

BASELINE = "baseline"

# name: flags in addition to those of the baseline, which are `candidate_flags` in the ledger
CANDIDATES = {
    BASELINE: "",
    "fused-rmsnorm": "--fused-rmsnorm",
    "chunked-ce": "--chunked-ce",
    "both": "--fused-rmsnorm --chunked-ce",
}


@dataclass(frozen=True)
class Profile:
    """A training protocol. It fixes all but the candidate, seed, depth and target.

    n_train_files: training shards to download (None: a demonstration, whose text is made on this
    machine).
    """

    description: str
    depth: int
    dataset: str
    flags: str
    vocab_size: int = 8192
    n_train_files: int | None = None

    def command_flags(self, depth):
        """Return the base_train flags of a run at `depth`, in the order of the protocol."""
        return [f"--depth={depth}", *shlex.split(self.flags), "--run=dummy",
                f"--tokenizer-dir={self.tokenizer_dir()}", f"--dataset={self.dataset}"]

    def tokenizer_dir(self):
        return base_dir() / f"tokenizer_{self.dataset}"

    def ledger(self):
        """Return the ledger of its runs, which people commit; that of demonstrations is cached."""
        return (Path("dev") if self.n_train_files else base_dir()) / "experiments.csv"


_CPU = "--device-type=cpu --aspect-ratio=64 --head-dim=64 --window-pattern=L "
_EVALUATE_ONLY = "--core-metric-every=-1 --sample-every=-1 --save-every=0"
# 16 times the recipe's learning rates: at 2,048 tokens per step the automatic scale is much too low
_LEARNING_RATES_2048 = "--matrix-lr=0.32 --embedding-lr=4.8 --unembedding-lr=0.128 "

PROFILES = {
    "d12-protocol": Profile(
        "compares step times and early losses on one GPU in 24.6M tokens; nanochat's d12 is "
        "trained on 1.3B tokens", 12, "climbmix",
        "--head-dim=128 --window-pattern=L --max-seq-len=512 --device-batch-size=16 "
        "--total-batch-size=16384 --eval-every=100 --eval-tokens=524288 --core-metric-every=-1 "
        "--sample-every=-1 --save-every=-1 --num-iterations=1500",
        vocab_size=32768, n_train_files=8),
    "miniseries": Profile(
        "complete schedules on GPUs: horizon and batch follow from the depth", 12, "climbmix",
        "--target-param-data-ratio=12 --eval-every=250 " + _EVALUATE_ONLY,
        vocab_size=32768, n_train_files=8),
    "cpu": Profile(
        "demonstration: d12-protocol scaled to a CPU", 4, "stdlib",
        _CPU + "--max-seq-len=256 --device-batch-size=8 --total-batch-size=2048 "
        "--num-iterations=300 --eval-every=50 --eval-tokens=65536 "
        + _LEARNING_RATES_2048 + _EVALUATE_ONLY),
    "cpu-short": Profile(
        "smoke test: 60 steps, short enough for kernels in the Triton interpreter; no verdict",
        2, "stdlib",
        _CPU + "--max-seq-len=128 --device-batch-size=4 --total-batch-size=512 "
        "--num-iterations=60 --eval-every=10 --eval-tokens=8192 " + _EVALUATE_ONLY),
}


def candidate_flags(name):
    """Return (name, flags) of a known candidate, or of a candidate given as NAME=FLAGS."""
    known, equals, flags = name.partition("=")
    if "." in known:
        raise UserError(f"the name of candidate {known!r} must not have a dot")
    if equals:
        try:
            return known, shlex.join(shlex.split(flags))
        except ValueError as error:
            raise UserError(f"candidate {known!r}: its flags {flags!r} do not parse ({error}); "
                            "close the quote") from None
    if known not in CANDIDATES:
        raise UserError(f"no candidate {name!r}; use one of {', '.join(CANDIDATES)}, or give "
                        "NAME='--its-flags ...'")
    return known, CANDIDATES[known]
