"""The loss scale: the same for all clients of a round, whatever their order."""

import torch

from loss_scale import LossScale


def needs(limit):
    """A client that overflows above `limit`: (train, overflowed) for LossScale.attempt."""
    last = []
    return last.append, lambda: last[-1] > limit


def test_an_overflowing_client_is_redone_whatever_the_others_did():
    for order in ([64.0, 4.0, 1e9], [1e9, 64.0, 4.0], [4.0, 1e9, 64.0]):
        scale = LossScale(256.0)
        used = {limit: scale.attempt(*needs(limit))[1] for limit in order}
        assert used == {64.0: 64.0, 4.0: 4.0, 1e9: 256.0}
        scale.next_round()
        assert scale.state.tolist() == [4.0, 4.0, 0.0]


def test_the_scale_doubles_after_quiet_rounds_and_sleeps_at_one():
    scale = LossScale(8.0, patience=3)
    for expected in (8.0, 8.0, 16.0, 16.0, 16.0, 32.0):
        scale.attempt(*needs(1e9))
        scale.next_round()
        assert scale.state[0] == expected
    off = LossScale(1.0, patience=1)
    assert not off.active and off.attempt(*needs(0.1))[1] == 1.0
    off.next_round()
    assert off.state.tolist() == [1.0, 1.0, 0.0]


def test_the_scale_is_all_in_its_state():
    a, b = LossScale(64.0, patience=2), LossScale(1024.0, patience=2)
    a.attempt(*needs(16.0))
    b.state.copy_(a.state)
    for scale in (a, b):
        scale.next_round(), scale.next_round(), scale.next_round()
    assert torch.equal(a.state, b.state) and a.state[0] == 32.0


def test_a_group_takes_the_lowest_scale_that_one_of_it_needed():
    class Others:
        def gather(self, value):
            return [value, 16.0, 128.0]

    scale = LossScale(64.0)
    scale.merge(Others())
    scale.next_round()
    assert scale.state.tolist() == [16.0, 16.0, 0.0]


def test_what_fails_at_any_scale_says_nothing_about_the_scale():
    scale = LossScale(64.0)
    assert scale.attempt(*needs(0.0))[1] == 1.0
    scale.attempt(*needs(32.0))
    scale.next_round()
    assert scale.state.tolist() == [32.0, 32.0, 0.0]
