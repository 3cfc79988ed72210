"""Files that are written whole, and found out when they are not."""

import errno
import json
import os
import random
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from machine import safe_files
from machine.safe_files import (
    DamagedFile,
    contents,
    forget_asides,
    load_checked,
    lock,
    read_json,
    save_checked,
    sync_folder,
    unlock,
    write_atomically,
    write_json,
)


def test_a_checked_file_comes_back(tmp_path):
    value = {"theta": torch.randn(7), "n": 3, "names": ["a"], "none": None}
    save_checked(tmp_path / "x.pt", value)
    back = load_checked(tmp_path / "x.pt")
    assert torch.equal(back.pop("theta"), value.pop("theta")) and back == value
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_every_flipped_bit_and_every_truncation_is_found(tmp_path):
    path = tmp_path / "x.pt"
    save_checked(path, {"theta": torch.arange(5.0)})
    whole = path.read_bytes()
    for position in range(0, len(whole), 13):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="x.pt is damaged"):
            load_checked(path)
    for length in range(0, len(whole), 29):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile, match="x.pt is damaged"):
            load_checked(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, lambda aside: (_ for _ in ()).throw(OSError("disk full")))
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_was_half_written_goes_once_it_is_old(tmp_path):
    new, old = "a.pt.0123abcd-7.tmp", "b.pt.0123abcd-7.tmp"
    others = {"c.pt", "notes.tmp", "d.pt.7.tmp", "e.pt.0123abcd-7.tmp.gz", ".0123abcd-7.tmp"}
    for name, age in ((new, 0), (old, 100), *((name, 100) for name in others)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    forget_asides(tmp_path, age=50)
    assert {p.name for p in tmp_path.iterdir()} == {new, *others}
    forget_asides(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == others


def test_threads_that_write_one_file_leave_it_whole(tmp_path):
    def work(value):
        for _ in range(40):
            save_checked(tmp_path / "x.pt", torch.full((20_000,), value))

    save_checked(tmp_path / "x.pt", torch.zeros(20_000))
    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(load_checked(tmp_path / "x.pt").unique()) == 1
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(safe_files.fcntl is None, reason="needs flock")
def test_a_forked_child_has_no_lock_of_its_parents_and_keeps_none(tmp_path):
    def tries_to_lock():
        """Tell by the exit status whether a forked child may lock the folder."""
        if (child := os.fork()) == 0:
            try:
                lock(tmp_path)
                os._exit(0)
            except ValueError:
                os._exit(1)
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    lock(tmp_path)
    assert tries_to_lock() == 1
    file = safe_files._locks[tmp_path.resolve()]
    copy = os.dup(file.fileno())  # as a process has it that began in another way
    try:
        unlock(tmp_path)
        assert tries_to_lock() == 0
    finally:
        os.close(copy)


def test_a_temporary_name_says_whose_it_is_and_leads_nowhere(tmp_path):
    def write(aside):
        names.append(aside.name)
        assert not aside.is_symlink()
        aside.write_text("new")

    names = []
    write_atomically(tmp_path / "x", write)
    assert safe_files.ASIDE.fullmatch(names[0]) and names[0].startswith("x.")
    assert names[0].endswith(f"-{threading.get_native_id()}.tmp")
    (tmp_path / "outside").write_text("theirs")
    (tmp_path / names[0]).symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "x", write)
    (tmp_path / "sub").mkdir()
    write_atomically(tmp_path / "sub" / "x", write)
    assert names[0] == names[1] != names[2]
    assert (tmp_path / "outside").read_text() == "theirs"


# ---------------------------------------------------------------------------- what is taken

Pair = namedtuple("Pair", "a b")


def within_itself():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("value", [
    None, True, 3, 2**100, 0.5, 1j, "é", b"x", [1, (2, {"a": 3})], {(1, 2): 3, torch.float32: 4},
    OrderedDict(a=1), torch.Size([1, 2]), torch.device("cpu"), torch.bfloat16, random.getstate(),
    Counter("aab"),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_plain_values_come_back_as_they_were(tmp_path, value):
    save_checked(tmp_path / "x.pt", {"x": value})
    back = load_checked(tmp_path / "x.pt")["x"]
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(("value", "expected"), [
    (np.float32(0.5), 0.5), (np.float64(0.1), 0.1), (np.int64(3), 3), (np.bool_(True), True),
    (np.str_("a"), "a"), ({np.int64(3): 1}, {3: 1}), (np.arange(3), torch.arange(3)),
    (np.arange(6)[::-2], torch.tensor([5, 3, 1])), (np.array(2.5), torch.tensor(2.5).double()),
    (np.arange(3, dtype=np.uint64), torch.arange(3).to(torch.uint64)),
    (np.ones(2, np.complex64), torch.ones(2, dtype=torch.complex64)),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_numpys_come_back_as_numbers_and_tensors(tmp_path, value, expected):
    save_checked(tmp_path / "x.pt", [value])
    (back,) = load_checked(tmp_path / "x.pt")
    assert type(back) is type(expected)
    if isinstance(back, torch.Tensor):
        assert back.dtype == expected.dtype and torch.equal(back, expected)
    else:
        assert back == expected and list(map(type, [back])) == list(map(type, [expected]))


def test_a_modules_state_keeps_its_versions_and_what_is_shared(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    save_checked(tmp_path / "x.pt", {"state": state, "again": state["weight"]})
    back = load_checked(tmp_path / "x.pt")
    assert back["state"]._metadata == state._metadata and list(back["state"]) == list(state)
    assert back["again"].data_ptr() == back["state"]["weight"].data_ptr()


class Marked(torch.Tensor):
    """A tensor of a class that is not torch's."""


UNREADABLE = [
    deque([1]), slice(1, 2), range(3), PurePosixPath("a/b"), frozenset([1]), {PurePosixPath("a")},
    Pair(1, 2), defaultdict(list), Decimal(1), object(), len, lambda: 0, torch.Generator(), 2**5000,
    np.array(["a"]), np.array([None]), np.datetime64("2020"), np.longdouble(1), np.dtype("f4"),
    np.ma.masked_array([1]), np.random.default_rng(0), torch.zeros(1).as_subclass(Marked),
]  # fmt: skip


@pytest.mark.parametrize("value", UNREADABLE, ids=lambda value: type(value).__name__)
def test_what_could_not_be_read_back_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(ValueError, match=r"^process\.parts\.1: an? \w+, which could not be read"):
        save_checked(tmp_path / "x.pt", {"process": {"n": 3, "parts": (0, value)}})
    with pytest.raises(ValueError, match=r"^the value: an? \w+, which could not be read back"):
        save_checked(tmp_path / "x.pt", value)
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_carries_more_is_read_back_or_refused(tmp_path):
    tensor = torch.ones(2)
    tensor.name_of = "weight"
    save_checked(tmp_path / "x.pt", tensor)
    assert load_checked(tmp_path / "x.pt").name_of == "weight"
    tensor.name_of = deque()
    with pytest.raises(ValueError, match="the value: a Tensor, which could not be read back"):
        save_checked(tmp_path / "x.pt", tensor)


def test_a_value_within_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="x.pt: a value within itself, or too deep"):
        save_checked(tmp_path / "x.pt", within_itself())
    with pytest.raises(ValueError, match="x.json: a dict, which JSON cannot hold"):
        write_json(tmp_path / "x.json", {"n": 1, "loop": within_itself()})
    assert not list(tmp_path.iterdir())


def test_json_takes_numpys_and_says_what_it_cannot_hold(tmp_path):
    path, value = tmp_path / "x.json", {"a": np.float32(0.5), "b": [PurePosixPath("c/d"), (1,)]}
    for sealed in (False, True):
        write_json(path, value, sealed=sealed)
        assert read_json(path).items() >= {"a": 0.5, "b": ["c/d", [1]]}.items()
    with pytest.raises(ValueError, match="x.json.b.1: an object, which JSON cannot hold"):
        write_json(path, {"b": [0, object()]})


# ---------------------------------------------------------------------------- what is no file


@pytest.mark.parametrize("sealed", [True, False])
def test_the_seals_own_key_is_refused(tmp_path, sealed):
    with pytest.raises(ValueError, match="x.json: 'sha256' is the key of the file's own hash"):
        write_json(tmp_path / "x.json", {"file": "w.pth", "sha256": "abc"}, sealed=sealed)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/zero")):
        for read in (load_checked, read_json):
            with pytest.raises(DamagedFile, match=f"{path.name} is no regular file"):
                read(path)


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs links")
def test_a_lock_is_no_link_and_keeps_what_is_there(tmp_path):
    (tmp_path / "theirs").write_text("theirs")
    for made in (Path.touch, lambda path: path.symlink_to("theirs")):
        path = tmp_path / "lock"
        path.unlink(missing_ok=True)
        made(path)
        if path.is_symlink():
            with pytest.raises(ValueError, match="lock is a link"):
                lock(tmp_path)
        else:
            path.write_text("theirs")
            lock(tmp_path)
            unlock(tmp_path)
        assert path.read_text() == "theirs"
    with pytest.raises(OSError), open(path, "ab", opener=safe_files.no_link):
        pass


def test_contents_that_do_not_fit_name_their_file_and_other_errors_pass(tmp_path):
    for error in (KeyError("theta"), TypeError("x"), RuntimeError("size\nmore"), ValueError("x")):
        with pytest.raises(ValueError, match="x.pt is whole, and its contents do not fit") as told:
            with contents(tmp_path / "x.pt"):
                raise error
        assert "\n" not in str(told.value) and type(error).__name__ in str(told.value)
    for error in (DamagedFile("x"), OSError("x"), MemoryError(), torch.OutOfMemoryError("x")):
        with pytest.raises(type(error)), contents(tmp_path / "x.pt"):
            raise error


# ---------------------------------------------------------------------------- file systems


@pytest.mark.skipif(os.name != "posix", reason="needs folders that can be opened")
def test_a_file_system_that_cannot_sync_folders_is_taken_as_it_is(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(numbers[-1], os.strerror(numbers[-1]))

    monkeypatch.setattr(os, "fsync", refuse)
    numbers = [errno.EIO, errno.ENOTSUP, errno.EINVAL]
    while len(numbers) > 1:
        sync_folder(tmp_path)
        numbers.pop()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_folder(tmp_path)


@pytest.mark.skipif(safe_files.fcntl is None, reason="needs flock")
def test_a_file_system_without_locks_is_taken_as_it_is(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(safe_files.fcntl, "flock", refuse)
    lock(tmp_path)
    safe_files.check_held(tmp_path)
    unlock(tmp_path)
