"""Lane B from a corpus to who won, as commands in their order: baseline and calibration, statistics, inference, the
inferred ratio and its one neighbour, rows, report."""

from dataclasses import dataclass
from pathlib import Path

from nanochat.errors import UserError
from nanochat.experiments.profiles import BASELINE, Profile, find_profile
from nanochat.files import read_json
from nanochat.runlog import check_run_id

MAX_CALIBRATION = 1.5  # baseline runs that the calibration may have cost, a seed, before it is given another horizon


@dataclass(frozen=True)
class Setting:
    """What lane B trains under a profile: depth, steps of the baseline, context, flags of every training."""

    depth: int
    steps: int
    context_tokens: int
    flags: tuple[str, ...] = ()


SETTINGS = {"cpu": Setting(2, 960, 256, ("--warmup-steps=10", "--eval-every=30")),
            "d12": Setting(12, 1500, 512, ("--eval-every=25",))}


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
            "--candidates", *candidates, "--", f"--num-iterations={setting.steps}", "--position-losses",
            *setting.flags])


def commands(study):
    """Yield (module, its flags) of the stages that are not done: run each before the next is asked for.

    The calibration starts at a half and two thirds of the baseline's steps and gets the next horizon as long as its
    inference asks for one. Ends early where an inference is not there yet, as in a dry run. A stage that was stopped
    goes on by itself. Errors: UserError where the calibration is spent without a horizon.
    """
    stats, steps = study.folder / "stats.json", study.setting.steps
    baseline, calibration = f"{study.name}_baseline", f"{study.name}_calibration"
    horizons = [steps // 2, 2 * steps // 3]
    yield study.training(baseline, [BASELINE])
    yield study.training(calibration, map(_candidate, horizons))
    if not stats.exists():
        yield "scripts.lane_b_stats", [
            "--dataset", study.profile.dataset, "--tokenizer-dir", study.profile.tokenizer_dir(),
            "--context-tokens", study.setting.context_tokens, "--out", stats, "--plot", stats.with_suffix(".png"),
            "--position-losses", *study.run_ids(calibration, f"h{horizons[0]}"), *study.run_ids(baseline, BASELINE)]
    while True:
        inference = study.folder / f"infer_{horizons[-1]}.json"
        yield "scripts.lane_b_infer_ratio", [
            "--stats-json", stats, "--out", inference, "--plot", inference.with_suffix(".png"), "--fallback",
            "--calibration-run", *study.run_ids(calibration, *(f"h{horizon}" for horizon in horizons)),
            "--baseline-run", *study.run_ids(baseline, BASELINE)]
        if not inference.exists():
            return
        found = read_json(inference, "delete it and run again")
        if found["next_num_iterations"] is None or sum(horizons) > MAX_CALIBRATION * steps:
            break
        horizons.append(found["next_num_iterations"])
        yield study.training(calibration, [_candidate(horizons[-1])])
    if found["decision"] != "inferred":
        raise UserError(f"no horizon to prove after a calibration of {sum(horizons) / steps:.2f} baseline runs a seed: "
                        f"{found['fallback_reason']}")
    yield from _proof(study, inference, found, [stats.with_suffix(".png"), inference.with_suffix(".png")])


def _candidate(horizon):
    return f"h{horizon}=--num-iterations {horizon}"


def _proof(study, inference, found, figures):
    """The stages that train at the ratios found, write their rows and say who won."""
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
