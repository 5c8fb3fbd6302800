"""The configuration of a pretraining run: one frozen dataclass.

The command line of scripts/base_train.py and its help, the record's `flags`, the checkpoint's
`user_config` and the checks of a resumed run all follow from it.
"""

import dataclasses
import math
from dataclasses import dataclass

from nanochat import schedule
from nanochat.common import Parser, UserError, check_name
from nanochat.dataset import DOWNLOADS
from nanochat.gpt import GPTConfig, flops_per_token, scaling_params
from nanochat.target import check_metric_name, check_target

DEFAULT_SEED = 42
# The learning rates are 16 times the defaults, which are scaled by (batch / 524,288)^0.5: that is
# 1/16 at 2,048 tokens per step, and the unscaled rates were much better (dev/LOG.md).
PRESETS = {"laptop": {
    "depth": 4, "head_dim": 64, "max_seq_len": 256, "window_pattern": "L", "device_batch_size": 8,
    "total_batch_size": 2048, "matrix_lr": 0.32, "embedding_lr": 4.8, "unembedding_lr": 0.128,
    "target_param_data_ratio": 0.2, "core_metric_every": -1}}


def _topic(title):
    """Return a function that creates the dataclass fields of one topic of the help.

    unit: placeholder of the value in the help. Marks: at_least, at_most (bounds); unset (the value
    for "not given"); choices; on_resume (the value changes the numbers of a run, so a resumed run
    must have the same one).
    """

    def flag(default, text, unit=None, **marks):
        metadata = {"topic": title, "help": text, "unit": unit, **marks}
        return dataclasses.field(default=default, metadata=metadata)

    return flag


_record, _machine, _data, _model = map(_topic, ("names and output", "machine", "data", "model"))
_horizon = _topic("horizon: the first of these flags that is not -1 sets the number of steps")
_optimization = _topic("optimization")
_start = _topic("resume, and limits that refuse a run")
_events = _topic("evaluation, samples, checkpoints (intervals in steps; -1: never)")


