"""What the gates find: figures by name, and the one place that words them for console, change log and report."""

from dataclasses import dataclass

from nanochat.experiments.paired import Paired
from nanochat.target import BEFORE_THE_CLOCK


def listed(numbers):
    return ", ".join(map(str, numbers))


def _each(form):
    """Words for a list of tuples, each put into `form`."""
    return lambda items: "; ".join(form.format(*item) for item in items)


_DOUBTS = {"no interval": "the gain has no interval", "zero": "the gain's interval reaches zero",
           "extrapolated": "a time to target was extrapolated, not measured",
           "interpreted": "the times are the Triton interpreter's and say nothing of a kernel's; not judged on this "
                          "device, run it on a GPU"}
_WORDS = {  # by the figure's name: a form that it is put into, or a function
    "absent": _each("no run of the {} at depth {} seed {}"),
    "failed": _each("{} ended as {!r}"),
    "seeds": "{0[0]} of {0[1]} seeds",
    # 1 time
    "slower_seeds": lambda seeds: f"not lower in seed {listed(seeds)}",
    "untimed_seeds": lambda seeds: f"no time to target in seed {listed(seeds)}",
    "before_clock_seeds": lambda seeds: f"target reached {BEFORE_THE_CLOCK} in seed {listed(seeds)}",
    "no_times": "no seed has both times",
    "interpreted": "times not judged on this device: Triton was interpreted",
    "no_target": lambda labels: f"no target recorded of {'; '.join(labels)}: give one from outside",
    "own_ends": _each("the threshold {:.6g} at depth {} is an end of the baseline's own seeds: give one from outside"),
    "batches": lambda sizes: f"batches of {listed(sizes)} tokens: steps are not alike; give --total-batch-size",
    "gain_percent": lambda gain: f"gain {gain.describe('%')}",
    "gain_sec": lambda gain: gain.describe("s", 1),
    "extrapolated": lambda extrapolated: "extrapolated" if extrapolated else "measured",
    # 2 quality
    "missed": lambda labels: f"target not reached: {'; '.join(labels)}",
    "reached_seeds": "target reached in all {} seeds",
    "no_margin": "the margin needs two baseline seeds that ended well",
    "no_val_bpb": "no seed has both val_bpb",
    "no_curves": "the runs' curves are not here",
    "excess_and_margin_bpb": lambda both: f"min val_bpb {both[0].describe('bpb', 5)}, margin {both[1]:.5f}",
    "worst_bpb": "worst of the run {0[0]:+.5f} at step {0[2]:.0f}, allowed {0[1]:.5f}",
    # 3 stability
    "failed_seeds": _each("seed {} ended as {!r}"),
    "spikes": _each("seed {} has a loss spike at step {}"),
    "graph_breaks": "compiles with {} graph breaks",
    "not_resumed": "a run did not end well after a resume",
    "resume_differs_nats": "losses differ by {:.2g} nats after a resume",
    "losses_not_enough": lambda seeds: "; ".join(
        f"seed {seed} has {n} losses: too short to look for a spike" if n else f"seed {seed}'s losses are not here"
        for seed, n in seeds),
    "no_probe": "no save/resume probe",
    "uncompiled": "graph breaks were not looked for: the probe ran uncompiled",
    "stable_runs": "{} runs without NaN, spike or graph break",
    "resume_within_nats": "losses after a resume differ by {:.2g} nats at most",
    # 4 generalisation
    "no_miniseries": "no miniseries of this candidate and the baseline",
    "depths": "{0[0]} of {0[1]} depths",
    "no_margin_of_gate_2": "gate 2's margin needs two baseline seeds that ended well",
    "no_figures": "a run has no val_bpb or no time",
    "changes": lambda changes: "; ".join(change.describe() for change in changes),
}


@dataclass(frozen=True)
class Gate:
    """One gate's outcome (pass, fail, insufficient) and the figures behind it, by name, in the order of speaking."""

    name: str
    outcome: str
    figures: dict

    @property
    def detail(self):
        """The figures in words, one line."""
        forms = [(_WORDS[name], value) for name, value in self.figures.items()]
        return "; ".join(form.format(value) if isinstance(form, str) else form(value) for form, value in forms)

    @property
    def doubt(self):
        """Why the gain among the figures is not shown: no interval, zero, extrapolated; None: it is, or is not here."""
        gain = self.figures.get("gain_percent")
        if gain is None:
            return None
        if gain.lo is None or gain.lo <= 0:
            return "no interval" if gain.lo is None else "zero"
        return "extrapolated" if self.figures["extrapolated"] else None

    @property
    def standing(self):
        """The outcome; a pass whose gain is in doubt is not shown."""
        return "not shown" if self.outcome == "pass" and self.doubt else self.outcome


@dataclass(frozen=True)
class Change:
    """A candidate's relative change of one figure, Paired over depths; sign_p is the sign test's."""

    what: str
    mean: Paired
    tolerance: float
    n_worse: int
    sign_p: float

    @property
    def is_regression(self):
        """Whether it is systematic: beyond the tolerance, and worse at every depth or with its interval above zero."""
        above_zero = self.mean.lo is not None and self.mean.lo > 0
        return self.mean.mean > self.tolerance and (above_zero or self.n_worse == self.mean.n)

    def describe(self):
        mean = self.mean
        interval = "no interval" if mean.lo is None else f"interval {100 * mean.lo:+.2f} to {100 * mean.hi:+.2f}"
        return (f"{self.what} {100 * mean.mean:+.2f} % ({interval}, tolerance {100 * self.tolerance:.2f}), "
                f"worse at {self.n_worse} of {mean.n} depths (sign test p={self.sign_p:.2g})")


@dataclass(frozen=True)
class Verdict:
    """A candidate's decision: promote, optional, reject, insufficient, not judged.

    deciding: the gates that failed or lack runs. doubt: why the gain is not shown (as Gate.doubt, or interpreted).
    """

    candidate: str
    flags: str
    gates: tuple[Gate, ...]
    decision: str
    deciding: tuple[str, ...] = ()
    doubt: str | None = None

    @property
    def gain(self):
        """Percent of the baseline's time to target, Paired over seeds; None without a pair of times."""
        return self.gates[0].figures.get("gain_percent")

    @property
    def decided_by(self):
        if self.deciding:
            return "gate " + ", gate ".join(self.deciding)
        return f"gate 1 time: {_DOUBTS[self.doubt]}" if self.doubt else "all four gates"

    def describe(self):
        """Lines for the console."""
        lines = [f"{self.candidate}: {self.decision.upper()} ({self.decided_by})"]
        return lines + [f"  {gate.name:<16} {gate.standing:<13} {gate.detail}" for gate in self.gates]
