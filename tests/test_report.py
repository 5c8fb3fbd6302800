"""The report: its content, the safety of its text, and the live page."""

import base64
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_runs import make_run, make_trial

from nanochat.common import UserError, runs_dir, write_json
from nanochat.experiments.gates import judge_all
from nanochat.experiments.ledger import experiment_table
from nanochat.experiments.report import experiment_page, runs_page
from nanochat.runlog import RunLog
from scripts import report as script

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `report`)")
SMALL = {"steps": 100, "eval_every": 10}
HOSTILE = "<script>alert(1)</script>\"'& $\\x$"


class Matrix:
    """Records of three candidates (one run fails), two seeds and a miniseries, and their page."""

    def __init__(self):
        self.runs = runs_dir()
        for seed in (0, 1):
            for name, step_ms in (("baseline", 100), ("chunked-ce", 90), ("both", 85)):
                nan_at = 60 if seed and name == "both" else None
                make_trial("lane_c", candidate=name, seed=seed,
                           step_ms=step_ms + seed, nan_at=nan_at, **SMALL)
        for depth in (2, 3, 4):
            for name, step_ms in (("baseline", 100.0), ("chunked-ce", 92.0)):
                make_trial("depths", candidate=name, depth=depth, step_ms=step_ms,
                           **SMALL)
        probe = {"graph_breaks": 0, "resume_difference_nats": 1e-6}
        write_json(self.runs / "lane_c.chunked-ce.probe" / "probe.json", probe)
        self.page = experiment_page("lane_c", self.runs, "depths")


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        return Matrix()


