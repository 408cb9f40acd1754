"""The aggregators held to numpy written out, to the identities of their papers, and to one replica that is far off."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from twin import deal, flat, run, schema_of

from sparkdeep.errors import ConfigError
from sparkdeep.models.program import Program
from sparkdeep.optim.aggregators import (
    Aggregator,
    Changes,
    Median,
    NormClip,
    RadialDirectional,
    TrimmedMean,
    aggregator_of,
    embeddings_of,
)
from sparkdeep.rounds.identity import describe
from sparkdeep.settings.contradictions import check_together
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.tensors.encoding import CHUNK
from sparkdeep.tensors.mean import OrderedSum
from sparkdeep.tensors.parameters import Layout

ALL = [NormClip(), Median(), TrimmedMean(0.34), RadialDirectional()]
NAMES = [type(one).__name__ for one in ALL]


class Tensors(nn.Module):
    """Parameters of the given sizes."""

    def __init__(self, *sizes, dtype=torch.float64):
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes])


def added(total, vectors):
    for i, vector in enumerate(vectors):
        if vector is not None:
            total.add(i, lambda a, b, vector=vector: vector[a:b], lambda: None)
    return total.mean()


def combined(aggregator, vectors, weights=None, *, start=None, differences=False, sizes=None, plain=frozenset()):
    size = next(len(vector) for vector in vectors if vector is not None)
    layout = Layout.of(Tensors(*(sizes or [size])))
    total = Changes(
        aggregator,
        layout,
        [1.0] * len(vectors) if weights is None else weights,
        start=torch.zeros(size, dtype=torch.float64) if start is None else start,
        differences=differences,
        out=torch.empty(size, dtype=torch.float64),
        plain=plain,
    )
    return added(total, vectors).clone()


def averaged(vectors, weights=None):
    total = OrderedSum(len(vectors[0]), [1.0] * len(vectors) if weights is None else weights)
    return added(total, vectors).clone()


def drawn(count, size, seed=0, scale=1.0):
    return scale * torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- numpy written out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_the_median_is_numpys_also_of_an_even_number(count):
    x = drawn(count, 11)
    np.testing.assert_array_equal(combined(Median(), x), np.median(x, axis=0))


@pytest.mark.parametrize(("count", "share", "cut"), [(5, 0.2, 1), (4, 0.2, 0), (7, 0.3, 2), (9, 0.49, 4), (3, 0.0, 0)])
def test_the_trimmed_mean_leaves_out_whole_replicas_at_both_ends(count, share, cut):
    x = drawn(count, 11)
    expected = np.sort(x, axis=0)[cut : count - cut].mean(axis=0)
    np.testing.assert_allclose(combined(TrimmedMean(share), x), expected, rtol=1e-15, atol=1e-16)
    if cut:
        assert np.abs(expected - np.sort(x, axis=0)[cut - 1 : count - cut + 1].mean(axis=0)).max() > 1e-3


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [3.0, 5.0, 1.0, 4.0]])
def test_the_clipped_mean_cuts_changes_to_the_median_of_their_norms(weights):
    start, changes = drawn(1, 9, seed=1)[0], drawn(4, 9, seed=2) * torch.tensor([[1.0], [2.0], [5.0], [100.0]])
    d, w = changes.numpy(), np.array(weights) / sum(weights)
    norms = np.linalg.norm(d, axis=1)
    shares = w * np.minimum(1.0, np.median(norms) / norms)
    expected = start.numpy() + shares @ d
    np.testing.assert_allclose(combined(NormClip(), start + changes, weights, start=start), expected, rtol=1e-13)
    assert np.abs(start.numpy() + w @ d - expected).max() > 1.0, "the mean is another"


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.0, 5.0, 1.0]])
def test_the_radial_directional_mean_is_of_each_tensor_by_itself(weights):
    sizes, start, changes = [4, 6, 5], drawn(1, 15, seed=1)[0], drawn(3, 15, seed=2, scale=3.0)
    w = np.array(weights) / sum(weights)
    expected = start.numpy().copy()
    for part in (slice(0, 4), slice(4, 10), slice(10, 15)):
        d = changes.numpy()[:, part]
        norms = np.linalg.norm(d, axis=1)
        direction = w @ (d / norms[:, None])
        expected[part] += (w @ norms) * direction / np.linalg.norm(direction)
    given = combined(RadialDirectional(), start + changes, weights, start=start, sizes=sizes)
    np.testing.assert_allclose(given, expected, rtol=1e-13, atol=1e-14)
    whole = combined(RadialDirectional(), start + changes, weights, start=start)
    assert np.abs(whole.numpy() - expected).max() > 1e-2, "in one piece it is another"


def test_embeddings_take_the_plain_mean_where_directions_are_averaged():
    x, plain = drawn(5, 10), frozenset({"parts.1"})
    given = combined(RadialDirectional(), x, sizes=[4, 6], plain=plain)
    np.testing.assert_allclose(given[4:], x[:, 4:].mean(0), rtol=1e-14, atol=1e-16)
    np.testing.assert_array_equal(given[:4], combined(RadialDirectional(), x, sizes=[4, 6])[:4])
    assert given[:4].norm() > 1.3 * x[:, :4].mean(0).norm()


def test_embeddings_are_found_by_their_modules_also_where_they_are_shared():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.bag = nn.EmbeddingBag(4, 3)
            self.head = nn.Linear(3, 5)
            self.head.weight = self.table.weight

    assert embeddings_of(Text()) == {"table.weight", "bag.weight"}
    assert embeddings_of(nn.Linear(2, 2)) == frozenset()
    names = [entry.name for entry in Layout.of(Text()).entries]
    assert "head.weight" not in names
    tied_first = nn.ModuleDict({"head": nn.Linear(3, 5, bias=False), "table": nn.Embedding(5, 3)})
    tied_first["table"].weight = tied_first["head"].weight
    assert embeddings_of(tied_first) == {"head.weight"}


# -- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.identity(12)
@pytest.mark.parametrize("differences", [False, True], ids=["parameters", "differences"])
@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_one_replica_is_what_it_says(aggregator, differences):
    start, change = drawn(1, 20, seed=3)[0], drawn(1, 20, seed=4)[0]
    told = change if differences else start + change
    given = combined(aggregator, [told], [7.0], start=start, differences=differences, sizes=[8, 12])
    torch.testing.assert_close(given, start + change, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_replicas_that_agree_are_what_they_say_and_none_moves_where_none_did(aggregator):
    start, change = drawn(1, 20, seed=3)[0], drawn(1, 20, seed=4)[0]
    torch.testing.assert_close(combined(aggregator, [start + change] * 5, start=start), start + change)
    torch.testing.assert_close(combined(aggregator, [start] * 5, start=start), start, rtol=1e-15, atol=0)


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_parameters_and_differences_from_the_start_give_the_same(aggregator):
    start, changes = drawn(1, 20, seed=3)[0], drawn(6, 20, seed=4)
    parameters = combined(aggregator, start + changes, start=start, sizes=[8, 12])
    told = combined(aggregator, changes, start=start, differences=True, sizes=[8, 12])
    torch.testing.assert_close(told, parameters, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_a_replica_of_weight_zero_does_not_count_and_their_order_does_not_matter(aggregator):
    x = drawn(4, 9)
    alone = combined(aggregator, list(x))
    assert torch.equal(combined(aggregator, [x[0], None, *x[1:]], [1.0, 0.0, 1.0, 1.0, 1.0]), alone)
    for order in permutations(range(4)):
        torch.testing.assert_close(combined(aggregator, x[list(order)]), alone, rtol=1e-14, atol=1e-15)


@pytest.mark.identity(12)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32, 64])
def test_the_radial_directional_mean_keeps_the_length_that_a_mean_loses(count):
    x = drawn(count, 4000)
    length = float(x.norm(dim=1).mean())
    assert float(combined(RadialDirectional(), x).norm()) == pytest.approx(length, rel=0.02)
    assert float(averaged(x).norm()) == pytest.approx(length / math.sqrt(count), rel=0.05)


@pytest.mark.identity(12)
def test_one_zero_vector_has_no_direction_and_shortens_the_others():
    start, d = drawn(1, 6, seed=1)[0], drawn(1, 6, seed=2)[0]
    given = combined(RadialDirectional(), [start + d, start, start + d], start=start)
    torch.testing.assert_close(given - start, 2 / 3 * d, rtol=1e-13, atol=1e-14)
    assert torch.equal(combined(RadialDirectional(), [d, -d]), torch.zeros_like(d)), "opposites move nothing"


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_a_vector_of_several_chunks_is_as_its_parts(aggregator):
    size = CHUNK + 70_001
    x = drawn(3, size)
    if isinstance(aggregator, Median | TrimmedMean):
        middle = torch.cat([combined(aggregator, x[:, :CHUNK]), combined(aggregator, x[:, CHUNK:])])
        assert torch.equal(combined(aggregator, x), middle)
        return
    d = x.numpy()
    norms = np.linalg.norm(d, axis=1)
    if isinstance(aggregator, NormClip):
        expected = (np.minimum(1.0, np.median(norms) / norms) @ d) / 3
    else:
        expected = norms.mean() * (towards := (1.0 / norms) @ d) / np.linalg.norm(towards)
    np.testing.assert_allclose(combined(aggregator, x), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_float32_is_computed_in_float64_and_rounded_once(aggregator):
    x = drawn(5, 40).float()
    layout = Layout.of(Tensors(40, dtype=torch.float32))
    out = torch.empty(40)
    total = Changes(aggregator, layout, [1.0] * 5, start=torch.zeros(40), differences=False, out=out)
    assert torch.equal(added(total, x), combined(aggregator, x.double()).float())


def test_what_is_not_all_there_is_an_error_of_ours():
    total = Changes(
        Median(), Layout.of(Tensors(3)), [1.0, 0.0, 1.0],
        start=torch.zeros(3, dtype=torch.float64), differences=False, out=torch.empty(3, dtype=torch.float64),
    )  # fmt: skip
    total.add(0, lambda a, b: torch.ones(b - a, dtype=torch.float64), lambda: None)
    with pytest.raises(AssertionError, match=r"replicas \[2\] have not added"):
        total.mean()
    with pytest.raises(AssertionError, match="replica 1 does not count"):
        total.add(1, lambda a, b: torch.ones(b - a), lambda: None)


# -- whole fits -----------------------------------------------------------------------------------------------------

SIZES = [16, 16, 16]


class Spoil:
    """Multiplies the features of the replica whose rows begin with `mark`."""

    def __init__(self, mark, factor):
        self.mark, self.factor = mark, factor

    def __call__(self, features):
        return features * self.factor if self.mark is not None and int(features[0, 0]) == self.mark else features


def program(spoil=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return Program(model=net, loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.05), augment=spoil)


def linear(spoil=None):
    torch.manual_seed(0)
    return Program(model=nn.Linear(4, 1).double(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.01), augment=spoil)


def table(sizes=SIZES, marks=None):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes), 4))
    x[:, 0] = np.repeat(marks or range(len(sizes)), sizes)
    return x, rng.normal(size=(sum(sizes), 1))


def fitted(tmp_path, own, sizes=SIZES, keep=None, **options):
    x, y = table(sizes)
    parts = deal(x, y, sizes)
    parts = parts if keep is None else [parts[i] for i in keep]
    settings = {"epochs": 2, "batch_size": 4, "sync_every": 2, **options}
    _, records, fit = run(tmp_path, own, parts, schema_of(x, y), **settings)
    return flat(own.model), records, fit


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_a_fit_of_one_round_is_the_aggregator_of_fits_alone(tmp_path, aggregator):
    options = {"epochs": 1, "batch_size": 16, "sync_every": 1}  # all rows at once: in no order
    sizes = [16, 16, 16, 16]
    start = flat(program().model)
    alone = [fitted(tmp_path, program(), sizes, [i], **options)[0] for i in range(4)]
    model = program().model
    shapes = [parameter.numel() for parameter in model.parameters()]
    expected = combined(aggregator, alone, start=start, sizes=shapes)
    trained, records, _ = fitted(tmp_path, program(), sizes, aggregator=aggregator, **options)
    torch.testing.assert_close(trained, expected, rtol=1e-13, atol=1e-14)
    assert len(records) == 1
    assert (fitted(tmp_path, program(), sizes, **options)[0] - expected).abs().max() > 1e-5, "the mean is another"


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_a_lossy_codec_brings_differences_and_the_same_within_its_loss(tmp_path, aggregator):
    trained, _, _ = fitted(tmp_path, program(), aggregator=aggregator)
    coded, _, _ = fitted(tmp_path, program(), aggregator=aggregator, codec="bf16")
    change = (trained - flat(program().model)).norm()
    assert 0 < (coded - trained).norm() < 0.02 * change


@pytest.mark.identity(12)
@pytest.mark.parametrize("aggregator", [NormClip(), Median(), TrimmedMean(0.34)], ids=NAMES[:3])
def test_one_replica_that_is_a_million_times_off_does_not_take_the_others_along(tmp_path, aggregator):
    options = {"epochs": 1, "batch_size": 8, "sync_every": 1}
    sizes, spoil = [8, 8, 8], Spoil(1, 1e6)
    start = flat(linear().model)
    honest = torch.stack([fitted(tmp_path, linear(), sizes, [i], **options)[0] for i in (0, 2)])
    bad, _, _ = fitted(tmp_path, linear(spoil), sizes, [1], **options)
    assert torch.isfinite(bad).all()
    assert (bad - start).norm() > 1e6 * (honest - start).norm(dim=1).max()
    trained, _, _ = fitted(tmp_path, linear(spoil), sizes, aggregator=aggregator, **options)
    mean, _, _ = fitted(tmp_path, linear(spoil), sizes, **options)
    low, high = honest.amin(0), honest.amax(0)
    reach = float((honest - start).norm(dim=1).max())
    assert float((mean - start).norm()) > 1e5 * reach, "the mean goes with it"
    if isinstance(aggregator, NormClip):
        assert float((trained - start).norm()) <= reach * (1 + 1e-12)
    else:
        assert ((low <= trained) & (trained <= high)).all(), "in the honest hull, coordinate by coordinate"
        assert not ((low <= mean) & (mean <= high)).all()


@pytest.mark.identity(13)
@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_a_replica_of_nan_is_dropped_and_the_rest_are_combined_as_without_it(tmp_path, aggregator):
    options = {"epochs": 1, "batch_size": 16, "sync_every": 1, "aggregator": aggregator}
    spoiled, records, _ = fitted(tmp_path, program(Spoil(1, math.nan)), on_nonfinite="drop", **options)
    assert [part.dropped for part in records[0].replicas] == ["", "nonfinite", ""]
    without, _, _ = fitted(tmp_path, program(), keep=[0, 2], **options)
    torch.testing.assert_close(spoiled, without, rtol=1e-14, atol=1e-15)
    assert (spoiled - fitted(tmp_path, program(), **options)[0]).abs().max() > 1e-4


@pytest.mark.parametrize("aggregator", ALL, ids=NAMES)
def test_a_fit_goes_on_from_its_checkpoint_as_if_never_cut(tmp_path, aggregator):
    options = {"aggregator": aggregator, "outer_optimizer": partial(SGD, lr=0.7, momentum=0.9)}
    whole, _, _ = fitted(tmp_path, program(), epochs=4, **options)

    def directory():
        return CheckpointDirectory(LocalStore(tmp_path / "kept"), identity={"run": "same"})

    first = fitted(tmp_path, program(), epochs=2, checkpoints=directory(), checkpoint_every=1, **options)
    assert not torch.equal(first[0], whole)
    second = fitted(tmp_path, program(), epochs=4, checkpoints=directory(), checkpoint_every=1, **options)
    assert second[2].resumed_from == len(first[1]) > 0
    torch.testing.assert_close(second[0], whole, rtol=0, atol=0)


@dataclasses.dataclass(frozen=True)
class First(Aggregator):
    """A user's own: the first replica's parameters, but the last `short` of them."""

    short: int = 0

    def combine(self, changes, weights):
        for part in changes.slices(slice(0, changes.layout.numel - self.short)):
            yield part, changes.parameters(part)[0]


def test_the_plain_mean_is_an_aggregator_too_and_streams():
    x, weights = drawn(5, 33), [2.0, 1.0, 4.0, 4.0, 3.0]
    expected = averaged(x, weights)
    torch.testing.assert_close(combined(aggregator_of("mean"), x, weights), expected, rtol=1e-14, atol=1e-15)
    assert aggregator_of(Median()) == Median()


def test_an_aggregator_of_the_users_own_is_taken(tmp_path):
    options = {"epochs": 1, "batch_size": 16, "sync_every": 1}
    alone = fitted(tmp_path, program(), [16, 16], [0], **options)[0]
    trained, _, _ = fitted(tmp_path, program(), [16, 16], aggregator=First(), **options)
    torch.testing.assert_close(trained, alone, rtol=0, atol=0)
    assert describe(First()) == {"class": f"{__name__}:First", "short": 0}, "what a run is resumed by"


def test_one_that_leaves_parameters_out_is_refused():
    with pytest.raises(ConfigError, match=r"aggregator=First\(short=3\): combine gave 8 of 11 parameters"):
        combined(First(short=3), drawn(2, 11))


def test_weights_may_be_equal_and_fednova_is_refused():
    check_together(LocalSettings(), RunSettings(aggregator=NormClip(), weighting="equal"))
    with pytest.raises(ConfigError, match=r"aggregator=Median\(\) with weighting='fednova'"):
        check_together(LocalSettings(), RunSettings(aggregator=Median(), weighting="fednova"))


@pytest.mark.parametrize(
    ("local", "run_options", "why"),
    [
        ({}, {"aggregation": "ring"}, r"aggregation='ring' with aggregator=Median\(\)"),
        ({"inner_state": "average"}, {}, r"aggregator=Median\(\) with inner_state='average'"),
        ({"overlap": 1}, {}, r"aggregator=Median\(\) with overlap=1"),
    ],
)
def test_what_an_aggregator_cannot_be_combined_with_is_refused(local, run_options, why):
    with pytest.raises(ConfigError, match=why):
        check_together(LocalSettings(**local), RunSettings(aggregator=Median(), **run_options))
    assert "aggregator=Median()" in RunSettings(aggregator=Median()).closing, "what a ring and a job a round look at"


@pytest.mark.parametrize("share", [0.5, -0.1, float("nan"), "a"])
def test_a_share_that_would_leave_nobody_is_refused(share):
    with pytest.raises(ConfigError, match=r"TrimmedMean.share=.*from 0 to below 0.5"):
        TrimmedMean(share)
    assert dataclasses.asdict(TrimmedMean(0.49)) == {"share": 0.49}


def test_a_share_that_cuts_nobody_is_warned_of(tmp_path, caplog):
    fitted(tmp_path, program(), aggregator=TrimmedMean(0.2))
    assert "it cuts none of 3, and is a plain mean then. Give a share of at least 0.334" in caplog.text
    caplog.clear()
    fitted(tmp_path, program(), aggregator=TrimmedMean(0.35))
    assert not caplog.records
    fitted(tmp_path, program(), aggregator=TrimmedMean(0.35), quorum=2, quorum_grace_s=60.0)
    assert "with quorum=2: rounded down to whole replicas it cuts none of 2" in caplog.text
    assert "Use more replicas: of so few none can be cut." in caplog.text, "a share of 0.5 is refused"
