"""Codecs keep their error bounds, and training with them behaves as the theory says."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from twin import flat, run, schema_of

from sparkdeep.errors import CheckpointError, ConfigError
from sparkdeep.models.program import Program
from sparkdeep.replica.update import LocalUpdate
from sparkdeep.rounds.downlink import Downlink
from sparkdeep.settings.run import LocalSettings
from sparkdeep.tensors.encoding import CHUNK, CODECS, chunks_of, codec_named, encoded_bytes
from sparkdeep.tensors.parameters import Layout

NAMES = sorted(CODECS)


def there_and_back(name, values):
    codec = codec_named(name)
    data = codec.encode(values)
    assert data.dtype == torch.uint8
    assert data.numel() == codec.num_bytes(values.numel(), values.dtype)
    return codec.decode(data, values.numel(), values.dtype)


def values(numel, seed=0, spread=30):
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-spread, spread, (numel,), generator=generator)
    return torch.randn(numel, generator=generator) * 2.0**exponents


@pytest.mark.identity(11)
@settings(max_examples=60, deadline=None)
@given(numel=st.integers(1, 1500), seed=st.integers(0, 1000), spread=st.integers(1, 120))
def test_int8_is_off_by_at_most_half_a_step_of_its_block(numel, seed, spread):
    x = values(numel, seed, spread)
    error = (there_and_back("int8", x) - x).abs()
    for start in range(0, numel, 256):
        block = slice(start, start + 256)
        step = x[block].abs().max() / 127
        assert (error[block] <= step * 0.5000005 + 1.2e-38).all()


@settings(max_examples=30, deadline=None)
@given(numel=st.integers(1, 700), seed=st.integers(0, 1000))
def test_bf16_is_the_nearest_bfloat16(numel, seed):
    x = values(numel, seed)
    error = (there_and_back("bf16", x) - x).abs()
    assert (error <= x.abs() * 2.0**-8).all()
    assert torch.equal(there_and_back("bf16", x), x.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_keeps_every_bit(dtype):
    x = values(1000).to(dtype)
    x[:3] = torch.tensor([0.0, -0.0, 1e-310], dtype=dtype)
    assert torch.equal(there_and_back("identity", x).view(torch.uint8), x.view(torch.uint8))


@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_zeros_denormals_and_single_elements(name):
    assert torch.equal(there_and_back(name, torch.zeros(600)), torch.zeros(600))
    assert there_and_back(name, torch.tensor([3.0])).item() == pytest.approx(3.0, rel=1e-2)
    tiny = there_and_back(name, torch.full((300,), 1e-41))
    assert torch.isfinite(tiny).all()
    assert tiny.abs().max() < 1.2e-38


def test_int8_is_a_quarter_and_bf16_a_half():
    numel = 10 * CHUNK + 1000
    whole = encoded_bytes(codec_named("identity"), numel, torch.float32)
    assert whole == 4 * numel
    assert encoded_bytes(codec_named("bf16"), numel, torch.float32) * 2 == whole
    assert whole / encoded_bytes(codec_named("int8"), numel, torch.float32) > 3.9


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_is_its_chunks_one_after_the_other(name):
    numel = 2 * CHUNK + 333
    sizes = [codec_named(name).num_bytes(stop - start, torch.float32) for start, stop in chunks_of(numel)]
    assert sum(sizes) == encoded_bytes(codec_named(name), numel, torch.float32)


# -- error feedback ----------------------------------------------------------------------------------------------


class Moved(nn.Module):
    """A module whose parameters are set from outside."""

    def __init__(self, numel):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(numel))


@pytest.mark.identity(11)
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_what_feedback_sends_adds_up_to_what_was_meant(codec):
    module = Moved(500)
    update = LocalUpdate(Layout.of(module), LocalSettings(codec=codec, error_feedback=True), [module.w])
    sent, meant = torch.zeros(500), torch.zeros(500)
    for step in range(20):
        update.known.zero_()
        update.begin()
        change = values(500, seed=step, spread=3)
        module.w.data.add_(change)
        vector = update.end()
        pieces = b"".join(update.pieces(vector))
        data = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
        sent += codec_named(codec).decode(data, 500, torch.float32)
        meant += change
    residual = update.state_dict()["residual"]
    torch.testing.assert_close(sent + residual, meant, rtol=0, atol=2e-4)
    assert residual.abs().max() > 1e-4  # something was lost that had to be made up for


CENTRES = [-1.0, -0.3, 0.2, 0.9]


def floor(lr, **options):
    """Replicas with different optima; how far from their common one averaging hovers, over the last steps."""
    rng = np.random.default_rng(0)
    targets = [torch.from_numpy(c * rng.normal(size=64)) for c in CENTRES]
    modules = [Moved(64).double() for _ in CENTRES]
    updates = [LocalUpdate(Layout.of(m), LocalSettings(**options), [m.w]) for m in modules]
    codec = codec_named(options.get("codec", "identity"))
    parameters, seen = torch.zeros(64, dtype=torch.float64), []
    steps = int(12 / lr)
    for step in range(steps):
        mean = torch.zeros(64, dtype=torch.float64)
        for module, update, target in zip(modules, updates, targets, strict=True):
            update.known.copy_(parameters)
            update.begin()
            module.w.data.sub_(lr * (module.w.data - target))
            pieces = b"".join(update.pieces(update.end()))
            mean += codec.decode(torch.frombuffer(bytearray(pieces), dtype=torch.uint8), 64, torch.float64) / len(
                modules
            )
        parameters = parameters + mean if codec.lossy else mean
        if step > 0.8 * steps:
            seen.append(float((parameters - sum(targets) / len(targets)).norm()))
    return sum(seen) / len(seen)


@pytest.mark.identity(11)
def test_with_feedback_the_floor_falls_with_the_learning_rate_and_without_it_does_not():
    """int8 of what replicas change that disagree: without feedback a bias remains (Karimireddy et al., 2019)."""
    rates = (0.2, 0.02)
    assert floor(rates[0]) < 1e-3
    without = [floor(lr, codec="int8") for lr in rates]
    feedback = [floor(lr, codec="int8", error_feedback=True) for lr in rates]
    assert without[1] > 0.5 * without[0]
    assert feedback[1] < 0.3 * feedback[0]
    assert feedback[0] < without[0]


# -- the way down ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_copy_of_the_parameters_follows_them_and_loses_nothing_for_ever(codec):
    parameters = values(3000, spread=2)
    down = Downlink(codec_named(codec), overlap=False, parameters=parameters)
    module = Moved(3000)
    replica = LocalUpdate(Layout.of(module), LocalSettings(down_codec=codec), [module.w])
    replica.known.copy_(down.current)
    for step in range(5):
        parameters.add_(values(3000, seed=step, spread=2) * 0.1)
        down.after_step()
        data = torch.frombuffer(bytearray(down.encoded), dtype=torch.uint8)
        replica.take(data, 0, 3000)
        replica.begin()
        assert torch.equal(module.w.data, down.current)  # both ends hold the same copy, bit for bit
        assert not torch.equal(down.current, parameters)
    for _ in range(6):
        down.after_step()
    assert (down.current - parameters).abs().max() < 1e-7 * parameters.abs().max()


def test_a_copy_of_other_settings_is_not_restored():
    down = Downlink(codec_named("int8"), overlap=False, parameters=torch.zeros(3))
    with pytest.raises(CheckpointError, match="another down_codec"):
        down.load_state_dict({"current": None, "previous": None})


# -- a whole fit -------------------------------------------------------------------------------------------------


def regression(tmp_path, **options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 6)).astype(np.float32)
    y = (x @ rng.normal(size=(6, 2))).astype(np.float32)
    parts = [{"features": x[a:b], "label": y[a:b]} for a, b in ((0, 40), (40, 96))]
    torch.manual_seed(0)
    own = Program(model=nn.Linear(6, 2), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1, momentum=0.5))
    return run(tmp_path, own, parts, schema_of(x, y), epochs=15, batch_size=16, sync_every=2, **options)


ALL = {"codec": "int8", "down_codec": "int8", "error_feedback": True}


@pytest.mark.parametrize("options", [{"codec": "bf16"}, {"codec": "int8"}, ALL, {**ALL, "overlap": 1}])
def test_a_fit_with_a_lossy_code_learns_what_one_without_does(tmp_path, options):
    exact, _, _ = regression(tmp_path)
    coded, records, _ = regression(tmp_path, **options)
    assert not torch.equal(flat(exact), flat(coded))
    torch.testing.assert_close(flat(coded), flat(exact), rtol=0, atol=0.02)
    assert records[-1].loss < 1e-3 < records[0].loss


@pytest.mark.parametrize("options", [ALL, {**ALL, "overlap": 1}], ids=["in time", "overlap"])
@pytest.mark.parametrize("staging", [{"rounds_per_stage": 3}, {"replica_state": "durable", "checkpoint_every": 2}])
def test_stages_and_snapshots_change_not_a_bit_of_it(tmp_path, options, staging):
    together, _, _ = regression(tmp_path, **options)
    apart, _, _ = regression(tmp_path, **options, **staging)
    assert torch.equal(flat(together), flat(apart))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "int4"}, "codec='int4': must be one of 'identity', 'bf16', 'int8'. Did you mean 'int8'?"),
        ({"down_codec": "zip"}, "down_codec='zip': must be one of"),
        ({"error_feedback": True}, "error_feedback=True with codec='identity': nothing is lost"),
        ({"codec": "int8", "inner_state": "average"}, "inner_state='average' with codec='int8'"),
        ({"overlap": 1, "inner_state": "average"}, "overlap=1: averaged optimizer state"),
        ({"overlap": 2}, "overlap=2: must be one of 0, 1"),
        ({"overlap_mix": 0.5}, "overlap_mix=0.5 is for overlap=1"),
        ({"overlap": 1, "overlap_mix": 1.5}, "overlap_mix=1.5: must be a number from 0 to 1"),
        ({"overlap_fragments": 4}, "overlap_fragments=4 is for overlap=1"),
        ({"overlap": 1, "overlap_fragments": 0}, "overlap_fragments=0: must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        LocalSettings(**options)
    assert message in str(caught.value)