def text_of(page):
    """Return the visible text of a page, with single spaces."""
    body = page[page.index("<body>"):]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def table_of(page):
    """Return {first cell: [other cells]} of the table of runs."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return {row[0]: row[1:] for row in cells}


# --- content -----------------------------------------------------------

def test_page_shows_the_verdicts_every_section_figure_and_run(matrix):
    text, rows = text_of(matrix.page), table_of(matrix.page)
    tables = [experiment_table(name, matrix.runs) for name in ("lane_c", "depths")]
    for verdict in judge_all(*tables, matrix.runs):
        assert f"{verdict.candidate} {verdict.decision}" in text
        for name, (outcome, sentence) in verdict.gates.items():
            assert f"{name}: {outcome}. {' '.join(sentence.split())}" in text
    assert "both reject" in text and text.index("chunked-ce promote") < text.index("Curves")
    headings = re.findall("<h2>(.*)</h2>", matrix.page)
    assert headings == ["Overview", "Curves", "Depths", "Runs"]
    assert matrix.page.count("<img ") == 2 + 2 * 3 + 2
    assert all(f"lane_c.{name}.d4.s{seed}" in rows for name in ("baseline", "chunked-ce", "both")
               for seed in (0, 1))
    assert rows["lane_c.both.d4.s1"][0] == "nan" and "commit 000000000000" in text


def test_table_of_runs_has_mean_and_sd_standard_errors_and_says_what_was_not_measured():
    not_measured = {"time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": 33.0}
    times = ({"time_to_target_sec_measured": 12.34}, not_measured, {})
    for seed, cells in enumerate(times):
        summary = cells | {"min_val_bpb": 1.5 + 0.01 * seed**2}
        summary |= {"final_val_bpb_se": 0.0123} if seed == 0 else {}
        make_trial("x", seed=seed, summary=summary, **SMALL)
    rows = table_of(experiment_page("x", runs_dir()))
    bpb = np.array([1.5, 1.51, 1.54])
    mean_sd = f"{bpb.mean():.5f} ± {bpb.std(ddof=1):.5f}"
    headings = ["status", "min val_bpb", "standard error over documents", "time to target, s"]
    assert rows["run"][:4] == headings
    assert rows["baseline, depth 4"][:3] == ["mean ± sd of 3", mean_sd, "0.01230"]
    assert rows["x.baseline.d4.s0"][1:4] == ["1.50000", "0.01230", "12.3"]
    assert rows["x.baseline.d4.s1"][0] == "ok; target 1.5 not reached, time extrapolated"
    assert rows["x.baseline.d4.s1"][2:4] == ["·", "33.0"]


def test_state_says_how_far_a_run_is_and_what_a_resumption_changed():
    make_run("going", **SMALL, finished=False)
    changed = [["compute_dtype", "float32", HOSTILE]]
    RunLog.resume(runs_dir(), "going", 40, changed=changed).close()
    page = runs_page(["going"], runs_dir())
    words = f"going running, step 40 of 100; compute_dtype was float32, is {HOSTILE}"
    assert words in text_of(page) and "<script" not in page


def test_missing_targets_and_candidates_leave_sections_out():
    no_target = dict.fromkeys(["target_metric_threshold", "time_to_target_sec_measured",
                               "time_to_target_sec_extrapolated"])
    make_trial("no-target", **SMALL, summary=no_target)
    page = experiment_page("no-target", runs_dir())
    assert 'id="verdict"' not in page and "target <b>none</b>" in page and "Overview" not in page
    make_trial("no-baseline", candidate="both", **SMALL)
    assert 'id="verdict"' not in experiment_page("no-baseline", runs_dir())


# --- refusals ----------------------------------------------------------

def test_runs_of_other_datasets_and_devices_and_two_of_one_id_are_refused(tmp_path):
    make_trial("x", **SMALL)
    make_trial("depths", device="H200", **SMALL)
    books = make_run("books", dataset_id="books-1", **SMALL)
    with pytest.raises(UserError, match="another device"):
        experiment_page("x", runs_dir(), "depths")
    with pytest.raises(UserError, match="another dataset"):
        runs_page(["x.baseline.d4.s0", "books"], runs_dir())
    shutil.copytree(books.folder, tmp_path / "copy")
    with pytest.raises(UserError, match="two of the runs have the id 'books'"):
        runs_page(["books", str(tmp_path / "copy")], runs_dir())


@pytest.mark.parametrize(("argv", "message"), [
    ([], "give either"), (["--experiment", "x", "one"], "give either"),
    (["--experiment", "x"], "no experiment 'x'"), (["run"], "no run 'run'"),
    (["one", "--miniseries", "depths"], "needs --experiment"),
])
def test_script_refuses_in_one_line_and_writes_nothing(tmp_path, refusal, argv, message):
    make_trial("lane_c", **SMALL)
    make_run("one", **SMALL)
    out = tmp_path / "report.html"
    error = refusal(script.main, ["--out", str(out), *argv])
    assert error.count("\n") == 1 and message in error and not out.exists()


def test_script_writes_the_page_of_an_experiment(tmp_path):
    make_trial("x", **SMALL)
    out = tmp_path / "new folder" / "x.html"
    script.main(["--experiment", "x", "--out", str(out)])
    assert out.read_text() == experiment_page("x", runs_dir())


# --- safety ------------------------------------------------------------

def test_page_refers_only_to_itself_and_its_ids_are_unique(matrix):
    links = re.findall(r'\b(?:src|href|srcset|data|action)="([^"]*)"', matrix.page)
    ids = re.findall(r'\bid="([^"]+)"', matrix.page)
    assert sorted(ids) == sorted(set(ids))
    assert len(links) > 9 and all(link.startswith("data:") for link in links)
    assert not re.search(r"@import|url\(|<(script|iframe|object|embed|base)\b", matrix.page)


def test_hostile_text_is_escaped_everywhere():
    """In the names of run, device and dataset; the figures draw the first."""
    for name, depth in (("one", 4), ("other", 3)):
        make_run(name, depth=depth, device=HOSTILE, dataset_id=HOSTILE, **SMALL)
        path = runs_dir() / name / "config.json"
        write_json(path, json.loads(path.read_text()) | {"run_id": f"{name} {HOSTILE}"})
    page = runs_page(["one", "other"], runs_dir())
    assert "<script" not in page and "alert(1)</" not in page
    for data in re.findall('src="data:image/svg[^,]*,([^"]*)"', page):
        ElementTree.fromstring(base64.b64decode(data))


# --- live page ---------------------------------------------------------

def test_live_page_follows_the_record_keeps_its_last_state_and_ends_quietly(tmp_path):
    folder, out = make_run("one", **SMALL).folder, tmp_path / "x.html"
    # a shell starts background jobs with SIGINT ignored, and children inherit that
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from scripts import report as r; r.RELOAD_SEC, r.MAX_LOAD = 0.1, 1.0; r.main()")
    process = subprocess.Popen([sys.executable, "-c", code, "--live", "one", "--out", str(out)],
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "written" in process.stdout.readline()
    before = out.read_text()
    assert 'http-equiv="refresh"' in before and "Written at" in before
    aside = folder.rename(tmp_path / "aside")
    assert "no run 'one'" in process.stderr.readline()
    assert "Curves" in out.read_text()
    summary = json.loads((aside / "summary.json").read_text())
    write_json(aside / "summary.json", {**summary, "status": "nan"})
    aside.rename(folder)
    deadline = time.monotonic() + 300  # a busy machine draws slowly
    while "1 failed" not in text_of(out.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert "Traceback" not in error and process.returncode == 0
    assert out.read_text() == runs_page(["one"], runs_dir())
