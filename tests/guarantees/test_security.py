"""What others wrote is data: no file and no name makes a command run code or leave its folder."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, small_synthetic

import data
import train
from machine import safe_files, streams
from study import experiments, tables

ROOMS = ("federated", "machine", "training", "study", "commands")
FOLDERS = [ROOT, *(ROOT / room for room in ROOMS)]
ITS_OWN = {  # tests that load or run what they have just written themselves
    "test_sparse_sgdm.py",  # pickled optimisers
    "test_readme.py",  # the README's snippets
    "test_brief.py",  # the notebook's cells
}
SOURCES = sorted(
    path
    for paths in (
        *(folder.glob("*.py") for folder in FOLDERS),
        *((ROOT / folder).rglob("*.py") for folder in ("bench", "tests")),
    )
    for path in paths
    if path.name not in ITS_OWN
)
TINY = ("fedavg", "--data", "synthetic", "--rounds", 1, "--clients", 10, "--batch-size", 4)


class Evil:
    """Makes the folder `owned` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.path.abspath("owned"),)


def plant(path, value):
    """Put a value in a file's place, with the right checksum, and the purpose of what was there."""
    length = len(safe_files.BOUND) + 2 * safe_files.DIGEST
    purpose = safe_files.BOUND + hashlib.sha256(b"").digest()
    if path.exists():
        purpose = path.read_bytes()[-length : -safe_files.DIGEST]
    torch.save(value, path)
    content = path.read_bytes() + purpose
    path.write_bytes(content + hashlib.sha256(content).digest())


