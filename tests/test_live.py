"""The live page: what it answers to whom, that it follows the records, and that nobody needs it."""

import http.client
import json
import threading
import time

import pytest
from synthetic_runs import make_run, make_trial

from nanochat.common import RunLock, UserError, locks_dir, runs_dir, write_json
from nanochat.experiments import live
from nanochat.experiments.live import LivePage, LiveServer
from nanochat.experiments.report import experiment_report, runs_report
from nanochat.runlog import RunLog
from scripts import report as script

pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `report`)")
SMALL = {"steps": 40, "eval_every": 10}


class Drawn:
    """In place of a Report."""

    def __init__(self, text="page", is_over=False):
        self.text, self.is_over = text, is_over

    def html(self, live):
        return f"<p>{live}</p>{self.text}"


@pytest.fixture
def serve():
    servers = []

    def start(report):
        servers.append(LiveServer(report))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]
    yield start
    for server in servers:
        server.shutdown(), server.server_close()


def ask(server, path="/", method="GET", host=None):
    """(status, headers, body)"""
    port = server.server_address[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, headers={"Host": f"127.0.0.1:{port}" if host is None else host.format(port)})
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_it_is_bound_to_the_loopback_address_and_reloads_itself(serve):
    server = serve(Drawn)
    status, headers, body = ask(server)
    assert server.server_address[0] == "127.0.0.1" and status == 200 and "page" in body and "hold it still" in body
    assert headers["Refresh"] == str(live.RELOAD_SEC) and headers["Cache-Control"] == "no-store"
    assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(headers["Content-Security-Policy"].split("; "))
    status, headers, body = ask(server, "/?still")
    assert status == 200 and "Refresh" not in headers and "follow the runs" in body
    assert ask(server, method="HEAD")[::2] == (200, "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{}", "127.0.0.1", "localhost:1", "", "127.0.0.1:{}.x"])
def test_other_hosts_names_are_refused(serve, host):
    assert ask(serve(Drawn), host=host)[0] == 403


def test_what_else_is_asked_for_is_not_there(serve):
    server = serve(Drawn)
    assert ask(server, host="localhost:{}")[0] == 200
    assert [ask(server, path)[0] for path in ("/../etc/passwd", "/x", "/?other")] == [404] * 3
    assert ask(server, method="POST")[0] == 501


def test_it_follows_the_record_to_the_end_of_the_run(monkeypatch):
    config = json.loads((make_run("r", **SMALL).folder / "config.json").read_text()) | {"seed": 1}
    del config["run_id"]
    owned = [RunLock(runs_dir() / "going", locks_dir() / "run.going", "going", "")]
    log = RunLog.create(runs_dir(), "going", config, owned=owned)
    page = LivePage(lambda: runs_report(["r", "going"], runs_dir()))
    monkeypatch.setattr(live.time, "monotonic", lambda: now)
    now = 0.0
    assert "running, step 0/40" in page.get(False)[1] and not page.is_over
    log.event("train", step=1, tokens=8, loss=3.0, dt_ms=1.0, tok_per_sec=8.0, train_time_sec=0.0)
    assert "running, step 0/40" in page.get(False)[1]  # no sooner than it is asked to come again
    now = page.reload_sec + 0.1
    assert "running, step 1/40" in page.get(False)[1]
    log.finish(status="ok", steps=1, tokens=8)
    log.close()
    now += page.reload_sec + 0.1
    assert "no run of it is running any more" in page.get(False)[1] and page.is_over


def test_drawing_takes_a_twentieth_of_a_core(monkeypatch):
    times = iter([0.0, 4.0])
    monkeypatch.setattr(live.time, "thread_time", lambda: next(times))
    page = LivePage(Drawn)
    page.get(False)
    assert page.reload_sec == 80


@pytest.mark.parametrize("error", [UserError, OSError])
def test_a_record_that_breaks_is_said_in_the_page_which_goes_on(serve, monkeypatch, error):
    monkeypatch.setattr(live, "RELOAD_SEC", 0)
    fault = [error("line 3: <b>not</b> an event")]

    def report():
        if fault:
            raise fault[0]
        return Drawn()
    server = serve(report)
    status, headers, body = ask(server)
    assert status == 503 and "line 3: &lt;b&gt;not&lt;/b&gt; an event" in body and "Refresh" in headers
    fault.clear()
    assert ask(server)[0] == 200


def test_clients_that_go_away_or_say_nonsense_end_nothing(serve, capsys):
    server = serve(Drawn)
    for words in (b"", b"GET /", b"\xff\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
        connection.connect()
        connection.sock.sendall(words)
        connection.close()
    time.sleep(0.05)
    assert ask(server)[0] == 200 and capsys.readouterr() == ("", "")


def test_a_fault_of_the_program_is_seen_in_its_terminal(serve, capsys):
    server = serve(lambda: 1 / 0)
    with pytest.raises(http.client.RemoteDisconnected):
        ask(server)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_page_of_runs_that_are_over_is_drawn_anew_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(live, "RELOAD_SEC", 0)
    reports = iter([Drawn("finished", is_over=True), Drawn("resumed")])
    page = LivePage(lambda: next(reports))
    assert "finished" in page.get(False)[1] and page.is_over
    assert "resumed" in page.get(False)[1] and not page.is_over


def test_a_page_of_an_experiment_never_says_that_it_is_over(tmp_path):
    make_trial(tmp_path / "ledger.csv", "one", **SMALL)  # its next run has no line yet
    page = LivePage(lambda: experiment_report(tmp_path / "ledger.csv", "one", runs_dir()))
    assert "comes again by itself" in page.get(False)[1] and not page.is_over


def test_a_port_that_is_taken_is_said(serve):
    port = serve(Drawn).server_address[1]
    for wanted in (port, 70000, -1):
        with pytest.raises(UserError, match=f"--port {wanted} cannot be had"):
            LiveServer(Drawn, wanted)


def test_the_script_serves_until_it_is_interrupted(monkeypatch, capsys, refusal):
    make_run("one", **SMALL)
    before = {path: path.read_bytes() for path in runs_dir().rglob("*") if path.is_file()}
    monkeypatch.setattr(live.os, "nice", lambda _: None)
    asked = []

    def interrupted(server):
        asked.append(server.page.get(False)[0])
        raise KeyboardInterrupt
    monkeypatch.setattr(LiveServer, "serve_forever", interrupted)
    script.main(["--live", "one"])
    assert asked == [200] and "http://127.0.0.1:" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in runs_dir().rglob("*") if path.is_file()} == before
    for argv in (["--live", "one", "--out", "x.html"], ["--live", "nothing"]):
        refusal(script.main, argv)


def test_a_record_without_its_device_or_dataset_is_named():
    folder = make_run("odd", **SMALL).folder
    write_json(folder / "config.json", {"run_id": "odd", "flags": {"depth": 1}, "seed": 1})
    with pytest.raises(UserError, match=r"odd: dataset_id is empty; this is no training's record"):
        runs_report(["odd"], runs_dir())
