"""The round is McMahan's, its sum does not know the order of clients, and it stops anywhere."""

import math

import numpy as np
import pytest
import torch
from conftest import Threads, in_threads
from loops import reloaded, run

from fedavg import (
    ClientError,
    Cohort,
    FedAvg,
    MeanServer,
    Method,
    State,
    add_delta_,
    add_up,
    apply_total_,
)
from federated.cohort import sample_clients, shares
from federated.server import Server

TARGETS = torch.linspace(-1, 2, 60, dtype=torch.float64).view(12, 5)
SIZES = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def descend(start, client, steps=3, lr=0.3):
    """Take plain steps on |theta - target|^2 / 2; returns where they end, and their losses."""
    theta, losses = start.clone(), []
    for _ in range(steps):
        error = theta - TARGETS[client].to(theta.dtype)
        losses.append(error.square().sum() / 2)
        theta.sub_(lr * error)
    return theta, torch.stack(losses)


def gives(result):
    """A training in which each client comes to result(theta, client)."""

    def train(theta, clients, round):
        yield from (result(theta, int(client)) for client in clients)

    return train


ONE = torch.ones(1)
quadratic = gives(descend)  # clients trained one by one


def drawn(round):
    """The usual cohort: drawn evenly, weighted by samples."""
    clients = sample_clients(12, 0.4, seed=3, round=round)
    return Cohort(clients, clients, shares(SIZES, clients))


def always(clients, weights=None, sent=None):
    """The same cohort in every round."""
    clients = np.array(clients, np.int64)
    weights = shares(SIZES, clients) if weights is None else np.array(weights)
    sent = clients if sent is None else np.array(sent)
    return lambda round: Cohort(sent, clients, weights)


def federation(dtype=torch.float64, train=quadratic, cohort=drawn, **options):
    return FedAvg(torch.zeros(5, dtype=dtype), train, cohort, **options)


# ---------------------------------------------------------------------------- the update


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_rounds_are_the_update_written_by_hand(server_lr):
    theta = torch.zeros(5, dtype=torch.float64)
    loop = federation(server=Server("fedavg", theta, lr=server_lr) if server_lr != 1 else None)
    for t in range(1, 5):
        (record,) = run(loop, t)
        clients = sample_clients(12, 0.4, seed=3, round=t)
        n = sum(SIZES[k] for k in clients)
        # three steps of 0.3 towards the target leave (1 - 0.3)^3 of the distance
        change = sum(SIZES[k] / n * (1 - 0.7**3) * (TARGETS[k] - theta) for k in clients)
        loss = sum(
            SIZES[k]
            / n
            * np.mean([0.49**j for j in range(3)])
            * (theta - TARGETS[k]).square().sum()
            for k in clients
        )
        assert record["train_loss"] == pytest.approx(loss.item() / 2, rel=1e-12)
        assert (record["round"], record["clients"]) == (t, clients.tolist())
        theta = theta + server_lr * change
        # the fixed point's unit is 2^-48, and each of five clients rounds once
        torch.testing.assert_close(loop.theta, theta, rtol=0, atol=1e-13)


def test_weights_need_not_add_up_to_one_where_the_method_says_so():
    method, theta = Method(any_sum=True), torch.zeros(5).double()
    loop = federation(cohort=always([2, 11], [0.25, 1.5]), method=method)
    for t in (1, 2):
        run(loop, t)
        pull = 0.25 * (TARGETS[2] - theta) + 1.5 * (TARGETS[11] - theta)
        theta = theta + (1 - 0.7**3) * pull
        torch.testing.assert_close(loop.theta, theta, rtol=0, atol=1e-13)


def test_the_training_loss_has_the_weights_of_the_average():
    method = Method(any_sum=True)
    (record,) = run(federation(cohort=always([2, 11], [0.5, 0.125]), method=method), 1)
    means = [descend(torch.zeros(5).double(), k)[1].mean().item() for k in (2, 11)]
    expected = (0.5 * means[0] + 0.125 * means[1]) / 0.625
    assert record["train_loss"] == pytest.approx(expected, rel=1e-14)


