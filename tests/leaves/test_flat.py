"""Parameters and gradients are views of two vectors; the norm that bounds a gradient is torch's."""

import copy
import math

import numpy as np
import pytest
import torch
from built import build
from test_model import randomise

import flat as flat_file
from fedavg import Cohort, FedAvg
from flat import Entries, FlatView, Sgd, clip_divisor
from model import build_vit

# ---------------------------------------------------------------------------- the view


def test_parameters_and_gradients_are_views_of_two_vectors():
    model, plain = (randomise(build_vit("vit_demo", 5)) for _ in range(2))
    flat = FlatView(model.named_parameters())
    images = torch.randn(2, 3, 32, 32)
    model(images).square().sum().backward()
    plain(images).square().sum().backward()
    for name, p in plain.named_parameters():
        assert torch.equal(flat.view(flat.theta, name), p)
        assert torch.equal(flat.view(flat.grad, name), p.grad)
    assert all(offset % 64 == 0 for offset in flat.offsets.values())
    assert flat.size == sum(p.numel() for p in plain.parameters()) < flat.theta.numel()
    padding = torch.ones_like(flat.theta)
    for name in flat.shapes:
        flat.view(padding, name).zero_()
    assert padding.sum() == flat.theta.numel() - flat.size
    assert not flat.theta[padding.bool()].any() and not flat.grad[padding.bool()].any()
    flat.theta.zero_()
    assert not model(images).any()


def test_a_view_of_a_stack_keeps_the_leading_axis():
    flat = FlatView(torch.nn.Linear(5, 3).named_parameters())
    stack = torch.randn(4, flat.theta.numel())
    assert flat.view(stack, "weight").shape == (4, 3, 5)
    assert torch.equal(flat.view(stack, "bias")[2], flat.view(stack[2], "bias"))


def test_other_precisions():
    model = randomise(build_vit("vit_demo", 5))
    names = dict(model.named_parameters())
    exact = {name: p.detach().clone() for name, p in names.items()}
    flat = FlatView([(n, p) for n, p in names.items() if n.startswith("blocks.1.")],
                    compute_dtype=torch.bfloat16)  # fmt: skip
    assert flat.theta.dtype == torch.float32 and flat.grad.dtype == torch.bfloat16
    assert names["blocks.1.mlp.fc1.weight"].dtype == torch.bfloat16
    assert names["blocks.0.mlp.fc1.weight"].dtype == torch.float32
    view = flat.view(flat.theta, "blocks.1.mlp.fc1.weight")
    assert torch.equal(view, exact["blocks.1.mlp.fc1.weight"])
    flat.reset(torch.full_like(flat.theta, 1 / 3))
    assert torch.equal(flat.compute, flat.theta.bfloat16())
    assert (names["blocks.1.attn.proj.bias"] == torch.tensor(1 / 3).bfloat16()).all()
    double = FlatView(build_vit("vit_demo", 5).named_parameters(), dtype=torch.float64)
    assert double.theta.dtype == double.grad.dtype == torch.float64
    with pytest.raises(ValueError, match="at least one parameter"):
        FlatView([])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_filled_gradient_is_that_of_backward_and_zero_where_the_loss_does_not_reach(dtype):
    model = build_vit("vit_demo", 10, seed=0)
    flat = FlatView(model.named_parameters(), compute_dtype=dtype)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        model.head.weight.fill_(0.1)
    model(images).square().sum().backward()
    once = flat.grad.clone()
    flat.fill_grad(model(images).square().sum())
    assert once.any() and torch.equal(flat.grad, once)
    flat.fill_grad(model(images).square().sum(), add=True)
    assert torch.equal(flat.grad, 2 * once)
    flat.fill_grad(model.features(images).sum())
    assert not flat.view(flat.grad, "head.weight").any() and flat.grad.any()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_a_parameter_of_any_shape_has_its_view(shape):
    value = torch.nn.Parameter(torch.full(shape, 2.0))
    flat = FlatView({"scale": value, "rest": torch.nn.Parameter(torch.ones(3))}.items())
    assert value.shape == shape and flat.size == 3 + value.numel()
    assert flat.view(torch.zeros(4, len(flat.theta)), "scale").shape == (4, *shape)
    flat.theta.zero_()
    assert not value.any()


