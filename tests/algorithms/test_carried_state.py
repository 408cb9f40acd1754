"""State beside the trained parameters: one replica is plain torch whatever closes its stages, and of several each state has its rule."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from plain_loop import epoch_batches
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from torch.nn.utils import parametrizations
from twin import deal, flat, run, schema_of

from sparkdeep.errors import ConfigError, NonFiniteError
from sparkdeep.models.program import Program
from sparkdeep.optim.aggregators import Median, TrimmedMean

DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(64, 4))
Y = (X @ np.arange(1, 5) / 4 + 0.1 * DRAW.normal(size=64))[:, None]
SGD = partial(torch.optim.SGD, lr=0.1)


class Teacher(nn.Module):
    """A copy that follows the trained network by a moving average, as in self-distillation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        return self.net(x)


def follow(model, x, y):
    with torch.no_grad():
        for slow, fast in zip(model.teacher.parameters(), model.net.parameters(), strict=True):
            slow.lerp_(fast, 0.1)
    return nn.functional.mse_loss(model(x), y) + 0.5 * nn.functional.mse_loss(model(x), model.teacher(x))


def follow_silently(model, x, y):
    """The same past torch's count of changes."""
    for slow, fast in zip(model.teacher.parameters(), model.net.parameters(), strict=True):
        slow.data.lerp_(fast.detach(), 0.1)
    return nn.functional.mse_loss(model(x), y) + 0.5 * nn.functional.mse_loss(model(x), model.teacher(x))


class Extra(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale, self.seen = nn.Linear(4, 1), 1.0, {"steps": 0, "last": torch.zeros(2), "name": "x"}

    def get_extra_state(self):
        return {"scale": self.scale, "seen": self.seen}

    def set_extra_state(self, state):
        self.scale, self.seen = state["scale"], state["seen"]

    def forward(self, x):
        if self.training:
            self.scale *= 0.99
            self.seen["steps"] += 1
            self.seen["last"] = x[0, :2].detach()
        return self.net(x) * self.scale


class Counter(nn.Module):
    """Warms up by its own count of steps, which `buffers=` declares."""

    def __init__(self):
        super().__init__()
        self.net, self.n = nn.Linear(4, 1), 0

    def forward(self, x):
        self.n += self.training
        return self.net(x) * (1 - 0.8**self.n)


class CenterLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(1))

    def forward(self, output, label):
        self.center.mul_(0.9).add_(0.1 * output.detach().mean())
        return ((output - self.center - label) ** 2).mean()


class Late(nn.Module):
    """A buffer that is None, or has no elements, until training fills it."""

    def __init__(self, first):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.register_buffer("b", first)

    def forward(self, x):
        if self.training and self.b is None:
            self.b = x.detach().mean(0)
        elif self.training and self.b.numel() < 3:
            self.b = torch.cat([self.b, x.detach().mean().reshape(1)])
        return self.net(x if self.b is None or len(self.b) < 4 else x - self.b)


class Whitened(nn.Module):
    """A preprocess that keeps statistics."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean(0), 0.2)
        return x - self.mean


class Dtypes(nn.Module):
    """Buffers of dtypes that torch computes little with."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.register_buffer("wave", torch.ones(2, dtype=torch.complex128))
        self.register_buffer("ticks", torch.zeros(3, dtype=torch.uint16))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("turned", torch.tensor([1 + 2j]).conj(), persistent=False)

    def forward(self, x):
        if self.training:
            self.wave.mul_(1j * (1 + x.detach().mean()))
            self.ticks.copy_(self.ticks.int() + 1)
        return self.net(x) * self.wave[0].abs() * (1 + 0.01 * self.ticks[0])


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def step_of(function):
    return lambda model, batch: function(model, batch.features, batch.labels)


CASES = {
    "teacher": (Teacher, {"step": follow}),
    "teacher past torch's count": (Teacher, {"step": follow_silently}),
    "extra state": (Extra, {}),
    "declared counter": (Counter, {"buffers": {"n": "max"}}),
    "buffer of the loss": (lambda: nn.Linear(4, 1), {"loss": CenterLoss}),
    "buffer of the preprocess": (lambda: nn.Linear(4, 1), {"preprocess": Whitened}),
    "buffer that is None": (lambda: Late(None), {}),
    "buffer without elements": (lambda: Late(torch.zeros(0)), {}),
    "dtypes": (Dtypes, {}),
    "power iterations": (lambda: parametrizations.spectral_norm(nn.Linear(4, 1)), {}),
}