@dataclass(frozen=True)
class TrainingConfig:
    """The flags of a training run; field `a_b` is flag --a-b of scripts.base_train.

    Raise UserError naming the flag of a value that no run can have.
    """

    run: str = _record("dummy", "name of the run in wandb; dummy: do not use wandb", "NAME")
    run_id: str = _record(
        "", "folder of the run's record in <cache>/runs; empty: model tag, time and seed", "ID")
    model_tag: str = _record(
        "", "checkpoint folder in <cache>/base_checkpoints; empty: d<depth>, or d<depth>-s<seed> "
        "if --seed is not 42. Checkpoints of another run in it are moved to <tag>.before-<time>",
        "TAG")
    quiet: bool = _record(False, "print results and errors only; the run's record stays complete")

    device_type: str = _machine("", "cuda, mps or cpu; empty: the best available", "KIND")
    rank_timeout_minutes: float = _machine(
        60.0, "with several ranks: abort if one of them keeps the others waiting for "
        "N minutes", "N", at_least=0.1, at_most=10_000)
    no_compile: bool = _machine(
        False, "run the model uncompiled (slower, but starts at once)", on_resume=True)
    attention: str = _machine(
        "auto", "attention backend: varlen (FlashAttention, on a GPU), sdpa (torch's), blockwise "
        "(for short rows on a CPU), or auto: the best for each layer", "BACKEND",
        choices=("auto", "varlen", "sdpa", "blockwise"), on_resume=True)
    fp8: bool = _machine(
        False, "compute the large matmuls of training in fp8 with one scale per tensor (compute "
        "capability 8.9 or newer; faster only for large models)", on_resume=True)

    dataset: str = _data(
        "climbmix", "stdlib, climbmix, fineweb-edu, or a folder of text files", "NAME")
    tokenizer_dir: str = _data("", "tokenizer folder; empty: <cache>/tokenizer", "FOLDER")
    crop: str = _data(
        "", "how to treat the rest of a document that was cropped to fill a row: carry (use it in "
        "a later row) or drop; empty: drop for climbmix and fineweb-edu, as in karpathy/nanochat, "
        "else carry", "RULE", choices=("carry", "drop"))
    seed: int = _data(
        DEFAULT_SEED, "seed of the initial weights and of the data order", "SEED", at_least=0)

    depth: int = _model(20, "number of layers", "LAYERS", at_least=1, at_most=10_000)
    aspect_ratio: int = _model(
        64, "model width = depth * aspect ratio, rounded up to a multiple of the head dimension",
        "CHANNELS", at_least=1)
    head_dim: int = _model(128, "head dimension of the attention", "CHANNELS", at_least=2)
    max_seq_len: int = _model(2048, "context length", "TOKENS", at_least=1)
    window_pattern: str = _model(
        "SSSL", "attention window of each layer, repeated over the layers: L is the full context, "
        "S is a quarter of it; the last layer always has the full context", "PATTERN")
    fused_rmsnorm: bool = _model(
        False, "compute rotary embedding and QK-norm in one Triton kernel (lane C, see ideas/)",
        on_resume=True)
    chunked_ce: bool = _model(
        False, "compute output head and cross-entropy in chunks of rows, so that the complete "
        "logits are never stored (lane C, see ideas/)", on_resume=True)

    num_iterations: int = _horizon(-1, "optimizer steps", "STEPS", at_least=1, unset=-1)
    target_flops: float = _horizon(
        -1.0, "total training FLOPs", "FLOPS", at_least=0, at_most=1e30, unset=-1)
    target_param_data_ratio: float = _horizon(
        12.0, "training tokens per scaling parameter, that is, per weight of the transformer "
        "matrices and the output head", "RATIO", at_least=0, at_most=1e9, unset=-1)

    device_batch_size: int = _optimization(
        32, "rows per device and micro-batch", "ROWS", at_least=1, at_most=1 << 20, on_resume=True)
    total_batch_size: int = _optimization(
        -1, "tokens per optimizer step; -1: a power of two that grows with the model. The learning "
        "rates below are for 524,288 tokens and are scaled by the square root of the batch size",
        "TOKENS", at_least=1, unset=-1)
    embedding_lr: float = _optimization(
        0.3, "learning rate of the embeddings (AdamW)", "LR", at_least=0, on_resume=True)
    unembedding_lr: float = _optimization(
        0.008, "learning rate of the output head (AdamW)", "LR", at_least=0, on_resume=True)
    matrix_lr: float = _optimization(
        0.02, "learning rate of the transformer matrices (Muon)", "LR", at_least=0, on_resume=True)
    scalar_lr: float = _optimization(
        0.5, "learning rate of the scalar parameters (AdamW)", "LR", at_least=0, on_resume=True)
    weight_decay: float = _optimization(
        0.28, "initial weight decay of Muon; it falls to 0 over the horizon", "DECAY", at_least=0,
        on_resume=True)
    warmup_steps: int = _optimization(
        40, "linear warm-up of the learning rates", "STEPS", at_least=0, on_resume=True)
    warmdown_ratio: float = _optimization(
        0.65, "share of the horizon over which the learning rates decay", "SHARE", at_least=0,
        at_most=1, on_resume=True)
    final_lr_frac: float = _optimization(
        0.05, "final learning rate as a share of its peak", "SHARE", at_least=0, on_resume=True)
    resume_from_step: str = _start(
        "-1", "resume from the checkpoint of this step; latest: from the newest one; auto: from "
        "the newest valid one, or start a new run if there is none; -1: start a new run", "STEP")
    allow_memory: bool = _start(
        False, "start a run whose planned memory exceeds that of the device by more than 10 %")
    allow_repeats: bool = _start(
        False, "start a run whose horizon reads the training text more than 10 times")
    allow_changed: bool = _start(
        False, "resume even if the horizon is longer than that of the checkpoint, or if flags, "
        "dtype, device or versions that change the numbers differ; the differences are recorded")

    eval_every: int = _events(
        250, "measure bits per byte on the validation split", "STEPS", at_least=-1)
    eval_tokens: int = _events(
        80 * 524288, "validation tokens per evaluation, at most one pass over the split", "TOKENS",
        at_least=1, on_resume=True)
    core_metric_every: int = _events(2000, "evaluate CORE", "STEPS", at_least=-1)
    core_metric_max_per_task: int = _events(
        500, "examples per CORE task; -1: all", "EXAMPLES", at_least=-1, on_resume=True)
    sample_every: int = _events(2000, "print samples from the model", "STEPS", at_least=-1)
    save_every: int = _events(
        -1, "save a checkpoint; -1: only at the end; 0: never", "STEPS", at_least=-1)
    save_minutes: float = _events(
        0.0, "also save a checkpoint every N minutes (0: off)", "N", at_least=0)
    keep_checkpoints: int = _events(
        0, "keep the N newest checkpoints and the best by val_bpb (0: keep all)", "N", at_least=0)
    target_metric_name: str = _events(
        "val_bpb", "metric whose time to target is measured: val_bpb or core", "METRIC")
    target_metric_threshold: float = _events(
        math.nan, "value of that metric that is the target; nan: no target", "VALUE")
    stop_at_target: bool = _events(
        False, "end the run at the first evaluation that reaches the target")

    def __post_init__(self):
        if not self.crop:  # the record holds the rule, not the empty default
            rule = "drop" if self.dataset in DOWNLOADS else "carry"
            object.__setattr__(self, "crop", rule)
        for flag in dataclasses.fields(self):
            _check_flag(flag, getattr(self, flag.name))
        check_name("--model-tag", self.tag)
        check_name("--run-id", self.run_id or "default")

        check_metric_name(self.target_metric_name)
        if self.target[1] is not None:
            check_target(*self.target)
        elif self.stop_at_target:
            raise UserError("--stop-at-target needs a target; give --target-metric-threshold")
        if self.save_minutes and self.save_every == 0:
            raise UserError("--save-every 0 never saves, but --save-minutes does; leave one out")

    @property
    def target(self):
        """Return (metric name, threshold) of the time to target; threshold None: no target."""
        threshold = self.target_metric_threshold
        return self.target_metric_name, None if math.isnan(threshold) else threshold

    @property
    def tag(self):
        """Return the name of the checkpoint folder; by default it differs between seeds."""
        seed = f"-s{self.seed}" if self.seed != DEFAULT_SEED else ""
        return self.model_tag or f"d{self.depth}{seed}"

    def to_dict(self):
        """Return the values as records and checkpoints keep them; a missing target is None."""
        return {**dataclasses.asdict(self), "target_metric_threshold": self.target[1]}

    @classmethod
    def fixed_on_resume(cls):
        """Return the names of the flags that a resume may change only with --allow-changed."""
        return [flag.name for flag in dataclasses.fields(cls) if flag.metadata.get("on_resume")]


