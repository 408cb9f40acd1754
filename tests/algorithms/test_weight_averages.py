"""EMA, SWA and soups held to recurrences over the parameters of every round; checkpoints that a listener asks for."""

from __future__ import annotations

import copy
import logging
from functools import partial

import numpy as np
import pytest
import torch
from model_parts import Net, schema
from torch import nn
from torch.optim import SGD
from twin import deal, local_coordinator, make_fit, schema_of
from twin_faults import Plan, lost

from sparkdeep import EMA, SWA, TorchModel, greedy_soup, soup
from sparkdeep.errors import ConfigError, ReplicaLostError
from sparkdeep.models.program import Program
from sparkdeep.stages.stage import Stage
from sparkdeep.storage.checkpoints import CheckpointDirectory
from sparkdeep.storage.local import LocalStore
from sparkdeep.tracking.callbacks import Callback, Callbacks, FitInfo
from sparkdeep.tracking.records import RoundRecord

SIZES = [16, 16]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


class Kept(Callback):
    """Every round's parameters, and what was asked in reply to it."""

    def __init__(self, answers=None):
        self.rounds, self.records, self.answers = [], [], answers or {}

    def on_round_parameters(self, record, parameters):
        self.rounds.append(parameters)

    def on_round_end(self, record):
        assert len(self.rounds) == len(self.records) + 1, "parameters come before the end of the round"
        self.records.append(record)
        return self.answers.get(record.round)


def told(fit, *listeners):
    """Run a fit's rounds with listeners, as `spark.training` does."""
    callbacks = Callbacks(listeners)
    info = FitInfo(run=fit.run, num_rounds=1, committed=fit.state.committed, rows=1, num_parameters=1, settings={})
    callbacks.start(info)
    for record in fit.rounds():
        if callbacks.round(record, lambda: None, parameters=fit.parameters, checkpoint=fit.checkpoint):
            fit.stop("asked")
    fit.load_result()


def made(tmp_path, coordinator, *, augment=None, folder=None, **options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(sum(SIZES), 4)), rng.normal(size=(sum(SIZES), 1))
    x[:, 0] = np.repeat([0, 1], SIZES)
    program = Program(model=network(), loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.1), augment=augment)
    if folder is not None:
        options["checkpoints"] = CheckpointDirectory(LocalStore(tmp_path / folder), identity={"run": "x"}, keep=30)
    settings = {"epochs": 3, "batch_size": 4, "sync_every": 2, "checkpoint_every": 100, **options}
    return make_fit(tmp_path, program, deal(x, y, SIZES), schema_of(x, y), coordinator=coordinator, **settings)


def model_of(module):
    return TorchModel(module=module.eval(), schema=schema())


@pytest.fixture
def coordinator():
    made = local_coordinator()
    yield made
    made.close()


# -- over rounds ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fit of six rounds: its rounds' parameters, its averages, its model."""
    coordinator = local_coordinator()
    kept, ema, swa, all_of = Kept(), EMA(0.8), SWA(start_round=2, every=2), SWA()
    fit = made(tmp_path_factory.mktemp("averages"), coordinator)
    told(fit, kept, ema, swa, all_of)
    coordinator.close()
    return kept, ema, swa, all_of, fit


def test_what_listeners_are_given_are_the_rounds_parameters_and_copies(trained):
    kept, *_, fit = trained
    assert len(kept.rounds) == len(kept.records) == 6
    final = dict(fit.program.model.named_parameters())
    assert kept.rounds[-1].keys() == final.keys()
    assert all(torch.equal(tensor, final[name]) for name, tensor in kept.rounds[-1].items())
    assert all(
        (a["0.weight"] - b["0.weight"]).abs().max() > 0 for a, b in zip(kept.rounds, kept.rounds[1:], strict=False)
    )
    kept.rounds[-1]["0.bias"].fill_(7.0)
    assert (fit.state.parameters != 7.0).all(), "they are copies"


def test_ema_is_its_recurrence(trained):
    kept, ema, _, _, _ = trained
    for name in kept.rounds[0]:
        if name == "0.bias":  # written to above
            continue
        expected = kept.rounds[0][name].numpy().copy()
        for one in kept.rounds[1:]:
            expected = 0.8 * expected + 0.2 * one[name].numpy()
        np.testing.assert_allclose(ema.parameters[name], expected, rtol=1e-13, atol=1e-15)
        assert (ema.parameters[name] - kept.rounds[-1][name]).abs().max() > 1e-4
    assert ema.num_averaged == 6