# ---------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("reaches", [True, False])
def test_gradients_that_left_the_view_come_back_at_the_step(reaches):
    models = [randomise(build_vit("vit_demo", 5)) for _ in range(2)]
    flat = FlatView(models[0].named_parameters())
    entries = Entries(flat, None, Sgd(lr=0.1, momentum=0.0))
    plain = torch.optim.SGD(models[1].parameters(), lr=0.1)
    for _ in range(2):
        for model in models:
            model.zero_grad()
            logits = model(torch.ones(2, 3, 32, 32))
            (logits if reaches else model.head.weight).square().sum().backward()
        entries.step(lr=0.1)
        plain.step()
        for name, p in models[1].named_parameters():
            assert torch.equal(flat.view(flat.theta, name), p)


@pytest.mark.parametrize("filled", [True, False])
def test_a_sparse_gradient_is_made_dense(filled):
    model = torch.nn.Embedding(9, 4, sparse=True)
    flat = FlatView(model)
    entries = Entries(flat, None, Sgd(lr=1.0, momentum=0.0))
    before = model.weight.detach().clone()
    loss = model(torch.tensor([1, 2, 2])).sum()
    if filled:
        flat.fill_grad(loss)
    else:
        model.zero_grad()
        loss.backward()
    entries.step(lr=1.0)
    torch.testing.assert_close(
        before - model.weight, torch.eye(9)[:, [1, 2, 2]].sum(1, True).expand(9, 4)
    )


def test_what_no_view_can_hold_is_refused_and_constants_stay_the_models():
    model = torch.nn.Linear(4, 3)
    flat = FlatView(model)
    for mask in (torch.ones(15, dtype=torch.bool), torch.ones_like(flat.theta)):
        with pytest.raises(ValueError, match=r"a mask must be \(128,\) bool in the view's layout"):
            Entries(flat, mask, Sgd())
    with pytest.raises(ValueError, match="c is torch.complex64"):
        FlatView({"c": torch.nn.Parameter(torch.tensor([1 + 2j]))}.items())
    model.register_buffer("causal", torch.full((2, 2), -math.inf).triu(1))
    assert set(FlatView(model).shapes) == {"weight", "bias"}


