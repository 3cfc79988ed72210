"""Where a run's mask comes from, and which process keeps it."""

import pytest
from built import parsed

from machine.runs import Run
from training.mask_cache import find_mask
from training.workspace import Workspace


@pytest.mark.parametrize("given", [False, True])
def test_of_the_processes_that_share_a_run_the_writing_one_keeps_its_mask(small_data, given):
    o = parsed("fedavg", "--data-dir", small_data, "--mask-rule", "random").groups
    workspace, masks = Workspace(o.source, o.machine, o.backbone), []
    model, file = workspace.build_model(), None
    if given:
        mask = find_mask(workspace, model, None, o.masking, Run(small_data / "calibrated"))
        masks, file = [mask], str(small_data / "calibrated" / "mask.pt")
    for writes in (False, True):
        run = Run(small_data / "run", writes=writes)
        masks.append(find_mask(workspace, model, file, o.masking, run))
        assert (run.folder / "mask.pt").exists() == writes
    assert len({mask.sha256 for mask in masks}) == 1
