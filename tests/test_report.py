"""The report: its content, the safety of its text, the live page, and a real Chromium if any."""

import html
import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from synthetic_runs import make_run, make_trial

from nanochat.common import UserError, runs_dir, write_json
from nanochat.config import parse_config
from nanochat.experiments.gates import judge_all
from nanochat.experiments.report import experiment_page, runs_page
from nanochat.experiments.table import experiment_table
from nanochat.runlog import RunLog
from scripts import report as script

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `report`)")
SMALL = {"steps": 100, "eval_every": 10}
HOSTILE = "<script>alert(1)</script>\"'& $\\x$"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Matrix:
    """A ledger with three candidates (one run fails), two seeds and a miniseries, and its page."""

    def __init__(self, folder):
        self.ledger, self.runs = folder / "experiments.csv", runs_dir()
        for seed in (0, 1):
            for name, step_ms in (("baseline", 100), ("chunked-ce", 90), ("both", 85)):
                nan_at = 60 if seed and name == "both" else None
                make_trial(self.ledger, "lane_c", candidate=name, seed=seed,
                           step_ms=step_ms + seed, nan_at=nan_at, **SMALL)
        for depth in (2, 3, 4):
            for name, step_ms in (("baseline", 100.0), ("chunked-ce", 92.0)):
                make_trial(self.ledger, "depths", candidate=name, depth=depth, step_ms=step_ms,
                           **SMALL)
        probe = {"graph_breaks": 0, "resume_difference_nats": 1e-6, "steps_compared": 10}
        write_json(self.runs / "lane_c.chunked-ce.probe" / "probe.json", probe)
        image = folder / "beta_of <books>.svg"
        image.write_text("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1 1'/>")
        self.page = experiment_page(self.ledger, "lane_c", self.runs, "depths", [image])


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        return Matrix(folder)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "experiments.csv"