def test_swa_is_the_mean_of_the_rounds_that_it_takes(trained):
    kept, _, swa, all_of, _ = trained
    name = "0.weight"
    stacked = np.stack([one[name].numpy() for one in kept.rounds])
    np.testing.assert_allclose(swa.parameters[name], stacked[[1, 3, 5]].mean(0), rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(all_of.parameters[name], stacked.mean(0), rtol=1e-13, atol=1e-15)
    assert np.abs(stacked.mean(0) - stacked[[1, 3, 5]].mean(0)).max() > 1e-4
    assert (swa.num_averaged, all_of.num_averaged) == (3, 6)


def test_the_averaged_model_is_a_copy_with_the_last_rounds_statistics(trained):
    _, ema, _, _, fit = trained
    model = model_of(fit.program.model)
    before = copy.deepcopy(model.model.state_dict())
    averaged = ema.model(model)
    own = dict(averaged.model.named_parameters())
    assert all(torch.equal(own[name].detach(), tensor) for name, tensor in ema.parameters.items())
    assert all(torch.equal(b, model.model.get_buffer(name)) for name, b in averaged.model.named_buffers())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert averaged.getOrDefault("batch_size") == model.getOrDefault("batch_size")


def round_of(number):
    return RoundRecord(round=number, epoch=1, rows=8, loss=0.5)


def info(committed=0):
    return FitInfo(run="r", num_rounds=3, committed=committed, rows=8, num_parameters=2, settings={})


def test_float32_parameters_are_averaged_in_float64():
    values = [torch.tensor([1.0 + k * 2.0**-23]) for k in range(4)]
    swa = SWA()
    swa.on_fit_start(info())
    for number, value in enumerate(values, 1):
        swa.on_round_parameters(round_of(number), {"x": value})
    exact = sum(value.double() for value in values) / 4
    assert swa.parameters["x"].dtype == torch.float64
    torch.testing.assert_close(swa.parameters["x"], exact, rtol=1e-15, atol=0)
    single = values[0].clone()
    for number, value in enumerate(values[1:], 1):
        single.lerp_(value, 1 / (number + 1))
    assert abs(float(single - exact)) > 1e-9, "float32 would not tell them apart"


def test_an_average_begins_anew_with_a_fit_and_goes_on_with_one_that_goes_on(caplog):
    ema = EMA(0.5)
    ema.on_fit_start(info())
    for number, value in [(1, 0.0), (2, 4.0), (2, 4.0)]:  # the second was repeated
        ema.on_round_parameters(round_of(number), {"x": torch.tensor([value])})
    assert (float(ema.parameters["x"]), ema.num_averaged) == (2.0, 2)
    ema.on_fit_start(info(committed=2))
    ema.on_round_parameters(round_of(3), {"x": torch.tensor([4.0])})
    assert float(ema.parameters["x"]) == 3.0
    with caplog.at_level(logging.WARNING, logger="sparkdeep"):
        ema.on_fit_start(info(committed=2))
    assert "EMA begins at round 3" in caplog.text
    assert ema.parameters == {}
    ema.on_round_parameters(round_of(3), {"x": torch.tensor([4.0])})
    ema.on_fit_start(info())
    assert ema.num_averaged == 0


def test_averages_that_cannot_be_meant_are_refused():
    with pytest.raises(ConfigError, match=r"EMA.decay=1.0: must be a number from 0 to below 1"):
        EMA(1.0)
    with pytest.raises(ConfigError, match=r"SWA.start_round=0: must be a whole number of at least 1"):
        SWA(0)
    with pytest.raises(ConfigError, match=r"SWA.every=0"):
        SWA(every=0)
    with pytest.raises(ConfigError, match=r"SWA\(start_round=9, every=1\) has averaged no round yet"):
        SWA(9).model(model_of(Net()))
    ema = EMA()
    ema.on_round_parameters(round_of(1), {"linear.weight": torch.zeros(3, 5), "gone": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"other parameters than the fit.*gone.*linear.weight"):
        ema.model(model_of(Net()))


def test_nothing_is_copied_where_no_listener_wants_parameters():
    def parameters():
        raise AssertionError("nobody asked")

    assert Callbacks([Callback(), lambda record: None]).round(round_of(1), lambda: None, parameters=parameters) == ""
    with pytest.raises(AssertionError, match="nobody asked"):
        Callbacks([EMA()]).round(round_of(1), lambda: None, parameters=parameters)


def test_parameters_are_copied_once_for_all_who_want_them():
    calls = []

    def parameters():
        calls.append(1)
        return {"x": torch.ones(1)}

    Callbacks([EMA(), SWA(), Kept()]).round(round_of(1), lambda: None, parameters=parameters)
    assert calls == [1]


# -- checkpoints on demand ------------------------------------------------------------------------------------------


def kept_rounds(tmp_path, folder):
    directory = CheckpointDirectory(LocalStore(tmp_path / folder), identity={"run": "x"}, keep=30)
    return directory.begin().round_number


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_listener_has_a_checkpoint_written_and_the_run_is_what_it_was(tmp_path, coordinator, overlap):
    plain, asked = (
        made(tmp_path, coordinator, overlap=overlap),
        made(tmp_path, coordinator, overlap=overlap, folder="a"),
    )
    told(plain)
    kept = Kept({2: "checkpoint", 3: "chekpoint", 4: 1})
    told(asked, kept)
    assert [record.round for record in kept.records] == [1, 2, 3, 4, 5, 6], "each is told once"
    written = [record.round for record in asked.state.records if record.checkpoint_bytes]
    assert written == [2 + overlap, 6], "of the round after it, where replicas are in that one already"
    for mine, other in zip(
        plain.program.model.state_dict().values(), asked.program.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other)


def test_a_run_goes_on_from_a_checkpoint_that_was_asked_for(tmp_path, coordinator):
    whole = made(tmp_path, coordinator)
    told(whole)

    class StopError(Exception):
        pass

    def cut(record):
        if record.round == 4:
            raise StopError
        return "checkpoint" if record.round == 3 else None

    with pytest.raises(StopError):
        told(made(tmp_path, coordinator, folder="a"), cut)
    again = made(tmp_path, coordinator, folder="a")
    assert again.resumed_from == 3
    told(again)
    for mine, other in zip(
        whole.program.model.state_dict().values(), again.program.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, other)


def test_a_checkpoint_that_its_turn_wrote_already_is_not_written_again(tmp_path, coordinator):
    fit = made(tmp_path, coordinator, folder="a", checkpoint_every=2)
    told(fit, Kept({2: "checkpoint", 6: "checkpoint"}))
    assert [record.round for record in fit.state.records if record.checkpoint_bytes] == [2, 4, 6]


def test_one_that_asks_for_a_checkpoint_and_one_that_ends_the_run_are_both_heard(tmp_path, coordinator):
    fit = made(tmp_path, coordinator, folder="a")
    told(fit, Kept({2: "checkpoint"}), Kept({2: True}))
    assert len(fit.state.records) == 2
    assert kept_rounds(tmp_path, "a") == 2


def test_without_a_folder_it_is_said_once_that_none_is_written(tmp_path, coordinator, caplog):
    fit = made(tmp_path, coordinator)
    with caplog.at_level(logging.WARNING, logger="sparkdeep"):
        told(fit, Kept({2: "checkpoint", 3: "checkpoint"}))
    said = [one for one in caplog.messages if "asked for a checkpoint" in one]
    assert said == [
        "callback Kept asked for a checkpoint, and checkpoint_dir=None: none is written. Give checkpoint_dir=, a folder or URI."
    ]
    assert len(fit.state.records) == 6


def test_a_replica_that_is_lost_after_the_round_was_told_does_not_lose_the_checkpoint(tmp_path, coordinator):
    plan = Plan({(1, 4): lost("the executor went away")})  # in round 3, whose repetition opens a stage anew
    fit = made(tmp_path, coordinator, folder="a", augment=plan.hook(), rounds_per_stage=100)
    kept = Kept(dict.fromkeys(range(1, 7), "checkpoint"))
    told(fit, kept)
    assert [record.round for record in fit.state.records if record.failures] == [3]
    assert [record.round for record in kept.records] == [1, 2, 3, 4, 5, 6]
    assert all(record.checkpoint_bytes for record in fit.state.records)


def test_a_replica_that_is_lost_while_its_state_is_asked_for_is_asked_again(tmp_path, coordinator, monkeypatch):
    fit, kept, states, failed = made(tmp_path, coordinator, folder="a"), Kept({3: "checkpoint"}), Stage.states, []

    def fails_once(stage, clocks):
        if not failed:
            failed.append(fit.state.committed)
            raise ReplicaLostError("the executor went away", replica=1)
        return states(stage, clocks)

    monkeypatch.setattr(Stage, "states", fails_once)
    told(fit, kept)
    assert failed == [3]
    assert [record.round for record in kept.records] == [1, 2, 3, 4, 5, 6]
    assert [record.round for record in fit.state.records if record.checkpoint_bytes] == [3, 6]


# -- of several fits ------------------------------------------------------------------------------------------------


def several(count, seed=0, dtype=torch.float32):
    models = []
    for i in range(count):
        torch.manual_seed(seed + i)
        module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(dtype)
        module.train()(torch.randn(8, 2, dtype=dtype) * (i + 1))
        models.append(model_of(module))
    return models


def test_a_soup_of_one_is_itself_to_the_bit():
    (model,) = several(1)
    mixed = soup([model])
    assert mixed.model is not model.model
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(mixed.model.state_dict()[name], tensor)
    weighted = soup([model, *several(1, seed=5)], [0.3, 0.0])
    assert torch.equal(weighted.model[0].weight, model.model[0].weight)


def test_a_soup_is_the_mean_and_pools_statistics():
    models = several(3, dtype=torch.float64)
    weights = np.array([1.0, 2.5, 0.5])
    for given, w in ((None, np.full(3, 1 / 3)), (list(weights), weights / weights.sum())):
        mixed = soup(models, given).model
        for name, tensor in mixed.named_parameters():
            values = np.stack([m.model.get_parameter(name).detach().numpy() for m in models])
            np.testing.assert_allclose(tensor.detach(), np.tensordot(w, values, 1), rtol=1e-14, atol=1e-16)
            if not name.startswith("1."):  # a BatchNorm's own begin alike
                assert np.abs(values[0] - np.tensordot(w, values, 1)).max() > 1e-3
        means = np.stack([m.model[1].running_mean.numpy() for m in models])
        variances = np.stack([m.model[1].running_var.numpy() for m in models])
        pooled = np.tensordot(w, variances + (means - w @ means) ** 2, 1)
        np.testing.assert_allclose(mixed[1].running_var, pooled, rtol=1e-13)
        assert int(mixed[1].num_batches_tracked) == 1
    assert all(
        torch.equal(a.model[0].weight, b.model[0].weight)
        for a, b in zip(models, several(3, dtype=torch.float64), strict=True)
    )


def test_tied_parameters_stay_tied_in_a_soup():
    def tied(value):
        module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        module["b"].weight = module["a"].weight
        nn.init.constant_(module["a"].weight, value)
        return model_of(module)

    mixed = soup([tied(1.0), tied(4.0)]).model
    assert mixed["a"].weight is mixed["b"].weight
    assert torch.equal(mixed["a"].weight, torch.full((2, 2), 2.5))


def test_a_greedy_soup_keeps_what_does_not_make_it_worse():
    def at(value):
        module = nn.Linear(1, 1, bias=False)
        nn.init.constant_(module.weight, value)
        return model_of(module)

    def score(model):
        return -abs(model.model.weight.item() - 1.0)

    # From the best down: 1.1 (0.1 off); with 0.8: 0.95 (0.05 off), kept; with 3.0: 1.63, left out.
    mixed = greedy_soup([at(3.0), at(1.1), at(0.8)], score)
    assert mixed.model.weight.item() == pytest.approx(0.95, abs=1e-7)
    assert score(mixed) > max(score(at(value)) for value in (3.0, 1.1, 0.8)) > score(soup([at(3.0), at(1.1), at(0.8)]))


def test_soups_that_cannot_be_meant_are_refused():
    models = several(2)
    for given, why in (
        (([],), "no models"),
        ((models, [1.0]), r"1 weights for 2 models; give one each"),
        ((models, [1.0, -1.0]), r"weights\[1\]=-1.0: must be a number that is not negative"),
        ((models, [0.0, 0.0]), "all zero; one must be positive"),
        (
            ([models[0], model_of(Net())],),
            r"models\[1\] has other parameters or buffers than models\[0\].*Soups are of one",
        ),
    ):
        with pytest.raises(ConfigError, match=why):
            soup(*given)
