"""The report: content, safety of its text, and a real headless Chromium where there is one."""

import html
import json
import re
import shlex
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_runs import make_run, make_trial

from nanochat.common import RunLock, UserError, locks_dir, runs_dir, write_json
from nanochat.config import TrainingConfig
from nanochat.experiments import canvas, figures
from nanochat.experiments.gates import judge_all
from nanochat.experiments.report import experiment_report, runs_report
from nanochat.experiments.trials import load_trials
from nanochat.runlog import RunLog
from scripts import base_train
from scripts import report as script

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `report`)")
SMALL = {"steps": 100, "eval_every": 10}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Matrix:
    """A ledger with three candidates (one run fails) at two seeds and a three-depth miniseries, and its report."""

    def __init__(self, folder):
        self.ledger, self.runs = folder / "experiments.csv", runs_dir()
        for seed in (0, 1):
            make_trial(self.ledger, "lane_c", seed=seed, step_ms=100 + seed, **SMALL)
            make_trial(self.ledger, "lane_c", candidate="chunked-ce", seed=seed, step_ms=90 + seed, **SMALL)
            make_trial(self.ledger, "lane_c", candidate="both", seed=seed, step_ms=85.0, **SMALL,
                       nan_at=60 if seed else None)
        for depth in (2, 3, 4):
            for name, step_ms in (("baseline", 100.0), ("chunked-ce", 92.0)):
                make_trial(self.ledger, "depths", candidate=name, depth=depth, step_ms=step_ms, **SMALL)
        write_json(self.runs / "lane_c.chunked-ce.probe" / "probe.json",
                   {"graph_breaks": 0, "resume_difference_nats": 1e-6, "steps_compared": 10})
        self.report = experiment_report(self.ledger, "lane_c", self.runs, "depths", [png(folder / "beta.png")])
        self.page = self.report.html()


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        return Matrix(folder)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "experiments.csv"


def page_text(page):
    """The visible text of a page, without styles."""
    body = page[page.index("<body>"):]
    return html.unescape(re.sub(r"<[^>]*>", " ", body))


def test_page_shows_the_verdicts_that_the_gates_give(matrix):
    text = " ".join(page_text(matrix.page).split())
    trials, series = (load_trials(matrix.ledger, name, matrix.runs) for name in ("lane_c", "depths"))
    for verdict in judge_all(trials, series, matrix.runs):
        assert f"{verdict.candidate} {verdict.decision}" in text and f"decided by {verdict.decided_by}" in text
        for gate in verdict.gates:
            assert " ".join(gate.detail.split()) in text
    assert text.index("chunked-ce promote") < text.index("Validation") < text.index("Runs")
    assert "both reject" in text


def test_page_has_every_figure_and_every_run(matrix):
    report, page = matrix.report, matrix.page
    assert [section.title for section in report.sections] == ["Overview", "Validation", "Training loss",
                                                             "Miniseries: depths", "Lane B"]
    assert page.count('<svg role="img"') == 3 + 3 + 3 + 3
    assert all(trial.row.run_id in page for trial in report.trials)
    assert re.search(r'<tr class="bad"><th scope="row">lane_c\.both\.d4\.s1</th><td>nan</td>', page)
    assert "2.13.0" in page and "COMMON=" in page


def test_ids_that_figures_refer_to_are_there_once(matrix):
    ids = re.findall(r'\bid="([^"]+)"', matrix.page)
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", matrix.page) + re.findall(r'xlink:href="#([^"]+)"', matrix.page)
    assert used and set(used) <= set(ids)


