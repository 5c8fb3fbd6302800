"""What can happen to the bytes of a file, as a hypothesis strategy; the files that the project reads."""

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from corpus import GOLDEN_TOKENIZER
from hypothesis import strategies as st

from nanochat.checkpoint import load_model_state, load_optimizer_state, read_meta, save_checkpoint
from nanochat.common import sha256_of, write_checksums
from nanochat.core_bundle import read_bundle
from nanochat.dataset import _open_shards
from nanochat.experiments.ledger import read_experiments
from nanochat.lane_b.infer.inference_file import read_inference
from nanochat.lane_b.infer.inputs import read_statistics
from nanochat.lane_b.infer.record import read_records
from nanochat.lane_b.statistics import read_position_losses
from nanochat.runlog import RunLog, numbers_of, read_run
from nanochat.shard_writer import prepare_shards
from nanochat.shards import read_documents
from nanochat.target import METRICS, evaluations_of
from nanochat.text_folder import folder_documents
from nanochat.tokenizer import load_tokenizer
from nanochat.tokens import TokenShard, write_token_shard

ROOT = Path(__file__).parent.parent.parent
STRANGE = (  # what a reader may find in place of what was written
    b"", b"\n", b"[]", b"{}", b"null", b"0", b'""', b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"-1e999",
    b'{"step": ' + b"9" * 5000 + b"}", b"\xff\xfe{\x00}\x00", b"\x00" * 4096, b"\xef\xbb\xbf{}", b'{"kind": "train"}\n',
    b'"\\ud800"', b"PAR1PAR1", b"PK\x05\x06" + bytes(18), b"<html>please log in</html>")


