"""What a command works with follows its options."""

from built import parsed

from training.workspace import Workspace


def test_a_forward_pass_takes_fewer_images_where_they_are_large(small_data):
    def batch(size):
        o = parsed("fedavg", "--model", "vit_ti16", "--image-size", size).groups
        return Workspace(o.source, o.machine, o.backbone).eval_batch

    assert batch(64) == 256 > batch(224) > 8
    assert batch(1600) == 8
