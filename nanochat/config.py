"""The configuration of a pretraining run: one frozen dataclass from which everything else follows: the command line and
its help (scripts/base_train.py), the record's `flags`, the checkpoint's `user_config`, the checks of a resumed run."""

import dataclasses
import math
from dataclasses import dataclass

from nanochat.common import UserError, check_name
from nanochat.dataset import NAMED_DATASETS
from nanochat.target import check_metric_name, check_target

DEFAULT_SEED = 42


def _topic(title):
    """A maker of the fields of one topic. unit: what the number counts, shown by --help; at_least, at_most: bounds;
    choices: the values there are; on_resume: a resumed run has the value of the run that it continues, or is given
    --allow-changed."""
    def flag(default, text, unit=None, **marks):
        return dataclasses.field(default=default, metadata={"topic": title, "help": text, "unit": unit, **marks})
    return flag


_record, _machine, _data, _model = map(_topic, ("record", "machine", "data", "model"))
_horizon, _optimization = map(_topic, ("horizon (the first that is given; -1: not)", "optimization"))
_events = _topic("evaluation, samples, checkpoints (every so many steps; -1 never)")


@dataclass(frozen=True)
class TrainingConfig:
    """What a run is asked for; field `a_b` is flag --a-b of scripts.base_train. Errors: UserError naming the flag of a
    value that no run can have. Sizes, horizon, batch and learning rates follow from it in `schedule` and `build`."""

    run: str = _record("dummy", "wandb run name; dummy turns wandb off", "NAME")
    run_id: str = _record("", "name of the run's record under <cache>/runs; empty: made from tag, time and seed", "ID")
    model_tag: str = _record(
        "", "name of the checkpoint folder; empty: d<depth> (with another seed d<depth>-s<seed>). Another run's "
        "checkpoints there, or later ones of this run, are set aside, in <tag>.before-<time> beside it", "TAG")

    quiet: bool = _record(False, "no progress on the console: what is made, and what is wrong; the record has the rest")

    device_type: str = _machine("", "cuda, mps or cpu; empty: the best there is", "KIND")
    rank_timeout_sec: float = _machine(
        30.0, "several ranks: one that is silent, or stays within its share of a training step, so long ends the job; "
        "0 never", "SECONDS", at_least=0)
    no_compile: bool = _machine(False, "run the model uncompiled (slower; starts at once)", on_resume=True)
    attention: str = _machine("auto", "auto, varlen, flex, sdpa or blockwise: what computes attention", "BACKEND",
                              choices=("auto", "varlen", "flex", "sdpa", "blockwise"), on_resume=True)
    fp8: bool = _machine(False, "the large matmuls of training in fp8, from compute capability 8.9 on; meant for large "
                         "models", on_resume=True)
    fp8_recipe: str = _machine("tensorwise", "one scale for each tensor", "NAME", choices=("tensorwise",),
                               on_resume=True)

    dataset: str = _data("climbmix", "stdlib, climbmix, fineweb-edu, or a folder of text", "NAME")
    tokenizer_dir: str = _data("", "folder of the tokenizer; empty: <cache>/tokenizer", "FOLDER")
    crop: str = _data("", "a document that fits no row: carry puts its rest into a later row, drop leaves it out; "
                      "empty: drop for the named datasets, carry for a folder", "RULE", choices=("carry", "drop"))
    seed: int = _data(DEFAULT_SEED, "seed of the initial values and of the data order", "SEED", at_least=0)

    depth: int = _model(20, "layers", "LAYERS", at_least=1, at_most=10_000)
    aspect_ratio: int = _model(64, "width = depth * aspect ratio, rounded up to whole heads", "CHANNELS")
    head_dim: int = _model(128, "channels per attention head", "CHANNELS")
    max_seq_len: int = _model(2048, "context length", "TOKENS", at_least=1)
    window_pattern: str = _model("SSSL", "attention per layer, tiled: L full, S a quarter; the last is full", "SL")
    fused_rmsnorm: bool = _model(
        False, "rotary + QK-norm in one Triton kernel; uncompiled, the other norms too (lane C)", on_resume=True)
    chunked_ce: bool = _model(False, "chunked linear cross-entropy (lane C)", on_resume=True)

    num_iterations: int = _horizon(-1, "optimizer steps", "STEPS")
    target_flops: float = _horizon(-1.0, "total training FLOPs", "FLOPS")
    target_param_data_ratio: float = _horizon(12.0, "tokens per scaling parameter", "RATIO")

    device_batch_size: int = _optimization(
        32, "rows per device and micro-batch", "ROWS", at_least=1, at_most=1 << 20, on_resume=True)
    total_batch_size: int = _optimization(-1, "tokens per optimizer step; -1: automatic", "TOKENS")
    embedding_lr: float = _optimization(0.3, "AdamW, embeddings", "LR", at_least=0, on_resume=True)
    unembedding_lr: float = _optimization(0.008, "AdamW, head", "LR", at_least=0, on_resume=True)
    matrix_lr: float = _optimization(0.02, "Muon", "LR", at_least=0, on_resume=True)
    scalar_lr: float = _optimization(0.5, "AdamW, scalars", "LR", at_least=0, on_resume=True)
    weight_decay: float = _optimization(0.28, "Muon, scheduled to 0", "DECAY", at_least=0, on_resume=True)
    warmup_steps: int = _optimization(40, "linear warmup of the learning rates", "STEPS", at_least=0, on_resume=True)
    warmdown_ratio: float = _optimization(
        0.65, "share of the steps with falling learning rates", "SHARE", at_least=0, at_most=1, on_resume=True)
    final_lr_frac: float = _optimization(0.05, "last learning rate over the peak", "SHARE", at_least=0, on_resume=True)
    resume_from_step: str = _optimization("-1", "a step, or latest: go on from that checkpoint; auto: "
                                           "from the newest whole one, or begin where there is none; -1: begin", "STEP")
    allow_changed: bool = _optimization(False, "resume although flags, dtype, device or versions that decide the "
                                        "numbers are not those of the checkpoint; the record says which")

    eval_every: int = _events(250, "validation bits per byte", "STEPS")
    eval_tokens: int = _events(80 * 524288, "tokens of each validation", "TOKENS", at_least=1, on_resume=True)
    core_metric_every: int = _events(2000, "CORE", "STEPS")
    core_metric_max_per_task: int = _events(500, "examples per CORE task; -1 all", "EXAMPLES", on_resume=True)
    sample_every: int = _events(2000, "samples from the model", "STEPS")
    save_every: int = _events(-1, "checkpoints; -1 at the end only, 0 never", "STEPS")
    save_minutes: float = _events(0.0, "a checkpoint besides whenever so long ago was the last; 0 never", "MINUTES",
                                  at_least=0)
    keep_checkpoints: int = _events(0, "the newest good ones that are kept, and the one with the best val_bpb; older "
                                    "ones go once a new one is whole; 0 all", "COUNT", at_least=0)
    time_limit_minutes: float = _events(0.0, "save and end before so long after the start, as when interrupted; 0: "
                                        "none", "MINUTES", at_least=0)
    on_nan: str = _events("stop", "stop, or rollback: where loss, validation or weights are not finite, go back to the "
                          "newest good checkpoint and leave out the text that led there", "POLICY",
                          choices=("stop", "rollback"))
    max_rollbacks: int = _events(3, "stop after so many rollbacks all the same", "COUNT", at_least=1)
    position_losses: bool = _events(False, "save the loss by position of the last validation with the run")
    target_metric_name: str = _events("val_bpb", "metric of the time to target: val_bpb or core", "METRIC")
    target_metric_threshold: float = _events(math.nan, "its threshold; nan: no target", "VALUE")
    stop_at_target: bool = _events(False, "end the run at the first evaluation that reaches the target")

    def __post_init__(self):
        if not self.crop:  # what is recorded is the rule itself
            object.__setattr__(self, "crop", "drop" if self.dataset in NAMED_DATASETS else "carry")
        for flag in dataclasses.fields(self):
            value, name = getattr(self, flag.name), f"--{flag.name.replace('_', '-')}"
            low, high = flag.metadata.get("at_least"), flag.metadata.get("at_most", math.inf)
            if flag.type is int and abs(value) >= 1 << 53:
                raise UserError(f"{name} {str(value)[:40]} is beyond what is counted here")
            if low is not None and not (low <= value <= high and value < math.inf):
                bounds = f"at least {low}" + ("" if high == math.inf else f" and at most {high}")
                raise UserError(f"{name} {value} must be {bounds}")
            if value not in flag.metadata.get("choices", (value,)):
                raise UserError(f"{name} {value} must be {' or '.join(flag.metadata['choices'])}")
        check_name("--model-tag", self.tag)
        if self.run_id:
            check_name("--run-id", self.run_id)
        check_metric_name(self.target_metric_name)
        if self.target[1] is not None:
            check_target(*self.target)
        elif self.stop_at_target:
            raise UserError("--stop-at-target needs a target: give --target-metric-threshold")

        if self.save_minutes and self.save_every == 0:
            raise UserError("--save-every 0 saves never, --save-minutes does; leave one out")

        if self.on_nan == "rollback" and self.save_every <= 0 and not self.save_minutes:
            raise UserError("--on-nan rollback needs checkpoints to go back to; give --save-every or --save-minutes")

    @property
    def target(self):
        """(metric name, threshold) of the time to target; the threshold is None where the run has none."""
        threshold = self.target_metric_threshold
        return self.target_metric_name, None if math.isnan(threshold) else threshold

    @property
    def tag(self):
        """The name of the run's checkpoint folder; seeds started side by side do not share one."""
        return self.model_tag or f"d{self.depth}" + (f"-s{self.seed}" if self.seed != DEFAULT_SEED else "")

    def to_dict(self):
        """The values as records and checkpoints keep them; no target is None."""
        return {**dataclasses.asdict(self), "target_metric_threshold": self.target[1]}

    @classmethod
    def fixed_on_resume(cls):
        """{name: default} of the flags that decide a run's numbers and do not make it another run: a resume without
        --allow-changed has them as they were. Records from before there was a flag did what its default does."""
        return {flag.name: flag.default for flag in dataclasses.fields(cls) if flag.metadata.get("on_resume")}
