"""A run's figures, computed from its record: what summary.json will say, and what a list of runs shows before."""

import statistics
from collections import namedtuple

from nanochat.runlog import UNTIMED_STEPS, numbers_of
from nanochat.target import METRICS, evaluations_of, time_to_target

_Step = namedtuple("_Step", "step tokens train_time_sec tok_per_sec dt_ms")


def curves_of(events):
    """What the figures are made of: the training steps' numbers, and the values of val_bpb and of CORE.

    Errors: UserError naming the step of an event that lacks a number."""
    train = [_Step(*numbers) for numbers in numbers_of(events, "train", *_Step._fields)]
    return train, *([e.metric for e in evaluations_of(events, name)] for name in METRICS)


def figures_of(events, target_metric_name=None, target_metric_threshold=None):
    """Steps, tokens, seconds, speed, val_bpb, CORE and time to target of a run's effective events, by the names that
    summary.json has. None: not there, or not finite. Errors: as curves_of."""
    train, bits, core = curves_of(events)
    timed = [step for step in train if step.step > UNTIMED_STEPS]
    target = {"target_metric_name": None, "target_metric_threshold": None,
              "time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": None}
    if target_metric_threshold is not None:
        target = time_to_target(evaluations_of(events, target_metric_name), target_metric_name,
                                target_metric_threshold).summary_fields()
    return {
        "steps": train[-1].step if train else 0,
        "tokens": train[-1].tokens if train else 0,
        "min_val_bpb": min((value for value in bits if value is not None), default=None),
        "final_val_bpb": bits[-1] if bits else None,
        "core_metric": core[-1] if core else None,
        "tok_per_sec_median": _median(step.tok_per_sec for step in timed),
        "dt_median_ms": _median(step.dt_ms for step in timed),
        "train_time_sec": train[-1].train_time_sec if train else 0.0,
        **target,
    }


def _median(values):
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