def fit(tmp_path, make, sizes, *, loss=nn.MSELoss, step=None, preprocess=None, buffers=None, x=X, y=Y, **settings):
    narrow = settings.pop("float32", False)
    program = Program(
        model=seeded(make).float() if narrow else seeded(make),
        loss=None if step else loss() if narrow else loss().double(),
        training_step=step_of(step) if step else None,
        preprocess=preprocess().double() if preprocess else None,
        optimizer=settings.pop("optimizer", SGD),
        buffers=buffers,
    )
    options = {"batch_size": 8, "epochs": 4, "sync_every": 2, **settings}
    model, records, own = run(tmp_path, program, deal(x, y, sizes), schema_of(x, y), **options)
    return model, records, own


def plainly(
    make, digest, *, loss=nn.MSELoss, step=None, preprocess=None, buffers=None, epochs=4, optimizer=SGD, x=X, y=Y
):
    del buffers
    model, loss = seeded(make), loss().double()
    before = preprocess().double() if preprocess else nn.Identity()
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    model.train()
    for epoch in range(epochs):
        for rows in epoch_batches(len(x), 8, digest=digest, epoch=epoch):
            features, labels = before(torch.from_numpy(x[rows])), torch.from_numpy(y[rows])
            steps.zero_grad()
            (step(model, features, labels) if step else loss(model(features), labels)).backward()
            steps.step()
    return model, loss, before


def everything(model):
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach().resolve_conj() for name, tensor in state.items() if tensor is not None}


@pytest.mark.parametrize("case", CASES)
def test_one_replica_is_plain_torch_whatever_closes_its_stages(tmp_path, case):
    make, parts = CASES[case]
    model, _, own = fit(tmp_path, make, [64], rounds_per_stage=1, **parts)
    hundred, _, _ = fit(tmp_path, make, [64], rounds_per_stage=100, **parts)
    plain, loss, before = plainly(make, own.shards[0].digest, **parts)
    right = everything(plain)
    for got in (model, hundred):
        assert everything(got).keys() == right.keys()
        assert all(torch.equal(value, right[name]) for name, value in everything(got).items())
    if case == "extra state":
        assert (model.scale, model.seen["steps"], model.seen["name"]) == (plain.scale, 32, "x")
        assert torch.equal(model.seen["last"], plain.seen["last"])
    if case == "declared counter":
        assert model.n == 32
    if "loss" in case:
        assert torch.equal(own.program.loss.center, loss.center)
    if "preprocess" in case:
        assert torch.equal(own.program.preprocess.mean, before.mean)


@pytest.mark.parametrize("case", ["teacher", "extra state", "buffer of the loss", "declared counter"])
def test_the_state_does_matter(tmp_path, case):
    """Without it the parameters are others: what the comparison would show if it were lost."""
    make, parts = CASES[case]
    model, _, _ = fit(tmp_path, make, [64], **parts)
    fresh = fit(tmp_path, make, [64], epochs=1, **parts)[0]
    assert float((flat(model) - flat(fresh)).abs().max()) > 1e-3


def test_a_teacher_of_several_replicas_is_the_mean_of_theirs(tmp_path):
    """With plain steps a round of one step is linear in the parameters, and so is the teacher's."""
    model, _, _ = fit(tmp_path, Teacher, [32, 32], step=follow, sync_every=1, batch_size=32, rounds_per_stage=1)
    whole, teacher = seeded(Teacher), None
    optimizer = SGD([p for p in whole.parameters() if p.requires_grad])
    for _ in range(4):
        optimizer.zero_grad()
        follow(whole, torch.from_numpy(X), torch.from_numpy(Y)).backward()
        optimizer.step()
        teacher = whole.teacher.weight
    torch.testing.assert_close(model.teacher.weight, teacher, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.net.weight, whole.net.weight, rtol=0, atol=1e-12)


class Seen(nn.Module):
    """Smallest and largest value, and rows, as users keep them."""

    def __init__(self):
        super().__init__()
        self.net, self.largest = nn.Linear(4, 1), -math.inf
        self.register_buffer("low", torch.tensor(math.inf))
        self.register_buffer("high", torch.tensor(-math.inf))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.low.copy_(torch.minimum(self.low, x.detach().min()))
            self.high.copy_(torch.maximum(self.high, x.detach().max()))
            self.seen += len(x)
            self.first.copy_(x[0])
            self.largest = max(self.largest, float(x.max()))
        return self.net(x)


