"""A table's runs in one file are what their folders hold, and a damaged file is called that."""

import json

import pytest

from machine.safe_files import DamagedFile
from study import packed
from study.packed import add, lines, pack, read, run_of, write
from study.past import Past

CONFIG = {"format": 1, "options": {"lr": 0.1}}
RUN = Past("a", CONFIG, {"final": {}}, [{"round": 0, "val_acc": float("nan")}])


def folder_of(run, table):
    folder = table / run.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(run.config))
    (folder / "summary.json").write_text(json.dumps(run.summary))
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run.records))
    (folder / "checkpoint.pt").write_bytes(b"large")


def test_a_run_is_moved_into_the_file_or_copied(tmp_path):
    folder_of(RUN, tmp_path)
    before = run_of(tmp_path, "a")
    assert before.folder == tmp_path / "a"
    pack(tmp_path, "a", keep=True)
    assert (tmp_path / "a").is_dir() and len(read(tmp_path / packed.FILE)) == 1
    pack(tmp_path, "a")
    assert not (tmp_path / "a").exists()
    before = before._replace(folder=RUN.folder)
    assert str(run_of(tmp_path, "a")) == str(before) == str(RUN)  # nan is not nan
    assert run_of(tmp_path, "b") is None


def test_a_run_that_is_not_done_stays_where_it_is(tmp_path):
    folder_of(RUN, tmp_path)
    (tmp_path / "a" / "summary.json").unlink()
    pack(tmp_path, "a")
    assert (tmp_path / "a").is_dir() and not (tmp_path / packed.FILE).exists()


def test_long_logs_keep_their_evaluations(tmp_path):
    records = [{"round": r} | ({"val_acc": 0.5} if r % 100 == 0 else {}) for r in range(600)]
    add(tmp_path, [RUN._replace(records=records)])
    assert [r["round"] for r in run_of(tmp_path, "a").records] == [*range(0, 600, 100)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_a_file_is_read_back_as_it_was_written_or_called_damaged(tmp_path, suffix):
    path = tmp_path / f"runs{suffix}"
    write(path, [{"name": "a", "n": 1}, {"name": "b", "n": 2}])
    assert [line["n"] for line in lines(path, ["name", "n"])] == [1, 2]
    with pytest.raises(DamagedFile, match="runs.jsonl.* is damaged"):
        lines(path, ["other"])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DamagedFile, match="is damaged"):
        lines(path, ["name"])