def text_of(page):
    """Return the visible text of a page, with single spaces."""
    body = page[page.index("<body>"):]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def table_of(page):
    """Return {first cell: [other cells]} of the table of runs."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return {row[0]: row[1:] for row in cells}


def strips_of(page):
    """Return the texts that the figures show under the pointer."""
    return [html.unescape(title) for title in re.findall(r"<title>([^<]*)</title>", page)[1:]]


def edit_config(run_id, **changes):
    path = runs_dir() / run_id / "config.json"
    write_json(path, json.loads(path.read_text()) | changes)


# --- content -----------------------------------------------------------

def test_page_shows_the_verdicts_of_the_gates(matrix):
    text = text_of(matrix.page)
    tables = [experiment_table(matrix.ledger, name, matrix.runs) for name in ("lane_c", "depths")]
    for verdict in judge_all(*tables, matrix.runs):
        assert f"{verdict.candidate} {verdict.decision}" in text
        for gate in verdict.gates:
            assert f"{gate.name}: {gate.outcome}. {' '.join(gate.sentence.split())}" in text
    assert text.index("chunked-ce promote") < text.index("both reject") < text.index("Curves")


def test_page_has_every_section_figure_and_run(matrix):
    headings = re.findall("<h2>(.*)</h2>", matrix.page)
    assert headings == ["Overview", "Curves", "Depths", "Lane B", "Gates", "Runs", "Reproduce"]
    assert matrix.page.count('<svg role="img"') == 2 + 2 * 3 + 2
    assert "beta of &lt;books&gt;" in matrix.page and "data:image/svg+xml;base64," in matrix.page
    rows = table_of(matrix.page)
    assert all(f"lane_c.{name}.d4.s{seed}" in rows for name in ("baseline", "chunked-ce", "both")
               for seed in (0, 1))
    assert re.search(r'<tr class="failed"><th>lane_c\.both\.d4\.s1<', matrix.page)
    assert "torch 2.13.0" in text_of(matrix.page)


def test_table_of_runs_has_mean_and_sd_standard_errors_and_says_what_was_not_measured(ledger):
    not_measured = {"time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": 33.0}
    times = ({"time_to_target_sec_measured": 0.0}, not_measured, {})
    for seed, cells in enumerate(times):
        row = cells | {"min_val_bpb": 1.5 + 0.01 * seed**2}
        make_trial(ledger, "x", seed=seed, row=row, **SMALL)
    path = runs_dir() / "x.baseline.d4.s0" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"val_bpb":', '"val_bpb_se": 0.0123, "val_bpb":'))
    rows = table_of(experiment_page(ledger, "x", runs_dir()))
    bpb = np.array([1.5, 1.51, 1.54])
    mean_sd = f"{bpb.mean():.5f} ± {bpb.std(ddof=1):.5f}"
    headings = ["state", "min val_bpb", "standard error over documents", "time to target, s"]
    assert rows["run"][:4] == headings
    assert rows["baseline, depth 4"][:3] == ["mean ± sd of 3", mean_sd, ""]
    assert rows["x.baseline.d4.s0"][1:4] == ["1.50000", "0.01230", "before the clock starts"]
    assert rows["x.baseline.d4.s1"][0] == "ok; target not reached: time extrapolated"
    assert rows["x.baseline.d4.s1"][2:4] == ["·", "33.0"]


def test_pointer_shows_mean_lowest_and_highest_at_the_steps_that_all_seeds_have(ledger):
    curves = []
    for seed, steps in ((0, 100), (1, 100), (2, 60)):
        make_trial(ledger, "x", seed=seed, steps=steps, eval_every=10)
        lines = (runs_dir() / f"x.baseline.d4.s{seed}" / "metrics.jsonl").read_text().splitlines()
        evaluations = [event for event in map(json.loads, lines) if event["kind"] == "val"]
        curves.append({event["step"]: event["val_bpb"] for event in evaluations})
    strips = strips_of(experiment_page(ledger, "x", runs_dir()))
    for step in range(0, 70, 10):
        values = [curve[step] for curve in curves]
        spread = f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
        assert f"step: {step}\nbaseline, depth 4: {spread}" in strips
    assert strips[7].startswith("step: 1\n")  # the next figure


def test_axis_labels_keep_their_digits(ledger):
    for seed in (0, 1):
        make_trial(ledger, "x", seed=seed)
        make_trial(ledger, "x", candidate="both", seed=seed, bpb_shift=0.0004, step_ms=92.0)
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", experiment_page(ledger, "x", runs_dir()))
    assert any(re.fullmatch(r"0\.\d\d\d*[1-9]", label) for label in labels), labels


def test_state_says_how_far_a_run_is_where_it_was_resumed_and_what_changed():
    make_run("going", **SMALL, finished=False)
    changed = [["compute_dtype", "float32", HOSTILE]]
    RunLog.resume(runs_dir(), "going", 40, changed=changed).close()
    page = runs_page(["going"], runs_dir(), live="12:00:00")
    words = f"resumed at step 40; compute_dtype was float32, is {HOSTILE}"
    assert f"going running, step 40 of 100; {words}" in text_of(page) and "<script" not in page
    assert "Written at 12:00:00" in text_of(page)


def test_missing_targets_candidates_and_records_leave_sections_out(ledger):
    no_target = dict.fromkeys(["target_metric_threshold", "time_to_target_sec_measured",
                               "time_to_target_sec_extrapolated"])
    make_trial(ledger, "no-target", **SMALL, row=no_target)
    page = experiment_page(ledger, "no-target", runs_dir())
    assert 'id="verdict"' not in page and "target <b>none</b>" in page and "Overview" not in page
    make_trial(ledger, "no-baseline", candidate="both", **SMALL)
    assert 'id="verdict"' not in experiment_page(ledger, "no-baseline", runs_dir())
    shutil.rmtree(runs_dir())
    assert "Curves" not in text_of(experiment_page(ledger, "no-baseline", runs_dir()))


def test_commands_give_the_flags_back(tmp_path, monkeypatch):
    """Run them in a shell whose `python` prints its arguments."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "my folder"))
    flags = ["--depth=4", "--save-every=0", "--weight-decay=0", "--chunked-ce", "--eval-every=-1",
             f"--tokenizer-dir={runs_dir().parent}/tokenizer x"]
    given = []
    for name, seed in (("one", 0), ("other", 7)):
        make_run(name, **SMALL)
        own = [f"--run-id={name}", f"--seed={seed}"]
        given.append(parse_config([*flags, *own]).to_dict())
        edit_config(name, flags=given[-1])
    page = runs_page(["one", "other"], runs_dir())
    commands = html.unescape(re.search("<pre>(.*)</pre>", page, re.DOTALL)[1])
    assert str(runs_dir().parent) not in commands
    shell = f"python() {{ printf '%s\\0' \"$@\"; echo; }}\n{commands}"
    printed = subprocess.run(["bash", "-c", shell], check=True, capture_output=True, text=True,
                             env={"NANOCHAT_BASE_DIR": str(tmp_path / "my folder")}).stdout
    argvs = [line.rstrip("\0").split("\0")[2:] for line in printed.splitlines()]
    assert [parse_config(argv).to_dict() for argv in argvs] == given


