"""What an experiment trains: the protocols (profiles) and what is compared under them (candidates)."""

import shlex
from dataclasses import dataclass

from nanochat.common import UserError, base_dir

BASELINE = "baseline"

# A candidate is the flags that set it apart from the baseline; the ledger's `candidate_flags` is its identity.
CANDIDATES = {
    BASELINE: "",
    "fused-rmsnorm": "--fused-rmsnorm",
    "chunked-ce": "--chunked-ce",
    "both": "--fused-rmsnorm --chunked-ce",
}
PINNED = ("--run=dummy", "--crop=drop")  # of every profile: no wandb, and upstream's packing rule


@dataclass(frozen=True)
class Profile:
    """A training protocol: everything but candidate, seed, depth and target is fixed by it.

    n_train_files: what is downloaded of the dataset (None: it is made here). series, series_depths: what gate 4 judges
    by.
    """

    description: str
    depth: int
    dataset: str
    flags: str
    vocab_size: int = 8192
    n_train_files: int | None = None
    min_seeds: int = 1
    series: str = ""
    series_depths: tuple[int, ...] = (2, 3, 4)

    def command_flags(self, depth):
        """The base_train flags of a run at `depth`, in the protocol's order."""
        return [f"--depth={depth}", *shlex.split(self.flags), *PINNED]

    def tokenizer_dir(self):
        """The folder of the tokenizer of this vocabulary and dataset."""
        return base_dir() / f"tokenizer_{self.dataset}"


_CPU = "--device-type=cpu --aspect-ratio=64 --head-dim=64 --window-pattern=L"
_ENDS_ALONE = "--core-metric-every=-1 --sample-every=-1 --save-every=0"  # no checkpoint at all; -1: one at the end
# the recipe's learning rates times 16: at 2,048 tokens a step the automatic scale makes them much too low (dev/LOG.md)
_UNSCALED_2048 = "--matrix-lr=0.32 --embedding-lr=4.8 --unembedding-lr=0.128"
PROFILES = {
    "d12": Profile(
        "the d12 baseline protocol: 1500 steps of 16384 tokens, on one GPU", 12, "climbmix",
        "--head-dim=128 --window-pattern=L --max-seq-len=512 --device-batch-size=16 --total-batch-size=16384 "
        "--eval-every=100 --eval-tokens=524288 --core-metric-every=-1 --sample-every=-1 --save-every=-1 "
        "--num-iterations=1500", vocab_size=32768, n_train_files=8, min_seeds=2, series="miniseries",
        series_depths=(8, 10, 12, 14)),
    "cpu": Profile(
        "the same shape of protocol on a CPU: d4, 300 steps of 2048 tokens", 4, "stdlib",
        f"{_CPU} --max-seq-len=256 --device-batch-size=8 --total-batch-size=2048 --num-iterations=300 --eval-every=50 "
        f"--eval-tokens=65536 {_UNSCALED_2048} {_ENDS_ALONE}", series="cpu"),
    "cpu-short": Profile(
        "the same shape in miniature, d2, 60 steps of 512 tokens: lane C's kernels run in the Triton interpreter there",
        2, "stdlib",
        f"{_CPU} --max-seq-len=128 --device-batch-size=4 --total-batch-size=512 --num-iterations=60 --eval-every=10 "
        f"--eval-tokens=8192 {_ENDS_ALONE}", series="cpu-short"),
    "miniseries": Profile(
        "whole schedules at each depth: horizon and batch follow from the depth", 12, "climbmix",
        f"--target-param-data-ratio=12 --eval-every=250 {_ENDS_ALONE}", vocab_size=32768, n_train_files=8,
        series="miniseries", series_depths=(8, 10, 12, 14)),
}


def find_profile(name):
    """The profile of that name. Errors: UserError naming those there are."""
    if name not in PROFILES:
        raise UserError(f"no profile {name!r}; use one of {', '.join(PROFILES)}")
    return PROFILES[name]


def candidate_flags(name):
    """A known candidate's flags, or those of NAME=FLAGS. Errors: UserError for an unknown name or an open quote."""
    known, equals, flags = name.partition("=")
    if equals:
        try:
            return known, shlex.join(shlex.split(flags))
        except ValueError as error:
            raise UserError(f"candidate {known!r}: its flags {flags!r} do not parse ({error})") from None
    if known not in CANDIDATES:
        raise UserError(f"no candidate {name!r}; use one of {', '.join(CANDIDATES)}, or give NAME='--its-flags ...'")
    return known, CANDIDATES[known]


def candidate_name(flags):
    """The name that `flags` are known by; flags without a name are their own."""
    return next((name for name, known in CANDIDATES.items() if known == flags), flags)
