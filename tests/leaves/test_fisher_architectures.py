"""Scores of models that fisher.py has never seen equal the mean squared per-sample gradient.

The reference is torch.func's gradient of one sample, in float64, or autograd's where that fails.

    python tests/leaves/test_fisher_architectures.py

writes results/bench/fisher_architectures.csv.
"""

import contextlib
import csv
import math
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from strangers import Forward, Odd  # noqa: E402

from fisher import Scorer, fisher_diagonal  # noqa: E402
from model import build_vit  # noqa: E402

CLASSES = 4
NOT_FOR_FUNC = (  # torch.func misses weights, or leaves others in the model than were there
    "weights read past their modules", "compiled", "MLP, weights shared",
)  # fmt: skip
ARCHITECTURES = {}  # name -> (builder of a model, builder of n samples)


def architecture(name, *shape, tokens=None):
    """Register a builder of models that read samples of this shape, or so many token numbers."""

    def samples(n):
        return torch.randint(tokens, (n, *shape)) if tokens else torch.randn(n, *shape).double()

    def register(build):
        ARCHITECTURES[name] = build, samples
        return build

    return register


architecture("every kind of parameter", 2, 5, 8)(Odd)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


# ---------------------------------------------------------------------------- transformers


@architecture("ViT of this project", 3, 40, 40)  # the position grid is resampled
def vit():
    model = build_vit("vit_demo", CLASSES, seed=1)
    for tensor in (model.head.weight, model.head.bias, model.pos_embed, model.cls_token):
        nn.init.normal_(tensor, std=0.3)
    return model


def encoder(batch_first, norm_first=False):
    layer = nn.TransformerEncoderLayer(
        8, 2, 12, dropout=0.1, batch_first=batch_first, norm_first=norm_first
    )
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Forward(
        lambda m, x: m.head(
            m.stack(m.embed(x)).mean(1)
            if batch_first
            else m.stack(m.embed(x.transpose(0, 1))).mean(0)
        ),
        embed=nn.Linear(3, 8), stack=stack, head=nn.Linear(8, CLASSES),
    )  # fmt: skip


@architecture("TransformerEncoder, batch first", 5, 3)
def encoder_batch_first():
    return encoder(batch_first=True)


@architecture("TransformerEncoder, batch first, T = 2, norm first", 2, 3)
def encoder_short():
    return encoder(batch_first=True, norm_first=True)


for steps in (1, 2, 5, 7):  # 2 samples are checked, and batches are of 7
    architecture(f"TransformerEncoder, time first, T = {steps}", steps, 3)(lambda: encoder(False))


@architecture("MultiheadAttention, pooled by a query", 6, 8)
def attention_pooled():
    def forward(m, x):
        query = m.query.expand(len(x), -1, -1)
        return m.head(m.attention(query, m.norm(x), m.norm(x), need_weights=False)[0][:, 0])

    return Forward(
        forward, query=parameter(1, 1, 8), norm=nn.LayerNorm(8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True),
        head=nn.Linear(8, CLASSES),
    )  # fmt: skip


@architecture("attention with queries, keys and values apart", 5, 6)
def attention_apart():
    def forward(m, x):
        q, k, v = m.q(x), m.k(input=x), m.v(x)
        x = x + (q @ k.transpose(1, 2) / 6**0.5).softmax(dim=2) @ v
        return m.head(x.mean(dim=1))

    q, k, v = (nn.Linear(6, 6) for _ in range(3))
    return Forward(forward, q=q, k=k, v=v, head=nn.Linear(6, CLASSES))


@architecture("tokens of text, tied embedding", 5, tokens=11)
def text():
    def forward(m, x):
        x = m.embed(x) + m.position
        return F.linear(m.norm(m.mix(x)).mean(dim=1), m.embed.weight[:CLASSES])

    return Forward(
        forward, embed=nn.Embedding(11, 6), position=parameter(5, 6), mix=nn.Linear(6, 6),
        norm=nn.LayerNorm(6),
    )  # fmt: skip


@architecture("tokens of text, sparse gradients", 5, tokens=11)
def sparse_text():
    return nn.Sequential(nn.Embedding(11, 6, sparse=True), nn.Flatten(), nn.Linear(30, CLASSES))


