"""Downloads from a server on this machine that does what servers, proxies and networks do."""

import functools
import http.server
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

import download

CONTENT = bytes(range(256)) * 4000  # more than one block


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT by a list of faults, one an answer: none, or what `Handler` knows."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.ranges, self.content = [], [], CONTENT
        self.url = f"http://127.0.0.1:{self.server_port}/x.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and fault != "whole" else 0
        body, kind = server.content[start:], "application/octet-stream"
        if fault in ("page", "disguised page"):
            body = b"\n<!DOCTYPE html><html>log in</html>"
            kind = "text/html; charset=utf-8" if fault == "page" else kind
        if start and not body:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            total = len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "slow":
            for at in range(0, len(body), 50_000):
                self.wfile.write(body[at : at + 50_000])
                time.sleep(0.05)
        else:
            self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def whole(part):
    if part.read_bytes() != CONTENT:
        raise ValueError("not what was wanted")


def fetch(server, path, **options):
    download.fetch(server.url, path, whole, pause=0.01, timeout=5, **options)


def test_a_file_arrives_whole_and_is_not_asked_for_again(server, tmp_path):
    shown, path = [], tmp_path / "new" / "x.bin"
    for _ in range(2):
        fetch(server, path, show=lambda *figures: shown.append(figures))
    assert path.read_bytes() == CONTENT and server.ranges == [None]
    assert shown[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in path.parent.iterdir()] == ["x.bin"]


def test_a_connection_that_ends_early_is_taken_up_where_it_ended(server, tmp_path):
    server.faults = ["cut", 503, "cut"]
    fetch(server, tmp_path / "x.bin", tries=2)
    half, size = len(CONTENT) // 2, len(CONTENT)
    resumed = [None, f"bytes={half}-", f"bytes={half}-", f"bytes={size - half // 2}-"]
    assert server.ranges == resumed and (tmp_path / "x.bin").exists()


def test_a_server_that_knows_no_ranges_sends_everything_again(server, tmp_path):
    server.faults = ["cut", "whole"]
    fetch(server, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("faults", "message", "asked"),
    [
        ([404], "HTTP 404", 1),
        ([403], "HTTP 403", 1),
        ([500] * 9, "HTTP 500", 4),
        (["page"], "a web page came in place of the file", 1),
        (["disguised page"], "a web page came in place of the file", 1),
    ],
)
def test_what_is_no_answer_leaves_nothing(server, tmp_path, faults, message, asked):
    server.faults = faults
    with pytest.raises(OSError, match=message):
        fetch(server, tmp_path / "x.bin")
    assert len(server.ranges) == asked and not list(tmp_path.iterdir())


def test_a_page_in_the_middle_leaves_what_had_arrived(server, tmp_path):
    server.faults = ["cut", "page"]
    with pytest.raises(OSError, match="a web page"):
        fetch(server, tmp_path / "x.bin")
    fetch(server, tmp_path / "x.bin")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT and server.ranges[-1] is not None


def test_another_file_is_refused_and_deleted(server, tmp_path):
    server.content = CONTENT[:-7]
    with pytest.raises(ValueError, match="not what was wanted"):
        fetch(server, tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [b"other" * 1000, CONTENT[:-1] + b"?", CONTENT + b"?", CONTENT])
def test_a_part_of_another_file_costs_one_more_download(server, tmp_path, left):
    (tmp_path / "x.bin.part").write_bytes(left)
    fetch(server, tmp_path / "x.bin")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_without_a_network_it_fails_at_once(server, tmp_path):
    closed = "http://127.0.0.1:9/x.bin"
    started = time.monotonic()
    with pytest.raises(OSError, match="refused"):
        download.fetch(closed, tmp_path / "x.bin", whole)
    assert time.monotonic() - started < 1 and not list(tmp_path.iterdir())


CHILD = "import sys, pathlib, download as d; d.fetch(sys.argv[1], pathlib.Path(sys.argv[2]), print)"


def start(server, path):
    command = [sys.executable, "-c", CHILD, server.url, str(path)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # a shell's background jobs ignore SIGINT, and so do their children
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=heeding, **quiet)


@pytest.mark.skipif(download.fcntl is None, reason="no file locks")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_its_part_and_the_next_one_goes_on(server, tmp_path, how):
    server.faults, part = ["slow"], tmp_path / "x.bin.part"
    child = start(server, tmp_path / "x.bin")
    while not part.exists() or not part.stat().st_size:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(how)
    assert child.wait() != 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin.part"]
    fetch(server, tmp_path / "x.bin")
    assert server.ranges[0] is None and server.ranges[1].startswith("bytes=")
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


@pytest.mark.skipif(download.fcntl is None, reason="no file locks")
def test_of_processes_that_want_one_file_a_single_one_downloads(server, tmp_path):
    server.faults = ["slow"]
    children = [start(server, tmp_path / "x.bin") for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert (tmp_path / "x.bin").read_bytes() == CONTENT and server.ranges == [None]
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