def model_config(config, vocab_size, depth=None):
    """Return the GPTConfig that a TrainingConfig describes (or that of another depth)."""
    depth = depth or config.depth
    shape = schedule.model_shape(depth, config.aspect_ratio, config.head_dim)
    return GPTConfig(config.max_seq_len, vocab_size, shape.n_layer, shape.n_head, shape.n_head,
                     shape.n_embd, config.window_pattern)


def run_horizon(config, model):
    """Return the Horizon of a run of the GPTConfig `model`."""
    reference = model_config(config, model.vocab_size, schedule.REFERENCE_DEPTH)
    return schedule.plan_horizon(
        scaling_params(model), scaling_params(reference), flops_per_token(model),
        num_iterations=config.num_iterations, target_flops=config.target_flops,
        target_param_data_ratio=config.target_param_data_ratio,
        total_batch_size_tokens=config.total_batch_size)


def parse_config(argv=None, prog="python -m scripts.base_train", description=None):
    """Return the TrainingConfig that a command line asks for."""
    parser = Parser(prog, description)
    parser.add_argument("--preset", choices=PRESETS, help="set other defaults; laptop: a small "
                        "model that trains in minutes on a CPU, for own text. Flags override it")
    topics = {}
    for flag in dataclasses.fields(TrainingConfig):
        title = flag.metadata["topic"]
        if title not in topics:
            topics[title] = parser.add_argument_group(title)
        if flag.type is bool:
            kind = {"action": "store_true"}
        else:
            kind = {"type": flag.type, "metavar": flag.metadata["unit"]}
        default = "" if flag.default in ("", False) else f" ({flag.default})"
        text = flag.metadata["help"].replace("%", "%%") + default  # argparse expands %(name)s
        topics[title].add_argument(_as_flag(flag.name), default=flag.default, help=text, **kind)
    parser.set_defaults(**PRESETS.get(parser.parse_args(argv).preset, {}))
    values = vars(parser.parse_args(argv))
    del values["preset"]
    return TrainingConfig(**values)


def _check_flag(flag, value):
    """Raise UserError for a value outside of the flag's bounds or choices."""
    name, marks = _as_flag(flag.name), flag.metadata
    low, high = marks.get("at_least"), marks.get("at_most", 1 << 53)
    if low is not None and value != marks.get("unset") and not low <= value <= high:
        raise UserError(f"{name} {str(value)[:40]} must be from {low} to {high}")
    choices = marks.get("choices", (value,))
    if value not in choices:
        raise UserError(f"{name} {value} must be {' or '.join(choices)}")


def _as_flag(name):
    return f"--{name.replace('_', '-')}"