def test_a_round_takes_the_seconds_of_its_clients(monkeypatch):
    clock = iter(range(9))  # read as a client's call begins and as it ends
    monkeypatch.setattr("fedavg.time.perf_counter", lambda: next(clock))
    loop = federation(cohort=always([3, 8]))
    assert loop.advance() is None and loop.advance()["seconds"] == 2


# ---------------------------------------------------------------------------- the sum


def test_the_sum_knows_neither_order_nor_grouping():
    start = torch.randn(70_001)
    results = start + torch.randn(6, 70_001) * 10.0 ** torch.arange(-6, 0).view(6, 1)
    weights = [0.1, 0.25, 0.05, 0.3, 0.2, 0.1]

    def total(order):
        acc = torch.zeros(70_001, dtype=torch.int64)
        for k in order:
            add_delta_(acc, results[k], start, weights[k])
        return acc

    whole = total(range(6))
    assert torch.equal(whole, total([5, 3, 1, 0, 2, 4]))
    assert torch.equal(whole, total([0, 1]) + total([5]) + total([4, 3, 2]))
    theta = start.clone()
    apply_total_(theta, whole)
    portions = torch.tensor(weights, dtype=torch.float64).view(6, 1)
    exact = start.double() + (portions * (results - start).double()).sum(0)
    torch.testing.assert_close(theta, exact.float(), rtol=1.2e-7, atol=1e-13)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("size", [2, 3, 7])  # of seven processes two have no client
def test_processes_share_a_round_and_meet_once(size, apart):
    method = Method(apart=lambda round: apart, bytes_up=20)
    alone = federation(method=method)
    records = run(alone, 3)

    def work(group):
        loop = federation(method=method, group=group)
        return [loop.advance() | {"seconds": 0} for _ in range(3)], loop.theta

    for shared, theta in in_threads(size, work).values():
        assert shared == records
        assert torch.equal(theta, alone.theta)


def test_all_processes_raise_what_the_client_of_one_has_met():
    train = gives(lambda theta, client: (theta + (math.nan if client == 7 else 1.0), ONE))

    def work(group):
        with pytest.raises(ClientError, match="round 1, client 7: its update is nan") as raised:
            federation(train=train, cohort=always(range(12)), group=group).advance()
        return str(raised.value)

    assert len(set(in_threads(3, work).values())) == 1


def test_processes_meet_once_a_round(monkeypatch):
    meetings, gather = [], Threads.gather

    def counted(self, value):
        meetings.append(isinstance(value, torch.Tensor))
        return gather(self, value)

    monkeypatch.setattr(Threads, "gather", counted)
    in_threads(3, lambda group: run(federation(group=group), 4))
    assert sorted(meetings) == 12 * [False] + 12 * [True]  # results, then the sum, in each of three


# ---------------------------------------------------------------------------- stops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop", range(1, 12))
def test_a_round_in_hand_can_be_saved_at_every_client(stop, dtype):
    whole, first, second = (federation(dtype, method=Method(bytes_up=20)) for _ in range(3))
    records = run(whole, 3)
    before = [r | {"seconds": 0} for r in (first.advance() for _ in range(stop)) if r is not None]
    second.load_state_dict(reloaded(first.state_dict()))
    assert before + run(second, 3) == records
    assert torch.equal(second.theta, whole.theta)


@pytest.mark.parametrize(("done", "size"), [(2, 1), (2, 2), (2, 3), (1, 2), (4, 7)])
def test_a_round_in_hand_is_gone_on_with_by_a_group_of_any_size(done, size):
    whole, first = federation(), federation()
    records = run(whole, 3)
    for _ in range(5 + done):
        first.advance()
    state = reloaded(first.state_dict())
    assert len(state["done"]) == done

    def work(group):
        loop = federation(group=group)
        loop.load_state_dict(state)
        return run(loop, 3), loop.theta

    for rest, theta in in_threads(size, work).values():
        assert rest == records[1:]
        assert torch.equal(theta, whole.theta)


def test_a_stop_after_a_round_holds_nothing_in_hand():
    loop = federation()
    run(loop, 2)
    state = loop.state_dict()
    assert set(state) == {"theta", "round", "states"} and state["round"] == 2