# --- refusals ----------------------------------------------------------

def test_runs_of_other_datasets_and_devices_are_refused(ledger):
    make_trial(ledger, "x", **SMALL)
    make_trial(ledger, "depths", device="H200", **SMALL)
    make_run("books", dataset_id="books-1", **SMALL)
    with pytest.raises(UserError, match="another device"):
        experiment_page(ledger, "x", runs_dir(), "depths")
    with pytest.raises(UserError, match="another dataset"):
        runs_page(["x.baseline.d4.s0", "books"], runs_dir())


def test_two_runs_with_one_id_are_refused(tmp_path):
    shutil.copytree(make_run("one", **SMALL).folder, tmp_path / "copy")
    with pytest.raises(UserError, match="two of the runs have the id 'one'"):
        runs_page(["one", str(tmp_path / "copy")], runs_dir())


@pytest.mark.parametrize(("argv", "message"), [
    ([], "give either"), (["--experiment", "x", "one"], "give either"),
    (["--experiment", "x"], "no experiment 'x'"), (["run"], "no run 'run'"),
    (["one", "--miniseries", "depths"], "needs --experiment"),
    (["one", "--lane-b-figures", "beta.csv"], "not an image"),
    (["one", "--lane-b-figures", "missing.png"], "cannot read"),
    (["one", "--live"], "leave out --out"),
])
def test_script_refuses_in_one_line_and_writes_nothing(ledger, tmp_path, refusal, argv, message):
    make_trial(ledger, "lane_c", **SMALL)
    make_run("one", **SMALL)
    out = tmp_path / "report.html"
    error = refusal(script.main, ["--ledger", str(ledger), "--out", str(out), *argv])
    assert error.count("\n") == 1 and message in error and not out.exists()


def test_script_writes_the_page(tmp_path):
    make_run("one", **SMALL)
    out = tmp_path / "new folder" / "x.html"
    script.main(["one", "--out", str(out)])
    assert out.read_text() == runs_page(["one"], runs_dir())


# --- safety ------------------------------------------------------------

