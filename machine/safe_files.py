"""Files that are whole or not there, and never taken for others; folders that one process holds.

A file is written aside, fsynced and renamed. It holds a SHA-256 of itself and of what it is for:
neither damage nor a file that was put in its place passes for it. What could not be read back is
refused when it is saved. No pipe or device is read, which could be waited for without end.

    from safe_files import *; from pathlib import Path
    save_checked(Path("x.pt"), {"n": 3}, purpose="x of run 7")
    load_checked(Path("x.pt"), purpose="x of run 7")  # {"n": 3}, or DamagedFile
    write_json(Path("x.json"), {"n": 3}, sealed=True)
    with held(Path("folder")): pass  # no other process holds it meanwhile
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has no flock: there nothing stops a second process
    fcntl = None

DIGEST = hashlib.sha256().digest_size
BOUND = b"SHA-256\1"  # a footer: this, the hash of a purpose, and that of all before
SEAL = "sha256"  # key of the hash that a JSON object holds of its other keys
RESERVED = '<>:"|?*\\'  # in the names of files on Windows
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{d}{i}" for d in ("COM", "LPT") for i in range(1, 10))}
DAY = 86400.0  # seconds, after which what was half written is nobody's
LONGEST = 200  # bytes of a part of a folder's name; file systems take 255
ASIDE = re.compile(r".+\.[0-9a-f]{8}-\d+\.tmp", re.DOTALL)  # NAME.<hash of its path>-<thread>.tmp
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of a file system that cannot sync a folder

_locks: dict[Path, Any] = {}  # of the folders that this process has open


def _forget_locks() -> None:
    """Close this process's own handles; a parent's locks stay the parent's."""
    while _locks:
        _locks.popitem()[1].close()


atexit.register(_forget_locks)
if fcntl is not None:
    os.register_at_fork(after_in_child=_forget_locks)


class DamagedFile(ValueError):
    """A file is truncated or its checksum does not match."""


class WrongFile(DamagedFile):
    """A file is whole, and not what was to be read: deleting it would lose something."""


# ---------------------------------------------------------------------------- files


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, sync it to disk, then rename it into place."""
    place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:8]
    writer = threading.get_native_id()  # others may write it too
    aside = path.with_name(f"{path.name}.{place}-{writer}.tmp")
    try:
        aside.unlink(missing_ok=True)  # a link, say
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from None
        raise
    sync_folder(path.parent)


def forget_asides(folder: Path, age: float | None = None) -> None:
    """Delete what killed processes left half written, of that age in seconds or of any."""
    for aside in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):  # another process was first
            old = age is None or time.time() - aside.lstat().st_mtime > age
            if old and ASIDE.fullmatch(aside.name):
                aside.unlink()


def opened(path: Path) -> BinaryIO:
    """Open a file to read; a pipe or a device is refused."""
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise WrongFile(f"{path} is no regular file")
    return open(path, "rb")


def check_plain(*paths: Path) -> None:
    """Raise WrongFile where a path is there, and a link, a pipe or a device."""
    for path in paths:
        with contextlib.suppress(OSError):  # it is not there
            if stat.S_ISLNK(path.lstat().st_mode):
                raise WrongFile(f"{path} is a link, and what a run writes stays in its folder")
            opened(path).close()


def no_link(path: str, flags: int) -> int:
    """The `opener` of files to write that follows no link, where the system can tell."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextlib.contextmanager
def contents(path: Path) -> Iterator[None]:
    """Raise ValueError that names the file, whole by its checksum, whose contents do not fit."""
    try:
        yield
    except (DamagedFile, torch.OutOfMemoryError):
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is whole, and its contents do not fit ({reason})") from None