def with_statistics(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Conv2d(2, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(20, 3))


STATISTICS = ["1.running_mean", "1.running_var"]


def test_a_module_brings_its_buffers_and_pairs_do_not():
    model, bare = with_statistics(), with_statistics()
    flat, pairs = FlatView(model), FlatView(bare.named_parameters())
    assert list(flat.shapes) == [*pairs.shapes, *STATISTICS]
    assert flat.size == pairs.size + 10 and pairs.buffers is None
    assert torch.equal(flat.theta[: len(pairs.theta)], pairs.theta)
    x = torch.randn(8, 2, 4, 4)
    assert torch.equal(model(x), bare(x))
    for name in STATISTICS:
        assert torch.equal(flat.view(flat.theta, name), bare.state_dict()[name])
        assert torch.equal(flat.view(flat.buffers, name), torch.ones(5, dtype=torch.bool))
    assert flat.buffers.sum() == 10 and model[1].num_batches_tracked == 1
    flat.reset(torch.zeros_like(flat.theta))
    assert not model[1].running_var.any() and bare[1].running_var.any()
    with pytest.raises(ValueError, match="1.running_mean is a buffer: it needs a compute_dtype of"):
        FlatView(with_statistics(), compute_dtype=torch.bfloat16)
    no_buffers = FlatView(build_vit("vit_demo", 5), compute_dtype=torch.bfloat16)
    assert no_buffers.buffers is None


@pytest.mark.parametrize("masked", [False, True])
def test_a_round_averages_running_statistics_and_no_step_touches_them(masked):
    model = with_statistics()
    flat = FlatView(model)
    mask = flat.marked(["0.weight", "3.bias"]) if masked else None
    sgd = Sgd(momentum=0.9, weight_decay=0.1, clip_norm=1.0)
    entries = Entries(flat, mask, sgd, prox=0.5)
    assert not entries.compact and entries.size == (90 + 3 + 10 if masked else flat.size)
    x, y = torch.randn(3, 2, 6, 2, 4, 4), torch.randint(3, (3, 2, 6))
    alone = []  # each client's statistics, by its own copy of the model

    def train(theta, clients, round):
        for k in clients:
            entries.load(theta)
            entries.pull_to(theta)
            plain = with_statistics()
            plain.load_state_dict(model.state_dict())
            for j in range(2):
                plain(x[k, j])
                flat.fill_grad(torch.nn.functional.cross_entropy(model(x[k, j]), y[k, j]))
                entries.step(0.1, first=j == 0)
                with torch.no_grad():
                    for p, stepped in zip(plain.parameters(), model.parameters(), strict=True):
                        p.copy_(stepped)
            alone.append({name: plain.state_dict()[name].clone() for name in STATISTICS})
            yield entries.gather(), torch.zeros(1)

    weights = np.array([10, 20, 30]) / 60
    cohort = Cohort(np.arange(3), np.arange(3), weights)
    federation = FedAvg(entries.theta.clone(), train, cohort=lambda round: cohort)
    start = flat.theta.clone()
    while federation.advance() is None:
        pass
    entries.load(federation.theta)
    for name in STATISTICS:
        mean = sum(w * client[name].double() for w, client in zip(weights, alone, strict=True))
        torch.testing.assert_close(flat.view(flat.theta, name).double(), mean, rtol=1e-6, atol=1e-7)
        assert not torch.equal(alone[0][name], alone[1][name])
    moved = (flat.theta != start) & ~flat.buffers
    assert torch.equal(moved, moved & mask) if masked else moved.sum() > 100
    assert model[1].num_batches_tracked == 6


# ---------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("size", [1, 1023, 262_144, 262_145, 700_001])
@pytest.mark.parametrize("bound", [0.5, 1e-3, 1e4])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**14, torch.tensor(2.0**14)], ids=str)
def test_the_divisor_clips_as_torch_does(size, bound, loss_scale):
    grad = torch.randn(size, generator=torch.Generator().manual_seed(size))
    weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    weight.grad = grad.double()
    norm = torch.nn.utils.clip_grad_norm_([weight], bound).item()
    divisor = clip_divisor(grad * loss_scale, bound, loss_scale)
    assert divisor.dtype == torch.float32
    torch.testing.assert_close(grad * loss_scale / divisor, weight.grad.float(), rtol=3e-7, atol=0)
    assert (divisor.item() == float(loss_scale)) == (norm <= bound)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    grad = torch.ones(5)
    grad[2] = bad
    assert not torch.isfinite(grad / clip_divisor(grad, 1.0)).all()


@pytest.mark.parametrize("compact", [True, False])
def test_under_a_mask_the_norm_is_of_what_trains(small_data, compact):
    mask = ("--head", "ridge", "--mask-rule", "random", "--sparsity", "0.9" if compact else "0.2")
    plain = "--mask-lr raw --momentum 0 --lr 1 --clip-norm 0.01 --precision fp32".split()
    learner, clients = build(small_data, *mask, *plain, "--J", "1")
    entries = learner.entries
    assert entries.compact == compact
    start = entries.theta.clone()
    clients.train_client(start, 4, round=1)
    grad = learner.flat.grad
    assert grad[entries.index].norm() > 0.01 and grad.norm() > 1.05 * grad[entries.index].norm()
    # a step of lr 1; the differences of fp32 parameters round to 2^-24 of their size
    assert (start - entries.theta).double().norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("prox", "corrected"), [(0.0, False), (0.1, True)])
