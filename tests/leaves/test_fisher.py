"""Batched sensitivity equals the per-sample definition, on every path."""

import copy
import itertools
import math
import warnings

import pytest
import taped
import torch
import torch.nn.functional as F
from conftest import needs_cuda
from kernels import DEVICE, INSTALLED, built_elsewhere, needs_triton
from strangers import Forward, Odd
from torch import nn

import fisher
import model as vit
from fisher import Scorer, fisher_diagonal, square_accumulate_
from machine import cuda_graph
from machine.cuda_graph import GraphedStep
from model import build_vit

quiet = pytest.mark.filterwarnings("ignore:per-sample gradients one by one")


def reference(model, inputs, labels, names=None):
    """The definition: one backward pass per sample, in float64."""
    parameters = dict(model.double().named_parameters())
    parameters = {name: parameters[name] for name in names or parameters}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, y in zip(inputs, labels, strict=True):
        out = model(x[None].double() if x.is_floating_point() else x[None])[0]
        grads = torch.autograd.grad(
            out.log_softmax(0)[y], [*parameters.values()], materialize_grads=True
        )
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad**2 / len(inputs)
    return total


def assert_exact(scores, model, x, y, tolerance=1e-5):
    """Let scores be the definition's, tensor by tensor; the model is in float64 afterwards."""
    for name, expected in reference(model, x, y, names=scores).items():
        error = (scores[name] - expected).norm()
        assert error <= tolerance * expected.norm(), (name, error / expected.norm())


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd(), torch.randn(7, 2, 5, 8), torch.randint(4, (7,))


def test_a_vit_is_scored_without_falling_back(recwarn):
    model = build_vit("vit_demo", 10, seed=1)
    nn.init.normal_(model.head.weight, std=0.3)
    names = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
    x, y = torch.randn(5, 3, 40, 40), torch.randint(10, (5,))  # the position grid is resampled
    found = fisher_diagonal(model, [(x, y)], parameters=names, labels="true")
    assert not recwarn.list and list(found) == names
    model.forward = lambda images: nn.functional.linear(
        model.features(images), model.head.weight, model.head.bias
    )
    assert_exact(found, model, x, y)


def test_a_scorer_that_is_used_again_sees_the_model_as_it_is(odd):
    model, x, _ = odd
    scorer = Scorer(model)
    weight = model.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="one by one for"), torch.no_grad():
        model.head.weight.fill_(math.nan)
        with pytest.raises(ValueError, match="is not finite"):
            scorer.diagonal([x])
        for factor, inputs in ((1, x), (2, x), (3, torch.randn(3, 2, 5, 8))):
            model.head.weight.copy_(factor * weight)
            found, fresh = scorer.diagonal([inputs], 5), fisher_diagonal(model, [inputs], seed=5)
            assert all(torch.equal(found[name], scores) for name, scores in fresh.items())


def test_what_lies_below_all_that_is_scored_sees_no_backward_pass():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    seen = []
    model[0].register_forward_hook(lambda module, x, out: seen.append(out))
    found = fisher_diagonal(model, [torch.randn(2, 3)], parameters=["1.weight"])
    assert found["1.weight"].any() and not any(out.requires_grad for out in seen)


def test_sampled_labels_follow_the_models_distribution_and_the_seed():
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    x = torch.zeros(20_000, 1)
    exact = torch.tensor([0.2 * 0.8, 0.3 * 0.7, 0.25])  # the variance of each indicator
    found = [fisher_diagonal(model, x.split(n), seed=3)["bias"] for n in (20_000, 333)]
    assert torch.allclose(found[0], exact, atol=0.01)  # 20,000 draws: a deviation of 0.002
    assert torch.allclose(*found, rtol=1e-5)
    assert not torch.allclose(found[0], fisher_diagonal(model, [x], seed=4)["bias"], rtol=1e-5)


def test_a_parameter_that_mixes_samples_is_no_broadcast():
    # copies of `bias` would all act on every sample
    model = Forward(lambda m, x: x * m.bias.mean(dim=0), bias=nn.Parameter(torch.randn(1, 3)))
    x, y = torch.randn(5, 3), torch.randint(3, (5,))
    with pytest.warns(UserWarning, match="one by one for bias"):
        found = fisher_diagonal(model, [(x, y)], labels="true")
    torch.testing.assert_close(found["bias"].double(), reference(model, x, y)["bias"])


