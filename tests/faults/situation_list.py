"""The list that situations.py plays: flags, files, text, environments, consoles, signals and names, each spoilt."""

import argparse
import contextlib
import gzip
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from corpus import GOLDEN_TOKENIZER, TINY_FLAGS, write_corpus
from damage import CASES, bundle
from synthetic_runs import make_trial

FINE, REFUSED = "fine", "refused"


@dataclass(frozen=True)
class Situation:
    """One thing that can happen. program: a module with `main(argv)`.

    expect: FINE or REFUSED where only that is right, else either is. change(world folder): before; within(): in the
    process, before main; check(world folder): of a program that ended well, anything false is wrong in silence.
    keep: whether the earlier run's record and checkpoints must be as they were. encoding: of its console.
    mute: whether it may be that nothing can be said.
    """

    name: str
    program: str
    argv: list
    expect: str | None = None
    change: object = None
    within: object = None
    check: object = None
    env: dict = field(default_factory=dict)
    keep: bool = True
    encoding: str = "utf-8"
    mute: bool = False


TRAIN = [*TINY_FLAGS, "--depth", "1", "--aspect-ratio", "32", "--dataset", "corpus", "--num-iterations", "2",
         "--device-type", "cpu"]
NEW = [*TRAIN, "--run-id", "new", "--model-tag", "new"]
RESUME = [*TRAIN, "--num-iterations", "4", "--run-id", "done", "--model-tag", "done", "--resume-from-step", "2"]
TEXT = ["--tokenizer-dir", GOLDEN_TOKENIZER]
PROGRAMS = {  # the shortest use of each that is right
    "scripts.base_train": NEW,
    "scripts.base_eval": ["--model-tag", "done", "--eval", "bpb", "--split-tokens", "256", "--device-batch-size", "2",
                          "--out", "out.json"],
    "scripts.sample": ["--model-tag", "done", "--max-new-tokens", "3", "the dog"],
    "scripts.export": ["--model-tag", "done", "--to", "exported", "--format", "upstream"],
    "scripts.tok_train": ["--dataset", "corpus", "--vocab-size", "300", "--tokenizer-dir", "tok"],
    "scripts.tok_eval": ["--dataset", "corpus", *TEXT],
    "scripts.lane_b_stats": ["--dataset", "corpus", *TEXT, "--out", "s.json", "--processes", "1",
                             "--max-tokens", "999"],
    "scripts.lane_b_infer_ratio": ["--calibration-run", "done", "--target-metric-threshold", "1.5", "--out", "i.json"],
    "scripts.lane_b_log_run": ["done", "--inference-json", "inference/f.json", "--ledger", "l.csv"],
    "scripts.lane_b": ["--profile", "cpu", "--dry-run"],
    "scripts.experiment": ["--name", "e", "--profile", "cpu", "--dry-run", "--ledger", "e.csv"],
    "scripts.verdict": ["--experiment", "made", "--ledger", "e.csv"],
    "scripts.report": ["done", "--out", "r.html"],
    "scripts.runs": [],
    "scripts.plan": ["--depth", "4"],
    "scripts.leaderboard": ["done"],
}


def make_world(world):
    """A cache with a run of four steps that went well, its checkpoints, an experiment's runs and ledger, and text."""
    os.environ |= {"NANOCHAT_BASE_DIR": str(world / "cache"), "NANOCHAT_DTYPE": "float32", "WANDB_MODE": "offline",
                   "HF_HUB_OFFLINE": "1"}
    write_corpus(world / "corpus", documents_per_shard=30)
    shutil.copytree(GOLDEN_TOKENIZER, world / "cache" / "tokenizer")
    code = importlib.import_module("scripts.base_train").main(
        [*TRAIN, "--num-iterations", "4", "--save-every", "2", "--eval-every", "2", "--run-id", "done", "--model-tag",
         "done", "--position-losses"])
    for candidate in ("baseline", "chunked-ce"):
        for seed in (0, 1):
            make_trial(world / "e.csv", "made", candidate=candidate, seed=seed)
    for name in ("text folder", "statistics", "inference"):
        folder = world / name.split()[0]
        folder.mkdir()
        CASES[name].make(folder)
    bundle(world)
    shutil.move(world / "b", world / "cache" / "eval_bundle")
    return code


