"""A blank report has the tables and figures of the runs that there are, and the writer's text."""

import json
import shutil
import subprocess
import zipfile

import pytest
from past import leave

from study import blank, history, relations
from study.figures import FIGURES


@pytest.fixture
def runs(tmp_path):
    for nc, val_acc in ((None, 0.3), (5, 0.2)):
        for seed in (0, 1):
            name = tmp_path / "runs" / f"{nc}-{seed}"
            leave(name, val_acc + seed / 100, nc=nc, seed=seed, data="synthetic")
    leave(tmp_path / "runs" / "scaffold", 0.4, scaffold=True)
    return history.read_all([tmp_path / "runs"])


def test_a_report_has_the_tables_of_its_runs_and_leaves_the_text_alone(tmp_path, runs):
    pytest.importorskip("matplotlib")
    out = tmp_path / "mine"
    pieces, notes = blank.write(runs, out)
    assert {"table/fedavg", "table/methods", "figure/heterogeneity"} <= set(pieces)
    assert "table/masks" not in pieces and notes == []
    numbers = json.loads((out / "generated" / "numbers.json").read_text())
    assert numbers["fedavg/nc5/validation"] == "20.50 ± 0.71"
    assert "| yes | 40.00 |" in (out / "generated" / "methods.md").read_text()
    (out / "report.tex").write_text("mine")
    blank.write(runs[:2], out)
    assert (out / "report.tex").read_text() == "mine"
    assert not (out / "generated" / "methods.tex").exists()
    with zipfile.ZipFile(blank.zipped(out)) as archive:
        names = archive.namelist()
    assert {"report.tex", "results.sty", "references.bib", "generated/numbers.tex"} <= set(names)


def test_what_many_runs_lack_is_said_once(tmp_path):
    for seed in range(4):
        leave(tmp_path / f"{seed}", 0.4, command="centralized", seed=seed)
    leave(tmp_path / "tested", 0.4, command="centralized", lr=0.3)
    log = tmp_path / "tested" / "log.jsonl"
    log.write_text(log.read_text().replace("val_loss", "test_acc"))
    _, (note,) = blank.comparable(history.read_all([tmp_path]))
    assert "0 and 3 more: its log has no test figures" in note