def calls(tree):
    """Yield the dotted name and the keywords of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {k.arg: getattr(k.value, "value", "computed") for k in node.keywords}
            yield ast.unparse(node.func), keywords, [ast.unparse(a) for a in node.args]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_calls_a_shell(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loads = sum(
        ast.unparse(n) == "torch.load" for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    )
    for name, keywords, arguments in calls(tree):
        if name == "torch.load" or "torch.load" in arguments:
            assert keywords.get("weights_only") is True
            loads -= 1
        assert name not in ("os.system", "os.popen", "eval", "exec", "subprocess.getoutput"), name
        assert not keywords.get("shell"), name
        if name == "np.load":
            assert not keywords.get("allow_pickle")
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), name
    assert loads == 0  # every one is called, with weights_only


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, made once."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthetic_dataset", small_synthetic)
        patch.chdir(home)
        assert train.main([str(a) for a in (*TINY, "--name", "x")]) == 0
    return home / "runs" / "x"


@pytest.fixture
def finished(trained, small_data):
    """A copy of it below the working directory."""
    return Path(shutil.copytree(trained, small_data / "runs" / "x"))


def refused(cli, *command):
    """Run a command that must end in one line and status 2, and without what Evil does."""
    status, _, err = cli(*command)
    assert status == 2 and err.count("\n") == 1, err
    assert not Path("owned").exists()
    return err


@pytest.mark.parametrize(
    "wrap", [Evil, lambda: {"norm.weight": Evil()}, lambda: {"teacher": Evil()}]
)
def test_weights_run_no_code(cli, small_data, wrap):
    torch.save(wrap(), "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps(wrap()))
    for name, why in (("evil.pth", f"({os.name}.mkdir)"), ("plain.pth", "no file of torch.save")):
        err = refused(cli, *TINY, "--weights", name)
        assert f"weights {name}: " in err and why in err
    assert not (small_data / "runs").exists()


def test_a_mask_runs_no_code(cli, small_data):
    plant(Path("evil.pt"), {"mask_format": 1, "shapes": Evil()})
    masked = (*TINY, "--head", "ridge", "--mask")
    err = refused(cli, *masked, "evil.pt")
    assert "mask evil.pt: " in err and "holds more than tensors and plain values" in err
    origin = dict(mask_rule="random", weights_sha256="", bytes_up=0, bytes_down=0)
    whole = dict(mask_format=1, shapes={"norm.weight": [48]}, made=origin)
    whole["bits"] = torch.full((6,), 255, dtype=torch.uint8)
    for key, value in (("shapes", 3), ("made", {}), ("bits", torch.zeros(9)), ("mask_format", 2)):
        plant(Path("odd.pt"), whole | {key: value})
        assert "mask odd.pt: " in refused(cli, *masked, "odd.pt")
    assert not (small_data / "runs").exists()
    plant(Path("odd.pt"), whole)
    assert cli(*masked, "odd.pt")[0] == 0


@pytest.mark.parametrize("content", [Evil(), {"state": Evil(), "log": {}}, {"state": 1}, [1]])
def test_a_checkpoint_runs_no_code(cli, finished, content):
    plant(finished / "checkpoint.pt", content)
    for command in (("eval", finished), ("export", finished, "x.pth"), ("merge", finished)):
        assert "checkpoint.pt" in refused(cli, *command)
    assert "checkpoint.pt" in refused(cli, *TINY, "--name", "x", "--rounds", 2)


@pytest.mark.parametrize("name", ["head.pt", "mask.pt"])
def test_what_a_run_keeps_runs_no_code(cli, small_data, name):
    options = (*TINY, "--name", "x", "--head", "ridge", "--mask-rule", "random")
    assert cli(*options)[0] == 0
    plant(small_data / "runs" / "x" / name, {"weight": Evil()})
    for command in (("eval", "runs/x"), ("export", "runs/x", "x.pth"), (*options, "--rounds", 2)):
        assert name in refused(cli, *command)


def test_kept_features_run_no_code_and_are_computed_again(cli, small_data):
    options = (*TINY, "--head", "ridge")
    assert cli(*options, "--name", "a")[0] == 0
    for path in (small_data / "data" / "features").iterdir():
        plant(path, Evil())
    status, _, err = cli(*options, "--name", "b")
    assert status == 0 and "computed again" in err and not Path("owned").exists()


@pytest.mark.parametrize(
    "config",
    [
        "[" * 100_000,
        "__import__('os').mkdir('owned')",
        '{"py/reduce": ["os.mkdir", "owned"]}',
        {"options": "__import__('os').mkdir('owned')"},
        {"options": {}},
        {"model": "__import__('os').mkdir('owned')"},
        {"image_size": "__import__('os').mkdir('owned')"},
        {"weights": "evil.pth"},
    ],
    ids=range(8),
)
def test_a_config_runs_no_code(cli, finished, config):
    torch.save(Evil(), "evil.pth")
    path = finished / "config.json"
    whole = json.loads(path.read_text())
    if isinstance(config, dict):
        whole |= config if "options" in config else {"options": whole["options"] | config}
        config = json.dumps(whole)
    path.write_text(config)
    for command in (("eval", finished), ("export", finished, "x.pth"), ("merge", finished)):
        refused(cli, *command)


def test_a_log_of_other_than_records_is_refused(cli, finished):
    for path in finished.glob("checkpoint*.pt"):  # which hold the log, and would serve in its place
        path.unlink()
    for line in ("3", '"text"', "[" * 100_000):
        (finished / "log.jsonl").write_text(line + "\n")
        assert "log.jsonl" in refused(cli, "plot", finished)


def test_arrays_of_objects_are_not_read(finished):
    np.savez("evil.npz", clients=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load("evil.npz")["clients"]
    with np.load(finished / "shards.npz") as shards:  # what runs write needs none
        assert len(shards["clients"]) == 3600


NAMES = {
    "must stay below": (
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/tmp/x",
        "a//b",
        "a/",
        "a.",
        "a ",
        " ",
    ),
    "holds characters": ("a\0b", "a\nb", "a:b", "a*", "C:\\x", "..\\x", "a\x7f", "a\udcff", "a|b"),
    "Windows reserves": ("con", "NUL.txt", "a/com1", "aux .x"),
    "is longer than": ("n" * 201, "ü" * 101, "a/" + "n" * 5000),
    "a link leads out of it": ("out/x", "out", "loop/x", "sub/up"),
}


@pytest.mark.parametrize(("message", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_a_runs_name_stays_in_its_folder(cli, small_data, message, name):
    home = small_data / "runs"
    (home / "sub").mkdir(parents=True)
    (home / "out").symlink_to(small_data)
    (home / "loop").symlink_to(home / "loop")
    (home / "sub" / "up").symlink_to("../..")
    before = sorted(small_data.rglob("*"))
    for command in (TINY, ("ridge", "--data", "synthetic"), ("calibrate", "--data", "synthetic")):
        err = refused(cli, *command, "--name", name)
        assert "--name: " in err and message in err
    assert sorted(small_data.rglob("*")) == before


def test_names_that_are_plain_and_links_to_the_whole_folder_are_taken(cli, small_data):
    (small_data / "big disk").mkdir()
    (small_data / "runs").symlink_to(small_data / "big disk")
    for name in ("größe=3, x", "-a/b.c", "n" * 200):
        assert cli(*TINY, f"--name={name}")[0] == 0
        assert (small_data / "big disk" / name / "summary.json").exists()


@pytest.mark.parametrize("folder", [".", "..", "empty", "file", "file/x", "n" * 5000, "loop"])
def test_what_is_no_run_folder_is_named(cli, small_data, folder):
    Path("empty").mkdir()
    Path("file").write_text("{}")
    Path("loop").symlink_to("loop")
    commands = ("eval", folder), ("merge", folder), ("plot", folder), ("export", folder, "x.pth")
    for command in commands:
        refused(cli, *command)
    assert {p.name for p in small_data.iterdir()} == {"empty", "file", "loop"}


# ---------------------------------------------------------------------------- names and terminals

HOSTILE = "_a\x1b[2J\x9b1m\x07\u202e$x_|\\input{y}\r%"  # ESC, CSI, bell, bidi, LaTeX, Markdown


@pytest.fixture
def terminal(monkeypatch, tmp_path_factory):
    """Run train.py on standard streams that go to a file; returns status and bytes."""
    path = tmp_path_factory.mktemp("terminal") / "said"

    def run(*command: object) -> tuple[int, bytes]:
        with open(path, "w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
            for name in ("stdout", "stderr", "__stdout__", "__stderr__"):
                patch.setattr(sys, name, file)
            status = train.main([str(a) for a in command])
            sys.stdout.flush(), sys.stderr.flush()
        return status, path.read_bytes()

    return run


def assert_printable(said: bytes) -> None:
    text = said.decode()
    assert text and all(c.isprintable() or c in "\n\t" for c in text), text


@pytest.mark.parametrize("option", [None, "model", "data", "weights", "head", "name", "mask_rule"])
def test_no_strangers_run_drives_the_terminal(terminal, finished, no_curves, option):
    evil = finished.rename(finished.with_name(HOSTILE))
    if option is not None:
        config = json.loads((evil / "config.json").read_text())
        del config[safe_files.SEAL]  # which anyone can compute
        config["options"][option] = HOSTILE
        (evil / "config.json").write_text(json.dumps(config))
    plain = option in (None, "name")
    for command in (
        *(("eval", evil), ("eval", evil, "--per-client"), ("export", evil, f"{HOSTILE}.pth")),
        *(("merge", evil), ("plot", evil, "--out", f"{HOSTILE}.png")),
    ):
        status, said = terminal(*command)
        assert status == 0 if plain or command[0] == "plot" else status in (0, 2), said
        assert_printable(said)
        assert status == 0 or said.count(b"\n") == 1


def test_what_a_damaged_strangers_run_is_said_to_be_is_printable(terminal, finished):
    evil = finished.rename(finished.with_name(HOSTILE))
    (evil / "summary.json").write_text("{")
    (evil / "log.jsonl").write_text("{}\n")
    for command in (("eval", evil), ("plot", evil), ("plot", evil, evil)):
        assert_printable(terminal(*command)[1])


def test_strangers_results_are_listed_and_reported_or_refused_in_a_line(terminal, small_data):
    cell = experiments.at_scale("smoke")["fedavg-iid"].rows[0]
    cell = cell.cell(cell.rates[0], cell.seeds[0])
    folder = small_data / "results" / "smoke" / "fedavg-iid" / cell.name
    folder.mkdir(parents=True)
    options = tables.given(cell) | {"schedule": HOSTILE, "nc": HOSTILE, "mask_rule": HOSTILE}
    for figure, environment in ((HOSTILE, {"device": HOSTILE}), ([], {}), (1e308, [])):
        config = {"format": 1, "options": options, "environment": environment}
        final = {"val_acc": figure, "test_acc": 0.5}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text(json.dumps({"wall_seconds": figure, "final": final}))
        (folder / "log.jsonl").write_text(json.dumps({"round": figure} | final) + "\n")
        for command in (("sweep", "--list"), ("report", "--out", "out")):
            status, said = terminal(*command, "--scale", "smoke")
            last = said.splitlines()[-1]
            assert status == 0 or status == 2 and last.startswith(b"train.py: error: "), said
            assert_printable(said)
        for path in Path("out").glob("*.tex"):
            assert "\\input" not in path.read_text() and "\x1b" not in path.read_text()


def test_a_redraw_begins_a_line_and_nothing_else_moves_the_cursor():
    stream = streams.Printable(io.BytesIO(), "utf-8", write_through=True)
    for text in ("\r\x1b[K1/2", "\rbar", "name\r\x1b[Kdone\n", "\r\r", "größe\tx\n", "\udcff"[:0]):
        assert stream.write(text) == len(text)
    said = stream.buffer.getvalue().decode()
    assert said == "\r\x1b[K1/2\rbarname\\r\\x1b[Kdone\n\r\\rgröße\tx\n"