@st.composite
def damages(draw, data):
    """The bytes, flipped here and there, cut, emptied, with blocks or lines in another order, or replaced."""
    kind = draw(st.sampled_from(("flip", "cut", "block", "lines", "number", "strange")))
    at = st.integers(0, max(0, len(data) - 1))
    if kind == "strange" or not data:
        return draw(st.sampled_from(STRANGE))
    if kind == "cut":
        return data[:draw(at)]
    if kind == "lines":
        lines = data.split(b"\n")
        return b"\n".join(draw(st.permutations(lines)) if len(lines) < 40 else lines[::-1])
    changed = bytearray(data)
    if kind == "flip":
        for position in draw(st.lists(at, min_size=1, max_size=8, unique=True)):
            changed[position] ^= 1 << draw(st.integers(0, 7))
    elif kind == "number":  # a field of another type
        parts = st.sampled_from((b"1", b"2", b'"', b"{", b"[", b",", b"null", b"true", b"-1e9", b""))
        old, new = draw(parts), draw(parts)
        return data.replace(old, new, draw(st.integers(1, 3))) if old else data
    else:
        start, other, length = draw(at), draw(at), draw(st.integers(1, max(1, len(data) // 4)))
        changed[start:start + length] = draw(st.sampled_from((bytes(length), data[other:other + length])))
    return bytes(changed)


@dataclass(frozen=True)
class Case:
    """A file (or several) and its reader. exact: what is read is what was written, or an error; else any value is."""

    make: Callable  # folder -> the files that may be damaged
    read: Callable  # folder -> a value that can be compared
    exact: bool = False


def tokens(folder):
    values = np.arange(500, dtype=np.uint16) % 250
    write_token_shard(folder / "s.bin", [([100, 400], values)], {"vocab_size": 300, "bos_id": 0, "tokenizer_id": "t"})
    return [folder / "s.bin"]


def read_tokens(folder):
    shard = TokenShard(folder / "s.bin")
    return shard.tokens.tolist(), shard.offsets.tolist(), shard.vocab_size, shard.bos_id


def prepared(folder):
    prepare_shards(folder / "d", "d", lambda: (f"text {i} " * 20 for i in range(40)), 5600)
    return [*(folder / "d").glob("*.parquet"), folder / "d" / "sha256.json"]


def read_prepared(folder):
    return [text for shard in _open_shards("d", folder / "d").shards for text in read_documents(shard)]


def manifest(folder):
    prepared(folder)
    return [folder / "d" / "dataset.json"]


def own_parquet(folder):
    pq.write_table(pa.table({"text": [f"text {i} " * 20 for i in range(40)]}), folder / "a.parquet")
    return [folder / "a.parquet"]


def text_folder(folder):
    lines = "".join(json.dumps({"text": f"some words {i}"}) + "\n" for i in range(20))
    (folder / "t").mkdir()
    (folder / "t" / "a.txt").write_text("prose, ünd more\n\n" * 9, encoding="utf-8")
    (folder / "t" / "b.jsonl").write_text(lines)
    (folder / "t" / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return sorted((folder / "t").iterdir())


def tokenizer(folder):
    load_tokenizer(GOLDEN_TOKENIZER).save(folder / "tokenizer")
    return [folder / "tokenizer" / "tokenizer.txt", folder / "tokenizer" / "tokenizer.pkl"]


def pickled_tokenizer(folder):
    shutil.copytree(GOLDEN_TOKENIZER, folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer.txt").unlink(missing_ok=True)
    return [folder / "tokenizer" / "tokenizer.pkl"]


def checkpoint(folder):
    save_checkpoint(folder / "c", 3, {"w": torch.arange(50.0)}, {"state": {0: {"m": torch.ones(9)}}},
                    {"model_config": {"n_layer": 1}, "loop_state": {"step": 3}})
    return sorted((folder / "c").iterdir())


def read_checkpoint(folder):
    meta = read_meta(folder / "c", 3)
    return (meta, load_model_state(folder / "c", 3, meta, "cpu")["w"].tolist(),
            load_optimizer_state(folder / "c", 3, meta, "cpu")["state"][0]["m"].tolist())


def record(folder):
    log = RunLog.create(folder, "r", {"num_iterations": 4, "flags": {"depth": 1}})
    for step in range(1, 5):
        log.event("train", step=step, tokens=step * 8, loss=2.0, train_time_sec=1.5, dt_ms=10.0, tok_per_sec=800.0)
        log.event("val", step=step, tokens=step * 8, val_bpb=1.25, train_time_sec=1.5)
    log.finish(status="ok", steps=4)
    log.close()
    return sorted((folder / "r").iterdir())


def read_record(folder):
    run = read_run(folder / "r")
    numbers_of(run.events, "train", "step", "tokens", "loss", "dt_ms", "tok_per_sec")
    return run.status, [evaluations_of(run.events, name) for name in METRICS]


def bundle(folder):
    (folder / "b" / "eval_data").mkdir(parents=True)
    (folder / "b" / "core.yaml").write_text("icl_tasks:\n- {label: t, icl_task_type: multiple_choice, dataset_uri: "
                                            "t.jsonl, num_fewshot: [1], continuation_delimiter: ' '}\n")
    (folder / "b" / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nt,25\n")
    (folder / "b" / "eval_data" / "t.jsonl").write_text(
        "".join(json.dumps({"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2}) + "\n" for i in range(6)))
    return [path for path in (folder / "b").rglob("*") if path.is_file()]


def downloaded_bundle(folder):
    found = bundle(folder)
    write_checksums(folder / "b", {path.relative_to(folder / "b").as_posix(): sha256_of(path) for path in found})
    return [*found, folder / "b" / "sha256.json"]


def document(name, **fields):
    def make(folder):
        (folder / name).write_text(json.dumps(fields, indent=1))
        return [folder / name]
    return make


def ledger(name):
    def make(folder):
        (folder / "l.csv").write_bytes(b"".join((ROOT / name).read_bytes().splitlines(keepends=True)[:6]))
        return [folder / "l.csv"]
    return make


ESTIMATE = {"value": 0.3, "se": 0.1, "lo": 0.2, "hi": 0.4}
CASES = {
    "tokens": Case(tokens, read_tokens, exact=True),
    "prepared shards": Case(prepared, read_prepared, exact=True),
    "manifest": Case(manifest, lambda folder: _open_shards("d", folder / "d")),
    "own parquet": Case(own_parquet, lambda folder: list(read_documents(folder / "a.parquet"))),
    "text folder": Case(text_folder, lambda folder: list(folder_documents(folder / "t"))),
    "tokenizer": Case(tokenizer, lambda folder: load_tokenizer(folder / "tokenizer").tokenizer_id, exact=True),
    "pickled tokenizer": Case(pickled_tokenizer, lambda folder: load_tokenizer(folder / "tokenizer").tokenizer_id),
    "checkpoint": Case(checkpoint, read_checkpoint, exact=True),
    "record": Case(record, read_record),
    "bundle": Case(bundle, lambda folder: read_bundle(folder / "b")),
    "downloaded bundle": Case(downloaded_bundle, lambda folder: read_bundle(folder / "b"), exact=True),
    "experiments": Case(ledger("dev/experiments.csv"), lambda folder: read_experiments(folder / "l.csv")),
    "lane B's ledger": Case(ledger("ideas/lane_b_inference_schema.csv"), lambda folder: read_records(folder / "l.csv")),
    "statistics": Case(document("f.json", schema_version=1, dataset_id="d", tokenizer_id="t", gamma=ESTIMATE,
                                beta=ESTIMATE, warnings=["w"]), lambda folder: read_statistics(folder / "f.json")),
    "inference": Case(document(
        "f.json", schema_version=2, decision="inferred", target_metric_name="val_bpb", dataset_id="d", tokenizer_id="t",
        state="ok", alpha_source="curves", alpha=ESTIMATE, target_tokens=ESTIMATE, target_param_data_ratio=ESTIMATE,
        target_metric_threshold=1.2, n_scaling_params=9, confirmation_ratio=9.5, default_ratio=12.0,
        slopes={"envelope": 0.2}), lambda folder: read_inference(folder / "f.json")),
    "position losses": Case(document("f.json", tokens=9, nats_by_position=[2.5, 2, None], counts_by_position=[3, 2, 0]),
                            lambda folder: read_position_losses(folder / "f.json", folder).nats.tolist()),
}
