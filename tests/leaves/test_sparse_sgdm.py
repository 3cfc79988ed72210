"""Masked momentum SGD: torch's where nothing is masked, nothing at all where something is."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from kernels import DEVICE, HAS_TRITON, INSTALLED, built_elsewhere, needs_triton
from torch import nn

import sparse_sgdm
from sparse_sgdm import SparseSGDM, sparse_sgdm_, sparse_sgdm_reference_

VALID = [
    dict(momentum=m, dampening=d, weight_decay=w, nesterov=n)
    for m, d, w, n in itertools.product([0.0, 0.9], [0.0, 0.3], [0.0, 0.01], [False, True])
    if not n or (m > 0 and d == 0)
]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (1,), (3, 2, 4), (11,)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params[:-1]:  # the last one never has a gradient
        p.grad = torch.randn(p.shape, generator=generator) + p.detach()


def random_masks(params, seed=9, density=0.4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(p.shape, generator=generator) < density for p in params]


def assert_equal_states(mine, theirs):
    """Compare two optimisers to the bit: parameters, momentum and every option that both have."""
    for group, other in zip(mine.param_groups, theirs.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
            buffers = [
                o.state.get(x, {}).get("momentum_buffer") for o, x in ((mine, p), (theirs, q))
            ]
            assert buffers[0] is None and buffers[1] is None or torch.equal(*buffers)
        shared = (group.keys() & other.keys()) - {"params", "masks"}
        assert {k: group[k] for k in shared} == {k: other[k] for k in shared}


def step_both(optimisers, steps=range(3)):
    """Give two optimisers the same gradients; no gradient for their last parameter."""
    for step in steps:
        for optimiser in optimisers:
            set_gradients([p for group in optimiser.param_groups for p in group["params"]], step)
            optimiser.step()


def moved(optimiser, step=7):
    """Return which entries the next step moves, for each parameter that has a gradient."""
    params = [p for group in optimiser.param_groups for p in group["params"]]
    start = [p.detach().clone() for p in params]
    set_gradients(params, step)
    optimiser.step()
    return [p != before for p, before in zip(params, start, strict=True)][:-1]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("options", VALID, ids=str)
def test_without_a_mask_it_steps_in_lockstep_with_torch(options, maximize):
    optimisers = [
        c(parameters(), 0.05, maximize=maximize, **options) for c in (SparseSGDM, torch.optim.SGD)
    ]
    for step in range(20):
        step_both(optimisers, [step])
        assert_equal_states(*optimisers)


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("options", VALID, ids=str)
def test_frozen_entries_keep_their_bits_and_the_others_do_not_notice(options, density):
    mine, free = parameters(), parameters()
    masks = random_masks(mine, density=density)
    start = [p.detach().clone() for p in mine]
    masked = SparseSGDM(mine, lr=0.05, masks=masks, **options)
    unmasked = SparseSGDM(free, lr=0.05, **options)
    for step in range(5):
        set_gradients(mine, step), set_gradients(free, step)
        for p, mask in zip(mine[:-1], masks, strict=False):
            p.grad[~mask] = [math.nan, math.inf, -math.inf][step % 3]
        masked.step(), unmasked.step()
    for p, q, before, mask in zip(mine, free, start, masks, strict=True):
        assert torch.equal(p[~mask], before[~mask]) and torch.equal(p[mask], q[mask])
        if "momentum_buffer" in masked.state[p]:
            assert not masked.state[p]["momentum_buffer"][~mask].any()


def test_parameter_groups_and_a_saved_state_go_on_identically():
    def build(params):
        groups = [{"params": params[:2], "lr": 0.3}, {"params": params[2:], "momentum": 0.0}]
        return SparseSGDM(groups, lr=0.1, momentum=0.9, masks=[None] * 4)

    optimiser = build(mine := parameters())
    step_both([optimiser], range(2))
    resumed = build([nn.Parameter(p.detach().clone()) for p in mine])
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    step_both([optimiser, resumed], [2])
    assert_equal_states(optimiser, resumed)


@pytest.mark.parametrize(
    "options",
    [dict(lr=-1.0), dict(momentum=-0.1), dict(weight_decay=-1.0), dict(lr=math.nan),
     dict(nesterov=True), dict(nesterov=True, momentum=0.9, dampening=0.1)],
    ids=str,
)  # fmt: skip
def test_invalid_options_are_refused(options):
    with pytest.raises(ValueError, match=r"must not be negative|nesterov needs"):
        SparseSGDM(parameters(), **{"lr": 0.1} | options)


BACKENDS = ["reference", "triton"] if HAS_TRITON else ["reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_of_another_shape_layout_or_type_are_refused_by_name(backend):
    theta, wide = torch.zeros(4, device=DEVICE), torch.zeros(4, 2, device=DEVICE)
    operands = dict(grad=theta, momentum_buffer=None, mask=None, compute_copy=None)
    for name, wrong, said in [
        ("grad", wide[:, 0], "grad must be a contiguous vector"),
        ("momentum_buffer", theta[:3], r"momentum_buffer must be .* \(4,\), not \(3,\)"),
        ("mask", theta, "mask must be bool, not torch.float32"),
        ("compute_copy", wide, "compute_copy must be a contiguous vector"),
    ]:
        with pytest.raises(ValueError, match=said):
            sparse_sgdm_(theta, **operands | {name: wrong}, lr=1.0, backend=backend)


def loaded(thing, weights_only):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: loaded(x, False)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_masks_as_the_original_does(duplicate):
    params = parameters()
    optimiser = SparseSGDM(params, 0.1, 0.9, masks=random_masks(params))
    step_both([optimiser])
    twins = duplicate((params, optimiser))
    assert twins[1].param_groups[0]["params"][0] is twins[0][0] and twins[0][0] is not params[0]
    step_both([optimiser, twins[1]], range(3, 6))
    assert_equal_states(optimiser, twins[1])
    assert all(map(torch.equal, twins[1].masks.values(), random_masks(params)))
    assert all(map(torch.equal, moved(twins[1]), random_masks(params)))


@pytest.mark.parametrize("with_masks", [False, True])
def test_a_fresh_optimiser_takes_the_masks_from_a_state_dict(with_masks):
    params, masks = parameters(), [None, *random_masks(parameters())[1:]]
    optimiser = SparseSGDM(params, 0.1, 0.9, masks=masks)
    step_both([optimiser])
    other = [nn.Parameter(p.detach().clone()) for p in params]
    fresh = SparseSGDM(other, 1.0, masks=random_masks(other, seed=10) if with_masks else None)
    fresh.load_state_dict(loaded(optimiser.state_dict(), weights_only=True))
    expected = random_masks(other, seed=10)[0] if with_masks else torch.ones(7, 5, dtype=torch.bool)
    assert len(fresh.masks) == 3 + with_masks
    assert all(map(torch.equal, moved(fresh), [expected, *masks[1:]]))


def test_a_state_dict_goes_through_torchs_sgd_and_back():
    params, masks = parameters(), random_masks(parameters())
    mine = SparseSGDM(params, 0.1, 0.9, weight_decay=0.01, masks=masks)
    step_both([mine])
    other = [nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.SGD(other, lr=1.0)
    theirs.load_state_dict(loaded(mine.state_dict(), weights_only=True))
    assert_equal_states(mine, theirs)
    back = SparseSGDM(other, lr=2.0)
    back.load_state_dict(loaded(theirs.state_dict(), weights_only=True))
    step_both([mine, back], range(3, 6))
    assert_equal_states(mine, back)
    assert all(map(torch.equal, moved(theirs), [torch.ones_like(m) for m in masks]))


def test_torchs_state_dict_leaves_the_masks_and_brings_its_momentum():
    theirs = torch.optim.SGD(parameters(), 0.1, 0.9, nesterov=True)
    step_both([theirs])
    mine = SparseSGDM(parameters(), 1.0, masks=random_masks(parameters()))
    step_both([mine])  # its parameters differ
    for p, q in zip(mine.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    mine.load_state_dict(loaded(theirs.state_dict(), weights_only=True))
    assert_equal_states(mine, theirs)
    frozen = [p.detach()[~mask].clone() for p, mask in mine.masks.items()]
    step_both([mine, theirs], range(3, 6))
    pairs = zip(mine.masks.items(), theirs.param_groups[0]["params"], frozen, strict=True)
    for (p, mask), q, before in pairs:
        assert torch.equal(p[mask], q[mask]) and torch.equal(p[~mask], before)


def test_a_state_dict_that_does_not_fit_changes_nothing():
    def named(names):
        return list(zip(names, (nn.Parameter(torch.ones(2)) for _ in names), strict=True))

    mask = torch.tensor([True, False])
    fresh = SparseSGDM(named("ab"), 0.5, masks={"a": None, "b": mask})
    before = copy.deepcopy(fresh.state_dict())
    good = SparseSGDM(named("ab"), 0.1, masks={"a": mask, "b": None}).state_dict()
    for masks, names, sentence in [
        ([mask], "ab", "1 masks for 2 parameters"),
        ([None, torch.ones(3, dtype=torch.bool)], "ab", r"mask b must be .* shape \(2,\), not .*3"),
        ([torch.ones(2), None], "ab", "mask a must be a bool tensor .* not torch.float32"),
        ([[True, False], None], "ab", "mask a must be a bool tensor .* not <class 'list'>"),
        ([mask, None], "ba", "parameters in another order: .'b', 'a'"),
    ]:
        state = copy.deepcopy(good)
        state["param_groups"][0] |= dict(masks=masks, param_names=list(names))
        with pytest.raises(ValueError, match=sentence):
            fresh.load_state_dict(state)
        assert str(fresh.state_dict()) == str(before)


def test_masks_that_do_not_fit_are_refused():
    params = parameters()
    for masks, said in [
        ([None], "1 masks for 4 parameters"),
        ([None, torch.ones(2) > 0, None, None], r"mask 1 must be a bool tensor of shape \(1,\)"),
        ([torch.ones(7, 5), None, None, None], "mask 0 .* not torch.float32"),
        ([None, None, True, None], r"mask 2 .* shape \(3, 2, 4\), not <class 'bool'>"),
    ]:
        with pytest.raises(ValueError, match=said):
            SparseSGDM(params, lr=0.1, masks=masks)
    optimiser = SparseSGDM(params, lr=0.1)
    optimiser.param_groups[0]["masks"] = [None]
    with pytest.raises(ValueError, match="1 masks for 4 parameters"):
        optimiser.step()


def test_masks_by_name_find_their_parameters():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    masks = {"1.weight": torch.zeros(4, 4, dtype=torch.bool), "0.weight": None}
    optimiser = SparseSGDM(model.named_parameters(), lr=0.1, masks=masks)
    assert list(optimiser.masks) == [model[1].weight]
    groups = [{"params": [pair]} for pair in model.named_parameters()]
    groups[0]["masks"] = {"0.weight": torch.eye(4) > 0}
    assert list(SparseSGDM(groups, lr=0.1).masks) == [model[0].weight]
    groups = [{"params": [pair]} for pair in reversed(list(model.named_parameters()))]
    assert list(SparseSGDM(groups, lr=0.1, masks=masks).masks) == [model[1].weight]
    by_place = SparseSGDM(model.parameters(), lr=0.1, masks=masks.values())
    assert list(by_place.masks) == [model[0].weight]


def test_masks_by_name_that_do_not_match_are_refused():
    model, mask = nn.Linear(4, 1), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
        SparseSGDM(model.parameters(), lr=0.1, masks={"weight": mask, "bias": None})
    lacking = r"parameters without a mask \(None trains all of one\): bias"
    for masks, said in [({"weight": mask}, lacking), ({"weigt": mask}, "masks of no .*: weigt")]:
        with pytest.raises(ValueError, match=said):
            SparseSGDM(model.named_parameters(), lr=0.1, masks=masks)
    with pytest.raises(ValueError, match=r"mask weight must be .* shape \(1, 4\), not .* \(4, 1\)"):
        SparseSGDM(model.named_parameters(), lr=0.1, masks={"weight": mask.T, "bias": None})
    twice = [("w", nn.Parameter(torch.ones(1, 4))), ("w", nn.Parameter(torch.ones(1, 4)))]
    with pytest.raises(ValueError, match="several parameters of one name: w"):
        SparseSGDM(twice, lr=0.1, masks={"w": mask})
    groups = [{"params": model.parameters(), "masks": [mask, None]}]
    with pytest.raises(ValueError, match="given twice"):
        SparseSGDM(groups, lr=0.1, masks=[mask, None])


def test_groups_with_options_of_their_own_step_in_lockstep_with_torch():
    def groups(params):
        return [
            {"params": params[:1], "lr": 0.3, "weight_decay": 0.1},
            {"params": params[1:2], "momentum": 0.0},  # under nesterov
            {"params": params[2:], "nesterov": False, "dampening": 0.5, "maximize": True},
        ]

    options = dict(lr=0.1, momentum=0.9, nesterov=True)
    optimisers = [c(groups(parameters()), **options) for c in (SparseSGDM, torch.optim.SGD)]
    step_both(optimisers)
    assert_equal_states(*optimisers)
    assert len(optimisers[0].state) == len(optimisers[1].state) == 2


def test_a_group_added_later_is_masked_or_dense_and_a_refused_one_is_not_there():
    params = parameters()
    masks = random_masks(params)
    optimiser = SparseSGDM(params[:1], 0.1, 0.9, masks=masks[:1])
    optimiser.add_param_group({"params": params[1], "lr": 0.2})
    with pytest.raises(ValueError, match="1 masks for 2 parameters"):
        optimiser.add_param_group({"params": params[2:], "masks": [None]})
    optimiser.add_param_group({"params": params[2:], "masks": masks[2:]})
    assert len(optimiser.param_groups) == 3 and optimiser.param_groups[1]["lr"] == 0.2
    expected = [masks[0], torch.ones(1, dtype=torch.bool), masks[2]]
    assert all(map(torch.equal, moved(optimiser), expected))


LAYOUTS = {
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 7).T,
    "sliced": lambda: torch.randn(6, 8)[::2, 1::3],
    "strided": lambda: torch.randn(20)[::2],
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "bfloat16": lambda: torch.randn(3, 4).bfloat16(),
    "float64": lambda: torch.randn(3, 4).double().T,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_steps_to_the_same_bits_and_state_as_torchs(layout, masked):
    mine, theirs, values = (nn.Parameter(LAYOUTS[layout]()) for _ in range(3))
    mine.data.copy_(values.data), theirs.data.copy_(values.data)
    mask = torch.rand(values.shape) < 0.5 if masked else torch.ones(values.shape, dtype=torch.bool)
    masks = [mask] if masked else None
    options = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
    optimisers = SparseSGDM([mine], masks=masks, **options), torch.optim.SGD([theirs], **options)
    for step in range(4):
        grad = torch.randn(values.shape).to(values.dtype)
        for p, optimiser in zip((mine, theirs), optimisers, strict=True):
            # as autograd lays it out; in the last step as nobody does
            p.grad = torch.empty_like(p).copy_(grad) if step < 3 else grad.clone()
            optimiser.step()
    buffers = [
        o.state[p]["momentum_buffer"] for o, p in zip(optimisers, (mine, theirs), strict=True)
    ]
    assert torch.equal(mine[mask], theirs[mask]) and torch.equal(mine[~mask], values[~mask])
    assert torch.equal(buffers[0][mask], buffers[1][mask]) and not buffers[0][~mask].any()
    assert mine.stride() == values.stride() and buffers[0].stride() == buffers[1].stride()
    optimisers[1].load_state_dict(optimisers[0].state_dict())


def test_the_layout_may_change_between_steps():
    models = [nn.Conv2d(3, 4, 3, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mask = torch.rand(4, 3, 3, 3) < 0.5
    start = models[0].weight.detach().clone()
    optimisers = [
        SparseSGDM(models[0].parameters(), 0.1, 0.9, masks=[mask]),
        torch.optim.SGD(models[1].parameters(), 0.1, 0.9),
    ]
    for step in range(4):
        grad = torch.randn(4, 3, 3, 3)
        for model, optimiser in zip(models, optimisers, strict=True):
            if step == 2:
                model.to(memory_format=torch.channels_last)
            model.weight.grad = grad.clone(memory_format=torch.preserve_format)
            optimiser.step()
    weights = [model.weight.detach() for model in models]
    assert torch.equal(weights[0][mask], weights[1][mask])
    assert torch.equal(weights[0][~mask], start[~mask])


@pytest.mark.parametrize(
    "options",
    [dict(foreach=True), dict(foreach=False), dict(fused=True), dict(fused=False)],
    ids=str,
)
def test_torchs_keywords_are_taken_and_change_nothing(options):
    optimisers = (
        SparseSGDM(parameters(), 0.1, 0.9, **options),
        torch.optim.SGD(parameters(), 0.1, 0.9),
    )
    step_both(optimisers)
    for mine, theirs in zip(*(o.param_groups[0]["params"] for o in optimisers), strict=True):
        assert torch.equal(mine, theirs)
    for set_to_none in (False, True):
        optimisers[0].zero_grad(set_to_none=set_to_none)
        grads = [p.grad for p in optimisers[0].param_groups[0]["params"]][:-1]
        assert all(g is None if set_to_none else not g.any() for g in grads)


def test_its_options_are_those_of_torchs_sgd():
    params = parameters()
    optimiser = SparseSGDM(params, masks=random_masks(params), capturable=True)
    assert optimiser.defaults == torch.optim.SGD(params).defaults
    assert "momentum: 0.0" in str(optimiser) and "tensor" not in str(optimiser)
    assert type(optimiser)(params, **optimiser.defaults).defaults == optimiser.defaults


def test_what_it_cannot_step_is_refused_before_anything_moves():
    with pytest.raises(ValueError, match="not differentiable"):
        SparseSGDM(parameters(), lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="neither complex parameters"):
        SparseSGDM([nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)
    first, table = nn.Parameter(torch.ones(2)), nn.Embedding(4, 2, sparse=True)
    optimiser = SparseSGDM([first, table.weight], lr=0.1)
    first.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        optimiser.step()
    assert torch.equal(first, torch.ones(2))


def test_a_closure_gives_the_loss_and_a_changed_parameter_is_noticed_by_autograd():
    p = nn.Parameter(torch.ones(3))
    optimiser = SparseSGDM([p], lr=0.25)

    def closure():
        optimiser.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimiser.step(closure).item() == 3 and p.tolist() == [0.5] * 3
    loss = (p**2).sum()
    optimiser.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


SCHEDULERS = {
    "CosineAnnealingLR": dict(T_max=4),
    "OneCycleLR": dict(max_lr=0.3, total_steps=12),  # moves the momentum too
    "LambdaLR": dict(lr_lambda=lambda step: 0.5**step),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_torchs(name):
    optimisers = [c(parameters(), 0.1, 0.9) for c in (SparseSGDM, torch.optim.SGD)]
    pairs = [
        (o, getattr(torch.optim.lr_scheduler, name)(o, **SCHEDULERS[name])) for o in optimisers
    ]
    for step in range(10):
        for optimiser, scheduler in pairs:
            step_both([optimiser], [step])
            scheduler.step()
    assert_equal_states(*optimisers)


def test_an_overflow_in_the_first_step_does_not_count_as_it():
    optimisers = [c(parameters(), 0.1, 0.9, dampening=0.5) for c in (SparseSGDM, torch.optim.SGD)]
    for optimiser in optimisers:
        params = optimiser.param_groups[0]["params"]
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # a power of two divides exactly
        scaler.scale(torch.ones(()))
        for step in range(4):
            set_gradients(params, step)
            for p in params[:-1]:
                p.grad *= scaler.get_scale()
            if step == 0:
                params[1].grad[0] = math.inf
            scaler.step(optimiser)
            scaler.update()
    assert_equal_states(*optimisers)


def test_the_flat_step_is_the_written_equation_in_float64():
    theta, grad, b, anchor, correction = torch.randn(5, 50, dtype=torch.float64)
    mask = torch.rand(50) < 0.5
    g = grad / 4 + 0.01 * theta + 0.3 * (theta - anchor) + correction
    b_new = torch.where(mask, 0.9 * b + g, b)
    expected = torch.where(mask, theta - 0.1 * (g + 0.9 * b_new), theta)
    options = dict(momentum=0.9, weight_decay=0.01, nesterov=True, grad_scale=4, prox=0.3)
    sparse_sgdm_(theta, grad, b, mask, None, anchor, correction, lr=0.1, **options)
    torch.testing.assert_close(theta, expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(b, b_new, rtol=1e-15, atol=1e-15)


def test_the_momentum_of_frozen_entries_is_neither_read_nor_written():
    theta, b = torch.randn(10), torch.full((10,), math.nan)
    before, mask = theta.clone(), torch.arange(10) < 5
    b[mask] = 1.0
    sparse_sgdm_(theta, torch.ones(10), b, mask, lr=0.1, momentum=0.9)
    assert torch.equal(theta[~mask], before[~mask]) and b[~mask].isnan().all()
    torch.testing.assert_close(theta[mask], before[mask] - 0.19)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_is_served_as_torchs_own_fused_optimiser_is(overflow):
    mine, theirs = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
    optimisers = SparseSGDM([mine], 0.1, 0.9), torch.optim.SGD([theirs], 0.1, 0.9, fused=True)
    for p, optimiser in zip((mine, theirs), optimisers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            optimiser.zero_grad()
            scaler.scale((torch.arange(300.0) * p**2).sum() / 300).backward()
            if overflow and step == 1:
                p.grad[7] = math.inf
            scaler.step(optimiser)
            scaler.update()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(mine).all()


@pytest.mark.parametrize("options", VALID, ids=str)
def test_a_step_size_in_a_tensor_is_read_in_each_step(options):
    theta, grad, b = torch.randn(3, 1000)
    rates, moved = (0.5, 2.0**-7, 0.0), []  # powers of two: lr * d is exact, rounded or not
    for tensor in (False, True):
        x, buffer, lr = theta.clone(), b.clone() if options["momentum"] else None, torch.zeros(())
        for rate in rates:
            sparse_sgdm_(x, grad, buffer, lr=lr.fill_(rate) if tensor else rate, **options)
        moved.append(x)
    assert torch.equal(*moved) and not torch.equal(moved[0], theta)


def test_the_optimiser_takes_its_step_size_from_a_tensor():
    mine, theirs, lr = parameters(), parameters(), torch.tensor(0.05)
    optimisers = SparseSGDM(mine, lr=lr, momentum=0.9), SparseSGDM(theirs, lr=0.05, momentum=0.9)
    for step in range(3):
        lr.fill_(0.05 / (1 + step))
        optimisers[1].param_groups[0]["lr"] = 0.05 / (1 + step)
        step_both(optimisers, [step])
    for a, b in zip(mine, theirs, strict=True):  # lr * d is rounded once more
        torch.testing.assert_close(a, b, rtol=5e-7, atol=5e-7)


def test_chunks_do_not_show(monkeypatch):
    theta, grad, b = torch.randn(3, 1000)
    copies = [x.clone() for x in (theta, grad, b)]
    sparse_sgdm_(theta, grad, b, lr=0.1, momentum=0.9)
    monkeypatch.setattr(sparse_sgdm, "CPU_CHUNK", 17)
    sparse_sgdm_(*copies, lr=0.1, momentum=0.9)
    assert torch.equal(theta, copies[0]) and torch.equal(b, copies[2])


@needs_triton
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(momentum=0.9), dict(momentum=0.9, first=True, weight_decay=0.1),
     dict(momentum=0.9, nesterov=True, prox=0.2), dict(momentum=0.5, dampening=0.3, grad_scale=8.0),
     dict(momentum=0.9, grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0)),
     dict(momentum=0.9, found_inf=torch.tensor(1.0)), dict(lr=torch.tensor(0.1), momentum=0.9)],
    ids=str,
)  # fmt: skip
def test_the_kernel_equals_the_reference(size, masked, options):
    generator = torch.Generator().manual_seed(size)
    theta, grad, b, anchor, correction = (
        torch.randn(size, generator=generator).to(DEVICE) for _ in range(5)
    )
    options = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    mask = (torch.rand(size, generator=generator) < 0.3).to(DEVICE) if masked else None
    if masked:
        mask[1024:2048] = False  # a block in which nothing trains
        grad[~mask] = math.nan
    terms = (anchor, correction) if "prox" in options else ()
    buffer = b if "momentum" in options else None
    ours = [theta.clone(), grad, None if buffer is None else b.clone(), mask, None, *terms]
    start = theta.clone()
    options = dict(lr=0.1) | options
    sparse_sgdm_reference_(theta, grad, buffer, mask, None, *terms, **options)
    sparse_sgdm_(*ours, backend="triton", **options)
    # a fused multiply-add rounds once where the reference rounds twice
    torch.testing.assert_close(ours[0], theta, rtol=5e-7, atol=5e-7)
    if buffer is not None:
        torch.testing.assert_close(ours[2], b, rtol=5e-7, atol=5e-7)
    if masked:
        assert torch.equal(ours[0][~mask], start[~mask])
    if "found_inf" in options and options["found_inf"]:
        assert torch.equal(ours[0], start)


@needs_triton
def test_the_kernel_steps_to_the_same_bits_by_a_number_and_by_a_tensor():
    theta, grad, b = torch.randn(3, 1025, device=DEVICE)
    ends = []
    for lr in (0.1, torch.tensor(0.1, device=DEVICE)):
        x, buffer = theta.clone(), b.clone()
        sparse_sgdm_(x, grad, buffer, lr=lr, momentum=0.9, backend="triton")
        ends.append(x)
    assert torch.equal(*ends)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_and_the_compute_copy(dtype):
    theta, grad = torch.randn(1025, device=DEVICE), torch.randn(1025, device=DEVICE).to(dtype)
    copies = [torch.zeros(1025, dtype=dtype, device=DEVICE) for _ in range(2)]
    ours = theta.clone()
    sparse_sgdm_reference_(theta, grad, compute_copy=copies[0], lr=0.1)
    sparse_sgdm_(ours, grad, compute_copy=copies[1], lr=0.1, backend="triton")
    torch.testing.assert_close(ours, theta, rtol=3e-7, atol=3e-7)
    assert torch.equal(copies[0], theta.to(dtype))
    # the interpreter truncates bf16 stores where torch rounds: one unit in the last place
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(copies[1].float(), copies[0].float(), rtol=ulp, atol=1e-6)


def test_backends_are_dispatched_as_promised(monkeypatch):
    theta, grad = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match="backend must be auto, triton or reference"):
        sparse_sgdm_(theta, grad, lr=0.1, backend="cuda")
    if sparse_sgdm.triton is not None:
        with pytest.raises(ValueError, match="steps fp32 parameters, not torch.float64"):
            sparse_sgdm_(theta.double().to(DEVICE), grad.to(DEVICE), lr=0.1, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton"):
        sparse_sgdm_(theta, grad, lr=0.1, backend="triton")
    assert torch.equal(theta, torch.ones(4))


def test_where_triton_fails_the_reference_takes_over_and_says_so_once(monkeypatch, recwarn):
    def broken(*arguments, **options):
        raise RuntimeError("cannot compile")

    monkeypatch.setattr(sparse_sgdm, "sparse_sgdm_triton_", broken)
    monkeypatch.setattr(sparse_sgdm, "_devices_without_triton", known := set())
    monkeypatch.setattr(sparse_sgdm, "_triton_serves", lambda theta: theta.device not in known)
    theta = torch.ones(4)
    for _ in range(2):
        sparse_sgdm_(theta, torch.ones(4), lr=0.25)
    assert theta.tolist() == [0.5] * 4
    assert [str(w.message) for w in recwarn.list] == [
        "Triton does not run on cpu, using PyTorch: cannot compile"
    ]


COMPILE = """
import kernels, sparse_sgdm
fp32 = ["theta", "momentum", "anchor", "correction", "lr", "scale", "found_inf"]
types = {f"{name}_ptr": "*fp32" for name in fp32} | dict(mask_ptr="*u8", count="i32")
scalars = ["lr", "momentum", "rate", "weight_decay", "prox", "grad_scale"]
types |= dict.fromkeys(scalars, "fp32")
names = ["MOMENTUM", "MASK", "COPY", "ANCHOR", "CORRECTION", "LR", "SCALE", "FOUND_INF"]
constants = {f"HAS_{name}": True for name in names}
constants |= dict(NESTEROV=False, FIRST=False, BLOCK=sparse_sgdm.TRITON_BLOCK)
for capability, half in kernels.CARDS:
    halves = dict(grad_ptr=half, copy_ptr=half)
    kernels.build(sparse_sgdm._sparse_sgdm_kernel, capability, types | halves, constants)
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="no Triton")
def test_the_kernel_compiles_for_turing_ampere_and_hopper_without_a_gpu(tmp_path):
    assert built_elsewhere(COMPILE, tmp_path) == 3
