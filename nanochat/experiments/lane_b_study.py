"""Lane B from a corpus to who won, as commands in their order: baseline and calibration, statistics, inference, the
inferred ratio and its one neighbour, rows, report."""

from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.experiments.profiles import BASELINE, Profile, find_profile
from nanochat.files import read_json
from nanochat.runlog import check_run_id

FRACTIONS = (16, 8, 4, 2)  # of the baseline's steps: the calibration's horizons, shortest first
WITH_LOSSES = FRACTIONS[-2:]  # those whose losses by position give gamma: on P/2 and P tokens


@dataclass(frozen=True)
class Setting:
    """What lane B trains under a profile: depth, steps of the baseline, context, flags of every training."""

    depth: int
    steps: int
    context_tokens: int
    flags: tuple[str, ...] = ()


SETTINGS = {"cpu": Setting(2, 960, 256, ("--warmup-steps=10", "--eval-every=60")), "d12": Setting(12, 1500, 512)}


@dataclass(frozen=True)
class Study:
    """One study: its name (of experiments, rows and report), profile, seeds, and the folder of its files."""

    name: str
    profile_name: str
    seeds: tuple[int, ...]
    folder: Path

    def __post_init__(self):
        check_run_id(self.name)
        if self.profile_name not in SETTINGS:
            raise UserError(f"no lane B for profile {self.profile_name!r}; use one of {', '.join(SETTINGS)}")

    @property
    def profile(self) -> Profile:
        return find_profile(self.profile_name)

    @property
    def setting(self):
        return SETTINGS[self.profile_name]

    def run_ids(self, experiment, *candidates):
        """The ids of an experiment's runs."""
        return [f"{experiment}.{candidate}.d{self.setting.depth}.s{seed}"
                for candidate in candidates for seed in self.seeds]

    def training(self, name, candidates, *more):
        """The command that trains `candidates`, or goes on with them."""
        setting = self.setting
        return ("scripts.experiment", [
            "--name", name, "--profile", self.profile_name, "--depths", setting.depth, "--seeds", *self.seeds, *more,
            "--candidates", *candidates, "--", f"--num-iterations={setting.steps}", *setting.flags])


def commands(study):
    """Yield (module, its flags) of the stages that are not done: run each before the next is asked for.

    Ends early where the inference is not there yet, as in a dry run. A stage that was stopped goes on by itself.
    """
    stats, inference = study.folder / "stats.json", study.folder / "infer.json"
    figures = [path.with_suffix(".png") for path in (stats, inference)]
    baseline, calibration = f"{study.name}_baseline", f"{study.name}_calibration"
    yield study.training(baseline, [BASELINE])
    yield study.training(calibration, [
        f"h{part}=--num-iterations {study.setting.steps // part} --position-losses" for part in FRACTIONS])
    if not stats.exists():
        yield "scripts.lane_b_stats", [
            "--dataset", study.profile.dataset, "--tokenizer-dir", study.profile.tokenizer_dir(),
            "--context-tokens", study.setting.context_tokens, "--out", stats, "--plot", figures[0],
            "--position-losses", *study.run_ids(calibration, *(f"h{part}" for part in WITH_LOSSES))]
    yield "scripts.lane_b_infer_ratio", [
        "--stats-json", stats, "--out", inference, "--plot", figures[1],
        "--calibration-run", *study.run_ids(calibration, *(f"h{part}" for part in FRACTIONS)),
        "--baseline-run", *study.run_ids(baseline, BASELINE)]
    if inference.exists():
        yield from _proof(study, inference, figures)


def _proof(study, inference, figures):
    """The stages that train at the ratios of infer.json, write their rows and say who won."""
    found = read_json(inference, "delete it and run again")
    ratios = {"inferred": found["chosen_ratio"], "confirmation": found["confirmation_ratio"]}
    yield study.training(study.name, [BASELINE, *(
        f"{decision}=--num-iterations -1 --target-param-data-ratio {ratio}" for decision, ratio in ratios.items())],
        "--target-metric-threshold", found["target_metric_threshold"])
    for decision in ratios:
        yield "scripts.lane_b_log_run", [*study.run_ids(study.name, decision), "--inference-json", inference,
                                         "--decision", decision, "--skip-logged"]
    yield "scripts.report", ["--experiment", study.name, "--out", f"dev/reports/{study.name}.html",
                             "--lane-b-figures", *figures]
    yield "scripts.lane_b_log_run", ["--standing", "--inference-json", inference,
                                     "--baseline-run", *study.run_ids(study.name, BASELINE)]
