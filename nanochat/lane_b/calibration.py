"""Calibration runs: their curves and what they share, from the records of base_train."""

from dataclasses import dataclass, fields
from statistics import median

import numpy as np

from nanochat.common import UserError
from nanochat.config import TrainingConfig, model_config, run_horizon
from nanochat.gpt import flops_per_token, scaling_params
from nanochat.lane_b import Refusal
from nanochat.lane_b.curves import Curve
from nanochat.schedule import lr_multipliers
from nanochat.target import evaluations_of

MIN_STEPS = 440  # the fixed warm-ups dominate shorter runs
MIN_EVALUATIONS = 5  # after the warm-ups
MAX_BATCH_FACTOR = 4  # between calibration runs; more was not tested
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr")
SCHEDULE = ("warmup_steps", "warmdown_ratio", "final_lr_frac")
RECIPE = (*SCHEDULE, "scalar_lr", "weight_decay", "aspect_ratio", "head_dim", "max_seq_len",
          "window_pattern", "crop", "eval_tokens")  # flags that must be equal, with the RATES


@dataclass(frozen=True)
class Setup:
    """What the calibration runs share. Steps are reference steps, of `step_tokens` tokens each.

    The learning rates are proportional to the root of the batch, so that progress is proportional
    to tokens: two steps of half the batch are one reference step.
    """

    config: TrainingConfig  # its depth and horizon are those of one of the runs
    vocab_size: int
    dataset_id: str
    tokenizer_id: str
    step_tokens: int
    train_tokens: int | None
    step_sec: dict  # {depth: measured seconds per reference step}

    def model(self, depth):
        return model_config(self.config, self.vocab_size, depth)

    def n_params(self, depth):
        return scaling_params(self.model(depth))

    def batch(self, depth):
        """Return the tokens per step that a run has: the recipe's if its batch is automatic."""
        if self.config.total_batch_size != -1:
            return self.step_tokens
        return run_horizon(self.config, self.model(depth)).total_batch_size_tokens

    def step_flops(self, depth):
        return flops_per_token(self.model(depth)) * self.step_tokens

    def seconds(self, depth):
        """Return seconds per step: measured, or by FLOPs at the rate of the largest measured."""
        largest = max(self.step_sec)
        rate = self.step_sec[largest] / self.step_flops(largest)
        return self.step_sec.get(depth, rate * self.step_flops(depth))

    def own_steps(self, depth, ratio):
        """Return the horizon of a run in steps of its own batch."""
        return int(ratio * self.n_params(depth)) // self.batch(depth)

    def steps(self, depth, ratio):
        return self.own_steps(depth, ratio) * self.batch(depth) // self.step_tokens

    def multipliers(self, steps, batch=None):
        """Return the learning-rate multipliers, per reference step, of `steps` of a batch."""
        shape = {name: getattr(self.config, name) for name in SCHEDULE}
        factor = (batch or self.step_tokens) / self.step_tokens
        middle = (np.arange(round(steps * factor)) + 0.5) / factor - 0.5
        return np.interp(middle, np.arange(steps), lr_multipliers(steps, **shape))


def setup_of(records, timing=(), half_rates=()):
    """Return the Setup of calibration runs.

    timing: further runs, for the seconds per step only. half_rates: runs at half the learning
    rates. Raise Refusal if the runs differ in a setting that changes their curves.
    """
    first = records[0]
    if len({record.run_id for record in records}) < len(records):
        raise Refusal("a calibration run is given twice; give it once", "mixed_setup")
    for record in [*records, *timing]:
        _check_same(first, record)
    for record in half_rates:
        _check_same(first, record, scale=0.5)
    largest = max(records, key=lambda record: of(record, "n_scaling_params"))
    step_tokens, step_sec = of(largest, "total_batch_size_tokens"), {}
    for record in [*records, *timing]:
        milliseconds = (record.summary or {}).get("dt_median_ms")
        if not milliseconds:
            raise Refusal(f"run {record.run_id} has no step time (dt_median_ms): it is not "
                          "complete; repeat it or leave it out", "incomplete_run")
        seconds = milliseconds / 1e3 * step_tokens / of(record, "total_batch_size_tokens")
        step_sec.setdefault(of(record, "flags")["depth"], []).append(seconds)
    known = {f.name for f in fields(TrainingConfig)} - {"target_metric_threshold", "stop_at_target"}
    config = TrainingConfig(**{k: v for k, v in of(largest, "flags").items() if k in known})
    return Setup(config, of(first, "model_config")["vocab_size"], of(first, "dataset_id"),
                 of(first, "tokenizer_id"), step_tokens,
                 first.config.get("train_tokens"), {d: median(s) for d, s in step_sec.items()})


