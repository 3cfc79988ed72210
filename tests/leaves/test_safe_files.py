"""Files that are written whole, and found out when they are not."""

import json
import os
import time

import pytest
import torch

from machine.safe_files import (
    DamagedFile,
    forget_asides,
    load_checked,
    save_checked,
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
    for name, age in (("a.pt.7.tmp", 0), ("b.pt.7.tmp", 100), ("c.pt", 100)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    forget_asides(tmp_path, age=50)
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt.7.tmp", "c.pt"}
    forget_asides(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