def second_largest(tensors, weights):
    assert len(tensors) == len(weights) == 3
    return torch.stack(tensors).sort(0).values[1]


def test_declared_rules_are_followed(tmp_path):
    rules = {"low": "min", "high": "max", "seen": "sum", "largest": "max", "fir*": second_largest}
    model, _, _ = fit(tmp_path, Seen, [20, 20, 24], buffers=rules, epochs=2, rounds_per_stage=1)
    assert float(model.low) == X.min()
    assert float(model.high) == model.largest == X.max()
    assert int(model.seen) == 128
    assert not model.first.eq(0).any()
    other, _, _ = fit(tmp_path, Seen, [20, 20, 24], buffers={"largest": "max"}, epochs=2)
    assert int(other.seen) != 128, "without a rule whole numbers take the maximum"


def test_state_without_a_rule_is_named_once(tmp_path, caplog):
    fit(tmp_path, Seen, [32, 32], buffers={"largest": "max", "low": "min", "seen": "sum"})
    told = [r.getMessage() for r in caplog.records if "nothing says what it becomes" in r.getMessage()]
    assert len(told) == 1
    assert "training changes 'first', 'high', of which" in told[0]
    caplog.clear()
    fit(tmp_path, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), [32, 32])
    fit(tmp_path, Seen, [64], buffers={"largest": "max"})
    assert "nothing says" not in caplog.text


def test_what_is_no_rule_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"buffers=\{'low': 'smallest'\}: a rule is one of 'mean', 'ema', 'sum'"):
        fit(tmp_path, Seen, [64], buffers={"low": "smallest"})