class Gated(nn.Module):
    """A layer that works for samples whose first number is positive, and whose weight is read."""

    def __init__(self, size=5):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, size))
        self.mix = nn.Linear(size, size)
        self.alias = [self.mix.bias]  # which torch.func does not reach
        self.head = nn.Linear(size, 4)

    def forward(self, x):
        open = (x[:, :1, :1] > 0).to(x.dtype)
        y = self.mix(x).tanh() + 0.1 * x @ self.mix.weight + self.alias[0] + self.token
        return self.head((x + open * y).mean(dim=1))


@pytest.mark.parametrize("closed", [(0, 1, 2), (0, 2), (0, 1, 2, 3, 4, 5, 6)], ids=str)
def test_a_tensor_is_compared_where_its_gradients_are_not_zero(closed):
    torch.manual_seed(0)
    model, x, y = Gated().double(), torch.randn(7, 2, 5).double(), torch.randint(4, (7,))
    x[:, 0, 0] = 1.0
    x[list(closed), 0, 0] = -1.0  # so that the first samples tell nothing of `mix` and `token`
    batches = list(zip(x.split(3), y.split(3), strict=True))
    scorer = Scorer(model, labels="true", dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = scorer.diagonal(batches)
    said = {str(warning.message) for warning in caught}
    alive = len(closed) < 7
    assert said == (
        {"per-sample gradients one by one for mix.weight, mix.bias"} if alive else set()
    )
    for _ in range(2):
        for name, expected in reference(model, x, y).items():
            assert expected.any() == (alive or name.startswith("head")), name
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)
        found = scorer.diagonal(batches)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_layer_of_little_weight_is_compared_all_the_same():
    torch.manual_seed(0)
    model = Forward(  # layer scale, at a first value of 1e-6
        lambda m, x: m.head((x + 1e-6 * (m.mix(x) + x @ m.mix.weight)).mean(dim=1)),
        mix=nn.Linear(6, 6), head=nn.Linear(6, 4),
    )  # fmt: skip
    x, y = torch.randn(7, 5, 6), torch.randint(4, (7,))
    with pytest.warns(UserWarning, match="one by one for mix.weight$"):
        found = fisher_diagonal(model, [(x, y)], labels="true")
    assert_exact(found, model, x, y)


def test_a_model_that_is_sure_of_itself_is_compared_by_the_labels_that_it_doubts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[1].register_forward_hook(lambda module, x, out: out + 0.5 * x[0] @ module.weight)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([500.0, 0.0, 0.0]))  # p is 1, its gradient 0
    x, y = torch.randn(6, 8), torch.tensor([0, 0, 1, 0, 2, 0])
    with pytest.warns(UserWarning, match="one by one for 1.weight$"):
        found = fisher_diagonal(model, [(x[:2], y[:2]), (x[2:], y[2:])], labels="true")
    for name, expected in reference(model, x, y).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squares_of_half_gradients_do_not_underflow(odd, dtype):
    model, x, y = odd
    with torch.no_grad():
        model.head.weight.mul_(1e-3)  # squares of 1e-8 and less, where fp16 ends at 6e-8
    with pytest.warns(UserWarning, match="one by one for"):
        found = fisher_diagonal(model.to(dtype), [(x.to(dtype), y)], labels="true")
    assert_exact(
        found, model, x.to(dtype), y, 0.02 if dtype == torch.float16 else 0.1
    )  # 11 bits, 8


def test_what_is_not_used_stays_zero_and_is_not_scored_one_by_one(recwarn):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    found = fisher_diagonal(model, [torch.randn(5, 3), torch.randn(2, 3)])
    assert not recwarn.list and found["2.bias"].any()
    assert not any(found[name].any() for name in ("0.weight", "0.bias", "2.weight"))


