"""Where a run's mask comes from: --mask's file, a mask made before of the same, or a new one."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import fisher
import masks
import model as vit
from machine import safe_files
from training import calibration as scoring
from training.calibration import Calibration, Masking
from training.mask_file import Mask, given_mask, say_rounds

if TYPE_CHECKING:
    from machine.runs import Run
    from training.workspace import Workspace

MAKERS = fisher.__file__, masks.__file__, scoring.__file__  # the code that decides what one keeps


def cached_mask(calibration: Calibration) -> Mask:
    """Return the calibration's mask, from <data-dir>/masks where it was made before."""
    workspace, model, preprocess = calibration.workspace, calibration.model, calibration.preprocess
    options = calibration.options._replace(score_precision=calibration.score_precision)
    made_from = [*options, calibration.seed, workspace.source.data]
    made_from += [preprocess.image_size, preprocess.scale.tolist(), preprocess.shift.tolist()]
    made_from += [vit.fingerprint(model), workspace.device.type, safe_files.BOUND]
    digest = hashlib.sha256(repr(made_from).encode())
    for tensor in (model.head.weight, model.head.bias):
        digest.update(tensor.detach().cpu().numpy().tobytes())
    for shard in calibration.shards:
        digest.update(len(shard).to_bytes(8, "little") + shard.tobytes())
    for file in MAKERS:
        digest.update(Path(file).read_bytes())
    purpose = digest.hexdigest()
    path = workspace.folder("masks") / f"{purpose[:16]}.pt"
    if workspace.keeps(path):
        try:
            mask = Mask.load(path, model, purpose)
        except ValueError as error:
            print(f"warning: {error}; made again", file=sys.stderr)
        else:
            print(f"mask taken from {path}, made {mask.origin['date']}; --fresh makes it anew")
            options = calibration.options
            say_rounds(mask.origin["rounds"], options.mask_rule, options.consensus)
            return mask
    mask = calibration.make()
    try:
        safe_files.forget_asides(path.parent, safe_files.DAY)
        mask.save(path, purpose)
    except OSError as error:
        print(f"warning: the mask is not kept for other runs: {error}", file=sys.stderr)
    return mask


def find_mask(
    workspace: Workspace,
    model: vit.VisionTransformer,
    file: str | None,
    options: Masking,
    run: Run,
    cuda_graph: str = "auto",
) -> Mask | None:
    """Return the run's mask, kept as its mask.pt: --mask's, or one made by --mask-rule; else None.

    Args:
        file: of --mask; cuda_graph: of --cuda-graph.

    Raises:
        ValueError: mask.pt is gone, and the one made anew is not that of the run's checkpoint.
    """
    path: Path = run.folder / "mask.pt"
    if file is not None:
        mask = given_mask(file, model, path)
    elif options.mask_rule is None:
        return None
    elif path.exists():
        return Mask.load(path, model, run.purpose("mask.pt"))
    else:
        mask = cached_mask(Calibration(workspace, model, options, cuda_graph))
        check_remade(mask, run, path)
    if run.writes and not path.exists():
        mask.save(path, run.purpose("mask.pt"))
    return mask


def check_remade(mask: Mask, run: Run, path: Path) -> None:
    """Raise ValueError where a mask made in place of a lost one is not that of the checkpoint."""
    if (checkpoint := run.load()) is None:
        return
    with safe_files.contents(run.checkpoint_path):
        before = (checkpoint["state"]["environment"] or {}).get("mask")
    if before != mask.sha256:
        raise ValueError(
            f"{path} is gone, and a mask made anew here is not known to be the checkpoint's: put "
            "the run's own file in its place, or take another --name"
        )
