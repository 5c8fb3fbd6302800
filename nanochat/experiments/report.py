"""The report of an experiment: one self-contained HTML page, or Markdown; the figures are in figures.py."""

import base64
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from markupsafe import Markup  # marks the figures as markup: matplotlib escapes their texts

from nanochat.common import UserError, locks_dir
from nanochat.experiments import figures
from nanochat.experiments.canvas import DASHES
from nanochat.experiments.comparison import RULES
from nanochat.experiments.gates import judge_all, quality_margin
from nanochat.experiments.horizon_gates import one_clock
from nanochat.experiments.profiles import BASELINE
from nanochat.experiments.runs.listing import read_state
from nanochat.experiments.runs.watch import progress
from nanochat.experiments.trials import (
    Trial,
    check_same_world,
    facts_of,
    load_trials,
    recipe_of,
    row_of,
    seeds_label,
    split,
)
from nanochat.runlog import find_run
from nanochat.segments import in_words, part_of, segments_of
from nanochat.target import BEFORE_THE_CLOCK

MARKS = {"pass": "✓", "fail": "✗", "insufficient": "?", "not shown": "~"}
_CACHE = '"${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"'  # in a shell, as paths.base_dir has it
_IMAGE_TYPES = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True)
class Section:
    """Figures under one heading; `figures` are (caption, note, markup). table: (headings, rows) of the same values."""

    title: str
    figures: list
    table: tuple | None = None


@dataclass(frozen=True)
class Report:
    """What both forms show."""

    title: str
    facts: list  # (name, value)
    labels: list  # of the colours, in order
    trials: list
    verdicts: list
    sections: list
    states: dict = field(default_factory=dict)  # in words, of runs that have no summary, by id
    is_over: bool = False  # whether it is of certain runs, and none of these is running
    marks = MARKS
    dashes = tuple(" ".join(map(str, dash)) for dash in DASHES)
    rules = RULES.describe()

    @property
    def records(self):
        return [trial.record for trial in self.trials if trial.record]

    @property
    def versions(self):
        """(name, version) pairs, every version that occurs among the runs, and the commits."""
        configs = [record.config for record in self.records]
        names = dict.fromkeys(name for config in configs for name in config.get("versions", {}))
        found = [(name, ", ".join(sorted({str(config.get("versions", {}).get(name)) for config in configs})))
                 for name in names]
        commits = sorted({trial.row.git_commit[:12] for trial in self.trials if trial.row.git_commit})
        dirty = any(config.get("git_dirty") for config in configs)
        return [("commit", ", ".join(commits) + (" (with uncommitted changes)" if dirty else "")), *found]

    @property
    def segments(self):
        """(run, first step, what computed it, what changed then) of each segment of the runs that have several."""
        several = [(record, segments_of(record)) for record in self.records]
        return [(record.run_id, segment["first_step"], _computed_on(segment),
                 "; ".join([*filter(None, [segment.get("rollback")]), in_words(segment.get("changed", []))]))
                for record, segments in several if len(segments) > 1 for segment in segments]

    @property
    def commands(self):
        """Shell lines that make the runs again: the flags all have in common, then each run's own."""
        argvs = [_flags(record) for record in self.records if record.config.get("flags")]
        if not argvs:
            return []
        shared = [item for item in argvs[0] if all(item in items for items in argvs)]
        own = [" ".join(item for item in items if item not in shared) for items in argvs]
        interpreted = any(record.config["device"].get("triton_interpreted") for record in self.records)
        return [*(["export TRITON_INTERPRET=1"] if interpreted else []), f"COMMON=({' '.join(shared)})",
                *(f'python -m scripts.base_train "${{COMMON[@]}}" {flags}'.rstrip() for flags in own)]

    def html(self, live=None):
        """The page. live: what a page that is served says of itself, above the rest (Markup)."""
        return _template("report.html.jinja", autoescape=True).render(report=self, live=live)

    def markdown(self):
        return _template("report.md.jinja", autoescape=False).render(report=self)


