"""A job of several ranks ends when one of them dies or hangs, in a line that names it: heartbeats through the store of
torchrun's rendezvous."""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import namedtuple

from nanochat.common import UserError, json_bytes, parse_json

BEAT_SEC = 1.0
SURE_SEC = 8.0  # of silence are enough where a peer's connection is gone already, or torchrun ends this rank
BUSY, TRAINING, WAITING, LEFT = "busy", "training", "waiting", "left"


# n_marks counts progress, step is of steps done, where is the main thread's place in the code
_Beat = namedtuple("_Beat", "n_beats n_marks step doing host pid where")
# its last heartbeat, and when, by the clock here, the last one and the last progress were seen
_Peer = namedtuple("_Peer", "beat heard_sec moved_sec")


class Watchdog:
    """For its block, a thread of each rank tells the others once a second what the rank does.

    One that is silent for `timeout_sec`, or stays so long within its share of a training step, ends the job: one rank
    says which and where, all exit with UserError's code. A BUSY rank (it compiles, evaluates, saves, reads) has no
    limit as long as its heart beats. Rank 0 looks at all, the others at rank 0. timeout_sec 0: no watchdog.
    """

    def __init__(self, ranks, timeout_sec):
        self._ranks, self._timeout_sec = ranks, timeout_sec
        self._is_on = ranks.store is not None and timeout_sec > 0
        self._n_marks, self._step, self._doing = 0, 0, BUSY  # read by the thread
        self._peers = {}
        self._looked_sec = None
        self._failing = False

    def at(self, step, doing):
        """What this rank does from here on, after `step` steps: BUSY, TRAINING its own share of a step, or WAITING for
        the others'. Each call is progress."""
        self._step, self._doing = step, doing
        self._n_marks += 1

    def wait_for_all(self, name):
        """Until every rank has come here. No collective: those have a time limit."""
        if not self._is_on:
            return
        if self._store.add(name, 1) == self._ranks.world_size:
            self._store.set(f"{name}/all", "")
        while not self._store.check([f"{name}/all"]):
            time.sleep(0.1)

    def __enter__(self):
        if self._is_on:
            self._store = self._ranks.store.clone()  # a call on the process group's may wait for a peer
            self._wake, wake = socket.socketpair()
            wake.setblocking(False)
            # a signal wakes the thread even where the main thread is within a collective, out of Python's reach
            self._wake_up = wake
            self._before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False), signal.signal(
                signal.SIGTERM, self._terminated)
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, _traceback):
        if not self._is_on:
            return
        if isinstance(error, RuntimeError) or (kind and self._failing):
            self._failing = True  # maybe because another is gone: when the thread knows which, it ends the process
            self._thread.join(SURE_SEC + 4 * BEAT_SEC)
        self.at(self._step, LEFT)
        self._wake_up.send(b"\0")
        self._thread.join()
        if kind is None:  # rank 0 may hold the store: it leaves last
            deadline_sec = time.monotonic() + self._timeout_sec
            n_left = self._store.add("left", 1)
            while self._ranks.is_main and n_left < self._ranks.world_size and time.monotonic() < deadline_sec:
                time.sleep(0.02)
                n_left = self._store.add("left", 0)
        signal.set_wakeup_fd(self._before[0])
        signal.signal(signal.SIGTERM, self._before[1])

    def _terminated(self, number, _frame):
        """SIGTERM while the training loop does not handle it. torchrun sends it as soon as one rank is gone."""
        if not self._failing:
            self._failing = True
            raise SystemExit(128 + number)

    def _run(self):
        n_beats = 0
        try:
            while self._doing != LEFT:
                n_beats += 1
                self._beat(n_beats)
                if self._failing and any(peer.beat.doing == LEFT for peer in self._peers.values()):
                    break  # it has said why
                found = self._look(time.monotonic())
                if found and self._store.add("found", 1) == 1:
                    self._end(found)
                if found or self._store.check(["found"]):
                    self._end()
                if select.select([self._wake], [], [], BEAT_SEC)[0] and signal.SIGTERM in self._wake.recv(64):
                    self._failing = True
            self._beat(n_beats)
        except Exception as error:  # torch has several for a store that is gone
            if self._doing != LEFT:
                self._end(f"the ranks' store is gone, with torchrun or rank 0's machine "
                          f"({' '.join(str(error).split())[:100]}); this rank's last step was {self._step}")

    def _beat(self, n_beats):
        frame = sys._current_frames().get(threading.main_thread().ident)
        where = frame and f"{os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno}"
        beat = _Beat(n_beats, self._n_marks, self._step, self._doing, socket.gethostname(), os.getpid(), where)
        self._store.set(f"beat/{self._ranks.rank}", json_bytes(beat).decode())

    def _look(self, now_sec):
        """In words, what is wrong with whom; None while all is well."""
        watched = range(self._ranks.world_size) if self._ranks.is_main or self._failing else [0]
        keys = {rank: f"beat/{rank}" for rank in watched}
        there = {rank: key for rank, key in keys.items() if rank in self._peers or self._store.check([key])}
        for rank, value in zip(there, self._store.multi_get(list(there.values())) if there else [], strict=True):
            beat, known = _Beat(*parse_json(value)), self._peers.get(rank)
            if known is None or beat.n_beats != known.beat.n_beats:
                moved_sec = known.moved_sec if known and beat.n_marks == known.beat.n_marks else now_sec
                self._peers[rank] = _Peer(beat, now_sec, moved_sec)
        # while this process did not run (it was stopped, the machine is overloaded) nobody could be heard
        missed_sec = now_sec - (self._looked_sec or now_sec)
        self._looked_sec = now_sec
        if missed_sec > 4 * BEAT_SEC:
            self._peers = {rank: _Peer(beat, heard_sec + missed_sec, moved_sec + missed_sec)
                           for rank, (beat, heard_sec, moved_sec) in self._peers.items()}
        silent_sec = min(SURE_SEC, self._timeout_sec) if self._failing else self._timeout_sec
        for rank, peer in self._peers.items():
            if peer.beat.doing != LEFT and now_sec - peer.heard_sec > silent_sec:
                step = max(peer.beat.step, self._step)  # as far as this rank came, that one had come too
                return f"{_name(rank, peer.beat)} is gone; its last step was {step}"
        still = {rank: peer.beat for rank, peer in self._peers.items() if now_sec - peer.moved_sec > self._timeout_sec}
        training = {rank: beat for rank, beat in still.items() if beat.doing == TRAINING}
        if training:  # a rank that is a step ahead may wait within its own share
            rank, beat = min(training.items(), key=lambda item: item[1].step)
            return (f"{_name(rank, beat)} hangs: {self._timeout_sec:g} s (--rank-timeout-sec) in {beat.where}; its "
                    f"last step was {beat.step}")
        if len(still) == self._ranks.world_size and all(beat.doing == WAITING for beat in still.values()):
            return f"all ranks wait for each other since step {still[0].step}: a collective hangs"
        return None

    def _end(self, found=None):
        """End this process; the main thread may be where nothing else reaches it."""
        with contextlib.suppress(OSError, ValueError):
            if found:
                print(f"error: {found}; go on with --resume-from-step auto", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(UserError.exit_code)


def _name(rank, beat):
    return f"rank {rank} (pid {beat.pid} on {beat.host})"
