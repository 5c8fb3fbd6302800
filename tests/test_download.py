"""Downloads through huggingface_hub from a real HTTP server on loopback, one that fails in the ways servers do."""

import hashlib
import http.server
import json
import logging
import re
import threading
import time
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset as sources
from nanochat.common import UserError
from nanochat.dataset import Download, download_shards, open_dataset
from nanochat.download import fetch_shards
from nanochat.shards import read_documents

REPO = "owner/repository"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` as the hub does; `server.faults[name]` says what goes wrong with the next GETs."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def respond(self):
        name, is_get = self.path.removeprefix(f"/datasets/{REPO}/resolve/main/"), self.command == "GET"
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        with self.server.lock:
            self.server.requests[name].append((self.command, start))
            fault = self.server.faults[name].pop(0) if is_get and self.server.faults[name] else None
        if isinstance(fault, int) or name not in self.server.files:
            self.send_response(fault or 404)
            if not fault:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = self.server.files[name]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if is_get:
            sent = bytes([data[0], data[1], data[2], data[3], data[4] ^ 1]) + data[5:] if fault == "flip" else data
            self.wfile.write(sent[start:start + 100_000] if fault == "drop" else sent[start:])
        self.close_connection = fault == "drop"

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's attempts
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests = {}, defaultdict(list), defaultdict(list)
    server.lock = threading.Lock()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def shard_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "shard.parquet"
    letters = np.random.default_rng(0).integers(97, 123, (300, 1000), dtype=np.uint8)
    pq.write_table(pa.table({"text": [row.tobytes().decode() for row in letters]}), path, compression="none")
    return path.read_bytes()


def test_shards_arrive_whole_and_nothing_else_is_left(server, shard_bytes, tmp_path):
    server.files = dict.fromkeys(("a.parquet", "b.parquet"), shard_bytes)
    fetch_shards(REPO, ["a.parquet", "b.parquet"], tmp_path / "data")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").glob("[!s]*")} == server.files


def test_shards_already_there_are_not_asked_for(server, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"mine")
    fetch_shards(REPO, ["a.parquet"], tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == b"mine" and not server.requests


@pytest.mark.parametrize("faults", [["drop"] * 2, [429], ["drop", 429, "drop"]])
def test_passing_faults_end_with_the_right_bytes(server, shard_bytes, tmp_path, faults):
    server.files["a.parquet"], server.faults["a.parquet"] = shard_bytes, list(faults)
    fetch_shards(REPO, ["a.parquet"], tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == shard_bytes
    starts = [start for command, start in server.requests["a.parquet"] if command == "GET"]
    assert max(starts) == 100_000 * faults.count("drop"), "it goes on where the line broke"


def test_what_is_no_shard_never_gets_the_name(server, tmp_path):
    server.files["a.parquet"] = b"<html>please log in</html>"
    with pytest.raises(UserError, match=rf"could not download a\.parquet of {REPO}: what came is not a parquet"):
        fetch_shards(REPO, ["a.parquet"], tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(("status", "said"), [(None, "404 Not Found"), (503, "503 Service Unavailable")])
def test_a_shard_that_cannot_be_had_is_one_error_and_the_others_are_kept(server, shard_bytes, tmp_path, status, said):
    server.files["a.parquet"], folder = shard_bytes, tmp_path / "data"
    if status:
        server.files["b.parquet"], server.faults["b.parquet"] = shard_bytes, [status]
    with pytest.raises(UserError, match=rf"could not download b\.parquet of {REPO} \(.*{said}.*\); run the same"):
        fetch_shards(REPO, ["a.parquet", "b.parquet"], folder, num_workers=1)
    assert [path.name for path in folder.glob("*.parquet")] == ["a.parquet"]
    server.files["b.parquet"] = shard_bytes
    fetch_shards(REPO, ["a.parquet", "b.parquet"], folder)
    assert sorted(path.name for path in folder.iterdir()) == ["a.parquet", "b.parquet", "sha256.json"]
    assert sum(command == "GET" for command, _ in server.requests["a.parquet"]) == 1


def test_bytes_that_changed_on_the_way_never_get_the_name(server, shard_bytes, tmp_path):
    server.files["a.parquet"], server.faults["a.parquet"] = shard_bytes, ["flip"]
    with pytest.raises(UserError, match=r"could not download a\.parquet .*not those of the host's SHA-256"):
        fetch_shards(REPO, ["a.parquet"], tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
    fetch_shards(REPO, ["a.parquet"], tmp_path)
    assert json.loads((tmp_path / "sha256.json").read_text()) == {"a.parquet": hashlib.sha256(shard_bytes).hexdigest()}


def test_a_failure_leaves_out_what_was_not_begun(server, shard_bytes, tmp_path):
    server.files = {f"{i}.parquet": shard_bytes for i in range(40)}
    with pytest.raises(UserError, match=r"gone\.parquet"):
        fetch_shards(REPO, ["gone.parquet", *server.files], tmp_path, num_workers=1)
    assert len(server.requests) < 10


def test_a_server_that_is_not_there_is_one_clear_error(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not download a\.parquet .*refused"):
        fetch_shards(REPO, ["a.parquet"], tmp_path)


def test_known_dataset_comes_with_its_validation_shard(server, shard_bytes, base_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.DOWNLOADS, "climbmix", Download(REPO, 5))
    server.files = {f"shard_{i:05d}.parquet": shard_bytes for i in range(5)}
    pq.write_table(pa.table({"text": ["held out"]}), tmp_path / "val.parquet")
    server.files["shard_00005.parquet"] = (tmp_path / "val.parquet").read_bytes()
    download_shards("climbmix", 3, num_workers=2)
    dataset = open_dataset("climbmix")
    assert [path.name for path in dataset.shards] == [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 5)]
    assert dataset.shards[0].parent == base_dir / "base_data_climbmix"
    assert list(read_documents(dataset.val_shards[0])) == ["held out"]
    download_shards("climbmix", 4)
    assert len(open_dataset("climbmix").train_shards) == 4
    assert sum(command == "GET" for command, _ in server.requests["shard_00000.parquet"]) == 1
