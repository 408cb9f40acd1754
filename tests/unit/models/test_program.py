"""The user's objects on their way to replicas: structure travels, tensor values do not."""

from __future__ import annotations

import pickle
import threading
from functools import partial

import pytest
import torch
from torch import nn

from sparkdeep.errors import ConfigError, PreflightError
from sparkdeep.models.packing import pack_program, unpack_program
from sparkdeep.models.program import Program, other_modules
from sparkdeep.tensors.parameters import named_tensors


def program(model, **parts):
    return Program(model=model, **{"loss": nn.MSELoss(), "optimizer": partial(torch.optim.SGD, lr=0.1), **parts})


def through(model, **parts):
    return unpack_program(pack_program(program(model, **parts)))


def test_structure_dtypes_and_flags_arrive_and_values_do_not():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).to(torch.bfloat16))
    model[0].bias.requires_grad_(False)
    model.eval()
    back = through(model).model
    assert [(n, t.shape, t.dtype, t.requires_grad) for n, t in named_tensors(back)] == [
        (n, t.shape, t.dtype, t.requires_grad) for n, t in named_tensors(model)
    ]
    assert isinstance(back[0].weight, nn.Parameter)
    assert all((t == 0).all() for _, t in named_tensors(back))
    assert not back.training


def test_no_tensor_data_is_in_the_pickle():
    small, large = (len(pack_program(program(nn.Linear(n, n)))) for n in (10, 1000))
    assert large - small < 100
    assert large < 5000, "four million bytes of weights would show"


def test_tied_tensors_stay_tied():
    model = nn.ModuleList([nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight
    model.register_buffer("same", model[2].running_mean)
    back = through(model).model
    assert back[1].weight is back[0].weight
    assert back.same is back[2].running_mean


def test_tensors_that_are_neither_parameter_nor_buffer_travel_by_value():
    model = nn.Linear(2, 2)
    model.table = torch.tensor([1.0, 5.0])
    back = through(model, loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0])))
    assert back.model.table.tolist() == [1.0, 5.0]
    assert back.loss.weight.tolist() == [1.0, 3.0]


class WithStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def training_step(self, model, batch):
        assert self is model
        return self.linear(batch).sum()


def test_a_training_step_that_is_a_method_of_the_model_meets_the_same_model():
    model = WithStep()
    back = through(model, loss=None, training_step=model.training_step)
    assert back.training_step.__self__ is back.model
    assert back.training_step(back.model, torch.ones(1, 2)) == 0


def test_a_callable_that_closes_over_a_parameter_finds_it():
    model = nn.Linear(2, 1)
    back = through(model, loss=lambda output, label: (output - label).square().mean() + model.weight.abs().sum())
    with torch.no_grad():
        back.model.weight.fill_(2.0)
    assert back.loss(torch.zeros(1), torch.zeros(1)) == 4.0


def test_lambdas_and_local_classes_travel():
    class Local(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)
            self.act = lambda x: x * 3

    back = through(Local(), preprocess=lambda x: x + 1, metrics={"m": lambda o, y: o})
    assert back.model.act(2) == 6
    assert back.preprocess(1) == 2
    assert back.metrics["m"](5, None) == 5


class Guarded(nn.Module):
    def __init__(self, guard):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.guard = guard


def step(guard, model, batch):
    return guard


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        ({"model": Guarded(threading.Lock())}, r"^model\.guard cannot be pickled"),
        ({"model": nn.Sequential(nn.ReLU(), Guarded({"a": threading.Lock()}))}, r"^model\.1\.guard\['a'\] cannot"),
        ({"metrics": {"m": threading.Lock()}}, r"^metrics\['m'\] cannot be pickled"),
        ({"training_step": partial(step, threading.Lock())}, r"^training_step\.args\[0\] cannot be pickled"),
        ({"optimizer": partial(torch.optim.SGD, lr=threading.Lock())}, r"^optimizer\['lr'\] cannot be pickled"),
    ],
    ids=["attribute", "nested", "metric", "argument", "keyword"],
)
@pytest.mark.fault(rows=[33], phases="PF")
def test_the_attribute_that_cannot_be_pickled_is_named(parts, where):
    with pytest.raises(PreflightError, match=where) as caught:
        pack_program(program(**{"model": nn.Linear(1, 1), **parts}))
    assert "must be made inside the model" in str(caught.value)


def test_a_lazy_parameter_without_a_shape_is_named():
    with pytest.raises(ConfigError, match=r"parameter '1\.weight' is lazy and has no shape yet"):
        pack_program(program(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))))


def test_every_module_beside_the_model_is_found_once_and_the_models_own_are_not():
    model = WithStep()
    loss, statistics, metric, inner = nn.CrossEntropyLoss(), nn.BatchNorm1d(2), nn.L1Loss(), nn.Dropout()
    given = program(
        model,
        loss=loss,
        training_step=model.training_step,
        preprocess=statistics.forward,
        augment=partial(step, inner, key=model.linear),
        metrics={"m": metric, "f": len},
    )
    assert other_modules(given) == {
        "loss": loss,
        "preprocess.__self__": statistics,
        "augment.args[0]": inner,
        "metrics['m']": metric,
    }


def test_parametrized_modules_travel_though_torch_refuses_to_pickle_them():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1))
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(model)
    twin = unpack_program(pack_program(Program(model=model, loss=nn.MSELoss(), optimizer=torch.optim.SGD))).model
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(twin(x), model(x))
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in model.named_parameters()]
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_a_callable_that_holds_a_long_list_is_looked_into_in_a_moment():
    words = [str(i) for i in range(300_000)]
    table = {word: i for i, word in enumerate(words)}
    norm = nn.BatchNorm1d(2)
    given = program(nn.Linear(2, 1), loss=None, augment=lambda x: norm(x) if words and table else x)
    assert other_modules(given) == {"augment.norm": norm}
