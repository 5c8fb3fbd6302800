"""Downloads against a real HTTP server on loopback, one that fails in the ways servers and lines do."""

import http.server
import re
import threading
import time
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.data import download
from nanochat.data import sources as dataset_module
from nanochat.data.download import fetch_shards
from nanochat.data.sources import Download, download_shards, open_dataset, read_documents
from nanochat.errors import UserError


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.files` with Range; `server.faults[path]` says what goes wrong with the next requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        range_header = self.headers.get("Range")
        with server.lock:
            server.requests[self.path].append(range_header)
            fault = server.faults[self.path].pop(0) if server.faults[self.path] else None
        if isinstance(fault, int) or self.path not in server.files:
            self.answer(fault or 404, b"")
            return
        data = server.files[self.path]
        start = int(re.fullmatch(r"bytes=(\d+)-", range_header)[1]) if range_header and fault != "no range" else 0
        if fault == "redirect":
            self.answer(302, b"", Location=f"http://{self.headers['Host']}{self.path}")
        elif start >= len(data):
            self.answer(416, b"", **{"Content-Range": f"bytes */{len(data)}"})
        elif fault == "no length":
            self.answer(200, data[start:], length=False)
        else:
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
            body = {"drop": data[start:start + 70_000], "garbage": bytes(len(data) - start)}.get(fault, data[start:])
            self.answer(206 if start else 200, body, length=len(data) - start, **headers)

    def answer(self, status, body, length=True, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is True else length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_FIRST_WAIT_SEC", 0.001)
    monkeypatch.setattr(download, "_BLOCK_BYTES", 10_000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests = {}, defaultdict(list), defaultdict(list)
    server.lock = threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
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


@pytest.fixture
def shard(server, shard_bytes):
    server.files["/a.parquet"] = shard_bytes
    return f"{server.url}/a.parquet"


def test_file_arrives_whole_and_nothing_else_is_left(server, shard, shard_bytes, tmp_path):
    fetch_shards({tmp_path / "data" / "a.parquet": shard})
    assert (tmp_path / "data" / "a.parquet").read_bytes() == shard_bytes
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.parquet"]


def test_file_already_there_is_not_asked_for(server, shard, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"mine")
    fetch_shards({tmp_path / "a.parquet": shard})
    assert (tmp_path / "a.parquet").read_bytes() == b"mine" and not server.requests


def test_dropped_line_is_resumed_where_it_broke(server, shard, shard_bytes, tmp_path):
    assert len(shard_bytes) > 4 * 70_000
    server.faults["/a.parquet"] = ["drop"] * 3
    fetch_shards({tmp_path / "a.parquet": shard})
    assert (tmp_path / "a.parquet").read_bytes() == shard_bytes
    assert server.requests["/a.parquet"] == [None, "bytes=70000-", "bytes=140000-", "bytes=210000-"]


def test_line_that_drops_often_but_moves_is_not_given_up(server, shard, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    server.faults["/a.parquet"] = ["drop", 503] * 4
    with pytest.raises(UserError):
        fetch_shards({tmp_path / "a.parquet": shard})
    server.faults["/a.parquet"] = ["drop"] * 3
    fetch_shards({tmp_path / "a.parquet": shard})
    assert (tmp_path / "a.parquet").read_bytes() == shard_bytes


@pytest.mark.parametrize("faults", [[500, 503, 429], ["redirect"], ["no length"], ["drop", "no range"],
                                    ["garbage", "garbage"], ["drop", "drop", 502, "drop"]])
def test_passing_faults_end_with_the_right_bytes(server, shard, shard_bytes, tmp_path, faults):
    server.faults["/a.parquet"] = faults
    fetch_shards({tmp_path / "a.parquet": shard})
    assert (tmp_path / "a.parquet").read_bytes() == shard_bytes


def test_download_goes_on_in_a_later_call(server, shard, shard_bytes, tmp_path):
    (tmp_path / "a.parquet.part").write_bytes(shard_bytes[:100_000])
    fetch_shards({tmp_path / "a.parquet": shard})
    assert server.requests["/a.parquet"] == ["bytes=100000-"]
    assert (tmp_path / "a.parquet").read_bytes() == shard_bytes


def test_complete_part_is_only_renamed_and_too_long_a_part_is_begun_anew(server, shard, shard_bytes, tmp_path):
    for extra in (b"", b"more"):
        (tmp_path / "a.parquet").unlink(missing_ok=True)
        (tmp_path / "a.parquet.part").write_bytes(shard_bytes + extra)
        fetch_shards({tmp_path / "a.parquet": shard})
        assert (tmp_path / "a.parquet").read_bytes() == shard_bytes


def test_what_is_no_shard_never_gets_the_name(server, tmp_path):
    server.files["/a.parquet"] = b"<html>please log in</html>"
    with pytest.raises(UserError, match=r"could not download http.*/a\.parquet: what came is not a parquet"):
        fetch_shards({tmp_path / "data" / "a.parquet": f"{server.url}/a.parquet"})
    assert list((tmp_path / "data").iterdir()) == []
    assert len(server.requests["/a.parquet"]) == download.ATTEMPTS


def test_missing_file_is_said_at_once(server, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.parquet: HTTP status 404; run the same command again"):
        fetch_shards({tmp_path / "a.parquet": f"{server.url}/nothing.parquet"})
    assert len(server.requests["/nothing.parquet"]) == 1


def test_server_that_is_not_there_is_one_clear_error(tmp_path, server):
    with pytest.raises(UserError, match=r"could not download .*refused"):
        fetch_shards({tmp_path / "a.parquet": "http://127.0.0.1:9/a.parquet"})


def test_full_disk_is_not_tried_again_and_keeps_what_came(server, shard, tmp_path, monkeypatch):
    class FullFile:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, block):
            if self._file.tell() >= 50_000:
                raise OSError(28, "No space left on device")
            return self._file.write(block)

    monkeypatch.setattr(download, "open", lambda *args: FullFile(open(*args)), raising=False)  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device"):
        fetch_shards({tmp_path / "a.parquet": shard})
    assert (tmp_path / "a.parquet.part").stat().st_size == 50_000
    assert len(server.requests["/a.parquet"]) == 1


def test_failure_of_one_file_ends_the_others_soon(server, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_FIRST_WAIT_SEC", 30.0)  # others would wait for their next attempt
    for i in range(3):
        server.files[f"/{i}.parquet"] = shard_bytes
        server.faults[f"/{i}.parquet"] = [500] * 3
    targets = {tmp_path / f"{i}.parquet": f"{server.url}/{i}.parquet" for i in range(3)}
    start = time.monotonic()
    with pytest.raises(UserError, match="status 404"):
        fetch_shards({**targets, tmp_path / "gone.parquet": f"{server.url}/gone.parquet"}, num_workers=4)
    assert time.monotonic() - start < 10


def test_known_dataset_comes_with_its_validation_shard(server, shard_bytes, base_dir, monkeypatch):
    monkeypatch.setitem(dataset_module.DOWNLOADS, "climbmix", Download("owner/repository", 5))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for i in range(6):
        server.files[f"/datasets/owner/repository/resolve/main/shard_{i:05d}.parquet"] = shard_bytes
    server.faults["/datasets/owner/repository/resolve/main/shard_00001.parquet"] = [500, "drop"]
    download_shards("climbmix", 3, num_workers=2)
    dataset = open_dataset("climbmix")
    assert [path.name for path in dataset.shards] == [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 5)]
    assert dataset.shards[0].parent == base_dir / "base_data_climbmix"
    assert len(list(read_documents(dataset.val_shards[0]))) == 300
    download_shards("climbmix", 4)
    assert len(open_dataset("climbmix").train_shards) == 4
    assert len(server.requests["/datasets/owner/repository/resolve/main/shard_00000.parquet"]) == 1