def write_json(path: Path, value: Any, sealed: bool = False) -> None:
    """Write what `as_json` takes, indented and atomically; a sealed object holds its own hash.

    Raises:
        ValueError: JSON cannot hold it, or it has a key of the hash's name, "sha256".
    """
    value = as_json(value, path.name)
    if isinstance(value, dict) and SEAL in value:
        raise ValueError(f"{path.name}: {SEAL!r} is the key of the file's own hash")
    if sealed:
        value |= {SEAL: seal(value)}
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def as_json(value: Any, where: str) -> Any:
    """Return what a value's JSON reads as: arrays and tensors as numbers or lists, paths as text.

    Raises:
        ValueError: JSON cannot hold it; the message names the place in it, below `where`.
    """
    try:
        return json.loads(json.dumps(value, default=_listed))
    except TypeError:
        parts = enumerate(value) if isinstance(value, list | tuple) else ()
        for name, part in value.items() if isinstance(value, dict) else parts:
            as_json(part, f"{where}.{name}")
    except (ValueError, RuntimeError):  # within itself, too deep, a tensor without values
        pass
    raise ValueError(f"{where}: {_kind(value)}, which JSON cannot hold")


def _listed(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, np.generic | np.ndarray | Tensor):
        listed = value.tolist()
        if type(listed) is not type(value):  # as a long double is
            return listed
    raise TypeError


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def read_json(path: Path) -> dict:
    """Read a JSON object, sealed or not; the seal is no part of it.

    Raises:
        DamagedFile: it is none, or other than what was sealed.
    """
    with opened(path) as file:
        content = file.read()
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is damaged: it is no JSON object")
    if value.get(SEAL, computed := seal(value)) != computed:
        raise DamagedFile(f"{path} is damaged or edited: its checksum does not match")
    value.pop(SEAL, None)
    return value


def seal(value: dict) -> str:
    """Return the hash of an object's keys and values but for the seal itself."""
    sealed = {name: part for name, part in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def save_checked(path: Path, value: Any, purpose: str | None = None) -> None:
    """torch.save `value` atomically, numpy's parts as torch's, with a footer that holds its hash.

    Args:
        purpose: what the file is for, if `load_checked` is to refuse any other in its place.

    Raises:
        ValueError: `load_checked` could not read it back; the message names the place in it.
    """
    try:
        value = _readable(value, ())
    except RecursionError:
        raise ValueError(f"{path.name}: a value within itself, or too deep to be saved") from None

    def write(aside: Path) -> None:
        try:
            torch.save(value, aside)
        except RuntimeError as error:  # what a full disk comes to
            raise OSError(str(error).splitlines()[0]) from None
        bound = _bound(purpose or "")
        with open(aside, "rb+") as file:
            digest = _sha256(file, aside.stat().st_size, bound)
            file.write(bound + digest)  # at its end

    write_atomically(path, write)


def _readable(value: Any, where: tuple) -> Any:
    """Return a value, at the keys `where`, as torch loads it, or raise ValueError."""
    kind = type(value)
    if kind in (type(None), bool, float, str) or kind is int and value.bit_length() < 64:
        return value
    if kind in (Tensor, torch.nn.Parameter) and not vars(value):
        return value
    if kind in (list, tuple):
        return kind([_readable(part, (*where, i)) for i, part in enumerate(value)])
    if kind in (dict, OrderedDict):
        readable = kind((_readable(k, where), _readable(v, (*where, k))) for k, v in value.items())
        if kind is OrderedDict:  # a module's state has its versions there
            vars(readable).update(_readable(vars(value), where))
        return readable
    if isinstance(value, np.generic) and type(scalar := value.item()) is not kind:
        return _readable(scalar, where)
    try:
        if kind is np.ndarray:
            return torch.from_numpy(value.copy())
        torch.save(value, buffer := io.BytesIO())
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        return value
    except Exception:  # pickle, torch and what is pickled raise many types
        place = ".".join(map(str, where)) or "the value"
        raise ValueError(
            f"{place}: {_kind(value)}, which could not be read back; tensors, numpy arrays, "
            "numbers, text, and lists, tuples and dicts of these can"
        ) from None


def load_checked(path: Path, purpose: str | None = None) -> Any:
    """Load what `save_checked` wrote, on the CPU, tensors and plain values only.

    Args:
        purpose: what the file was saved for; None takes any.

    Raises:
        DamagedFile: the file is shorter or other than what was written.
        WrongFile: it is whole, and for something else, or not of plain values.
    """
    with opened(path) as file:  # once: another may take its place meanwhile
        size, length = file.seek(0, os.SEEK_END), len(BOUND) + 2 * DIGEST
        file.seek(max(0, size - length))
        footer = file.read()
        if size < length or not footer.startswith(BOUND):
            raise DamagedFile(f"{path} is damaged: it is truncated or has no checksum")
        bound, digest = footer[:-DIGEST], footer[-DIGEST:]
        if digest != _sha256(file, size - length, bound):
            raise DamagedFile(f"{path} is damaged: its checksum does not match")
        if purpose is not None and bound != _bound(purpose):
            raise WrongFile(
                f"{path} is whole, and belongs elsewhere: it was made for something else"
            )
        file.seek(0)
        return _loaded(file, path)


def _loaded(file: BinaryIO, path: Path) -> Any:
    """Load tensors and plain values from a whole file, or raise WrongFile."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WrongFile(f"{path} is whole, and holds more than tensors and plain values") from None
    except Exception as error:  # torch.load raises many types on what it does not know
        reason = str(error).partition("\n")[0]
        raise WrongFile(
            f"{path} is whole, and torch {torch.__version__} cannot load it ({reason})"
        ) from None


def _bound(purpose: str) -> bytes:
    return BOUND + hashlib.sha256(purpose.encode()).digest()


def _sha256(file: BinaryIO, length: int, then: bytes) -> bytes:
    """Hash the first `length` bytes of a file, and what follows them."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(min(length - file.tell(), 1 << 20)):
        digest.update(block)
    digest.update(then)
    return digest.digest()


def sync_folder(folder: Path) -> None:
    """Bring what was renamed in a folder to disk, where the file system can."""
    if os.name == "posix":  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in NO_SYNC:
                raise
        finally:
            os.close(descriptor)


# ---------------------------------------------------------------------------- folders


def lock(folder: Path) -> None:
    """Keep other processes out of a folder, until `unlock` or this one's end, however it comes.

    Raises:
        ValueError: another process holds it.
    """
    if fcntl is None or (key := folder.resolve()) in _locks:
        return
    check_plain(folder / "lock")
    file = open(folder / "lock", "a", opener=no_link)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder} is open in another process, which runs it") from None
    except OSError:  # a file system without locks
        pass
    _locks[key] = file