def test_a_round_that_was_saved_as_a_sum_or_apart_goes_on_as_the_other():
    methods = Method(), Method(apart=lambda round: True)
    whole = federation()
    run(whole, 3)
    for before, after in (methods, methods[::-1]):
        first, second = federation(method=before), federation(method=after)
        for _ in range(7):
            first.advance()
        second.load_state_dict(reloaded(first.state_dict()))
        run(second, 3)
        assert torch.equal(second.theta, whole.theta)


class Counter(State):
    """Counts the rounds that it was let take in."""

    bytes, count = 8, 0

    def next_round(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_states_follow_the_rounds_and_are_saved_by_name():
    first, second = (federation(states={"counter": Counter()}) for _ in range(2))
    records = run(first, 2)
    assert all(record["state_bytes"] == {"counter": 8} for record in records)
    first.advance()
    second.load_state_dict(reloaded(first.state_dict()))
    assert second.states["counter"].count == 2
    run(second, 3)
    assert second.states["counter"].count == 3


# ---------------------------------------------------------------------------- what a method changes


def test_a_method_scales_sends_keeps_apart_combines_and_looks_on():
    seen = []

    def send_(part, client, cohort, round):
        part[0] = 0
        return 10 + client

    def combine(parts, cohort, round):
        seen.append((tuple(parts.shape), cohort.clients.tolist(), round))
        return 2 * add_up(parts)

    method = Method(
        factor=lambda theta_k, theta: 0.5,
        send_=send_,
        apart=lambda round: round == 2,
        combine=combine,
        after_=lambda theta: theta[1:2].fill_(7),
    )
    loop, plain = federation(method=method), federation()
    (record,) = run(loop, 1)
    run(plain, 1)
    assert record["bytes_up"] == sum(10 + k for k in record["clients"])
    assert loop.theta[:2].tolist() == [0, 7]
    torch.testing.assert_close(loop.theta[2:], plain.theta[2:], rtol=0, atol=1e-13)
    run(loop, 2)
    assert [shape for shape, _, _ in seen] == [(1, 5), (5, 5)]
    assert [(clients, t) for _, clients, t in seen] == [
        (drawn(t).clients.tolist(), t) for t in (1, 2)
    ]


def test_parts_lie_by_place_in_the_cohort_whichever_process_trained_them():
    seen = []  # threads append at once

    def combine(parts, cohort, round):
        seen.append(parts.clone())
        return add_up(parts)

    method = Method(apart=lambda round: True, combine=combine)
    run(federation(method=method), 1)
    in_threads(2, lambda group: run(federation(method=method, group=group), 1))
    assert len(seen) == 3 and all(torch.equal(parts, seen[0]) for parts in seen)
    cohort = drawn(1)
    for part, client, weight in zip(seen[0], cohort.clients, cohort.weights, strict=True):
        expected = weight * descend(torch.zeros(5).double(), client)[0]
        torch.testing.assert_close(part.double() / 2.0**48, expected, rtol=0, atol=2.0**-48)


def test_bytes_down_count_who_was_sent_the_model_and_did_not_answer():
    method = Method(bytes_up=20, bytes_down=30)
    (record,) = run(federation(cohort=always([3], sent=[3, 8, 5]), method=method), 1)
    assert record["clients"] == [3] and record["dropped_out"] == [8, 5]
    assert (record["bytes_up"], record["bytes_down"]) == (20, 90)


# ---------------------------------------------------------------------------- no client, no weight


@pytest.mark.parametrize("server", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize(
    ("clients", "why"),
    [([], "no client took part"), ([3, 8], "the round's clients weigh nothing")],
    ids=["nobody", "no weight"],
)
def test_a_round_in_which_nobody_counts_changes_nothing_and_says_so(server, clients, why):
    def sometimes(round):
        return (always(clients, [0.0] * len(clients)) if round == 2 else always([3, 8]))(round)

    loop, never = (
        federation(
            cohort=cohort,
            server=Server(server, torch.zeros(5)),
            states={"counter": Counter()},
            method=Method(bytes_up=20),
        )
        for cohort in (sometimes, always([3, 8]))
    )
    records = run(loop, 1)
    before = loop.theta.clone()
    records += run(loop, 2)
    assert torch.equal(loop.theta, before)
    assert records[1]["unchanged"] == why and records[1]["clients"] == clients
    assert records[1]["bytes_up"] == 20 * len(clients) and "train_loss" not in records[1]
    records += run(loop, 3)
    assert all(r["train_loss"] > 0 and "unchanged" not in r for r in records[::2])
    run(never, 2)
    assert torch.equal(loop.theta, never.theta)
    assert loop.states["counter"].count == 2


def test_a_client_without_weight_changes_nothing_beside_others():
    loop, never = federation(cohort=always([3, 8], [1.0, 0.0])), federation(cohort=always([3]))
    records, others = run(loop, 2), run(never, 2)
    assert torch.equal(loop.theta, never.theta)
    assert [r["train_loss"] for r in records] == [r["train_loss"] for r in others]


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("weight", [-0.25, -1e-300, math.nan, math.inf, -math.inf])
def test_a_weight_that_cannot_be_averaged_by_names_its_client(weight):
    loop = federation(cohort=always([3, 8, 5], [0.5, weight, 0.5]))
    with pytest.raises(ValueError, match=f"client 8 has weight {weight}: it must be") as raised:
        loop.advance()
    assert not isinstance(raised.value, ClientError)
    assert not loop.theta.any() and loop.round == 0


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_weights_as_clients(count):
    with pytest.raises(ValueError, match=f"3 clients need as many weights, not {count}"):
        federation(cohort=always([3, 8, 5], [0.2] * count)).advance()


@pytest.mark.parametrize("weights", [[600, 600], [1.0, 1.0], [0.3, 0.3]])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match=f"add up to {sum(weights):g}, not 1: divide them"):
        federation(cohort=always([3, 8], weights)).advance()


def test_a_theta_that_is_not_finite_is_refused_before_training():
    with pytest.raises(ValueError, match="theta holds NaN or infinite values before any client"):
        FedAvg(torch.tensor([0.0, -math.inf]), quadratic, always([3]))


@pytest.mark.parametrize("loss", [torch.tensor(0.5), 0.5, [0.25, 0.75]])
def test_lists_do_for_a_cohort_and_a_number_for_losses(loss):
    everyone = Cohort([0, 1], [0, 1], [0.5, 0.5])
    train = gives(lambda theta, client: (theta + 1, loss))
    loop = FedAvg(torch.zeros(3), train, lambda round: everyone)
    (record,) = run(loop, 1)
    assert record["train_loss"] == 0.5 and loop.theta.tolist() == [1, 1, 1]


SECOND = torch.tensor([1])
UNUSABLE = {  # what is said of a client's result
    **{
        f"its update is {bad}": lambda theta, bad=bad: (theta.index_fill(0, SECOND, bad), ONE)
        for bad in (math.nan, math.inf, 1e5)
    },
    "local step 2: the loss is inf": lambda theta: (theta, torch.tensor([1.0, math.inf])),
    "it gives no loss": lambda theta: (theta, torch.zeros(0)),
    r"its result is \(3,\), and theta is \(5,\)": lambda theta: (theta[:3], ONE),
}


@pytest.mark.parametrize("said", UNUSABLE)
def test_a_result_that_is_unusable_names_round_and_client_and_moves_nothing(said):
    train = gives(lambda theta, k: UNUSABLE[said](theta) if k == 7 else (theta + 1, ONE))
    loop = federation(train=train, cohort=always(range(12)))
    with pytest.raises(ClientError, match=f"^round 1, client 7[:,] {said}"):
        run(loop, 1)
    assert not loop.theta.any()


@pytest.mark.parametrize("scaled", ["by weights", "by a factor"])
def test_changes_that_are_scaled_up_cannot_leave_the_fixed_point_range(scaled):
    train = gives(lambda theta, k: (torch.full_like(theta, 9000.0), ONE))  # below the limit of 2^14
    weights, factor = ([2.0] * 5, 1.0) if scaled == "by weights" else (None, 10.0)
    method = Method(factor=lambda theta_k, theta: factor, any_sum=True)
    loop = federation(train=train, cohort=always(range(5), weights), method=method)
    with pytest.raises(ClientError, match="beyond the fixed-point range"):
        loop.advance()


@pytest.mark.parametrize("count", [0, 3, 5])
def test_as_many_results_as_clients(count):
    def train(theta, clients, round):
        for _ in range(count):
            yield theta, torch.ones(1)

    said = f"round 1: train yields {'more' if count > 4 else 'fewer'} results than clients"
    with pytest.raises(ClientError, match=said):
        run(federation(train=train, cohort=always(range(4))), 1)


@pytest.mark.parametrize(("round", "place"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_a_model_that_trains_in_thetas_memory_is_refused(round, place):
    """Each client would start where the one before ended; a warm-up from zero hides it at first."""

    def train(theta, clients, t):
        for i, _ in enumerate(clients):
            theta.add_(1.0 if (t, i) >= (round, place) else 0.0)
            yield theta.clone(), torch.ones(1)

    loop = federation(train=train, cohort=always([0, 1, 2]))
    with pytest.raises(ClientError, match=rf"round {round}: train has changed .*theta\.clone\(\)"):
        run(loop, 3)


def test_a_theta_that_one_process_changes_is_noticed_by_all():
    def train(theta, clients, round):
        for client in clients:
            if client == 3:
                theta.add_(1.0)
            yield theta.clone(), torch.ones(1)

    def work(group):
        loop = federation(train=train, cohort=always(range(4)), group=group)
        with pytest.raises(ClientError, match="round 1: train has changed"):
            loop.advance()
        return True

    assert in_threads(2, work) == {0: True, 1: True}


def test_a_theta_that_is_changed_after_the_last_result_is_noticed():
    def train(theta, clients, round):
        yield from quadratic(theta, clients, round)
        theta.add_(1.0)

    with pytest.raises(ClientError, match="round 1: train has changed"):
        run(federation(train=train), 1)


def test_a_theta_of_nan_is_no_clients_change_of_it():
    class Bad(MeanServer):
        def step_(self, theta, change, unit):
            theta.fill_(math.nan)

    with pytest.raises(ClientError, match=r"round 2, client \d+, local step 1: the loss is nan"):
        run(federation(server=Bad()), 2)


def test_theta_may_be_a_parameter():
    loop = FedAvg(torch.nn.Parameter(torch.zeros(5)), quadratic, drawn)
    run(loop, 2)
    state = loop.state_dict()
    assert not state["theta"].requires_grad
    again = FedAvg(torch.nn.Parameter(torch.zeros(5)), quadratic, drawn)
    again.load_state_dict(reloaded(state))
    assert run(loop, 3) == run(again, 3) and torch.equal(loop.theta, again.theta)


def test_a_change_beyond_the_range_counts_after_its_factor():
    """A bound on the norm keeps one client from ending a private run."""

    def train(theta, clients, round):
        for _ in clients:
            yield theta + 1e6, torch.ones(1)

    method = Method(factor=lambda theta_k, theta: 1e-6)
    loop = federation(train=train, cohort=always([0, 1]), method=method)
    run(loop, 1)
    torch.testing.assert_close(loop.theta, torch.ones(5, dtype=torch.float64))
    with pytest.raises(ClientError, match="beyond the fixed-point range"):
        run(federation(train=train, cohort=always([0, 1])), 1)


def test_a_server_may_step_before_any_client_has_trained():
    """As that of private runs does, whose first rounds may draw nobody."""
    none, some = always([], weights=[]), always(range(4))
    moved = torch.full((1, 5), 2**47)
    method = Method(
        steps_empty=True,
        combine=lambda parts, cohort, t: add_up(parts if len(cohort.clients) else moved),
    )
    loop = federation(cohort=lambda t: (none if t < 3 else some)(t), method=method)
    run(loop, 4)
    assert loop.theta.isfinite().all()


@pytest.mark.parametrize("clients", [2, 12, 15])
def test_a_state_is_a_copy_that_its_own_loop_can_go_back_to(clients):
    """In a round, after it, and after a server with memory has stepped."""
    theta = torch.zeros(5, dtype=torch.float64)
    loop = FedAvg(theta, quadratic, always(range(4)), Server("fedavgm", theta, momentum=0.5))
    for _ in range(clients):
        loop.advance()
    state = loop.state_dict()
    ends = []
    for _ in range(2):
        run(loop, 6)
        ends.append(loop.theta.clone())
        loop.load_state_dict(state)
    assert torch.equal(*ends) and loop.round == clients // 4