def experiment_report(ledger, experiment_name, runs_dir, miniseries=None, images=()):
    """The Report of an experiment: verdicts, curves, times, miniseries. Errors: UserError as judge."""
    trials = load_trials(ledger, experiment_name, runs_dir)
    series = load_trials(ledger, miniseries, runs_dir) if miniseries else []
    check_same_world([*trials, *series])
    groups, (baseline, others) = _groups(trials), split(trials)
    one_depth = len({trial.row.depth for trial in trials}) == 1
    verdicts = judge_all(trials, series, runs_dir) if others and baseline and one_depth else []
    by_steps = bool(verdicts) and all(trial.record for trial in trials) and all(
        trial.horizon_only for tried in others.values() for trial in tried.values())
    overview = _overview(groups, by_steps)
    if verdicts:
        drawn = figures.excess(groups, BASELINE, quality_margin(baseline, RULES))
        overview.append(("Quality", "val_bpb minus the baseline's, same seed and step; band: gate 2's margin",
                         Markup(drawn)))
    sections = [Section("Overview", overview), *_curve_sections(groups),
                *_miniseries_sections(series if one_depth else trials, list(groups)), *_image_sections(images)]
    return Report(experiment_name, facts_of(trials), list(groups), trials, verdicts, sections)


def runs_report(names, runs_dir, images=()):
    """The Report of runs chosen by id or folder; those that differ in their seeds alone are one group.

    Errors: UserError for a run that is not there, two runs with one id, and runs of other datasets or devices.
    """
    runs = [read_state(find_run(name, runs_dir).folder, locks_dir()) for name in names]
    trials = list(map(_chosen, runs))
    seen = {}
    for trial in trials:
        first = seen.setdefault(trial.row.run_id, trial)
        if first is not trial:
            raise UserError(f"two runs have the id {trial.row.run_id!r}: {first.record.folder} and "
                            f"{trial.record.folder}; name one of them")
    check_same_world(trials)
    by_recipe = {}
    for trial in trials:
        by_recipe.setdefault(str(recipe_of(trial.record)), []).append(trial)
    groups = {seeds_label([trial.row.run_id for trial in members]): members for members in by_recipe.values()}
    sections = [Section("Overview", _overview(groups)), *_curve_sections(groups), *_image_sections(images)]
    first, *others = groups
    title = ", ".join(groups) if len(groups) < 4 else f"{first} and {len(others)} others"
    states = {run.run_id: ", ".join([run.state, *progress(run)]) for run in runs if run.record.summary is None}
    return Report(title, facts_of(trials, states), list(groups), trials, [], sections, states,
                  all(run.is_over for run in runs))


def _chosen(run):
    """The Trial of a Run; of one without a summary, with the figures so far."""
    so_far = {}
    if run.record.summary is None:
        so_far = {name: run.figures[name] for name in (
            "target_metric_threshold", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
            "tok_per_sec_median", "dt_median_ms", "min_val_bpb")} | {"total_tokens": run.figures["tokens"]}
    try:
        return Trial(row_of(run.record, **so_far), run.record)
    except UserError as error:
        raise UserError(f"{run.record.folder}: {error}; this is no training's record, or an edited one") from None


def _overview(groups, by_steps=False):
    """by_steps: times to target are on one clock, as the gates of horizons take them."""
    drawn, timed, note = [], groups, ""
    if by_steps:
        clock = one_clock([trial for trials in groups.values() for trial in trials])
        timed = {label: list(map(clock, trials)) for label, trials in groups.items()}
        note = "steps to it at the median step time of all runs; "
    if any(t.time_to_target_sec is not None for trials in timed.values() for t in trials):
        drawn.append(("Training time to target", f"{note}bar: mean; line: 95 % interval of the mean; dots: seeds, "
                      "hollow where extrapolated, with their own interval", Markup(figures.time_bars(timed, 0.95))))
    if any(len(t.step_times_ms) for trials in groups.values() for t in trials):
        drawn.append(("Step times", "median, quartiles, 5th to 95th percentile of all seeds, compiling steps left out",
                      Markup(figures.step_times(groups))))
    return drawn