def situations():
    os.environ |= {"NANOCHAT_DTYPE": "float32", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1",
                   "NANOCHAT_BASE_DIR": "cache"}
    return [*right_uses(), *spoilt_flags(), *hostile_flags(), *spoilt_files(), *texts(), *environments(), *consoles(),
            *places(), *signals()]


def right_uses():
    for program, argv in PROGRAMS.items():
        expect = None if "lane_b_" in program or "leader" in program else FINE  # these refuse so little a run
        yield Situation(f"{program} as it should be", program, argv, expect)
    yield Situation("resumed from the middle", "scripts.base_train", RESUME, FINE, keep=False,
                    check=lambda world: last_event(world, "done")["step"] == 4)
    yield Situation("CORE", "scripts.base_eval", ["--model-tag", "done", "--eval", "core"], FINE)


def last_event(world, run_id):
    lines = (world / "cache" / "runs" / run_id / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "train"][-1]


# --- flags -----------------------------------------------------------------------------------------------------------

NUMBERS, WORDS = ("-1", "0", "nan", "inf", "9" * 25, "x", "1e-400"), ("", "x" * 5000, "a\nb", "\udcff", "/dev/null/x")


def flags_of(program):
    """The actions of a program's parser."""
    def caught(parser, *_, **__):
        raise _Caught(parser)

    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = caught
    try:
        importlib.import_module(program).parse_args([])
    except _Caught as found:
        return [action for action in found.args[0]._actions if action.nargs != 0 and action.option_strings]
    finally:
        argparse.ArgumentParser.parse_args = original


class _Caught(Exception):
    pass


def spoilt_flags():
    """Every flag of every program with values that it may not have; three in turn of a flag of numbers."""
    for program, argv in PROGRAMS.items():
        for at, action in enumerate(flags_of(program)):
            is_number = action.type in (int, float)
            values = NUMBERS if is_number else WORDS
            for value in sorted({values[(at + shift) % len(values)] for shift in ((0, 2, 4) if is_number else (0, 2))}):
                flag = action.option_strings[0]
                if flag in ("--run", "--hf-path"):  # another program's names
                    continue
                impossible = value == "x" or (value in ("nan", "inf") and (
                    action.type is int or flag.endswith(("lr", "decay", "ratio", "frac"))))
                wrong = is_number and impossible
                yield Situation(f"{program} {flag} {value[:9]!a}", program, [*argv, f"{flag}={value}"],
                                REFUSED if wrong else None)