def test_square_accumulate_equals_its_definition_at_odd_sizes(monkeypatch):
    monkeypatch.setattr(fisher, "CPU_CHUNK", 100)
    for n, t, o, i in itertools.product([1, 5], [1, 17], [1, 7], [1, 13]):
        g, a = torch.randn(n, t, o).double(), torch.randn(n, t, i).double()
        total = torch.ones(o, i).double()
        square_accumulate_(total, g, a)
        expected = 1 + torch.einsum("nto,nti->noi", g, a).square().sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_equals_the_reference_at_odd_sizes(dtype):
    for n, t, o, i in [(1, 1, 1, 1), (3, 33, 65, 17), (2, 5, 7, 131), (4, 64, 64, 64)]:
        g, a = (torch.randn(n, t, k, device=DEVICE).to(dtype) for k in (o, i))
        found = torch.ones(o, i, device=DEVICE)
        fisher.square_accumulate_triton_(found, g, a)
        exact = 1 + torch.einsum("nto,nti->noi", g.double(), a.double()).square().sum(0)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-3  # half products are rounded to half
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


def test_backends_are_dispatched_as_promised(monkeypatch):
    total, g, a = torch.zeros(2, 3), torch.ones(1, 4, 2), torch.ones(1, 4, 3)
    with pytest.raises(ValueError, match="backend must be auto, triton or reference, not 'cuda'"):
        square_accumulate_(total, g, a, backend="cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton"):
        square_accumulate_(total, g, a, backend="triton")
    assert torch.equal(total, torch.zeros(2, 3))