def test_segments_are_shown_where_a_run_has_several():
    make_run("one", **SMALL)
    make_run("resumed", **SMALL, finished=False)
    device = {"name": "CPU x9", "host": "<b>elsewhere", "compute_dtype": "bfloat16", "world_size": 2}
    for step, fields in ((60, {"device": device}), (40, {}), (50, {"device": device, "git_commit": "abc", "changed": [
            ["compute_dtype", "float32", "bfloat16"]]})):
        RunLog.resume(runs_dir(), "resumed", step, **fields).close()
    assert runs_report(["one"], runs_dir()).segments == []
    report = runs_report(["one", "resumed"], runs_dir())
    first, unknown, last = report.segments  # what 60 began is superseded
    assert first[:2] == ("resumed", 0) and "CPU x2" in first[2] and first[3] == ""
    assert unknown == ("resumed", 40, "not recorded", "")
    assert last[1:] == (50, "CPU x9, 2 rank(s) on <b>elsewhere, bfloat16, torch None, commit abc",
                        "compute_dtype was float32, is bfloat16")
    assert last[3] in page_text(report.html()) and last[3] in report.markdown()
    assert "<b>elsewhere" not in report.html() + report.markdown()


def test_axis_labels_keep_their_digits(ledger):
    for seed in (0, 1):
        make_trial(ledger, "x", seed=seed)
        make_trial(ledger, "x", candidate="both", seed=seed, bpb_shift=0.004, step_ms=92.0)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", experiment_report(ledger, "x", runs_dir()).html())
    assert "0.004" in texts and "baseline" in texts and any(re.fullmatch(r"9\d\.\d ms", text) for text in texts)


def test_commands_name_no_folder_of_this_machine():
    folder = make_run("one", **SMALL).folder
    config = json.loads((folder / "config.json").read_text())
    config["flags"] |= {"tokenizer_dir": f"{runs_dir().parent}/tokenizer x", "model_tag": f"{runs_dir().parent}2/y"}
    write_json(folder / "config.json", config)
    commands = "\n".join(runs_report(["one"], runs_dir()).commands)
    assert commands.count(str(runs_dir().parent)) == 1 and f"--model-tag={runs_dir().parent}2/y" in commands
    assert "--fused-rmsnorm" not in commands and "--depth=4" in commands


@pytest.mark.parametrize("where", ["NANOCHAT_BASE_DIR", "HOME"])
def test_commands_give_the_flags_back(tmp_path, monkeypatch, where):
    """In a real shell, with a stand-in `python` that writes down its arguments."""
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    monkeypatch.setenv(where, str(tmp_path / "my folder"))
    given = vars(base_train.parse_args(shlex.split(
        "--depth 4 --seed 0 --save-every 0 --weight-decay 0 --chunked-ce --eval-every -1")))
    for name, seed in (("one", 0), ("other", 7)):
        folder = make_run(name, **SMALL).folder
        config = json.loads((folder / "config.json").read_text())
        config["flags"] = TrainingConfig(**given | {
            "seed": seed, "run_id": name, "tokenizer_dir": f"{runs_dir().parent}/tokenizer x"}).to_dict()
        write_json(folder / "config.json", config)
    commands = runs_report(["one", "other"], runs_dir()).commands
    shell = "\n".join(["python() { printf '%s\\0' \"$@\"; echo; }", *commands])
    printed = subprocess.run(["bash", "-c", shell], check=True, capture_output=True, text=True,
                             env={where: str(tmp_path / "my folder")}).stdout
    for line, name in zip(printed.splitlines(), ("one", "other"), strict=True):
        flags = base_train.parse_args(line.rstrip("\0").split("\0")[2:]).to_dict()
        assert flags == json.loads((runs_dir() / name / "config.json").read_text())["flags"]


def test_candidates_without_a_baseline_are_a_page_without_verdict(ledger):
    make_trial(ledger, "x", candidate="both", **SMALL)
    report = experiment_report(ledger, "x", runs_dir())
    assert not report.verdicts and report.labels == ["both"]


def test_a_miniseries_of_another_device_is_refused(ledger):
    make_trial(ledger, "x", **SMALL), make_trial(ledger, "depths", device="H200", **SMALL)
    with pytest.raises(UserError, match="another device"):
        experiment_report(ledger, "x", runs_dir(), "depths")


def test_runs_on_one_and_on_eight_ranks_are_refused():
    folder = make_run("one", **SMALL).folder
    make_run("other", **SMALL)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text().replace(
        '"world_size": 1', '"world_size": 8')))
    with pytest.raises(UserError, match=r"another device.*\(8 ranks\)"):
        runs_report(["one", "other"], runs_dir())