def hostile_flags():
    def case(program, *argv, expect=REFUSED, **more):
        return Situation(f"{program} {' '.join(argv)[:60]!a}", program, [*PROGRAMS[program], *argv], expect, **more)

    for flag in ("--max-seq-len", "--aspect-ratio", "--head-dim", "--device-batch-size"):
        yield case("scripts.base_train", flag, "1000000000")
    yield case("scripts.base_train", "--depth", "10000")
    yield case("scripts.base_train", "--window-pattern", "XYZ")
    yield case("scripts.base_train", "--resume-from-step", "latest")
    yield case("scripts.base_train", "--resume-from-step", "-7")
    yield case("scripts.base_train", "--resume-from-step", "1.5")
    yield case("scripts.base_train", "--target-flops", "1e300", "--num-iterations", "-1")
    yield case("scripts.base_train", "--num-iterations", "-1", "--target-param-data-ratio", "1e300")
    yield case("scripts.base_train", "--total-batch-size", "255")
    yield case("scripts.base_train", "--run-id", "done")
    yield case("scripts.base_train", "--model-tag", "../../x")
    yield case("scripts.base_train", "--run-id", "x" * 300)
    yield case("scripts.base_train", "--dataset", "climbmix")
    yield case("scripts.base_train", "--dataset", "corpus/shard_00000.parquet")
    yield case("scripts.base_train", "--device-type", "cuda")
    yield case("scripts.base_train", "--fp8")
    yield case("scripts.base_train", "--nonsense")
    yield case("scripts.base_train", "surplus")
    yield case("scripts.base_train", "--stop-at-target")
    for program in ("scripts.base_eval", "scripts.sample", "scripts.export"):
        for tag in ("missing", "../base_checkpoints/done", "/", ".", "done/model_000002.pt", "a\0b"):
            yield case(program, "--model-tag", tag, expect=None if tag == "../base_checkpoints/done" else REFUSED)
        for step in ("3", "-2", "x", "9" * 30, "1e1"):
            yield case(program, "--step", step)
    yield case("scripts.base_eval", "--eval", "bpb,nothing")
    yield case("scripts.base_eval", "--eval", "")
    for text in ("", " ", "\n", "\0", "<|bos|>", "\udcff", "ü" * 2000, "\x1b[2J"):
        yield case("scripts.sample", text, expect=None)
    for name in ("corpus", "cache", "cache/runs/done", ".", "/", "e.csv", "missing/deep/down"):
        yield case("scripts.export", "--to", name, expect=None if "missing" in name else REFUSED)
    yield case("scripts.export", "--to", "e.csv", "--format", "hf")
    for name in ("done", "../done", "missing", "x" * 300, "a\0b", "cache/runs/done/config.json", ""):
        yield case("scripts.report", name, expect=None if name == "done" else REFUSED)
        for flag in ("--watch", "--compare"):
            yield case("scripts.runs", flag, name, expect=None if name == "done" else REFUSED)
    yield case("scripts.runs", "--prune", "--yes", "--with-last")
    yield case("scripts.runs", "--yes")
    yield case("scripts.runs", "--prune", "--yes", expect=FINE, keep=False)  # step 2 is neither newest nor best
    yield case("scripts.runs", "[", expect=FINE)
    yield case("scripts.experiment", "--candidates", "a=--fused-rmsnorm 'open")
    yield case("scripts.experiment", "--candidates", "../x=--fp8")
    yield case("scripts.experiment", "--seeds", "1", "1", expect=None)
    yield case("scripts.experiment", "--name", "../../x")
    yield case("scripts.lane_b", "--name", "../../x")
    yield case("scripts.verdict", "--experiment", "missing")
    yield case("scripts.lane_b_log_run", "--seed", "one")
    yield case("scripts.lane_b_log_run", "--notes", "=1+1", expect=None)


# --- files -----------------------------------------------------------------------------------------------------------

def spoilt(path, kind):
    """Damage one file in one way."""
    data = path.read_bytes() if path.exists() else b"more"  # tokenizer.txt: beside a pickle there was none
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as held, contextlib.chdir(path.parent) if hasattr(
                contextlib, "chdir") else contextlib.nullcontext():
            held.bind(path.name)
    elif kind != "missing":
        middle = len(data) // 2
        path.write_bytes({"empty": b"", "half": data[:middle], "list": b"[]", "deep": b"[" * 100_000,
                          "page": b"<html>sign in</html>", "zeros": bytes(len(data)), "unreadable": data,
                          "flipped": data[:middle] + bytes([data[middle] ^ 2]) + data[middle + 1:]}[kind])
        if kind == "unreadable":
            path.chmod(0)


KINDS = ("missing", "empty", "half", "flipped", "folder", "loop", "fifo", "unreadable", "deep", "page", "zeros", "list",
         "socket")