COMPILE = """
import fisher, kernels
constants = dict(SAMPLES=64, BLOCK=fisher.SQUARES_BLOCK)
for capability, half in kernels.CARDS:
    types = {"size": "i32", "products_ptr": half, "total_ptr": "*fp32"}
    kernels.build(fisher._add_squares_kernel, capability, types, constants)
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="no Triton")
def test_the_kernel_compiles_for_turing_ampere_and_hopper_without_a_gpu(tmp_path):
    assert built_elsewhere(COMPILE, tmp_path) == 3


def test_what_cannot_be_scored_is_refused(odd):
    model, x, _ = odd
    with pytest.raises(ValueError, match="no parameters"):
        fisher_diagonal(nn.Flatten(), [x])
    with pytest.raises(ValueError, match="calibration set is empty"):
        fisher_diagonal(model, [])
    with pytest.raises(ValueError, match=r"pass \[inputs\]"):
        fisher_diagonal(model, x)
    with pytest.raises(ValueError, match="unknown labels 'false'"):
        fisher_diagonal(model, [x], labels="false")
    with pytest.raises(ValueError, match="needs batches of"):
        fisher_diagonal(model, [x], labels="true")
    with pytest.raises(ValueError, match="is not finite"):
        fisher_diagonal(model, [x * math.inf], labels="sampled")
    for labels in (torch.zeros(6).long(), torch.zeros(7, 1).long()):
        with pytest.raises(ValueError, match="there must be one for each sample"):
            fisher_diagonal(model, [(x, labels)], labels="true")
    with pytest.raises(ValueError, match="come as a tensor .N, ...., not dict"):
        fisher_diagonal(model, [{"pixels": x}])
    with pytest.raises(ValueError, match="float32 or float64, not in torch.float16"):
        fisher_diagonal(model, [x], dtype=torch.float16)
    scorer = Scorer(model)
    model.head = nn.Linear(6, 4)
    with pytest.raises(ValueError, match="other parameters than its Scorer was made for"):
        scorer.diagonal([x])
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="codes is torch.int8: it has no real gradient"):
        fisher_diagonal(model, [x])


def test_models_without_gradients_of_each_sample_are_refused():
    def by(rule):
        return Forward(
            lambda m, x: m.head(rule(m.mix(x))), mix=nn.Linear(6, 6), head=nn.Linear(6, 4)
        )

    def large(y):  # statistics of batches of more than 4
        return y - y.mean(dim=0) if len(y) > 4 else y

    def in_place(y):
        z = y.exp()
        z2 = z * z
        z += 1
        return z2

    x = torch.randn(7, 6)
    fisher_diagonal(by(large), [x[:4]])
    for rule, reason in (
        (large, "depend on the others"),
        (F.dropout, "something random"),
        (lambda y: y.sum(dim=0, keepdim=True), "2 samples have 1 rows of logits"),
        (in_place, "autograd cannot take this model's gradients: one of the variables needed"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            fisher_diagonal(by(rule), [x])
        assert "\n" not in str(caught.value)


def test_an_empty_batch_is_no_sample(odd):
    model, x, y = odd
    with pytest.warns(UserWarning):
        found = fisher_diagonal(model, [(x[:0], y[:0]), (x, y), (x[:0], y[:0])], labels="true")
        expected = fisher_diagonal(model, [(x, y)], labels="true")
    assert all(torch.equal(found[name], scores) for name, scores in expected.items())


# ---------------------------------------------------------------------------- strangers' models


class Merging(nn.Linear):
    """Adds its low-rank part to its weight in eval mode, and takes it out in training."""

    def __init__(self, wide, tall):
        super().__init__(wide, tall)
        self.a, self.b = nn.Parameter(torch.randn(2, wide)), nn.Parameter(torch.randn(tall, 2))
        self.merged = False

    def train(self, mode=True):
        with torch.no_grad():
            if mode == self.merged:
                self.weight += (-1 if mode else 1) * self.b @ self.a
                self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (0 if self.merged else x @ self.a.T @ self.b.T)


@quiet
def test_modes_are_flags_and_no_train_or_eval_is_called():
    torch.manual_seed(0)
    model = nn.Sequential(Merging(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).train()
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    scores = fisher_diagonal(model, [(x, y)], labels="true")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and not model[0].merged
    for module in model.modules():
        module.training = False
    assert_exact(scores, model, x, y, 1e-4)


@pytest.mark.parametrize(
    ("batch", "labels", "reason"),
    [
        ((torch.zeros(3, 4), torch.tensor([1, 3, 2])), "true", "labels 'true' lie in 0..2"),
        ((torch.zeros(3, 4), torch.tensor([1, -100, 2])), "true", "these are -100 to 2"),
        ((torch.zeros(3, 4), torch.full((3,), 2.0)), "sampled", "labels 'sampled' lie in .0, 1"),
        ((torch.zeros(3, 4), torch.full((3,), math.nan)), "sampled", "these are nan to nan"),
        ([torch.zeros(3, 4)], "sampled", "or a pair .inputs, labels., not a list of 1: take"),
        ((torch.zeros(3, 4), torch.zeros(3), 3), "sampled", "not a tuple of 3: take"),
        ((torch.zeros(3, 4), [0, 1, 2]), "true", "labels come as a tensor .N,., not list"),
    ],
)  # fmt: skip
def test_what_are_no_labels_is_refused_by_name(batch, labels, reason):
    with pytest.raises(ValueError, match=reason):
        fisher_diagonal(nn.Linear(4, 3), [batch], labels=labels)


def test_a_single_logit_has_no_log_probability():
    model, x = nn.Linear(4, 1), torch.randn(5, 4)
    with pytest.raises(ValueError, match="single logit.*score 'logit'"):
        fisher_diagonal(model, [x])
    assert torch.equal(fisher_diagonal(model, [x], score="logit")["bias"], torch.ones(1))


@quiet
@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_tensor_that_is_only_read_does_not_loosen_the_comparison(frozen):
    def forward(m, x):  # the inner weight is read past its module, by little
        y = m.inner(x).tanh()
        return m.head(y + 0.1 * F.linear(y, m.inner.weight.T) + m.table.to(x.dtype))

    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(4).to(frozen), requires_grad=False)
    model = Forward(forward, inner=nn.Linear(4, 4), head=nn.Linear(4, 3), table=table)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    names = ["inner.weight", "inner.bias", "head.weight", "head.bias"]
    scores = fisher_diagonal(model, [(x, y)], parameters=names, labels="true")
    assert_exact(scores, model, x, y)


@pytest.mark.parametrize("kind", ["autocast", "bf16 trunk", "fp64"])
def test_models_of_several_types_are_scored_in_a_batch(kind, recwarn):
    torch.manual_seed(0)
    trunk = [nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32)]
    model = Forward(
        lambda m, x: m.head(m.trunk(x.to(m.trunk[0].weight.dtype)).to(m.head.weight.dtype).mean(1)),
        trunk=nn.Sequential(*trunk), head=nn.Linear(32, 3),
    )  # fmt: skip
    x, y = torch.randn(16, 9, 16), torch.randint(3, (16,))
    if kind == "bf16 trunk":
        model.trunk.bfloat16()
    elif kind == "fp64":
        model, x = model.double(), x.double()
    elif kind == "autocast":
        plain = model.does

        def cast(m, x):
            with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
                return plain(m, x).to(x.dtype)

        model.does = cast
    scores = fisher_diagonal(model, [(x[:8], y[:8]), (x[8:], y[8:])], labels="true")
    assert not recwarn.list
    assert_exact(scores, model, x, y, 1e-5 if kind == "fp64" else 0.1)  # 8 bits, squared


@quiet
@pytest.mark.parametrize("seed", [0, 11])  # of the second, an expert gets one row a sample
def test_experts_that_tokens_choose_are_exact(seed):
    def forward(m, x):
        tokens = x.reshape(-1, x.shape[-1])
        chosen = m.gate(tokens).argmax(dim=1)
        y = torch.zeros_like(tokens)
        for k, expert in enumerate(m.experts):  # which may get N rows, but not one of each sample
            at = (chosen == k).nonzero()[:, 0]
            y = y.index_add(0, at, expert(tokens[at]).relu())
        return m.head(y.view_as(x).mean(dim=1))

    torch.manual_seed(seed)
    experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    model = Forward(forward, gate=nn.Linear(8, 2), experts=experts, head=nn.Linear(8, 3))
    x, y = torch.randn(4, 2, 8), torch.randint(3, (4,))
    names = [name for name, _ in model.named_parameters() if not name.startswith("gate")]
    scores = fisher_diagonal(model, [(x, y)], parameters=names, labels="true")
    assert_exact(scores, model, x, y, 1e-4)


class Caching(nn.Module):
    """Keeps what it computed of its parameter until it trains again."""

    def __init__(self):
        super().__init__()
        self.biases, self.head, self.cache = nn.Parameter(torch.randn(4)), nn.Linear(4, 3), {}

    def train(self, mode=True):
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return self.head(x * self.biases[[1, 0, 2, 3]])
        if "biases" not in self.cache:
            self.cache["biases"] = self.biases[[1, 0, 2, 3]]
        return self.head(x * self.cache["biases"])


@quiet
def test_a_cache_is_neither_left_behind_nor_taken_for_a_constant():
    torch.manual_seed(0)
    model, x, y = Caching(), torch.randn(5, 4), torch.randint(3, (5,))
    scores = fisher_diagonal(model, [(x, y)], labels="true")
    assert model.training and not model.cache
    assert_exact(scores, model, x, y)
    model.float().eval()
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="reaches biases in eval mode.*call model.train.. before"):
        fisher_diagonal(model, [(x, y)], labels="true")
    assert not model.training and not model.cache["biases"].requires_grad


@quiet
def test_nothing_is_accumulated_so_no_optimizer_in_a_hook_steps():
    torch.manual_seed(0)
    low = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(3, 2))  # no gradient reaches a
    model = Forward(
        lambda m, x: m.base(x) + x @ m.a.T @ m.b.T, base=nn.Linear(4, 3), a=low[0], b=low[1]
    )
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook ran"))
    fisher_diagonal(model, [torch.randn(8, 4), torch.randn(8, 4)])
    assert all(p.grad is None for p in model.parameters())


@quiet
def test_what_modules_keep_of_a_pass_is_not_left_in_them():
    def forward(m, x):
        m.register_buffer("seen", x.detach())
        y = m.embed(x) * m.gain
        m.mean, m.last = 0.9 * m.mean + 0.1 * y.detach().mean(dim=0), y
        m.activations.append(y)
        return m.head(y)

    torch.manual_seed(0)
    model = Forward(
        forward, embed=nn.Linear(4, 4), gain=nn.Parameter(torch.ones(4)), head=nn.Linear(4, 3),
        mean=torch.zeros(4), activations=[],
    )  # fmt: skip
    model.register_buffer("wide", torch.ones(1).expand(3))
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    scores = fisher_diagonal(model, [(x, y)], labels="true")
    assert not hasattr(model, "seen") and not hasattr(model, "last") and not model.activations
    assert not model.mean.any()
    copy.deepcopy(model)
    model.mean = model.mean.double()
    assert_exact(scores, model, x, y)


@quiet
def test_a_model_may_look_at_the_shape_of_what_it_reads():
    def forward(m, x):
        assert m.grid.shape == (1, *x.shape[1:]), "grid of another size"
        return m.head((x + m.grid).mean(dim=1))

    torch.manual_seed(0)
    model = Forward(forward, grid=nn.Parameter(torch.randn(1, 6, 4)), head=nn.Linear(4, 3))
    x, y = torch.randn(5, 6, 4), torch.randint(3, (5,))
    assert_exact(fisher_diagonal(model, [(x, y)], labels="true"), model, x, y)


# ---------------------------------------------------------------------------- replays, precision


class Replayed:
    """Stands in for a CUDA graph: static inputs, one step, state where it was when it was made."""

    def __init__(self, step, state):
        self.step, self.state, self.inputs, self.calls = step, state, {}, 0
        self.places = [x.data_ptr() for x in state]

    def __call__(self, **values):
        for name, value in values.items():
            static = self.inputs.setdefault(name, torch.empty_like(value))
            assert static.shape == value.shape
            static.copy_(value)
        self.calls += 1
        assert [x.data_ptr() for x in self.state] == self.places
        return self.step(**self.inputs)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def test_replayed_batches_have_the_scores_of_the_others():
    model, replays = two_layers(), []

    def replay(step, state):
        replays.append(Replayed(step, state))
        return replays[-1]

    scorer = Scorer(model, replay=replay)
    for sizes in ([8, 8, 8, 3], [8, 3, 1], [8, 2, 2]):
        batches = [torch.randn(n, 5) for n in sizes]
        expected = fisher_diagonal(model, batches, seed=4)
        scores = scorer.diagonal(batches, seed=4)
        assert all(torch.equal(scores[name], expected[name]) for name in expected)
        with torch.no_grad():
            model[0].weight.mul_(0.5)  # in place: the next replays see it
    assert [r.calls for r in replays] == [4, 1]  # the first 8 and 3 are not, nor any 1 or 2
    assert {len(r.inputs["inputs"]) for r in replays} == {8, 3}


def test_what_is_scored_one_by_one_is_not_replayed():
    twice = Forward(lambda m, x: m.inner(m.inner(x)), inner=nn.Linear(4, 4))
    scorer = Scorer(twice, replay=lambda step, state: pytest.fail("replayed"))
    with pytest.warns(UserWarning, match="one by one"):
        scorer.diagonal([torch.randn(6, 4)] * 3)


def test_a_warning_names_a_few_of_many_parameters():
    model = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)), nn.Flatten())
    with pytest.warns(UserWarning, match=r"for 6 parameters, 0.weight, .*, 1.bias, \.\.\.$"):
        fisher_diagonal(model, [torch.randn(3, 1, 2, 2)])


def test_a_scale_of_the_score_is_taken_out_of_the_scores():
    model, batches = two_layers(), [torch.randn(6, 5)]
    plain, scaled = (Scorer(model, scale=scale).diagonal(batches) for scale in (1.0, 256.0))
    for name, scores in plain.items():
        assert torch.allclose(scores, scaled[name], rtol=1e-6, atol=0)
    half = two_layers().half()
    with torch.no_grad():
        half[2].weight.mul_(2.0**-20)  # so that fp16 gradients before it all but vanish
    exact = fisher_diagonal(copy.deepcopy(half).float(), batches)["0.weight"]
    small, kept = (
        Scorer(half, scale=scale).diagonal([batches[0].half()])["0.weight"]
        for scale in (1.0, 4096.0)
    )
    assert (kept - exact).norm() < 0.02 * exact.norm() < (small - exact).norm()


def test_copies_that_are_rounded_otherwise_are_still_a_samples_own(recwarn):
    def forward(m, x):  # two products as a GPU's libraries may choose them, for one or many
        return m.head(x + m.token * (1 if len(m.token) == 1 else 1 + 2**-7)).float()

    model = Forward(forward, token=nn.Parameter(torch.ones(1, 5)), head=nn.Linear(5, 3)).bfloat16()
    scorer, batches = Scorer(model), [torch.randn(6, 5).bfloat16()]
    scorer.diagonal(batches)
    assert not recwarn.list  # of what is scored one by one it warns


def check_graphed(model, batches, device):
    """Compare the scores of batches that a graph replays with eager ones."""
    statuses = []

    def replay(step, state):
        statuses.append(GraphedStep(step, state, device, mode="on"))
        return statuses[-1]

    model = model.to(device)
    batches = [batch.to(device) for batch in batches]
    graphed = Scorer(model, replay=replay)
    for seed in (1, 2):
        eager, scores = (s.diagonal(batches, seed) for s in (Scorer(model), graphed))
        assert all(torch.equal(eager[name], scores[name]) for name in eager)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)  # in place: the next replays see it
    assert [graphed_step.status for graphed_step in statuses] == ["on"]


def vit_of_another_size():
    model = build_vit("vit_demo", classes=10)
    torch.manual_seed(0)
    nn.init.normal_(model.head.weight)
    return model, torch.randn(16, 3, 48, 48).split(4)


GRAPHED = {
    "layers": lambda: (two_layers(), torch.randn(32, 5).split(8)),
    "ViT of another size": vit_of_another_size,
}


@pytest.mark.parametrize("made", GRAPHED.values(), ids=GRAPHED)
def test_a_recorded_pass_gives_the_eager_scores(monkeypatch, made):
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    check_graphed(*made(), "cpu")


@needs_cuda
@pytest.mark.parametrize("made", GRAPHED.values(), ids=GRAPHED)
def test_a_graph_gives_the_eager_scores_on_a_gpu(made):
    check_graphed(*made(), "cuda")


def test_a_model_keeps_its_constants_from_pass_to_pass(monkeypatch):
    """The position grid of other sizes: made and copied anew it would stop a capture on a GPU."""
    matrices, position_matrix = [], vit.position_matrix
    count = lambda *sizes: matrices.append(sizes) or position_matrix(*sizes)  # noqa: E731
    monkeypatch.setattr(vit, "position_matrix", count)
    monkeypatch.setattr(vit, "RESAMPLERS", {})
    model = vit.build_vit("vit_demo", classes=10)
    size = 2 * model.shape.patch * model.shape.grid
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    Scorer(model).diagonal(images.split(2))
    assert len(matrices) == 1


@pytest.mark.parametrize(
    ("rows_of", "tokens"),
    [
        # tokens choose an expert by their number
        (lambda x: [x % 2 == 0, x % 2 == 1], [[0, 1], [2, 3], [4, 6], [5, 7]]),
        # only those that are no padding pass a layer
        (lambda x: [x != 0], [[1, 0], [2, 0], [0, 0], [5, 7]]),
    ],
    ids=["experts", "padding"],
)
def test_rows_that_truth_values_pick_are_scored_one_by_one(rows_of, tokens):
    """In the second batch a layer sees as many rows as samples, and of other samples."""
    tokens, labels = torch.tensor(tokens), torch.tensor([0, 1, 2, 0])

    def forward(m, x):
        y = m.embed(x)
        out = torch.zeros_like(y)
        for rows, expert in zip(rows_of(x), m.experts, strict=True):
            out[rows] = expert(y[rows])
        return m.head(out.sum(1))

    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(5, 5) for _ in rows_of(tokens))
    model = Forward(forward, embed=nn.Embedding(8, 5), experts=experts, head=nn.Linear(5, 3))
    pairs = [(tokens[:2], labels[:2]), (tokens[2:], labels[2:])]
    with pytest.warns(UserWarning, match="one by one for .*experts.0.weight"):
        scores = fisher_diagonal(model, pairs, labels="true")
    assert_exact(scores, model, tokens, labels)


def test_a_model_that_no_gradient_passes_is_refused():
    model = nn.Linear(4, 3)
    model.forward = torch.no_grad()(model.forward)
    with pytest.raises(ValueError, match="no gradient reaches any of the model's parameters"):
        fisher_diagonal(model, [torch.randn(5, 4)])
    with pytest.raises(ValueError, match="are whole numbers, not torch.float32"):
        fisher_diagonal(nn.Linear(4, 3), [(torch.randn(5, 4), torch.ones(5))], labels="true")