class Links(HTMLParser):
    """Collects whatever a browser would load or follow."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "iframe", "object", "embed")
        self.found += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset", "data")]


def test_page_refers_to_nothing_outside_itself(matrix):
    page, links = matrix.page, Links()
    links.feed(page)
    assert links.found and all(value.startswith(("data:", "#")) for value in links.found)
    assert "@import" not in page and all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_text_from_the_ledger_is_escaped(ledger):
    evil = "<script>alert(1)</script>"
    make_trial(ledger, "x", seed=0, row={"experiment_name": evil, "device": evil, "dataset_id": evil})
    page = experiment_report(ledger, evil, runs_dir()).html()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "<script" not in experiment_report(ledger, evil, runs_dir()).markdown()


def test_markdown_has_the_same_verdicts_and_runs(matrix):
    text = matrix.report.markdown()
    assert "**chunked-ce** (`--chunked-ce`): **promote**, decided by all four gates." in text
    assert all(f"| {trial.row.run_id} | {trial.row.status} |" in text for trial in matrix.report.trials)
    assert "| 4 generalisation | pass |" in text and "&" not in text.replace("&&", "")


def test_a_gain_that_is_not_shown_carries_no_tick(ledger):
    """Its interval reaches zero, or it was extrapolated; the same gain with an interval above zero carries one."""
    cases = {"noisy": ((99.0, 80.0), {}), "shown": ((90.0, 90.5), {}),
             "extrapolated": ((90.0, 90.5), {"time_to_target_sec_measured": None})}
    for name, (times_ms, row) in cases.items():
        for seed, step_ms in enumerate(times_ms):
            make_trial(ledger, name, seed=seed, step_ms=100.0, **SMALL)
            make_trial(ledger, name, candidate="both", seed=seed, step_ms=step_ms, **SMALL,
                       row=row and {**row, "time_to_target_sec_extrapolated": 5 + 0.01 * seed})
        page = experiment_report(ledger, name, runs_dir()).html()
        assert ("✓ 1 time" in page) == ("✓ pass" in page.split("1 time</td>")[1][:60]) == (name == "shown")
        assert ("~ 1 time" in page) == (name != "shown") and "✓ 2 quality" in page


def test_a_target_reached_before_the_clock_is_shown_as_that(ledger):
    make_trial(ledger, "x", **SMALL, row={"time_to_target_sec_measured": 0.0})
    report = experiment_report(ledger, "x", runs_dir())
    assert report.markdown().count("before the clock starts") == 1
    assert report.html().count("before the clock starts") == 2  # the table and the figure


def test_experiment_without_candidates_or_target_is_still_a_page(ledger):
    for seed in (0, 1):
        make_trial(ledger, "base", seed=seed, row={"target_metric_threshold": None, "time_to_target_sec_measured": None,
                                                   "time_to_target_sec_extrapolated": None})
    page = experiment_report(ledger, "base", runs_dir()).html()
    assert 'id="verdict"' not in page and "target <b>none</b>" in page and page.count('<svg role="img"') == 1 + 6


def test_experiment_over_depths_shows_its_own_series(matrix):
    report = experiment_report(matrix.ledger, "depths", matrix.runs)
    assert report.sections[-1].title == "Miniseries: depths" and not report.verdicts


def test_curves_that_are_elsewhere_leave_a_page_of_figures_from_the_ledger(matrix, tmp_path):
    page = experiment_report(matrix.ledger, "lane_c", tmp_path / "nowhere", "depths").html()
    assert "insufficient" in page and "lane_c.baseline.d4.s0" in page


def test_runs_are_chosen_by_name_and_seeds_of_one_recipe_are_one_group():
    make_run("one", **SMALL), make_run("other", candidate="both", seed=7, **SMALL)
    make_run("one-more", seed=3, **SMALL)
    report = runs_report(["one", "other", "one-more"], runs_dir())
    assert report.labels == ["one{,-more}", "other"] and not report.verdicts
    page = report.html()
    assert page.count("<td>ok</td>") == 3
    value = r"1\.4\d{3}"
    assert re.search(rf"<title>step 100\none{{,-more}}: {value} \({value} to {value}\)\nother: {value}</title>", page)


def test_a_run_under_way_is_no_failure_and_has_its_figures_so_far():
    make_run("one", **SMALL), make_run("going", seed=7, finished=False, **SMALL)
    stale = make_run("stale", seed=8, finished=False, **SMALL).folder
    owned = [RunLock(runs_dir() / name, locks_dir() / f"run.{name}", name, "") for name in ("going", "stale")]
    owned[1].release()
    report = runs_report(["one", "going", stale], runs_dir())
    owned[0].release()
    page = report.html()
    assert '<tr><th scope="row">going</th><td>running, step 100/100, about 0 s left</td><td class="n">1.4' in page
    assert '<tr class="bad"><th scope="row">stale</th><td>stale, step 100/100</td>' in page
    assert "3, 1 running, 1 failed" in page and not report.is_over


def test_what_the_pointer_shows_is_the_text_itself():
    figure, axes = canvas.new_axes()
    axes.plot([0, 1], [0, 1])
    canvas.hover(axes, [(0.2, 'a < b & "c"\n</title>'), (0.8, "é")])
    svg = ElementTree.fromstring(canvas.to_svg(figure, "name", 'a "<&>"'))
    assert [title.text for title in svg.iter("{http://www.w3.org/2000/svg}title")] == ['a < b & "c"\n</title>', "é"]


def test_curves_say_their_values_in_the_alternative_text_under_the_pointer_and_in_a_table(matrix):
    trials = load_trials(matrix.ledger, "lane_c", matrix.runs)
    last = {name: np.mean([t.val_curve[-1, 3] for t in trials if t.candidate == name]) for name in ("baseline", "both")}
    alts = re.findall(r'<svg role="img" aria-label="([^"]+)"', matrix.page)
    assert len(alts) == 12 and any(f"last values: baseline {last['baseline']:.4f}" in alt for alt in alts)
    titles = re.findall(r'<g class="hover"><title>([^<]+)</title>', matrix.page)
    assert any(f"\nbaseline: {last['baseline']:.4f} (" in title for title in titles) and len(titles) <= 6 * 40
    table = next(section.table for section in matrix.report.sections if section.title == "Validation")
    assert table[0] == ["step", "baseline", "chunked-ce", "both"]
    assert table[1][-1][0] == "100" and table[1][-1][1].startswith(f"{last['baseline']:.4f} (")


def test_a_band_is_from_the_lowest_to_the_highest_seed_at_their_shared_steps(ledger):
    for seed, steps in ((0, 100), (1, 100), (2, 60)):
        make_trial(ledger, "x", seed=seed, steps=steps, eval_every=10)
    curves = [trial.val_curve for trial in load_trials(ledger, "x", runs_dir())]
    shared, *rests = figures.bands(load_trials(ledger, "x", runs_dir()), "val_bpb")
    stack = np.stack([curve[:7, 3] for curve in curves])
    assert np.array_equal(shared.mean[:, 0], np.arange(0, 70, 10)) and np.allclose(shared.mean[:, 3], stack.mean(0))
    assert np.array_equal(shared.low, stack.min(0)) and np.array_equal(shared.high, stack.max(0))
    assert [rest.mean[[0, -1], 0].tolist() for rest in rests] == [[60, 100]] * 2
    assert np.array_equal(rests[1].mean[:, 3], curves[1][6:, 3]) and not rests[0].has_width


def test_seeds_without_a_shared_step_are_lines():
    found = figures.bands([SimpleNamespace(row=SimpleNamespace(depth=1), val_curve=np.array([[step, 0, 0, 1.0]]))
                           for step in (1.0, 2.0)], "val_bpb")
    assert [band.mean[0, 0] for band in found] == [1.0, 2.0]


def test_two_runs_with_one_id_are_refused(matrix, tmp_path):
    shutil.copytree(matrix.runs / "lane_c.baseline.d4.s0", tmp_path / "copy")
    with pytest.raises(UserError, match=r"two runs have the id 'lane_c\.baseline\.d4\.s0'.*copy"):
        runs_report(["lane_c.baseline.d4.s0", str(tmp_path / "copy")], matrix.runs)


@pytest.mark.parametrize(("world", "word"), [({"dataset_id": "books-1"}, "dataset"), ({"device": "H200"}, "device")])
def test_runs_of_other_worlds_are_refused(world, word):
    make_run("one", **SMALL), make_run("other", **SMALL, **world)
    with pytest.raises(UserError, match=f"another {word}"):
        runs_report(["one", "other"], runs_dir())


@pytest.mark.parametrize(("argv", "message"), [
    ([], "name either"), (["--experiment", "x", "run"], "name either"), (["--experiment", "x"], "no experiment 'x'"),
    (["run"], "no run 'run'"), (["one", "--miniseries", "depths"], "goes with --experiment"),
    (["one", "--lane-b-figures", "beta.csv"], "not an image"),
    (["one", "--lane-b-figures", "missing.png"], "cannot read"),
])
def test_script_refuses_in_one_line_and_writes_nothing(matrix, tmp_path, refusal, argv, message):
    out = tmp_path / "report.html"
    make_run("one", **SMALL)
    error = refusal(script.main, ["--ledger", str(matrix.ledger), "--out", str(out), *argv])
    assert error.count("\n") == 1 and message in error and not out.exists()


def test_script_writes_both_forms(ledger, tmp_path):
    make_trial(ledger, "lane_c", **SMALL)
    for flag, start in (("--markdown", "# lane_c"), (None, "<!doctype html>")):
        out = tmp_path / "out"
        script.main(["--ledger", str(ledger), "--experiment", "lane_c", "--out", str(out), *([flag] if flag else [])])
        assert out.read_text().startswith(start)


def png(path):
    """A one-pixel PNG."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b""))
    return path


