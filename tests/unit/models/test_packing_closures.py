"""What hangs on parameters and what closures hold of the model: carried to the replica's own, or refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparkdeep.errors import ConfigError
from sparkdeep.models.packing import check_trained, copied, pack_program, unpack_program
from sparkdeep.models.program import Program, inner_optimizer

SGD = partial(torch.optim.SGD, lr=0.1)
WAYS = {"to a replica": lambda program: unpack_program(pack_program(program)), "to the driver's own": copied}


def program(model, **parts):
    return Program(model=model, **{"loss": nn.MSELoss(), "optimizer": SGD, **parts})


@pytest.fixture(params=WAYS)
def sent(request):
    return WAYS[request.param]


def gradient(model):
    model.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    return model.weight.grad


def test_hooks_on_a_gradient_come_along_in_their_order(sent):
    model = nn.Linear(2, 1)
    model.weight.register_hook(lambda g: g * torch.tensor([[0.0, 1.0]]))
    model.weight.register_hook(lambda g: g + 5)
    assert gradient(sent(program(model)).model).tolist() == [[5.0, 6.0]]
    assert gradient(sent(program(nn.Linear(2, 1))).model).tolist() == [[1.0, 1.0]]


def test_hooks_after_accumulation_meet_the_replicas_own_parameters(sent):
    model = nn.Linear(2, 1)
    seen = nn.Parameter(torch.zeros(1), requires_grad=False)
    model.seen = seen

    def note(parameter):
        assert parameter is model.weight
        model.seen.add_(parameter.grad.sum())

    model.weight.register_post_accumulate_grad_hook(note)
    own = sent(program(model)).model
    own.seen.data.zero_()
    gradient(own)
    assert own.seen.item() == 2.0
    assert seen.item() == 0.0


def test_attributes_of_a_parameter_come_along(sent):
    model = nn.Linear(2, 1)
    model.weight.lr_scale, model.bias.friend = 0.5, model.weight
    own = sent(program(model)).model
    assert own.weight.lr_scale == 0.5
    assert own.bias.friend is own.weight


def penalty(net):
    return lambda output, label: F.mse_loss(output, label) + 10 * sum(p.square().sum() for p in net.parameters())


def test_a_loss_that_closes_over_the_network_sees_the_replicas(sent):
    net = nn.Sequential(nn.Linear(2, 1))
    own = sent(program(net, loss=penalty(net)))
    check_trained(own)
    with torch.no_grad():
        for p in own.model.parameters():
            p.fill_(1.0)
    assert own.loss(torch.zeros(1), torch.zeros(1)).item() == 30.0
    part = sent(program(net, loss=lambda o, y: net[0].bias.square().sum()))
    with torch.no_grad():
        part.model[0].bias.fill_(3.0)
    assert part.loss(None, None).item() == 9.0


def by_name(net):
    def optimizer(parameters):
        del parameters
        named = dict(net.named_parameters())
        decayed = {"params": [p for n, p in named.items() if "weight" in n], "weight_decay": 0.1}
        return torch.optim.SGD([decayed, {"params": [p for n, p in named.items() if "bias" in n]}], lr=0.05)

    return optimizer


def test_an_optimizer_that_closes_over_the_network_is_given_the_replicas(sent):
    net = nn.Linear(2, 1)
    own = sent(program(net, optimizer=by_name(net)))
    optimizer, _ = inner_optimizer(own)
    assert optimizer.param_groups[0]["params"][0] is own.model.weight


def test_an_optimizer_of_another_network_is_refused_with_the_remedy():
    other = nn.Linear(2, 1)
    with pytest.raises(
        ConfigError, match=r"of 2 parameters that are not the model's \(shapes \(1, 2\), \(1,\)\).*named_parameters"
    ):
        inner_optimizer(program(nn.Linear(2, 1), optimizer=by_name(other)))


def decayed(named_parameters):
    pairs = list(named_parameters)
    assert [name for name, _ in pairs] == ["weight", "bias"]
    return torch.optim.SGD([p for _, p in pairs], lr=0.3)


def of_model(model):
    assert isinstance(model, nn.Linear)
    return torch.optim.SGD([model.bias], lr=0.3)


class Made:
    def __call__(self, model):
        return of_model(model)


@pytest.mark.parametrize("factory", [decayed, of_model, Made(), lambda model, lr=1.0: of_model(model)])
def test_a_factory_is_given_what_its_argument_is_named_after(factory):
    own = program(nn.Linear(2, 1), optimizer=factory)
    optimizer, _ = inner_optimizer(own)
    assert optimizer.param_groups[0]["params"][-1] is own.model.bias


@pytest.mark.parametrize("factory", [SGD, torch.optim.Adam, lambda ps: torch.optim.SGD(ps, lr=1.0)])
def test_other_factories_are_given_a_list_of_parameters(factory):
    own = program(nn.Linear(2, 1), optimizer=factory)
    optimizer, _ = inner_optimizer(own)
    assert optimizer.param_groups[0]["params"] == [own.model.weight, own.model.bias]


HEAD = nn.Linear(1, 1)


def with_global_head(model, batch):
    return HEAD(model(batch.features)).sum()


def holding(how):
    head = nn.Linear(1, 1)
    if how == "closure":
        return {"training_step": lambda model, batch: head(model(batch.features)).sum()}
    if how == "closure in a partial":
        return {"loss": partial(lambda o, y, scale: head(o).sum() * scale, scale=2.0)}
    if how == "list":
        heads = [head]
        return {"loss": lambda o, y: heads[0](o).sum()}
    if how == "parameter":
        return {"loss": lambda o, y: (o * head.weight).sum()}
    if how == "method":
        return {"loss": head.forward}
    return {"training_step": with_global_head}


@pytest.mark.parametrize("how", ["closure", "closure in a partial", "list", "parameter", "method", "global"])
def test_a_trainable_head_beside_the_model_is_refused(how):
    parts = holding(how)
    (where,) = parts
    with pytest.raises(ConfigError, match=rf"{where}= holds [12] trainable parameters that are not the model's"):
        check_trained(program(nn.Linear(2, 1), **parts))


def test_a_frozen_network_beside_the_model_is_what_a_loss_may_use():
    seen = nn.Linear(1, 1).requires_grad_(False)
    check_trained(program(nn.Linear(2, 1), loss=lambda o, y: seen(o).sum()))
    HEAD.requires_grad_(False)
    check_trained(program(nn.Linear(2, 1), training_step=with_global_head))
    HEAD.requires_grad_(True)


class Views(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.enc, self.dec = nn.Linear(3, 2), nn.Linear(2, 3)
        if how == "transposed":
            self.dec.weight = nn.Parameter(self.enc.weight.t())
        elif how == "data":
            self.other = nn.Linear(3, 2)
            self.other.weight.data = self.enc.weight.data
        elif how == "attribute":
            self.row = self.enc.weight.data[0]
        elif how == "list":
            self.rows = [self.enc.weight.data[1]]
        elif how == "buffer":
            self.register_buffer("kept", self.enc.weight.detach()[:, 1])
        elif how == "buffers":
            self.register_buffer("all", torch.zeros(4))
            self.register_buffer("part", self.all[2:])


@pytest.mark.parametrize("how", ["transposed", "data", "attribute", "list", "buffer", "buffers"])
def test_two_tensors_over_one_memory_are_refused_by_name(how, sent):
    names = {"transposed": "dec.weight", "data": "other.weight", "attribute": "row", "list": "rows", "buffer": "kept"}
    pair = " and ".join(map(repr, sorted(["all", "part"] if how == "buffers" else ["enc.weight", names[how]])))
    with pytest.raises(ConfigError, match=f"^{pair} share memory and are two tensors"):
        sent(program(Views(how)))


def test_one_parameter_of_two_names_and_parts_of_one_memory_that_do_not_overlap_are_no_such_thing(sent):
    model = Views("")
    model.same, model.again = model.enc.weight, model.dec
    whole = torch.arange(6.0)
    model.register_buffer("first", whole[:3])
    model.register_buffer("second", whole[3:])
    table = torch.arange(8.0).reshape(4, 2)
    model.register_buffer("cosines", table[:, 0])
    model.register_buffer("sines", table[:, 1])
    model.register_buffer("wide", torch.ones(1).expand(4))
    own = sent(program(model)).model
    assert own.same is own.enc.weight
    assert own.again is own.dec
    assert own.wide.shape == (4,)
    assert own.sines.shape == (4,)


def test_every_pair_is_looked_at():
    model, table = Views(""), torch.zeros(4, 2)
    model.register_buffer("all", table[:, 0])
    model.register_buffer("between", table[:, 1])
    model.register_buffer("last", table[3, 0])
    with pytest.raises(ConfigError, match=r"^'all' and 'last' share memory"):
        copied(program(model))


def test_a_tensor_class_of_its_own_is_refused_by_name(sent):
    class Own(nn.Parameter):
        pass

    model = nn.Linear(2, 1)
    model.weight = Own(torch.zeros(1, 2))
    with pytest.raises(ConfigError, match=r"'weight' is a Own, a tensor class of its own"):
        sent(program(model))


def test_the_copy_has_the_values_and_shares_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(3.0)
    own = copied(program(model)).model
    assert all(torch.equal(a, b) for a, b in zip(own.state_dict().values(), model.state_dict().values(), strict=True))
    assert not {t.data_ptr() for t in own.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
