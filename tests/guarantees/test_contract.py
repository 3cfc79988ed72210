"""What every federated method, server rule and client term must do, by being in its table.

    no change     at its neutral setting, where it has one, it is FedAvg to the bit
    no order      the order of a round's clients changes nothing
    no number     1, 2 and 3 processes give the same bits and the same records
    no stop       neither does a save, and a fresh start, after any client
    bytes         a record counts what was sent
    frozen        entries outside of a mask keep their bits, and so does padding

A further entry of a table is run as it is. Two tests then ask what its neutral setting is, and how
it is typed.
"""

import functools
import importlib.util
import typing

import built
import numpy as np
import pytest
import torch
from conftest import SYNTHETIC_DATASET, in_threads
from loops import reloaded, run

import data
import editing
from federated.client_states import ClientTerms
from federated.cohort import Participation
from federated.methods import METHODS
from federated.privacy import Privacy
from federated.server import RULES
from training.learner import Learner

ROUNDS = 2  # of three clients: two of them at least are in both
TINY = (
    *("--clients", 4, "--fraction", 0.75, "--J", 2, "--batch-size", 4, "--rounds", ROUNDS),
    *("--lr", 0.02, "--threads", 1),
)
WHAT_TRAINS = {
    "all": (),
    "masked": ("--mask-rule", "random", "--sparsity", 0.7, "--head", "ridge", "--lr", 1e-4),
    "head": ("--train", "head", "--head", "ridge"),  # a round's clients at once
}
REFUSED = {("local_norm", "head")}


def typed(group: type, values: dict) -> dict[str, tuple]:
    """Return how each option of a group is typed: a switch, or with a value."""
    kinds = typing.get_type_hints(group)
    options = {}
    for name in group._fields:
        flag = f"--{name.replace('_', '-')}"
        options[name] = (flag,) if kinds[name] is bool else (flag, values.get(name, 0.6))
    return options


PARTICIPATION = typed(Participation, {})
PARTICIPATION.pop("fraction")  # which every case has
CASES = {
    **{name: ("--aggregate", name) for name in METHODS},
    **{name: ("--server", name) for name in RULES},
    **typed(ClientTerms, {"prox": 0.1}),
    **PARTICIPATION,
    "secure_aggregation": ("--secure-aggregation",),
    "privacy": ("--dp-noise", 1, "--dp-clip", 0.5, "--dp-seed", 0),
    "fednova, stragglers": ("--aggregate", "fednova", "--straggler-fraction", 0.7),
    "dare, secure": ("--aggregate", "dare", "--dare-drop", 0.5, "--secure-aggregation"),
    "scaffold, dropout": ("--scaffold", "--dropout", 0.6, "--server", "fedyogi"),
    "private, secure": (
        *("--dp-noise", 1, "--dp-clip", 0.5, "--dp-seed", 0),
        "--secure-aggregation",
    ),
}

EVERYONE = ("--fraction", 1)  # then all draws of equal shards are the same, and so are weights
DEGENERATE = {  # options that make it FedAvg, and what FedAvg has beside them; None: there are none
    "mean": ((), ()),
    "fednova": ((), ()),  # all take equal steps
    "ties": (("--ties-keep", 1, "--clients", 1), ("--clients", 1)),
    "dare": (("--dare-drop", 0), ()),
    "sign": (("--clients", 1), ("--clients", 1)),
    "fedavg": ((), ()),
    "fedavgm": (("--server-momentum", 0), ()),
    "fedadagrad": None,
    "fedadam": None,
    "fedyogi": None,
    "prox": (("--J", 1), ("--J", 1)),  # a first step is where it pulls to
    "scaffold": (("--rounds", 1), ("--rounds", 1)),  # all variates are zero
    "fedir": (("--clients", 1), ("--clients", 1)),  # whose classes are everyone's
    "local_norm": None,
    "fedvc": (EVERYONE, EVERYONE),
    "straggler_fraction": (("--straggler-fraction", 1e-12), ()),
    "dropout": (("--dropout", 1e-12), ()),
    "secure_aggregation": ((), ()),
    "privacy": None,  # with a seed of its noise; clipping alone has a test of its own
}
ROUNDED = {("fedir", "head"), ("straggler_fraction", "head")}  # head by head, as FedAvg is not
COMBINED = {"fednova, stragglers", "dare, secure", "scaffold, dropout", "private, secure"}

ALL = [(case, trains) for case in CASES for trains in WHAT_TRAINS if (case, trains) not in REFUSED]
every_case = pytest.mark.parametrize(("case", "trains"), ALL)