def browse(page, folder, width=1280):
    """Open a page in Chromium without a network: (console lines, URLs that pages asked for, the final document)."""
    profile, netlog = folder / "profile", folder / "net.json"
    shutil.rmtree(profile, ignore_errors=True)
    result = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", "--enable-logging=stderr",
         f"--log-net-log={netlog}", f"--window-size={width},800", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    requests = [event["params"] for event in json.loads(netlog.read_text())["events"] if "params" in event]
    asked = {request["url"] for request in requests  # the browser's own requests have no origin
             if "url" in request and request.get("initiator", "not an origin") != "not an origin"}
    return ([line for line in result.stderr.splitlines() if ":CONSOLE" in line],
            {url for url in asked if not url.startswith(("file:", "data:"))}, result.stdout)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@needs_chromium
def test_chromium_opens_the_page_without_console_error_or_request(matrix, tmp_path):
    faulty, page = tmp_path / "faulty.html", tmp_path / "page.html"
    faulty.write_text("<!doctype html><script>console.error('boom')</script><img src='http://example.invalid/x.png'>")
    page.write_text(matrix.page)
    console, urls, _ = browse(faulty, tmp_path)
    assert any("boom" in line for line in console) and urls == {"http://example.invalid/x.png"}  # such faults are seen
    console, urls, document = browse(page, tmp_path)
    assert console == [] and urls == set() and document.count('<svg role="img"') == 12


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_verdict_is_seen_without_scrolling_and_nothing_is_cut_off(matrix, tmp_path, width, height):
    """The page in a frame as large as the screen; a script beside it measures."""
    frame = Path(tmp_path / "frame.html")
    frame.write_text(f"""<!doctype html><title>waiting</title>
        <iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{html.escape(matrix.page)}" onload="
          const inside = this.contentDocument;
          document.title = [inside.getElementById('verdict').getBoundingClientRect().bottom,
                            inside.documentElement.scrollWidth, inside.documentElement.clientWidth].join(' ')
        "></iframe>""")
    _, _, document = browse(frame, tmp_path, width=1400)
    bottom, full_width, seen_width = map(float, re.search(r"<title>([\d. ]+)</title>", document)[1].split())
    assert bottom <= height and full_width <= seen_width <= width
