"""Every writer of the project as two functions: write the value 1, then 2; read which of them is there."""

import json
import zipfile
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus import golden_tokenizer
from damage import CASES, bundle

from nanochat import core_eval as core_bundle
from nanochat.checkpoint import find_checkpoint, load_model_state, read_meta, save_checkpoint
from nanochat.common import write_checksums, write_json, write_text
from nanochat.dataset import _open_shards, open_dataset
from nanochat.experiments.change_log import add_entry
from nanochat.export.folder import check_replaceable, whole_folder
from nanochat.lane_b.infer.inference_file import read_inference
from nanochat.lane_b.infer.record import LaneBRecord, append_record, read_records
from nanochat.runlog import RunLog, read_run
from nanochat.shard_writer import prepare_shards
from nanochat.tokenizer import load_tokenizer, train_tokenizer
from nanochat.tokens import TokenShard, token_shards, write_token_shard


def append(folder, value):
    empty = dict.fromkeys(LaneBRecord.__dataclass_fields__)
    append_record(folder / "l.csv", LaneBRecord(**{
        **empty, "timestamp_utc": "t", "git_commit": "c", "run_id": f"run-{value}", "dataset_id": "d",
        "target_metric_name": "val_bpb", "lane_b_decision": "inferred", "status": "ok",
        "notes": "alpha_source=x " * 99}))


def write_tokens(folder, value):
    write_token_shard(folder / "s.bin", [([500], np.full(500, value, np.uint16))], {"vocab_size": 300, "bos_id": value})


def write_checkpoint(folder, value):
    save_checkpoint(folder, value, {"w": torch.full((99,), float(value))}, {"state": {}}, {"model_config": {}})


def read_checkpoint(folder):
    step = find_checkpoint(folder)
    values = set(load_model_state(folder, step, read_meta(folder, step), "cpu")["w"].tolist())
    assert values == {step}
    return step


def prepare(folder, value):
    prepare_shards(folder / f"d{value}", "d", lambda: (f"text {i} of {value} " * 9 for i in range(20)), 3000)


def read_prepared(folder):
    return max(int(path.name[1:]) for path in folder.glob("d[12]") if _open_shards("d", path))


@cache  # its library's threads are lost in a fork
def small_tokenizer():
    return train_tokenizer(["abc abd abe"] * 9, 266)


def save_tokenizer(folder, value):
    (golden_tokenizer() if value == 1 else small_tokenizer()).save(folder / "t")


def read_tokenizer(folder):
    return {1024: 1, 266: 2}[load_tokenizer(folder / "t").vocab_size]


def log(folder, value):
    writer = RunLog.create(folder, "r", {}) if value == 1 else RunLog.resume(folder, "r", 1)
    try:
        writer.event("train", step=value, text="x" * 500)
        writer.before_checkpoint()
        writer.finish(status="ok")
    finally:
        writer.close()


def read_log(folder):
    return max(event["step"] for event in read_run(folder / "r").of("train"))


def export(folder, value):
    with whole_folder(folder / "e", {"value": value}) as new:
        write_text(new / "a" / "b", str(value) * 5000)


def read_export(folder):
    check_replaceable(folder / "e")  # all of it is as it was written
    return int((folder / "e" / "a" / "b").read_text()[0])


def edit_change_log(folder, value):
    if not (folder / "LOG.md").exists():
        (folder / "LOG.md").write_text("# Log\n")
    add_entry(folder / "LOG.md", f"## 2026-01-0{value} \u00b7 entry {value}\n\n{'words ' * 99}")


def infer(folder, value):
    [path] = CASES["inference"].make(folder) if value == 1 else [folder / "f.json"]
    write_json(path, {**json.loads(path.read_text()), "target_metric_threshold": float(value)})


def fill_cache(folder, value):
    """The tokens of a dataset of `value` pairs of texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "cache"))
        dataset = folder / f"d{value}"
        dataset.mkdir(exist_ok=True)
        for i in range(3):
            if not (dataset / f"{i}.parquet").exists():
                pq.write_table(pa.table({"text": [f"text {j} of {i} and {value} " * 99 for j in range(9)]}),
                               dataset / f"{i}.parquet")
        token_shards(open_dataset(dataset), golden_tokenizer())


def read_cache(folder):
    """The last value whose tokens are all there; each file that is there is whole."""
    found = [TokenShard(path) for path in (folder / "cache" / "tokens").rglob("*.bin")]
    return {2: 1, 4: 2}.get(len(found), 1)


def unpack(folder, value):
    """Value 1 is the archive alone; 2 the bundle, as downloaded."""
    if value == 1:
        bundle(folder)
        with zipfile.ZipFile(folder / "b.zip", "w") as file:
            for path in (folder / "b").rglob("*.*"):
                file.write(path, f"eval_bundle/{path.relative_to(folder / 'b')}")
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "cache"))
        patch.setattr("huggingface_hub.file_download.http_get",
                      lambda url, file: file.write((folder / "b.zip").read_bytes()))
        core_bundle.download_bundle("http://127.0.0.1/eval_bundle.zip")


def read_unpacked(folder):
    unpacked = folder / "cache" / "eval_bundle"
    return 2 if unpacked.exists() and core_bundle.read_bundle(unpacked) else 1


WRITERS = {  # name -> (write the value 1, then 2; read which is there)
    "ledger": (append, lambda folder: len(read_records(folder / "l.csv"))),
    "tokens": (write_tokens, lambda folder: int(TokenShard(folder / "s.bin").tokens[0])),
    "checkpoint": (write_checkpoint, read_checkpoint),
    "prepared shards": (prepare, read_prepared),
    "tokenizer": (save_tokenizer, read_tokenizer),
    "record": (log, read_log),
    "report": (lambda folder, value: write_text(folder / "r.html", str(value) * 5000),
               lambda folder: int((folder / "r.html").read_text()[0])),
    "digests": (lambda folder, value: write_checksums(folder, {"name": str(value) * 64}),
                lambda folder: int((folder / "sha256.json").read_text().split('"')[3][0])),
    "change log": (edit_change_log, lambda folder: (folder / "LOG.md").read_text().count("\n## ")),
    "inference": (infer, lambda folder: int(read_inference(folder / "f.json").target_metric_threshold)),
    "token cache": (fill_cache, read_cache),
    "export": (export, read_export),
    "bundle": (unpack, read_unpacked),
}
ONCE = ("ledger",)  # has each row once: to write it again is an error