class Links(HTMLParser):
    """Collects whatever a browser would load or follow."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "iframe", "object", "embed", "base")
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.found += [value for name, value in attributes if name in names]


def test_page_refers_only_to_itself_and_its_ids_are_unique(matrix):
    links = Links()
    links.feed(matrix.page)
    targets = {*links.found, *re.findall(r"url\(([^)]*)\)", matrix.page)}
    ids = re.findall(r'\bid="([^"]+)"', matrix.page)
    assert sorted(ids) == sorted(set(ids))
    outside = {target for target in targets if not target.startswith("data:")}
    assert len(outside) > 10 and outside <= {f"#{name}" for name in ids}
    assert matrix.page.count("@import") == 0


def test_hostile_text_is_escaped_everywhere(ledger):
    """In the ledger's cells, the record, and the candidate's name, which the figures draw."""
    row = {"experiment_name": HOSTILE, "device": HOSTILE, "dataset_id": HOSTILE}
    for name, flags in (("baseline", ""), ("both", HOSTILE)):
        make_trial(ledger, "x", candidate=name, **SMALL, row=row | {"candidate_flags": flags})
    edit_config("x.baseline.d4.s0", versions={HOSTILE: HOSTILE}, flags={"depth": 4, "x": HOSTILE})
    page = experiment_page(ledger, HOSTILE, runs_dir())
    assert "<script" not in page and "alert(1)</" not in page
    Links().feed(page)
    for svg in re.findall("<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg.replace("xlink:", ""))
    assert any(HOSTILE in text for text in strips_of(page))


# --- live page ---------------------------------------------------------

@pytest.fixture
def live():
    """Serve the live page of run "one", written every 0.1 seconds; return (ask, process, port)."""
    make_run("one", **SMALL)
    # a shell starts background jobs with SIGINT ignored, and children inherit that
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "from scripts import report as r; r.RELOAD_SEC, r.MAX_LOAD = 0.1, 1.0; r.main()")
    process = subprocess.Popen([sys.executable, "-c", code, "--live", "one"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])

    def ask(path="/", method="GET", host="127.0.0.1:{}"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request(method, path, headers={"Host": host.format(port)})
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, body

    yield ask, process, port
    process.kill()
    process.communicate()


def test_live_page_answers_only_its_own_machine_and_ends_quietly(live, refusal):
    ask, process, port = live
    before = {path: path.read_bytes() for path in runs_dir().rglob("*") if path.is_file()}
    status, headers, body = ask()
    assert status == 200 and headers["Refresh"] and "Written at" in body
    assert ask(host="localhost:{}")[0] == 200
    hosts = ("evil.example", "evil.example:{}", "127.0.0.1", "localhost:1", "", "127.0.0.1:{}.x")
    assert [ask(host=host)[0] for host in hosts] == [403] * len(hosts)
    assert [ask(path)[0] for path in ("/../../etc/passwd", "/x")] == [404, 404]
    assert ask(method="POST")[0] == 501
    assert "cannot use --port" in refusal(script.main, ["--live", "one", "--port", str(port)])
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert before == {path: path.read_bytes() for path in runs_dir().rglob("*") if path.is_file()}


def test_live_page_follows_the_record_and_shows_its_errors(live):
    ask, _, _ = live
    folder = runs_dir() / "one"
    for name, words in (("moved", "no run &#x27;one&#x27;"), ("one", "Curves")):
        folder = folder.rename(runs_dir() / name)
        deadline = time.monotonic() + 300  # a busy machine draws slowly
        while words not in ask()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.1)


# --- in a browser ------------------------------------------------------

def browse(page, folder):
    """Open a page in Chromium; return (console lines, URLs that the page asked for, document)."""
    profile, netlog = folder / "profile", folder / "net.json"
    shutil.rmtree(profile, ignore_errors=True)
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
             "disable-background-networking", "disable-component-update", "disable-sync",
             "host-resolver-rules=MAP * ~NOTFOUND", f"user-data-dir={profile}",
             "enable-logging=stderr", f"log-net-log={netlog}", "window-size=1400,900", "dump-dom"]
    result = subprocess.run([CHROMIUM, *(f"--{flag}" for flag in flags), page.as_uri()],
                            capture_output=True, text=True, timeout=60, check=True)
    events = [event.get("params", {}) for event in json.loads(netlog.read_text())["events"]]
    urls = {event["url"] for event in events  # the browser's own requests have no origin
            if "url" in event and event.get("initiator", "not an origin") != "not an origin"}
    urls = {url for url in urls if not url.startswith(("file:", "data:"))}
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return console, urls, result.stdout


@needs_chromium
def test_browser_reports_no_error_and_no_request(matrix, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('boom')</script><img src='http://example.invalid/x'>")
    console, urls, _ = browse(page, tmp_path)  # such faults would be seen
    assert any("boom" in line for line in console) and urls == {"http://example.invalid/x"}
    page.write_text(matrix.page)
    console, urls, document = browse(page, tmp_path)
    assert console == [] and urls == set() and document.count('<svg role="img"') == 10


@needs_chromium
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_first_screen_has_the_verdict_and_nothing_overflows(matrix, tmp_path, width, height):
    """Measure the page in a frame of the size of a screen, and choose another x-axis."""
    frame = tmp_path / "frame.html"
    frame.write_text(f"""<!doctype html><title>waiting</title>
        <iframe style="border:0;width:{width}px;height:{height}px"
          srcdoc="{html.escape(matrix.page)}" onload="
          const page = this.contentDocument;
          const shown = () => [...page.querySelectorAll('.curve')].filter(
            figure => figure.getBoundingClientRect().height > 0).map(figure => figure.className);
          const before = shown();
          page.getElementById('by-tokens').click();
          document.title = JSON.stringify({{before: before, after: shown(),
            bottom: page.getElementById('verdict').getBoundingClientRect().bottom,
            width: page.documentElement.scrollWidth}});
        "></iframe>""")
    title = re.search("<title>(.*?)</title>", browse(frame, tmp_path)[2])[1]
    seen = json.loads(html.unescape(title))
    assert seen["bottom"] <= height and seen["width"] <= width
    assert seen["before"] == ["curve step"] * 2 and seen["after"] == ["curve tokens"] * 2