def spoilt_files():
    """Every file with each kind of damage in turn, before a program that reads it."""
    readers = {
        "cache/base_checkpoints/done/model_000004.pt": "base_eval sample export",
        "cache/base_checkpoints/done/model_000002.pt": "resume",
        "cache/base_checkpoints/done/meta_000002.json": "resume",
        "cache/base_checkpoints/done/optim_000002_rank0.pt": "resume",
        "cache/base_checkpoints/done/meta_000004.json": "base_eval sample export",
        "cache/runs/done/config.json": "resume runs report lane_b_infer_ratio lane_b_log_run",
        "cache/runs/done/metrics.jsonl": "resume runs report lane_b_infer_ratio lane_b_log_run",
        "cache/runs/done/summary.json": "runs report lane_b_infer_ratio lane_b_log_run",
        "cache/tokenizer/tokenizer.txt": "tok_eval", "cache/tokenizer/tokenizer.pkl": "tok_eval",
        "corpus/shard_00000.parquet": "base_train tok_train lane_b_stats", "corpus/shard_00002.parquet": "base_train",
        "e.csv": "verdict", "cache/eval_bundle/core.yaml": "core", "cache/eval_bundle/eval_meta_data.csv": "core",
        "cache/eval_bundle/eval_data/t.jsonl": "core", "inference/f.json": "lane_b_log_run",
        "statistics/f.json": "statistics", "text/t/b.jsonl": "text", "text/t/c.jsonl.gz": "text",
        "cache/runs/done/position_losses.json": "losses", "tokens": "base_train", "text/t/a.txt": "text",
    }
    uses = {name.split(".")[-1]: (name, argv) for name, argv in PROGRAMS.items()} | {
        "resume": ("scripts.base_train", RESUME),
        "core": ("scripts.base_eval", ["--model-tag", "done", "--eval", "core"]),
        "tok_eval": ("scripts.tok_eval", ["--dataset", "corpus"]),
        "text": ("scripts.tok_train", [*PROGRAMS["scripts.tok_train"], "--dataset", "text/t"]),
        "statistics": ("scripts.lane_b_infer_ratio", [*PROGRAMS["scripts.lane_b_infer_ratio"], "--stats-json",
                                                      "statistics/f.json"]),
        "losses": ("scripts.lane_b_stats", [*PROGRAMS["scripts.lane_b_stats"], "--position-losses", "done"])}

    def damage(name, kind):
        def change(world):
            for path in (world / "cache" / "tokens").rglob("*.bin") if name == "tokens" else [world / name]:
                spoilt(path, kind)
        return change

    for name, programs in readers.items():
        for at, (kind, use) in enumerate((kind, use) for use in programs.split() for kind in KINDS):
            if at % len(programs.split()) == 0 or len(programs.split()) == 1:
                program, argv = uses[use]
                yield Situation(f"{program} with {name} {kind}", program, argv, keep=False, change=damage(name, kind))


# --- text ------------------------------------------------------------------------------------------------------------