def test_the_compact_step_has_the_bits_of_the_masked_one(monkeypatch, momentum, prox, corrected):
    def walk(below):
        monkeypatch.setattr(flat_file, "COMPACT_BELOW", below)
        generator = torch.Generator().manual_seed(0)
        model = randomise(build_vit("vit_demo", 5))
        flat = FlatView(model.named_parameters())
        start = flat.theta.clone()
        mask = torch.rand(start.shape, generator=generator).lt(0.3) & flat.marked()
        sgd = Sgd(momentum=momentum, weight_decay=0.01, clip_norm=0.5)
        entries = Entries(flat, mask, sgd, prox=prox, corrected=corrected)
        assert entries.compact == (below == 1) and entries.size == mask.sum()
        if corrected:
            entries.correct(torch.randn(entries.size, generator=generator))
        if prox:
            entries.pull_to(entries.theta + 0.01)
        for j in range(3):
            flat.grad.copy_(torch.randn(start.shape, generator=generator))
            entries.step(0.1, first=j == 0, grad_scale=4.0)
        theta = entries.gather().clone()
        assert torch.equal(flat.theta[mask], theta) and (theta != start[mask]).all()
        assert torch.equal(flat.theta[~mask], start[~mask])
        entries.load(start[mask])
        assert torch.equal(flat.theta, start)
        return theta, entries.momentum

    compact, masked = walk(1), walk(0)
    assert torch.equal(compact[0], masked[0])
    assert compact[1] is masked[1] is None or torch.equal(compact[1], masked[1])


@pytest.mark.parametrize(
    "lose",
    [
        lambda model, flat: model.double(),
        lambda model, flat: torch.nn.utils.vector_to_parameters(torch.zeros(8), model.parameters()),
    ],
    ids=["cast", "from a vector"],
)
def test_a_view_that_has_lost_its_model_says_so_before_a_step(lose):
    model = torch.nn.Linear(3, 2)
    flat = FlatView(model.named_parameters())
    entries = Entries(flat, None, Sgd(momentum=0.0))
    entries.step(0.1)
    lose(model, flat)
    for use in (lambda: entries.step(0.1), lambda: flat.reset(flat.theta), entries.scatter):
        with pytest.raises(ValueError, match="weight no longer lies in the flat view"):
            use()


class Centring(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()  # another tensor, not in place
        return self.linear(x - self.mean)


def test_a_view_of_a_module_sees_what_the_module_has_replaced():
    model = torch.nn.Linear(3, 2)
    flat = FlatView(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="weight no longer lies"):
        flat.reset(torch.ones_like(flat.theta))
    model = Centring()
    flat = FlatView(model)
    flat.reset(torch.ones_like(flat.theta))
    with pytest.raises(ValueError, match="mean no longer lies"):
        flat.fill_grad(model(torch.ones(4, 2)).sum())


@pytest.mark.parametrize("density", [0.5, 0.9])
def test_weights_that_were_loaded_since_stay(density):
    model = torch.nn.Linear(50, 40)
    flat = FlatView(model)
    mask = flat.marked() & (torch.rand(flat.theta.shape) < density)
    entries = Entries(flat, mask, Sgd(momentum=0.9))
    model.load_state_dict({name: torch.full_like(p, 7.0) for name, p in model.named_parameters()})
    assert (entries.gather() == 7).all()
    flat.reset(torch.full_like(flat.theta, 5.0))
    flat.fill_grad(model(torch.ones(1, 50)).sum())
    entries.step(lr=0.0, first=True)
    assert (model.weight == 5).all() and (model.bias == 5).all()


def test_parameters_in_the_same_memory_are_refused():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    second.weight.data = first.weight.data
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight share memory"):
        FlatView(torch.nn.Sequential(first, second))


def test_a_loss_of_other_parameters_says_so():
    model = torch.nn.Linear(3, 2)
    flat = FlatView(model.named_parameters())
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match="depends on none of the flat view's parameters"):
        flat.fill_grad(model(torch.ones(2, 3)).sum())


def test_a_copy_of_model_and_view_says_that_it_is_none():
    model = torch.nn.Linear(3, 2)
    _, flat = copy.deepcopy((model, FlatView(model.named_parameters())))
    with pytest.raises(ValueError, match="a deep copy"):
        flat.recover_grad()


def test_every_parameter_has_one_name_and_every_name_one_parameter():
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    pairs = [*first.named_parameters(), *second.named_parameters()]
    with pytest.raises(ValueError, match="two parameters are called weight"):
        FlatView(pairs)
    tied = torch.nn.Sequential(first, torch.nn.Tanh(), first)
    with pytest.raises(ValueError, match=r"0\.weight and 2\.weight are one parameter"):
        FlatView(tied.named_parameters(remove_duplicate=False))
    assert FlatView(tied.named_parameters()).size == 20
