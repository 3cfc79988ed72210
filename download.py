"""Fetch a file over HTTP: beside its place, resumed, checked, then renamed into place.

What has arrived of x.bin lies in x.bin.part. A connection that ends early is taken up again where
it ended (HTTP Range), and so is a process that was killed, by the next one. Processes that want the
same file wait for one another.

    from pathlib import Path
    from download import fetch
    fetch(Path("download.py").resolve().as_uri(), Path("copy.py"), check=lambda part: None)
"""

from __future__ import annotations

import contextlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: there every process has a part of its own
    fcntl = None

BLOCK = 1 << 18  # bytes at a time
BUSY = (408, 416, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass
PAGE = (b"<!doctype html", b"<html")  # how a web page starts, in lower case


class _CutShort(OSError):
    """The connection ended early, or the server is busy: worth another try."""


def fetch(
    url: str,
    path: Path,
    check: Callable[[Path], object],
    *,
    tries: int = 4,
    pause: float = 1.0,
    timeout: float = 30.0,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Download `url` to `path`, unless it is there already.

    Args:
        check: raises ValueError where the file (its temporary name is the argument) is not what was
            wanted; it is then deleted, and if it was resumed, downloaded once more.
        tries: connections in a row that may bring nothing.
        pause: seconds before another try; doubled for each that brought nothing.
        timeout: seconds without an answer.
        show: is told how many bytes there are, and of how many; 0 where that is not known.

    Raises:
        OSError: the file cannot be reached or written, or a web page came in its place; what has
            arrived stays for the next call.
        ValueError: what `check` raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part" if fcntl else f"{path.name}.{os.getpid()}.part")
    with _alone(part):
        if path.exists():  # another process was first
            part.unlink(missing_ok=True)
            return
        resumed = _size(part) > 0
        while True:
            _complete(url, part, tries, pause, timeout, show)
            try:
                check(part)
            except ValueError:
                part.unlink()
                if not resumed:
                    raise
                resumed = False
            else:
                break
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Hold the lock of a temporary file; one that is empty in the end is deleted."""
    held = None
    while fcntl is not None:
        held = open(part, "ab")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        if _is_at(held, part):
            break
        held.close()  # whoever had it has renamed or deleted it
    try:
        yield
    finally:
        if (held is None or _is_at(held, part)) and not _size(part):
            part.unlink(missing_ok=True)
        if held is not None:
            held.close()


def _is_at(file: IO, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def _complete(
    url: str, part: Path, tries: int, pause: float, timeout: float, show: Callable[[int, int], None]
) -> None:
    """Append to `part` until it is whole."""
    failed, size = 0, _size(part)
    while True:
        try:
            return _append(url, part, timeout, show)
        except _CutShort:
            before, size = size, _size(part)
            failed = 0 if size > before else failed + 1
            if failed >= tries:
                raise
            time.sleep(pause * 2**failed)


def _append(url: str, part: Path, timeout: float, show: Callable[[int, int], None]) -> None:
    """Ask once for what is missing of `part`; returns when it is whole."""
    have = _size(part)
    headers = {"User-Agent": "Python", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), None, timeout)
    except urllib.error.HTTPError as error:
        what = f"HTTP {error.code} {error.reason}"
        if error.code == 416:  # nothing is left, or what is there is of another file
            if error.headers.get("Content-Range", "").endswith(f"*/{have}"):
                return
            part.unlink()
        raise (_CutShort if error.code in BUSY else OSError)(what) from None
    except (OSError, http.client.HTTPException) as error:
        if have or not isinstance(error, urllib.error.URLError):
            raise _CutShort(f"{type(error).__name__}: {error}") from None
        raise  # no network
    with answer:
        length = int(answer.headers.get("Content-Length") or 0)
        continues = answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        have = have if continues else 0
        total = have + length if length else 0
        web_page = answer.headers.get_content_type() == "text/html"
        with open(part, "ab") as file:
            while block := _read(answer):
                if web_page or (not have and block.lstrip()[:20].lower().startswith(PAGE)):
                    raise OSError("a web page came in place of the file: a proxy's, or a login")
                file.truncate(have)
                file.write(block)
                have += len(block)
                show(have, total)
    if have < total:
        raise _CutShort(f"the connection ended after {have} of {total} bytes")


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _CutShort(f"{type(error).__name__}: {error}") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