def texts():
    plain = b"some words here and there\n\n" * 40
    folders = {  # name -> ({file name: bytes}, what is right)
        "latin-1": ({"a.txt": "Gr\u00fc\u00dfe ".encode("latin-1") * 99}, REFUSED),
        "utf-16": ({"a.txt": "words ".encode("utf-16") * 9}, REFUSED),
        "empty files": ({"a.txt": b"", "b.txt": b""}, REFUSED),
        "white space": ({"a.txt": b" \n\n\t" * 9}, None), "NULs": ({"a.txt": b"\0" * 5000}, None),
        "one file": ({"a.txt": plain}, None), "no text": ({"a.rst": plain}, REFUSED), "nothing": ({}, REFUSED),
        "the same twice": ({"a.txt": plain, "b.txt": plain}, None),
        "odd names": ({"a b\nc.txt": plain, "\udcff.txt": plain + b"x", "$(id).md": plain + b"y"}, FINE),
        "hidden": ({".a.txt": plain}, REFUSED), "a page": ({"a.txt": b"<html>" * 99, "b.txt": plain}, FINE),
        "no gzip": ({"a.jsonl.gz": plain}, REFUSED),
        "half a gzip": ({"a.jsonl.gz": gzip.compress(b'{"text": "words"}\n' * 99)[:30]}, REFUSED),
        "JSON lines of lists": ({"a.jsonl": b"[]\n" * 9}, REFUSED),
        "JSON with CRLF and a mark": ({"a.jsonl": b"\xef\xbb\xbf" + b'{"text": "some words"}\r\n' * 9,
                                       "b.txt": plain}, None),
        "one JSON document": ({"a.jsonl": b'{\n"text": "words"\n}\n'}, REFUSED),
        "no parquet": ({"a.parquet": b"PAR1" + bytes(99) + b"PAR1"}, REFUSED),
        "a long line": ({"a.txt": b"x" * 3_000_000, "b.txt": plain}, None),
    }
    for name, (files, expect) in folders.items():
        def change(world, files=files):
            (world / "own").mkdir()
            for path, data in files.items():
                (world / "own" / path).write_bytes(data)
        tokenizer = [*PROGRAMS["scripts.tok_train"], "--vocab-size", "266", "--dataset", "own"]
        for program, argv in (("scripts.tok_train", tokenizer),
                              ("scripts.base_train", [*NEW, "--dataset", "own"])):
            yield Situation(f"{program} on text: {name}", program, argv,
                            None if program == "scripts.base_train" and expect == FINE else expect, change)
    tables = {"no column": ({"words": ["a"] * 9}, REFUSED), "numbers": ({"text": [1, 2, 3]}, REFUSED),
              "nulls": ({"text": ["a b c " * 30, None, "d"]}, None),
              "no rows": ({"text": pa.array([], pa.string())}, None),
              "bytes": ({"text": [b"\xff\xfe"] * 3}, REFUSED), "lists": ({"text": [["a"]] * 3}, REFUSED),
              "empty texts": ({"text": [""] * 9}, None)}
    for name, (table, expect) in tables.items():
        for where in ("corpus/shard_00000.parquet", "corpus/shard_00002.parquet"):
            yield Situation(f"{where} of {name}", "scripts.base_train", NEW, expect,
                            lambda world, table=table, where=where: pq.write_table(pa.table(table), world / where))
    for name, use in {"a fifo": os.mkfifo, "a loop": lambda path: path.symlink_to(path.name),
                      "a dangling link": lambda path: path.symlink_to("nowhere"),
                      "a loop of folders": lambda path: path.with_suffix("").symlink_to(".", True),
                      "a folder": Path.mkdir}.items():
        yield Situation(f"a text folder with {name} in it", "scripts.tok_train",
                        [*PROGRAMS["scripts.tok_train"], "--dataset", "text/t"],
                        None, lambda world, use=use: use(world / "text" / "t" / "z.txt"))


# --- environments and consoles ---------------------------------------------------------------------------------------

def limited(name, value):
    return lambda: resource.setrlimit(name, (value, resource.getrlimit(name)[1]))


def environments():
    def case(name, expect=None, program="scripts.base_train", **more):
        return Situation(f"{program}: {name}", program, PROGRAMS[program], expect, **more)

    odd = {"NANOCHAT_BASE_DIR": ("", "e.csv", "/proc/x", "a\nb c", "x" * 5000, "cache/../cache", "~"),
           "HOME": (None, "", "/nowhere"), "RANK": ("x", "0", "-1", "7"), "WORLD_SIZE": ("x", "0", "2"),
           "LOCAL_RANK": ("x",), "NANOCHAT_DTYPE": ("float8", "", "bfloat16"), "TZ": ("Mars/X", ""),
           "PATH": (None, ""), "TMPDIR": ("/nowhere",), "COLUMNS": ("0", "-1", "x"), "LINES": ("0",),
           "CUDA_VISIBLE_DEVICES": ("x", "99"), "OMP_NUM_THREADS": ("x",), "TERM": ("dumb", ""),
           "GIT_DIR": ("/nowhere",), "HF_HOME": ("/proc/x",), "PYTHONHASHSEED": ("0",), "NANOCHAT_NONSENSE": ("1",)}
    for name, values in odd.items():
        for value in values:
            yield case(f"{name}={value!a:.20}", env={name: value, **({"NANOCHAT_BASE_DIR": None} if name == "HOME"
                                                                    else {})})
    for program in ("scripts.base_train", "scripts.tok_train", "scripts.report", "scripts.sample", "scripts.export"):
        yield case("umask 077", FINE, program, within=lambda: os.umask(0o77))
        yield case("umask 777", None, program, within=lambda: os.umask(0o777))
        for n_bytes in (0, 1000, 20_000):
            yield case(f"a disk with room for {n_bytes}", None, program,
                       within=limited(resource.RLIMIT_FSIZE, n_bytes), mute=n_bytes == 0)
        yield case("16 open files", None, program, within=limited(resource.RLIMIT_NOFILE, 16))
        yield case("little memory", None, program, within=lambda: limited(
            resource.RLIMIT_AS, 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + (8 << 20))())
        yield case("a folder that is gone", None, program, within=gone_folder)