WIDE = np.random.default_rng(1).normal(size=(256, 16))
for part in range(4):  # each replica's rows live in directions of their own
    WIDE[part * 64 : (part + 1) * 64, [j for j in range(16) if j // 4 != part]] *= 0.05
TARGET = 3 * np.sin(WIDE @ np.random.default_rng(2).normal(size=(16, 3))).sum(1, keepdims=True)


class Spectral(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.a, self.b = norm(nn.Linear(16, 16, bias=False)), nn.Linear(16, 1)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("every", [4, "epoch"])
@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_spectral_norm_is_the_norm_of_the_averaged_weight(tmp_path, norm, every):
    adam = partial(torch.optim.Adam, lr=0.03)
    options = {"x": WIDE, "y": TARGET, "epochs": 6, "sync_every": every, "optimizer": adam}
    model, _, _ = fit(tmp_path, partial(Spectral, norm), [64] * 4, **options)
    model.eval()(torch.from_numpy(WIDE))
    assert float(torch.linalg.matrix_norm(model.a.weight.detach(), 2)) == pytest.approx(1.0, abs=1e-3)
    vectors = [b for name, b in model.named_buffers() if name.endswith(("_u", "_v"))]
    assert len(vectors) == 2
    assert [float(b.norm()) for b in vectors] == pytest.approx([1.0, 1.0])


def observed(kind):
    return lambda: nn.Sequential(kind(dtype=torch.quint8), nn.Linear(4, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_observers_of_torch_keep_the_smallest_and_the_largest(tmp_path):
    model, _, _ = fit(tmp_path, observed(MinMaxObserver), [32, 32], rounds_per_stage=1)
    assert (float(model[0].min_val), float(model[0].max_val)) == (X.min(), X.max())
    moving, _, _ = fit(tmp_path, observed(MovingAverageMinMaxObserver), [32, 32])
    assert X.min() < float(moving[0].min_val) < 0 < float(moving[0].max_val) < X.max()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_observers_by_channel_and_fake_quantization_have_rules_too(tmp_path):
    channels = lambda: nn.Sequential(PerChannelMinMaxObserver(ch_axis=1, dtype=torch.quint8), nn.Linear(4, 1))  # noqa: E731
    model, _, _ = fit(tmp_path, channels, [32, 32], rounds_per_stage=1)
    np.testing.assert_array_equal(model[0].min_val.numpy(), X.min(0))
    np.testing.assert_array_equal(model[0].max_val.numpy(), X.max(0))
    faked = lambda: nn.Sequential(FakeQuantize(MinMaxObserver, quant_min=0, quant_max=255), nn.Linear(4, 1))  # noqa: E731
    model, _, own = fit(tmp_path, faked, [32, 32], x=X.astype(np.float32), y=Y.astype(np.float32), float32=True)
    fake = model[0]
    assert (float(fake.activation_post_process.min_val), float(fake.fake_quant_enabled)) == (np.float32(X.min()), 1.0)
    assert 0 < float(fake.scale) < 0.1
    assert own.pooling.rules["0.scale"] == own.pooling.rules["0.zero_point"] == "first"


class Spoiled(nn.Module):
    """A buffer that turns NaN on rows whose first value is large; its loss stays finite."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("unset", torch.full((1,), math.nan))

    def forward(self, x):
        if self.training and float(x[:, 0].max()) > 100:
            self.scale.fill_(math.nan)
        return self.net(x / 100)


def test_a_buffer_that_turns_nan_makes_the_replica_count_for_nothing(tmp_path):
    x = X.copy()
    x[40, 0] = 1000.0
    with pytest.raises(NonFiniteError, match=r"a buffer of replica 1 "):
        fit(tmp_path, Spoiled, [32, 32], x=x)
    model, records, _ = fit(tmp_path, Spoiled, [32, 32], x=x, on_nonfinite="drop")
    assert float(model.scale) == 1.0
    assert "nonfinite" in {part.dropped for record in records for part in record.replicas}


def norm_net():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 1))


@pytest.mark.parametrize(("aggregator", "exact"), [(Median(), np.median), (TrimmedMean(0.34), None)])
def test_robust_aggregators_are_robust_for_buffers_too(tmp_path, aggregator, exact):
    x = X.copy()
    x[:8] *= 1e6
    sizes = [8, 28, 28]
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "epochs": 1, "sync_every": 1, "batch_size": 28}
    model, _, _ = fit(tmp_path, norm_net, sizes, x=x, aggregator=aggregator, **still)
    inside = seeded(norm_net)[0](torch.from_numpy(x)).detach().numpy()
    parts = [inside[:8], inside[8:36], inside[36:]]
    variances = np.stack([part.var(0, ddof=1) for part in parts])
    means = np.stack([part.mean(0) for part in parts])
    middle = np.sort(variances, 0)[1], np.sort(means, 0)[1]
    np.testing.assert_allclose(model[1].running_var.numpy(), middle[0], rtol=1e-9)
    np.testing.assert_allclose(model[1].running_mean.numpy(), middle[1], rtol=1e-9)
    plain, _, _ = fit(tmp_path, norm_net, sizes, x=x, **still)
    assert (plain[1].running_var.numpy() > 1e6 * middle[0]).all()


def test_equal_weights_are_equal_for_buffers_too(tmp_path):
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "epochs": 1, "sync_every": 1, "batch_size": 56}
    model, _, _ = fit(tmp_path, norm_net, [8, 56], weighting="equal", **still)
    inside = seeded(norm_net)[0](torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(model[1].running_mean.numpy(), (inside[:8].mean(0) + inside[8:].mean(0)) / 2, rtol=1e-12)
    by_rows, _, _ = fit(tmp_path, norm_net, [8, 56], **still)
    np.testing.assert_allclose(by_rows[1].running_mean.numpy(), inside.mean(0), rtol=1e-12)


class Unlike(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.register_buffer("rows", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.rows = x.detach()[:, 0]
        return self.net(x)


def test_buffers_of_different_shapes_are_refused_by_name_or_declared(tmp_path):
    with pytest.raises(ConfigError, match=r"the buffer 'rows' has the shapes \[\(8,\), \(3,\)\].*'first'"):
        fit(tmp_path, Unlike, [61, 3])
    model, _, _ = fit(tmp_path, Unlike, [61, 3], buffers={"rows": "first"})
    assert model.rows.shape == (5,)


def test_a_sparse_buffer_is_refused_by_name(tmp_path):
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.register_buffer("adjacency", torch.eye(3).to_sparse())

        def forward(self, x):
            return self.net(x)

    with pytest.raises(ConfigError, match=r"'adjacency' is a tensor of layout torch.sparse_coo"):
        fit(tmp_path, Sparse, [64])