def test_runs_that_are_not_finished_make_no_report(tmp_path):
    leave(tmp_path / "a", 0.3, reached=1)
    with pytest.raises(ValueError, match="no run is finished; .*round 1 of 3"):
        blank.write(history.read_all([tmp_path]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_files_is_left_alone(tmp_path, runs):
    with pytest.raises(ValueError, match="holds other files"):
        blank.write(runs, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="LaTeX is not installed")
def test_latex_takes_it_as_it_is(tmp_path, runs):
    blank.write(runs, tmp_path / "mine")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(command, cwd=tmp_path / "mine", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_point_of_a_figure_is_a_configuration(tmp_path):
    for rounds in (3, 6):
        leave(tmp_path / f"dense-{rounds}", 0.4, rounds=rounds)
        leave(tmp_path / f"nc-{rounds}", 0.3, rounds=rounds, nc=5)
        for scoring in (2, 4):
            rule = {"mask_rule": "least-sensitive", "sparsity": 0.5, "calibration_rounds": scoring}
            leave(tmp_path / f"{rounds}-{scoring}", 0.2, rounds=rounds, **rule)
    ran = blank.experiments(history.read_all([tmp_path]), [])
    assert [len(row.runs) for row in ran["heterogeneity"]] == [1] * 4
    assert {row.also(3) for row in ran["heterogeneity"]} == {"rounds 3", "rounds 6"}
    masks = [row.also(3) for row in ran["rules"] if row.key[1] == "least-sensitive"]
    assert len(set(masks)) == 4
    assert len({row.key for row in ran["rules"]}) == len(ran["rules"])


def test_figures_show_what_compares_and_say_what_they_leave_out(tmp_path):
    options = {"data": "cifar100"}
    leave(tmp_path / "long", 0.4, rounds=6, **options)
    leave(tmp_path / "other", 0.4, rounds=6, nc=5, **options)
    leave(tmp_path / "short", 0.3, **options)
    leave(tmp_path / "demo", 0.9, rounds=6, data="synthetic")
    for name in ("searched", "tested"):
        leave(tmp_path / name, 0.4, command="centralized", lr=0.1 * len(name), **options)
    log = tmp_path / "tested" / "log.jsonl"
    log.write_text(log.read_text().replace("val_loss", "test_acc"))
    shown, notes = blank.comparable(history.read_all([tmp_path]))
    assert {run.name for run in shown} == {"long", "other", "tested"}
    assert len(notes) == 3 and any("demo: most runs are on" in note for note in notes)
    assert any("short" in note and "long is the same but longer" in note for note in notes)
    assert any("searched" in note and "--eval-test" in note for note in notes)


def test_a_longer_central_run_without_test_figures_hides_no_shorter_one(tmp_path):
    for name, epochs in (("long", 6), ("tested", 3)):
        leave(tmp_path / name, 0.4, command="centralized", epochs=epochs)
    log = tmp_path / "tested" / "log.jsonl"
    log.write_text(log.read_text().replace("val_loss", "test_acc"))
    shown, (note,) = blank.comparable(history.read_all([tmp_path]))
    assert [run.name for run in shown] == ["tested"] and "--eval-test" in note


def test_the_only_masked_run_says_its_mask(tmp_path):
    leave(tmp_path / "run", 0.4, mask_rule="random", sparsity=0.9)
    (part,) = (part for part in blank.PARTS if part.name == "masks")
    blank.write_part(part, history.read_all([tmp_path / "run"]), tmp_path)
    heading, _, row = (tmp_path / "masks.md").read_text().splitlines()
    assert heading.startswith("| mask rule | sparsity |") and row.startswith("| random | 0.9 |")


def test_masks_stand_beside_the_dense_runs_that_they_compare_with(tmp_path):
    rule = {"mask_rule": "random", "sparsity": 0.9}
    for name, options in {
        "masked": rule,
        "dense": {},
        "longer": {"rounds": 6},
        "central-mask": rule | {"command": "centralized", "epochs": 3},
        "central": {"command": "centralized", "epochs": 3},
        "central-long": {"command": "centralized", "epochs": 6},
    }.items():
        leave(tmp_path / "runs" / name, 0.4, **options)
    blank.write(history.read_all([tmp_path / "runs"]), tmp_path / "out")
    text = (tmp_path / "out" / "generated" / "masks.md").read_text()
    assert text.count("| random | 0.9 |") == 2 and text.count("| dense | - |") == 2, text


def test_an_option_that_a_run_lacks_is_none_in_the_keys_of_its_numbers(tmp_path):
    for name, val_acc, schedule, nesterov in (
        ("a", 0.3, "cosine", None),
        ("b", 0.2, "cosine", True),
        ("c", 0.1, "step", True),
    ):
        options = {"command": "centralized", "schedule": schedule, "nesterov": nesterov}
        leave(tmp_path / "runs" / name, val_acc, **options)
    blank.write(history.read_all([tmp_path / "runs"]), tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "generated" / "numbers.json").read_text())
    assert numbers["centralized/cosine/none/validation"] == "30.00"
    assert numbers["centralized/nesterov=none/best/validation"] == "30.00"
    assert not [key for key in numbers if "" in key.split("/")]


@pytest.fixture
def calibrations(tmp_path):
    """Two calibrations of one sharding, of other sparsities, and one more of a second seed."""
    overlap = {"iou": 0.4, "ceiling": 0.5, "chance": 0.1, "groups": {"2": 0.6}}
    for name, options in (("a", {"sparsity": 0.5}), ("b", {}), ("c", {"seed": 1})):
        calibrated = {"command": "calibrate", "mask_rule": "least-sensitive", "sparsity": 0.9}
        leave(tmp_path / name, 0.1, **calibrated | options)
        summary = {"overlap": overlap, "density": {"key.weight": {"0": 0.3}}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    return history.read_all([tmp_path])


def test_calibrations_of_one_sharding_have_a_panel_each_and_seeds_are_one_row(
    calibrations, monkeypatch, tmp_path
):
    drawn = {}
    monkeypatch.setattr(relations, "plot_grouped", lambda panels, *more: drawn.update(panels))
    FIGURES["agreement"](blank.experiments([], calibrations), tmp_path / "a.pdf")
    assert list(drawn) == ["sparsity 0.5", "sparsity 0.9"]
    assert drawn["sparsity 0.5"]["two clients"] == {"iid": (0.4,)}
    assert drawn["sparsity 0.9"]["two clients"] == {"iid": (0.4, 0.4)}