def unlock(folder: Path) -> None:
    """Let other processes into a folder that this one holds."""
    if file := _locks.pop(folder.resolve(), None):
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)  # where a forked child has it open, too
        file.close()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made where it is missing, for the length of a block."""
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    try:
        yield
    finally:
        unlock(folder)


def check_held(folder: Path) -> None:
    """Raise FileNotFoundError where a folder is not the one that this process locked."""
    if (file := _locks.get(folder.resolve())) is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock")):
            return
    raise FileNotFoundError(f"{folder} was deleted, or made anew, while it was in use")


def folder_below(root: str | Path, name: str) -> Path:
    """Return root/name, a folder inside of `root` by a name that every file system takes.

    Raises:
        ValueError: a name that is empty, unprintable or reserved by Windows, or leads elsewhere.
    """
    if not name.isprintable() or any(c in RESERVED for c in name):
        raise ValueError(f"{name!r} holds characters that a folder's name cannot have everywhere")
    for part in name.split("/"):
        stem = part.partition(".")[0].rstrip(" ").upper()
        if not part.strip(" ") or part in (".", "..") or part.endswith((".", " ")):
            raise ValueError(f"{name!r} must stay below the folder of runs, each part a plain name")
        if stem in DEVICES:
            raise ValueError(f"{name!r}: Windows reserves {stem}")
        if len(part.encode()) > LONGEST:
            raise ValueError(f"{name[:20]!r}... is longer than {LONGEST} bytes")
    root, folder = Path(root), Path(root, name)
    with contextlib.suppress(OSError, RuntimeError):  # a loop of links
        if folder.resolve().is_relative_to(root.resolve()):
            return folder
    raise ValueError(f"{name!r} must stay below {root}, and a link leads out of it")