def _curve_sections(groups):
    sections = []
    for value, title in (("val_bpb", "Validation"), ("loss", "Training loss")):
        if any(len(t.val_curve if value == "val_bpb" else t.loss_curve) for trials in groups.values() for t in trials):
            sections.append(Section(title, [(f"against {axis}", "", Markup(figures.curves(groups, value, axis)))
                                            for axis in figures.X_AXES], figures.curve_table(groups, value)))
    return sections


def _image_sections(images):
    return [Section("Lane B", [_image(path) for path in images])] if images else []


def _miniseries_sections(series, labels):
    if len({trial.row.depth for trial in series}) < 2:
        return []
    groups = _groups(series, labels)
    values = {"val_bpb": lambda t: t.row.min_val_bpb, "step time": lambda t: t.row.dt_median_ms}
    drawn = [("val_bpb against depth", "", Markup(figures.over_depths(groups, values["val_bpb"], "min val_bpb")))]
    if groups.get(BASELINE) and len(groups) > 1:
        drawn += [(f"{what}, change at each depth", "below zero is better",
                   Markup(figures.over_depths(groups, value_of, f"{what} change, %", BASELINE)))
                  for what, value_of in values.items()]
    return [Section(f"Miniseries: {series[0].row.experiment_name}", drawn)]


def _groups(trials, labels=()):
    """{candidate: its trials}; `labels` come first, so that a candidate has one colour in all figures."""
    groups = {label: [] for label in labels}
    for trial in trials:
        groups.setdefault(trial.candidate, []).append(trial)
    return groups


def _flags(record):
    """A run's flags as shell words; the cache folder it used becomes the one of whoever runs them."""
    cache = str(record.folder.resolve().parent.parent)
    items = []
    for name, value in record.config["flags"].items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            items.append(flag)
        elif value is not None and value is not False and value != "":  # a 0 is a value
            rest = str(value).removeprefix(f"{cache}/")
            items.append(f"{flag}=" + (f"{_CACHE}/" if rest != str(value) else "") + shlex.quote(rest))
    return items


def _computed_on(segment):
    device, versions = part_of(segment, "device"), part_of(segment, "versions")
    if not device:
        return "not recorded"
    commit = str(segment.get("git_commit"))[:12]
    return (f"{device.get('name')}, {device.get('world_size', 1)} rank(s) on {device.get('host', 'an unknown host')}, "
            f"{device.get('compute_dtype')}, torch {versions.get('torch')}, commit {commit}")


def _image(path):
    path = Path(path)
    if path.suffix.lower() not in _IMAGE_TYPES:
        raise UserError(f"{path}: not an image this page can hold; use {', '.join(_IMAGE_TYPES)}")
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UserError(f"cannot read the figure {path} ({error.strerror})") from None
    caption = path.stem.replace("_", " ")
    return caption, "", Markup('<img alt="{}" src="data:{};base64,{}">').format(
        caption, _IMAGE_TYPES[path.suffix.lower()], data)


def _without_markup(value):
    """For Markdown: no text begins an HTML tag, ends a table's cell or its line."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(value.split("\n")).replace("|", "\\|")) \
        if isinstance(value, str) and not isinstance(value, Markup) else value


def _template(name, autoescape):
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=autoescape,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
                                     finalize=None if autoescape else _without_markup)
    environment.filters["number"] = lambda value, digits=0: "·" if value is None else f"{value:,.{digits}f}"
    environment.filters["seconds"] = lambda sec: BEFORE_THE_CLOCK if sec == 0 else environment.filters["number"](sec, 1)
    return environment.get_template(name)