def gone_folder():
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def consoles():
    def closed_pipe():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)

    def full():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    ways = {"stdin closed": lambda: os.close(0), "stdout closed": lambda: os.close(1),
            "a pipe that is closed": closed_pipe, "a full disk": full, "no streams": lambda: os.closerange(0, 3)}
    for program in PROGRAMS:
        for name, within in ways.items():
            yield Situation(f"{program}: {name}", program, PROGRAMS[program], within=within, mute=name == "no streams")
        yield Situation(f"{program}: an ASCII terminal", program, PROGRAMS[program], encoding="ascii")
    yield Situation("scripts.sample: ü in an ASCII terminal", "scripts.sample",
                    [*PROGRAMS["scripts.sample"], "ü"], encoding="ascii")
    for name, data in {"bytes": b"\xff\xfe\0\n", "nothing": b"", "lines": b"a\n\nb"}.items():
        def given(data=data):
            reader, writer = os.pipe()
            os.write(writer, data)
            os.close(writer)
            os.dup2(reader, 0)
        yield Situation(f"scripts.sample: {name} as standard input", "scripts.sample",
                        PROGRAMS["scripts.sample"][:-1], FINE, within=given)


# --- places and signals ----------------------------------------------------------------------------------------------

def places():
    def replaced(name, make):
        def change(world):
            path = world / name
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return change

    makes = {"a file": lambda path: path.write_text("x"), "read-only": lambda path: path.mkdir(0o555),
             "a dangling link": lambda path: path.symlink_to("/nowhere/x"),
             "a loop": lambda path: path.symlink_to(path.name), "shut": lambda path: path.mkdir(0)}
    spots = {"scripts.base_train": ("cache", "cache/runs", "cache/runs/new", "cache/base_checkpoints", "cache/locks",
                                    "cache/base_checkpoints/new", "cache/tokens", "corpus", "cache/locks/run.new"),
             "scripts.runs": ("cache/runs", "cache/runs/other", "cache/base_checkpoints/other", "cache/locks"),
             "scripts.tok_train": ("tok", "corpus"), "scripts.export": ("exported",),
             "scripts.report": ("r.html", "cache/runs"), "scripts.base_eval": ("out.json", "cache/base_eval")}
    for program, names in spots.items():
        for name in names:
            for kind, make in makes.items():
                yield Situation(f"{program}: {name} is {kind}", program, PROGRAMS[program], keep=False,
                                change=replaced(name, make))
    for name in ("a b", "a\nb", "ü", "-x", "$(id)", "x" * 200):
        yield Situation(f"corpus in {name[:9]!a}", "scripts.base_train", [*NEW, "--dataset", f"./{name}"], FINE,
                        change=lambda world, name=name: shutil.move(world / "corpus", world / name))


def signals():
    def sent(number, run_id, after):
        def watch():
            path = Path("cache/runs") / run_id / "metrics.jsonl"
            while not (path.exists() and path.read_bytes().count(b'"train"') >= after):
                time.sleep(0.005)
            os.kill(os.getpid(), number)
        return lambda: threading.Thread(target=watch, daemon=True).start()

    def is_saved(world):
        return (world / "cache" / "base_checkpoints" / "new").exists()

    long = [*NEW, "--num-iterations", "2000", "--save-every", "10"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        for after in (1, 8):
            yield Situation(f"{number.name} after step {after}", "scripts.base_train", long, check=is_saved,
                            within=sent(number, "new", after))
