"""Downloads through huggingface_hub from an HTTP server on loopback that fails as servers do."""

import hashlib
import http.server
import logging
import re
import threading
import time
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset as dataset_module
from nanochat.common import UserError
from nanochat.dataset import Download, download_shards, open_dataset, read_documents

REPO = "owner/repository"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve `server.files` as the hub does; `server.faults[name]` are the next GETs' faults."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        name = self.path.removeprefix(f"/datasets/{REPO}/resolve/main/")
        is_get = self.command == "GET"
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
            self.wfile.write(data[start:start + 100_000] if fault == "drop" else data[start:])
        self.close_connection = fault == "drop"

    do_GET = do_HEAD

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
    texts = [row.tobytes().decode() for row in letters]
    pq.write_table(pa.table({"text": texts}), path, compression="none")
    return path.read_bytes()


FIRST, LAST = "shard_00000.parquet", "shard_00005.parquet"


@pytest.fixture
def folder(server, shard_bytes, base_dir, monkeypatch):
    """The folder of a dataset of shards 0 to 5, all of them on the server."""
    monkeypatch.setitem(dataset_module.DOWNLOADS, "climbmix", Download(REPO, 5))
    server.files = {f"shard_{i:05d}.parquet": shard_bytes for i in range(6)}
    return base_dir / "base_data_climbmix"


def n_gets(server, name):
    return sum(command == "GET" for command, _ in server.requests[name])


def test_shards_arrive_complete_with_the_validation_shard_and_nothing_else(server, folder):
    download_shards("climbmix", 2, num_workers=2)
    names = [FIRST, "shard_00001.parquet", LAST]
    assert sorted(path.name for path in folder.glob("*.parquet")) == names
    assert all((folder / name).read_bytes() == server.files[name] for name in names)
    dataset = open_dataset("climbmix")
    assert [path.name for path in (*dataset.train_shards, *dataset.val_shards)] == names
    assert len(list(read_documents(dataset.val_shards[0]))) == 300
    download_shards("climbmix", 3)
    assert len(open_dataset("climbmix").train_shards) == 3
    assert n_gets(server, FIRST) == 1, "existing shards are kept"


@pytest.mark.parametrize("faults", [["drop"] * 2, [429], ["drop", 429, "drop"]])
def test_passing_faults_end_with_the_right_bytes(server, folder, faults):
    server.faults[FIRST] = list(faults)
    download_shards("climbmix", 1)
    assert (folder / FIRST).read_bytes() == server.files[FIRST]
    starts = [start for command, start in server.requests[FIRST] if command == "GET"]
    assert max(starts) == 100_000 * faults.count("drop"), "it continues where the line broke"


@pytest.mark.parametrize("fault, message", [
    (None, "404 Not Found"), (503, "503 Service Unavailable")])
def test_a_shard_that_fails_never_gets_the_name_and_the_others_are_kept(
        server, folder, shard_bytes, fault, message):
    server.faults[LAST] = [fault] if fault else []
    if not fault:
        del server.files[LAST]
    with pytest.raises(UserError, match=rf"not download {LAST} of {REPO} \(.*({message}).*; run"):
        download_shards("climbmix", 1, num_workers=1)
    assert [path.name for path in folder.glob("*.parquet")] == [FIRST]
    server.files[LAST] = shard_bytes
    download_shards("climbmix", 1)
    checksum = hashlib.sha256(shard_bytes).hexdigest()
    assert set(open_dataset("climbmix").checksums.values()) == {checksum}
    assert n_gets(server, FIRST) == 1


def test_a_server_that_does_not_answer_is_one_error(server, folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not download shard_\d+\.parquet .*refused"):
        download_shards("climbmix", 1)
