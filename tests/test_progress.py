"""What long work says: a line every tenth in a log, a bar on a terminal, nothing when quiet; no bar keeps a lock."""

import io
import sys
import threading
import types

import pytest
from tqdm import tqdm

from nanochat import common as module
from nanochat.common import QUIET, SILENCE_SEC, STAGE, Bar, TenPercentSteps, print_next_command, progress, set_quiet


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic of the module, set by hand."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    monkeypatch.delenv(QUIET, raising=False)
    monkeypatch.delenv(STAGE, raising=False)
    return clock


def items(n, clock, sec=1.0):
    for item in range(n):
        clock.now += sec
        yield item


def test_a_log_has_a_line_every_tenth(clock, capsys):
    assert list(progress(items(200, clock), total=200, desc="reading", unit="doc")) == list(range(200))
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == "reading: 10% (20/200 doc), about 03:00 left"
    assert [line.split()[1] for line in err.splitlines()] == [f"{10 * tenth}%" for tenth in range(1, 11)]


def test_short_work_is_silent_and_slow_work_shows_that_it_goes_on(clock, capsys):
    list(progress(items(1000, clock, 0.0005), total=1000))
    assert capsys.readouterr().err == ""
    list(progress(items(5, clock, SILENCE_SEC), total=1000, desc="slow"))
    assert capsys.readouterr().err.count("slow: 0%") == 5


def test_what_moves_in_leaps_or_learns_its_total_on_the_way_is_said_once(clock, capsys):
    with progress(desc="run", unit="step") as bar:
        for n, total in ((1, None), (4, 10), (9, 10), (10, 10)):
            clock.now += 2
            bar.total = total
            bar.update(n - bar.n)
    assert [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "run: 40% (4/10 step)", "run: 90% (9/10 step)", "run: 100% (10/10 step)"]


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_and_other_ranks_show_nothing_but_count(clock, capsys, monkeypatch, quiet):
    monkeypatch.setenv(QUIET, "")
    set_quiet(quiet)
    assert list(progress(items(50, clock), total=50, shown=quiet)) == list(range(50))
    with progress(total=5, shown=quiet) as bar:
        bar.set_description("x"), bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_a_tenth_is_due_once():
    tenths = TenPercentSteps(apart_sec=0.0)
    assert [n for n in (*range(45), *range(5, 101)) if tenths.is_due(n, 100)] == list(range(10, 101, 10))


def test_a_terminal_gets_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress(total=4, desc="reading") as bar:
        bar.update(4)
    assert "reading: 100%" in capsys.readouterr().err and isinstance(bar, Bar)


class Gone(io.StringIO):
    """A terminal that went away after so many writes."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def write(self, text):
        self.n -= 1
        if self.n < 0:
            raise OSError(5 if self.n % 2 else 28, "gone")
        return super().write(text)


@pytest.mark.parametrize("n_writes", range(8))
def test_a_terminal_that_goes_away_ends_nothing_and_leaves_no_lock(n_writes):
    bar = Bar(total=10, file=Gone(n_writes), mininterval=0)
    for _ in range(5):
        bar.update()
        bar.clear()
    bar.refresh(), bar.close()
    free = threading.Event()

    def take():
        with tqdm.get_lock():
            free.set()
    threading.Thread(target=take, daemon=True).start()
    assert free.wait(5)


def test_the_next_command_is_what_a_shell_takes_and_stages_leave_it_out(clock, capsys, monkeypatch):
    print_next_command("scripts.tok_train", "--dataset", "my folder")
    assert capsys.readouterr().out == "next: python -m scripts.tok_train --dataset 'my folder'\n"
    monkeypatch.setenv(STAGE, "1")
    print_next_command("scripts.tok_train")
    assert capsys.readouterr().out == ""