def curve_of(record, setup):
    """Return the Curve of a complete run. Raise Refusal for a run that cannot calibrate."""
    horizon, summary = of(record, "num_iterations"), record.summary or {}
    if record.status != "ok" or summary.get("steps") != horizon:
        raise Refusal(f"run {record.run_id} is not complete (status {record.status}); repeat it "
                      "or leave it out", "incomplete_run")
    if horizon < MIN_STEPS:
        raise Refusal(f"run {record.run_id} has {horizon} steps, at least {MIN_STEPS} are needed: "
                      "the warm-ups dominate shorter runs; use larger depths", "short_runs")
    if (summary.get("epochs") or 0) > 1:
        raise Refusal(f"run {record.run_id} read its text {summary['epochs']:.2f} times: its curve "
                      "is that of repetition; give more text or smaller depths", "repeated_text")
    if any(event.get("changed") for event in record.of("resume")):
        raise Refusal(f"run {record.run_id} was resumed with changes (--allow-changed): its curve "
                      "is not that of one schedule; repeat it or leave it out", "changed_run")
    (steps, loss), batch = losses_of(record), of(record, "total_batch_size_tokens")
    multipliers = setup.multipliers(horizon, batch)
    shares = steps * batch / setup.step_tokens
    curve = Curve(of(record, "n_scaling_params"), multipliers,
                  np.minimum(shares.round().astype(int), len(multipliers)), loss)
    n_late = len(curve.late().steps)
    if n_late < MIN_EVALUATIONS or steps[-1] != horizon:
        raise Refusal(f"run {record.run_id} has {n_late} evaluations after the warm-ups (need "
                      f"{MIN_EVALUATIONS} and one at the end); lower --eval-every",
                      "few_evaluations")
    return curve


def losses_of(record):
    """Return the steps and the val_bpb of a run's finite evaluations, but for step 0."""
    found = [e for e in evaluations_of(record.events, "val_bpb") if e.step and e.metric]
    return np.array([e.step for e in found], dtype=int), np.array([e.metric for e in found])


def _check_same(first, record, scale=1.0):
    """Raise Refusal unless two runs differ only in depth, horizon, seed.

    scale: expected factor on the learning rates of `record`.
    """
    pairs = [(name, of(first, name), of(record, name)) for name in ("dataset_id", "tokenizer_id")]
    for name in RATES + RECIPE:
        expected, value = of(first, "flags").get(name), of(record, "flags").get(name)
        pairs.append((name, expected * scale if name in RATES else expected, value))
    for name, expected, value in pairs:
        if value != expected:
            raise Refusal(f"runs {first.run_id} and {record.run_id} differ in {name} ({expected} "
                          f"and {value}); calibrate with one text and recipe", "mixed_setup")
    batches = sorted(of(run, "total_batch_size_tokens") for run in (first, record))
    if batches[1] > MAX_BATCH_FACTOR * batches[0]:
        raise Refusal(f"the batches of runs {first.run_id} and {record.run_id} differ by more than "
                      f"a factor of {MAX_BATCH_FACTOR} ({batches[0]} and {batches[1]} tokens); "
                      "calibrate with similar batches", "mixed_batch")


def of(record, name):
    """Return a field of a run's config.json. Raise UserError if it is missing."""
    if record.config.get(name) is None:
        raise UserError(f"{record.folder}: its record has no {name}; it was not written by "
                        "scripts.base_train")
    return record.config[name]