@architecture("class token and layer that are not used", 5, 6)
def unused():
    def forward(m, x):
        token = m.token.expand(len(x), -1, -1)
        return m.head(torch.cat([token, m.norm(x)], dim=1)[:, 1:].mean(dim=1))

    return Forward(
        forward, token=parameter(1, 1, 6), norm=nn.LayerNorm(6), idle=nn.Linear(6, 6),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("mixer, tokens transposed", 5, 6)
def mixer():
    def forward(m, x):
        x = x + m.tokens(m.norm(x).transpose(1, 2)).transpose(1, 2)
        return m.head((x + m.channels(x)).mean(dim=1))

    return Forward(
        forward, norm=nn.LayerNorm(6), tokens=nn.Linear(5, 5), channels=nn.Linear(6, 6),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


def folded(rows):
    """Two linear layers see the tokens of all samples along the first axis."""

    def forward(m, x):
        n, t, d = x.shape
        x = m.first(m.norm(x.reshape(n * t, d))).relu().reshape(n * t // rows, rows, d)
        return m.head(m.second(x).reshape(n, t, d).mean(dim=1))

    return Forward(
        forward, norm=nn.LayerNorm(6), first=nn.Linear(6, 6), second=nn.Linear(6, 6),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


for steps in (1, 2, 7):
    architecture(f"tokens folded into the batch, T = {steps}", steps, 6)(lambda: folded(1))


@architecture("windows folded into the batch, with a bias for each", 4, 6)
def windows():
    def forward(m, x):
        n = len(x)
        x = m.mix(x.reshape(2 * n, 2, 6)) + m.bias
        x = (x.view(n, 2, 2, 6) + m.pair[:, :, None]).reshape(n, 4, 6)
        return m.head(x.tanh().mean(dim=1))

    return Forward(
        forward, mix=nn.Linear(6, 6), bias=parameter(1, 2, 6), pair=parameter(1, 2, 6),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("samples along the second axis of one row", 6)
def one_row():
    return Forward(
        lambda m, x: m.head(m.mix(x[None]).tanh()[0]), mix=nn.Linear(6, 6),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


# ---------------------------------------------------------------------------- convolutions


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@architecture("ConvNeXt block", 3, 8, 8)
def convnext(scale=1e-6):
    def forward(m, x):
        x = m.stem_norm(m.stem(x))
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        y = m.gamma * m.down(F.gelu(m.up(y)))
        return m.head((x + y.permute(0, 3, 1, 2)).mean(dim=(2, 3)))

    return Forward(
        forward, stem=nn.Conv2d(3, 6, 2, 2), stem_norm=LayerNorm2d(6),
        depthwise=nn.Conv2d(6, 6, 3, padding=1, groups=6), norm=nn.LayerNorm(6),
        up=nn.Linear(6, 12), down=nn.Linear(12, 6), gamma=nn.Parameter(torch.full((6,), scale)),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("ResNet block, BatchNorm in train mode", 3, 6, 6)
def resnet():
    def forward(m, x):
        x = F.relu(m.norm1(m.conv1(x)), inplace=True)
        y = m.norm2(m.conv2(x))
        y += m.short(x)
        return m.head(y.relu_().flatten(2).mean(dim=2))

    model = Forward(
        forward, conv1=nn.Conv2d(3, 5, 3, padding=1, bias=False), norm1=nn.BatchNorm2d(5),
        conv2=nn.Conv2d(5, 5, 3, padding=1), norm2=nn.BatchNorm2d(5), short=nn.Conv2d(5, 5, 1),
        head=nn.Linear(5, CLASSES),
    )  # fmt: skip
    model(torch.randn(9, 3, 6, 6))  # statistics other than 0 and 1
    return model.train()


@architecture("GroupNorm and InstanceNorm", 3, 6, 6)
def group_norm():
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, 2), nn.InstanceNorm2d(4, affine=True), nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(),
        nn.Linear(36, CLASSES),
    )  # fmt: skip


def convolution(**settings):
    return nn.Sequential(
        nn.Conv2d(2, 4, settings.pop("kernel", 2), **settings), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


for name, settings in {
    "plain": {"stride": 2},
    "padding": {"stride": 2, "padding": 1},
    "groups": {"stride": 2, "groups": 2},
    "dilation": {"stride": 2, "dilation": 2},
    "same, 1 x 1": {"kernel": 1, "padding": "same"},
    "circular": {"stride": 2, "padding": 1, "padding_mode": "circular"},
}.items():
    architecture(f"convolution, kernel = stride, {name}", 2, 7, 6)(
        lambda settings=settings: convolution(**settings)
    )


# ---------------------------------------------------------------------------- recurrent


def recurrent(kind):
    return Forward(
        lambda m, x: m.head(m.cells(m.embed(x))[0][:, -1]), embed=nn.Linear(3, 5),
        cells=kind(5, 6, batch_first=True, bidirectional=True), head=nn.Linear(12, CLASSES),
    )  # fmt: skip


architecture("LSTM", 5, 3)(lambda: recurrent(nn.LSTM))
architecture("GRU", 5, 3)(lambda: recurrent(nn.GRU))


@architecture("GRU cell, time first", 2, 3)
def cell():
    def forward(m, x):
        state = x.new_zeros(len(x), 6)
        for step in m.embed(x.transpose(0, 1)):
            state = m.cell(step, state)
        return m.head(state)

    return Forward(
        forward, embed=nn.Linear(3, 5), cell=nn.GRUCell(5, 6), head=nn.Linear(6, CLASSES)
    )


# ---------------------------------------------------------------------------- weights of weights


@architecture("MLP, weights shared", 6)
def shared():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), first, nn.Linear(6, CLASSES))


class LoraLinear(nn.Linear):
    def __init__(self, wide, tall, rank=2):
        super().__init__(wide, tall)
        self.a, self.b = parameter(rank, wide), parameter(tall, rank)

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


class LoraAround(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@architecture("LoRA, a subclass and a wrapper", 5, 6)
def lora():
    return nn.Sequential(
        LoraLinear(6, 6), nn.Tanh(), LoraAround(nn.Linear(6, 6)), nn.Flatten(),
        nn.Linear(30, CLASSES),
    )  # fmt: skip


@architecture("weight norm, old and parametrized, and spectral norm", 6)
def weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(6, 6))
    return nn.Sequential(
        old, nn.Tanh(), parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, CLASSES),
    )  # fmt: skip


class Square(nn.Module):
    def forward(self, x):
        return x * x


@architecture("pruned and parametrized", 6)
def pruned():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    parametrize.register_parametrization(model[2], "bias", Square())
    return model


@architecture("layers that are more than they seem", 5, 6)
def disguised():
    """A subclass, a replaced forward, hooks that change what goes in and out, a weight read."""
    hooked_in, hooked_out, replaced = (nn.Linear(6, 6) for _ in range(3))
    hooked_in.register_forward_pre_hook(lambda module, x: (x[0] * 3,))
    hooked_out.register_forward_hook(lambda module, x, out: out * module.weight.mean())
    replaced.forward = types.MethodType(
        lambda module, x: F.linear(x, module.weight.T, module.bias), replaced
    )
    read = nn.Linear(6, 6)
    return Forward(
        lambda m, x: m.head((m.layers(x) + 1e-2 * x @ m.layers[-1].weight).mean(dim=1)),
        layers=nn.Sequential(Doubled(6, 6), hooked_in, hooked_out, nn.Tanh(), replaced, read),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("weights read past their modules", 6)
def aliased():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    weights = [model[0].weight, model[2].bias]  # torch.func's replacements do not reach these
    return Forward(lambda m, x: m.model(x) + F.linear(x, weights[0])[:, :CLASSES] * weights[1],
                   model=model)  # fmt: skip


# ---------------------------------------------------------------------------- ways to be called


@architecture("in place: its input, a layer's input, a layer's output", 5, 6)
def in_place():
    def forward(m, x):
        x.sub_(0.5).div_(0.25)
        x = m.first(x)
        x.tanh_()
        y = m.second(x.clone())
        y += x
        return m.head(y.mean(dim=1))

    return Forward(
        forward, first=nn.Linear(6, 6), second=nn.Linear(6, 6), head=nn.Linear(6, CLASSES)
    )


@architecture("keyword arguments and outputs as HF has them", 5, 6)
def like_hf():
    def forward(m, x):
        x = m.norm(input=m.mix(input=x))
        return types.SimpleNamespace(loss=None, logits=m.head(input=x.mean(dim=1)))

    return Forward(forward, mix=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, CLASSES))


@architecture("autocast inside", 5, 6)
def autocast():
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):  # leaves float64 alone
            return m.head(m.mix(x).tanh().mean(dim=1))

    return Forward(forward, mix=nn.Linear(6, 6), head=nn.Linear(6, CLASSES))


@architecture("frozen trunk under no_grad, one layer under checkpoint", 5, 6)
def checkpointed():
    def forward(m, x):
        with torch.no_grad():
            x = m.trunk(x)
        x = m.mix(x)
        x = checkpoint(lambda x: m.inner(x).tanh(), x, use_reentrant=False)
        return m.head(x.mean(dim=1))

    trunk, mix, inner = (nn.Linear(6, 6) for _ in range(3))
    return Forward(forward, trunk=trunk, mix=mix, inner=inner, head=nn.Linear(6, CLASSES))


@architecture("two samples at a time", 5, 6)
def chunked():
    return Forward(
        lambda m, x: torch.cat([m.head(m.mix(part).tanh().mean(dim=1)) for part in x.split(2)]),
        mix=nn.Linear(6, 6), head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("another path for more than two samples", 5, 6)
def by_size():
    def forward(m, x):
        if len(x) > 2:  # the same sums, in the other order, or past the module
            x = m.mix(x.transpose(0, 1)).transpose(0, 1)
            x = F.linear(x, m.past.weight, m.past.bias)
        else:
            x = m.past(m.mix(x))
        return m.head(x.tanh().mean(dim=1))

    return Forward(forward, mix=nn.Linear(6, 6), past=nn.Linear(6, 6), head=nn.Linear(6, CLASSES))


@architecture("experts that each see some samples", 6)
def experts():
    def forward(m, x):
        chosen = m.gate(x).argmax(dim=1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(m.experts):
            out = out.index_add(0, (at := (chosen == k).nonzero()[:, 0]), expert(x[at]).tanh())
        return m.head(out)

    return Forward(
        forward, gate=nn.Linear(6, 3), experts=nn.ModuleList(nn.Linear(6, 6) for _ in range(3)),
        head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("masked classes", 6)
def masked_classes():
    mask = torch.tensor([0, 1, 0, 0]).bool()
    return Forward(
        lambda m, x: m.head(m.mix(m.twice(m.twice(x)))).masked_fill(mask, -math.inf),
        twice=nn.Linear(6, 6), mix=nn.Linear(6, 6), head=nn.Linear(6, CLASSES),
    )  # fmt: skip


@architecture("compiled", 5, 6)
def compiled():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Flatten(), nn.Linear(30, CLASSES))
    return torch.compile(model, backend="eager")


# ---------------------------------------------------------------------------- the comparison


def build(name, n=7, seed=0):
    """Return the model in float64 and n samples."""
    torch.manual_seed(seed)
    make, samples = ARCHITECTURES[name]
    return make().double(), samples(n)


@contextlib.contextmanager
def evaluated(model):
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    yield
    torch.backends.mha.set_fastpath_enabled(fast)
    for module, training in modes.items():
        module.training = training


def drawn(model, x, u):
    """Labels by inversion of the model's own distribution."""
    with torch.no_grad(), evaluated(model):
        cdf = logits_of(model(x.clone())).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cdf / cdf[:, -1:], u[:, None])[:, 0]


def logits_of(out):
    return getattr(out, "logits", out)


def reference(model, x, y, score="log-prob", func=True):
    """The definition, in eval mode: the mean of each sample's squared gradient."""
    parameters = dict(model.named_parameters())
    for p in parameters.values():
        p.requires_grad_(True)

    def value(values, x, y):
        out = logits_of(torch.func.functional_call(model, values, (x[None].clone(),)))
        return (out if score == "logit" else out.log_softmax(dim=1))[0].gather(0, y[None])[0]

    per_sample = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))
    with evaluated(model):
        try:
            grads = per_sample({n: p.detach() for n, p in parameters.items()}, x, y) if func else {}
        except (RuntimeError, NotImplementedError):
            grads = {}
        if grads:
            return {name: grad.square().mean(dim=0) for name, grad in grads.items()}
        total = {name: torch.zeros_like(p).detach() for name, p in parameters.items()}
        for sample, label in zip(x, y, strict=True):
            grads = torch.autograd.grad(
                value({}, sample, label), list(parameters.values()), allow_unused=True
            )
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    total[name] += grad.to_dense().square() / len(x)
        return total


def errors(scores, expected):
    """The relative error of each tensor, by norm; of an exact zero, what there is."""
    largest = max(value.norm() for value in expected.values())
    return {
        name: ((total - expected[name]).norm() / expected[name].norm()).item()
        if expected[name].norm() > 1e-24 * largest
        else ((total - expected[name]).norm() / largest).item()  # a sum that cancels
        for name, total in scores.items()
    }


SIZES = [(1, 7, 4), (2, 3)]  # of batches of 7 samples, one Scorer for each row
OPTIONS = [("true", "log-prob"), ("sampled", "logit")]


def worst_error(name, sizes, seed, labels, score, chosen=slice(None)):
    """The largest relative error over batch sizes, with one Scorer."""
    model, x = build(name, seed=seed)
    names = [name for name, _ in model.named_parameters()][chosen]
    given = torch.randint(CLASSES, (7,)) if labels == "true" else torch.rand(7).double()
    if labels == "true" and name == "masked classes":
        given[given == 1] = 2  # which it gives no probability
    y = given if labels == "true" else drawn(model, x, given)
    expected = reference(model, x, y, score, name not in NOT_FOR_FUNC)
    scorer = Scorer(model, parameters=names, labels=labels, score=score, dtype=torch.float64)
    worst = 0.0
    for size in sizes:
        batches = zip(x.split(size), given.split(size), strict=True)
        scores = scorer.diagonal(batches)
        assert list(scores) == names
        worst = max(worst, *errors(scores, expected).values())
    return worst


quiet = pytest.mark.filterwarnings(
    "ignore:per-sample gradients one by one", "ignore:There is a performance drop"
)


@quiet
@pytest.mark.parametrize(("sizes", "option"), list(zip(SIZES, OPTIONS, strict=True)), ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_mean_squared_per_sample_gradients(name, sizes, option):
    assert worst_error(name, sizes, 0, *option) < 1e-10


@quiet
@pytest.mark.parametrize("chosen", [slice(0, None, 2), slice(-1, None)], ids=["half", "last"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_some_parameters_have_the_scores_that_they_have_among_all(name, chosen):
    assert worst_error(name, (4,), 1, "sampled", "log-prob", chosen) < 1e-10


@quiet
@pytest.mark.parametrize("name", ["ViT of this project", "ResNet block, BatchNorm in train mode"])
def test_a_scorer_takes_samples_of_several_shapes_in_one_stream(name):
    model, _ = build(name)
    channels = 3
    batches = [torch.randn(n, channels, s, s).double() for n, s in ((3, 32), (1, 40), (2, 32))]
    found = fisher_diagonal(
        model, [(x, torch.zeros(len(x)).long()) for x in batches], labels="true",
        dtype=torch.float64,
    )  # fmt: skip
    each = [(len(x), reference(model, x, torch.zeros(len(x)).long())) for x in batches]
    expected = {name: sum(n * part[name] for n, part in each) / 6 for name in found}
    assert max(errors(found, expected).values()) < 1e-10


@quiet
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_is_left_as_it_was(name):
    model, x = build(name)
    before = x.clone()

    def state():
        for module in model.modules():
            for part in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
                yield from ((part, key, id(value)) for key, value in vars(module)[part].items())
            yield module.training
        for p in model.parameters():
            yield p.requires_grad, None if p.grad is None else id(p.grad)

    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 1)
        p.grad = torch.ones_like(p) if i % 2 else None
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    earlier = list(state())
    with torch.inference_mode():
        fisher_diagonal(model, [x])
    assert list(state()) == earlier and torch.equal(x, before)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None or (p.grad == 1).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_that_cancel_are_no_reason_to_score_one_by_one(dtype, recwarn):
    model, x = build("attention with queries, keys and values apart")
    scores = fisher_diagonal(model.to(dtype), [x.to(dtype)])
    assert not recwarn.list
    assert scores["k.bias"].max() < 1e-2 * scores["q.bias"].max()  # a zero, but for rounding


def main():
    out = ROOT / "results" / "bench" / "fisher_architectures.csv"
    table = []
    for name in ARCHITECTURES:
        runs = [(*run, *option) for run in zip(SIZES, (0, 1), strict=True) for option in OPTIONS]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table.append((name, f"{max(worst_error(name, *run) for run in runs):.1e}"))
        print(f"{table[-1][0]:60} {table[-1][1]}", flush=True)
    with out.open("w", newline="") as file:
        file.write("# command: python tests/leaves/test_fisher_architectures.py\n")
        file.write(f"# torch: {torch.__version__}\n")
        file.write("# largest relative error of a tensor's scores, in float64\n")
        csv.writer(file, lineterminator="\n").writerows([("architecture", "error"), *table])


if __name__ == "__main__":
    main()
