"""Lane B from a corpus to who won, as commands in their order: target and calibration, statistics, inference, the
baseline beside the inferred ratio and its one neighbour, rows, report."""

from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, read_json
from nanochat.experiments.profiles import BASELINE, Profile, find_profile
from nanochat.runlog import check_run_id

CALIBRATION_SHARES = (1 / 2, 3 / 4)  # of the baseline's steps; the law may then be asked for up to 1.125 of them
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
    """One study: its name (of experiments, rows and report), profile, seeds, and the folder of its files.

    threshold: val_bpb; None: the end of two more baseline runs. Their seeds, the two of the calibration and those of
    the proof are all different.
    """

    name: str
    profile_name: str
    seeds: tuple[int, ...]
    folder: Path
    threshold: float | None = None

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

    def run_ids(self, experiment, seeds, *candidates):
        """The ids of an experiment's runs."""
        return [f"{experiment}.{candidate}.d{self.setting.depth}.s{seed}"
                for candidate in candidates for seed in seeds]

    def training(self, name, seeds, candidates, *more):
        """The command that trains `candidates`, or goes on with them."""
        setting = self.setting
        return ("scripts.experiment", [
            "--name", name, "--profile", self.profile_name, "--depths", setting.depth, "--seeds", *seeds, *more,
            "--candidates", *candidates, "--", f"--num-iterations={setting.steps}", "--position-losses",
            *setting.flags])


def commands(study):
    """Yield (module, its flags) of the stages that are not done: run each before the next is asked for.

    The calibration gets the next horizon as long as its inference asks for one. Ends early where an inference is not
    there yet, as in a dry run. A stage that was stopped goes on by itself. Errors: UserError where the calibration is
    spent without a horizon.
    """
    stats, steps = study.folder / "stats.json", study.setting.steps
    target, calibration = f"{study.name}_target", f"{study.name}_calibration"
    horizons = [round(share * steps) for share in CALIBRATION_SHARES]
    seeds, target_seeds = (range(max(study.seeds) + first, max(study.seeds) + first + 2) for first in (1, 3))
    if study.threshold is None:
        yield study.training(target, target_seeds, [BASELINE])
        threshold = ["--baseline-run", *study.run_ids(target, target_seeds, BASELINE)]
    else:
        threshold = ["--target-metric-threshold", study.threshold]
    yield study.training(calibration, seeds, map(_candidate, horizons))
    if not stats.exists():
        yield "scripts.lane_b_stats", [
            "--dataset", study.profile.dataset, "--tokenizer-dir", study.profile.tokenizer_dir(),
            "--out", stats, "--plot", stats.with_suffix(".png"),
            "--position-losses", *study.run_ids(calibration, seeds, *map(_name, horizons))]
    while True:
        inference = study.folder / f"infer_{horizons[-1]}.json"
        yield "scripts.lane_b_infer_ratio", [
            "--stats-json", stats, "--out", inference, "--plot", inference.with_suffix(".png"), "--fallback",
            "--calibration-run", *study.run_ids(calibration, seeds, *map(_name, horizons)), *threshold]
        if not inference.exists():
            return
        found = read_json(inference, "delete it and run again")
        if found["next_num_iterations"] is None or sum(horizons) > MAX_CALIBRATION * steps:
            break
        horizons.append(found["next_num_iterations"])
        yield study.training(calibration, seeds, [_candidate(horizons[-1])])
    if found["decision"] != "inferred":
        raise UserError(f"no horizon to prove after a calibration of {sum(horizons) / steps:.2f} baseline runs a seed: "
                        f"{found['fallback_reason']}")
    yield from _proof(study, inference, found, [stats.with_suffix(".png"), inference.with_suffix(".png")])


def _name(horizon):
    return f"h{horizon}"


def _candidate(horizon):
    return f"{_name(horizon)}=--num-iterations {horizon}"


def _proof(study, inference, found, figures):
    """The stages that train at the ratios found, write their rows and say who won."""
    ratios = {"inferred": found["chosen_ratio"], "confirmation": found["confirmation_ratio"]}
    yield study.training(study.name, study.seeds, [BASELINE, *(
        f"{decision}=--num-iterations -1 --target-param-data-ratio {ratio}" for decision, ratio in ratios.items())],
        "--target-metric-threshold", found["target_metric_threshold"])
    for decision in ratios:
        yield "scripts.lane_b_log_run", [*study.run_ids(study.name, study.seeds, decision), "--inference-json",
                                         inference, "--decision", decision, "--skip-logged"]
    yield "scripts.report", ["--experiment", study.name, "--out", study.folder / "report.html",
                             "--lane-b-figures", *figures]
    yield "scripts.verdict", ["--experiment", study.name]