def needs_accountant(case: str) -> None:
    if "priva" in case and importlib.util.find_spec("dp_accounting") is None:
        pytest.skip("epsilon needs dp-accounting")


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """Build the loop of a case: loops(case, trains, *further options) -> (learner, loop)."""
    folders = {trains: tmp_path_factory.mktemp(trains) for trains in WHAT_TRAINS}
    small, threads = SYNTHETIC_DATASET(samples_per_class=10), torch.get_num_threads()

    def build(case, trains, *further):
        needs_accountant(case or "")
        options = (*TINY, *WHAT_TRAINS[trains], *(CASES[case] if case else ()), *further)
        return built.build_loop(folders[trains], *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthetic_dataset", lambda: small)
        patch.setattr(built, "parsed", functools.cache(built.parsed))
        yield build
    torch.set_num_threads(threads)


class Whole(typing.NamedTuple):
    """A loop that ran without anything in its way: what it came to, and from where."""

    outcome: tuple
    learner: Learner
    start: torch.Tensor  # of the flat view
    frozen: dict[str, torch.Tensor]  # the parameters outside of it, at the start


@pytest.fixture(scope="module")
def ran(loops):
    """Run a case, computed once: ran(case, trains, *further options) -> Whole."""

    def run_case(case, trains, *further):
        learner, loop = loops(case, trains, *further)
        parameters, shapes = learner.model.named_parameters(), learner.flat.shapes
        frozen = {name: p.clone() for name, p in parameters if name not in shapes}
        return Whole(
            learner=learner, start=learner.flat.theta.clone(), frozen=frozen, outcome=outcome(loop)
        )

    return functools.cache(run_case)


@pytest.fixture(scope="module")
def whole(ran):
    """What a case comes to without anything in its way: theta and records."""
    return lambda case, trains: ran(case, trains).outcome


def outcome(loop):
    """Run a loop to its end; return theta and the records."""
    records = run(loop, loop.train.rounds)
    return loop.theta.clone(), records


def assert_same(result, expected):
    assert result[1] == expected[1]
    assert torch.equal(result[0], expected[0])


def in_a_group(size, build, state=None, rounds=ROUNDS):
    """Advance a loop to a round in a group of threads; return rank 0's outcome and state."""
    pairs = [build() for _ in range(size)]

    def work(group):
        learner, loop = pairs[group.rank]
        learner.group = loop.group = group
        if state is not None:
            loop.load_state_dict(reloaded(state))
        records = run(loop, rounds)
        return (loop.theta.clone(), records), reloaded(loop.state_dict())

    results = in_threads(size, work)
    assert len(results) == size
    for other in results.values():
        assert_same(other[0], results[0][0])
    return results[0]


# ---------------------------------------------------------------------------- the tables


def test_every_case_says_how_it_becomes_fedavg_or_that_it_does_not():
    assert DEGENERATE.keys() == CASES.keys() - COMBINED
    assert {*METHODS, *RULES, *ClientTerms._fields} < CASES.keys()
    assert not {*METHODS} & {*RULES} and not {*METHODS, *RULES} & {*ClientTerms._fields}


def test_every_option_of_privacy_is_in_a_case():
    typed_somewhere = " ".join(str(part) for options in CASES.values() for part in options)
    for name in {*Privacy._fields} - {"dp_delta"}:  # which epsilon alone reads
        assert f"--{name.replace('_', '-')}" in typed_somewhere


@pytest.mark.parametrize("case", CASES)
def test_a_case_turns_on_what_it_is_named_after(case):
    needs_accountant(case)
    plain, chosen = (built.parsed("fedavg", *options).stored for options in ((), CASES[case]))
    assert (plain != chosen) == (case not in ("mean", "fedavg"))


# ---------------------------------------------------------------------------- no change


@pytest.mark.parametrize("trains", WHAT_TRAINS)
@pytest.mark.parametrize("case", [case for case, neutral in DEGENERATE.items() if neutral])
def test_at_its_neutral_setting_it_is_fedavg_to_the_bit(loops, ran, case, trains):
    neutral, plain = DEGENERATE[case]
    theta, records = outcome(loops(case, trains, *neutral)[1])
    expected, plain_records = ran(None, trains, *plain).outcome
    close = 1e-4 if (case, trains) in ROUNDED else 0
    torch.testing.assert_close(theta, expected, rtol=close, atol=close)
    losses, plain_losses = ([r["train_loss"] for r in x] for x in (records, plain_records))
    assert losses == pytest.approx(plain_losses, rel=close, abs=0)


@pytest.mark.parametrize("trains", WHAT_TRAINS)
def test_clipping_alone_at_a_wide_bound_is_fedavg_to_the_bit(loops, ran, trains):
    wide = ("--dp-noise", 0, "--dp-clip", 1e9, *EVERYONE)
    expected = ran(None, trains, *EVERYONE).outcome[0]
    assert torch.equal(outcome(loops(None, trains, *wide)[1])[0], expected)


@every_case
def test_elsewhere_it_is_not(whole, case, trains):
    same = case in ("mean", "fedavg", "fednova", "secure_aggregation")
    assert torch.equal(whole(case, trains)[0], whole("mean", trains)[0]) == same


# ---------------------------------------------------------------------------- no order


@every_case
def test_the_order_of_clients_changes_no_bit(loops, whole, case, trains):
    _, loop = loops(case, trains)
    drawn = loop.cohort

    def turned(round):
        cohort = drawn(round)
        order = np.roll(np.arange(len(cohort.clients))[::-1], round)
        return cohort._replace(clients=cohort.clients[order], weights=cohort.weights[order])

    loop.cohort = turned
    assert_same(in_order(outcome(loop)), in_order(whole(case, trains)))


def in_order(result):
    theta, records = result
    ordered = [{"clients": sorted(r["clients"])} if "clients" in r else {} for r in records]
    return theta, [record | other for record, other in zip(records, ordered, strict=True)]


def answered(record):
    """Return how many clients took part; private records name none."""
    return record["answered"] if "answered" in record else len(record["clients"])


# ---------------------------------------------------------------------------- no number, no stop


@every_case
def test_two_processes_change_no_bit(loops, whole, case, trains):
    result, _ = in_a_group(2, lambda: loops(case, trains))
    assert_same(result, whole(case, trains))


@every_case
def test_a_stop_after_every_client_changes_no_bit(loops, whole, case, trains):
    (_, loop), records, stops = loops(case, trains), [], 0
    while loop.round < ROUNDS:
        if (record := loop.advance()) is not None:
            records.append(record | {"seconds": 0})
        state, stops = reloaded(loop.state_dict()), stops + 1
        _, loop = loops(case, trains)
        loop.load_state_dict(state)
    assert_same((loop.theta, records), whole(case, trains))
    private = "--dp-clip" in CASES[case]  # whose rounds are saved at their end alone
    assert stops == sum(1 if private else max(1, answered(record)) for record in records)


@every_case
def test_a_round_in_hand_goes_on_in_two_processes_then_in_three(loops, whole, case, trains):
    theta, records = whole(case, trains)
    _, loop = loops(case, trains)
    for _ in range(2 if len(records[0].get("clients", ())) > 2 else 1):  # clients
        loop.advance()
    (_, first), state = in_a_group(2, lambda: loops(case, trains), loop.state_dict(), rounds=1)
    (result, then), _ = in_a_group(3, lambda: loops(case, trains), state)
    first = first or records[:1]  # where the round had ended
    assert_same((result, first + then), (theta, records))


# ---------------------------------------------------------------------------- bytes, frozen


def shared(learner, options) -> torch.Tensor:
    """Return which entries are sent: neither padding nor what stays with each client."""
    flat, index = learner.flat, learner.entries.index
    marked = flat.marked(n for n in flat.shapes if "--local-norm" not in options or "norm" not in n)
    return marked if index is None else marked[index]


@every_case
def test_a_record_counts_the_bytes_that_were_sent(loops, whole, case, trains):
    (learner, _), options = loops(case, trains), CASES[case]
    entries, stored = shared(learner, options), built.parsed("fedavg", *options).stored
    vectors = 2 if "--scaffold" in options else 1  # a variate each way
    wide = 8 if "--secure-aggregation" in options else 4
    for record in whole(case, trains)[1]:
        sent = answered(record) * int(entries.sum())
        if "dare" in options and wide == 4:
            for client in record["clients"]:
                drop, at = stored["dare_drop"], dict(round=record["round"], client=client)
                stays = editing.drop_(torch.ones(len(entries)), drop, **at)
                sent -= int((entries & ~stays).sum())
        reached = answered(record) + len(record.get("dropped_out", ()))
        assert record["bytes_up"] == wide * vectors * sent
        assert record["bytes_down"] == 4 * vectors * reached * int(entries.sum())


@every_case
def test_what_does_not_train_keeps_its_bits(ran, case, trains):
    (theta, _), learner, start, frozen = ran(case, trains)
    flat, index = learner.flat, learner.entries.index
    parameters = dict(learner.model.named_parameters())
    learner.entries.load(theta)
    stays = ~flat.marked()
    assert torch.equal(flat.theta[stays], torch.zeros(int(stays.sum())))
    if index is not None:
        stays = torch.ones_like(stays).index_fill(0, index, False)
    assert torch.equal(flat.theta[stays], start[stays])
    assert (flat.theta != start).sum() > 0.2 * learner.entries.size
    for name, value in frozen.items():
        assert torch.equal(parameters[name], value), name
