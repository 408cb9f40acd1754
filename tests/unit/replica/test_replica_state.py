"""What a replica keeps: its random stream, its optimizer's tensors, its files."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from sparkdeep.replica.state import RandomState, read_inner_state, write_inner_state
from sparkdeep.storage.disks import StateFiles
from sparkdeep.tensors.state_dicts import pack, unpack

CPU = torch.device("cpu")


def draw():
    return torch.rand(2).tolist(), np.random.rand(), np.random.randn(), random.random(), random.gauss(0, 1)


def test_a_fresh_stream_is_what_the_seed_starts_and_leaves_the_process_as_it_was():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    undisturbed = [draw(), draw()]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    state = RandomState(5, CPU)
    first = draw()
    with state.installed():
        theirs = [draw(), draw()]
    assert [first, draw()] == undisturbed
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert theirs == [draw(), draw()]


def test_a_stream_goes_on_where_it_was_also_through_bytes():
    whole = RandomState(0, CPU)
    with whole.installed():
        expected = [draw() for _ in range(4)]
    halves = RandomState(0, CPU)
    with halves.installed():
        got = [draw(), draw()]
    other = RandomState(9, CPU)
    other.load_state_dict(unpack(pack(halves.state_dict())))
    with other.installed():
        got += [draw(), draw()]
    assert got == expected


def test_a_borrowed_stream_does_not_move():
    state = RandomState(0, CPU)
    with state.borrowed():
        first = draw()
    with state.installed():
        assert draw() == first
    with state.installed():
        assert draw() != first


def test_a_block_that_raises_gives_the_process_its_generators_back():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), RandomState(3, CPU).installed():
        torch.rand(5) / (1 // 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_take_turns_on_the_global_generators():
    alone = []
    for seed in range(4):
        with RandomState(seed, CPU).installed():
            alone.append([draw() for _ in range(50)])
    together = [None] * 4

    def work(seed):
        with RandomState(seed, CPU).installed():
            together[seed] = [draw() for _ in range(50)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


# -- averaged optimizer state -------------------------------------------------------------------------------------------


def stepped(factory, *, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 1), "scale": nn.Linear(1, 1, bias=False)})
    model.scalar = nn.Parameter(torch.tensor(2.0))
    parameters = list(model.parameters())
    optimizer = factory(parameters)
    (model["used"](torch.randn(3, 2)).square().sum() * model.scalar).backward()
    optimizer.step()
    return optimizer, parameters


@pytest.mark.parametrize(
    ("factory", "names"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), []),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (lambda p: torch.optim.AdamW(p, lr=0.1), ["exp_avg", "exp_avg_sq"]),
        (lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), ["sum"]),
        (lambda p: torch.optim.Adafactor(p, lr=0.1), ["variance"]),
        (
            lambda p: torch.optim.SGD([{"params": p[:2], "momentum": 0.9}, {"params": p[2:]}], lr=0.1),
            ["momentum_buffer"],
        ),
    ],
)
def test_state_of_a_parameters_shape_is_found_by_name_and_counters_are_not(factory, names):
    optimizer, parameters = stepped(factory)
    found, values = read_inner_state(optimizer, parameters)
    assert found == names
    for tensors in values:
        assert [t.shape for t in tensors] == [p.shape for p in parameters]
        for parameter, tensor in zip(parameters, tensors, strict=True):
            assert parameter.grad is not None or not tensor.any()


def test_averaged_state_is_written_where_it_was_read():
    optimizer, parameters = stepped(lambda p: torch.optim.AdamW(p, lr=0.1))
    names, values = read_inner_state(optimizer, parameters)
    doubled = [[t * 2 for t in tensors] for tensors in values]
    write_inner_state(optimizer, parameters, names, doubled)
    _, again = read_inner_state(optimizer, parameters)
    for before, after in zip(doubled, again, strict=True):
        for p, a, b in zip(parameters, before, after, strict=True):
            assert torch.equal(a, b) or p.grad is None
    assert optimizer.state[parameters[0]]["step"] == 1
    optimizer.step()


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_last_three_rounds_are_kept_whole_and_private(tmp_path):
    files = StateFiles(tmp_path / "state", "a")
    for number in range(1, 6):
        files.write(number, b"%d" % number)
    assert files.kept() == [(3, "a"), (4, "a"), (5, "a")]
    assert files.read(4, "a") == b"4"
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "state").iterdir()} == {0o600}
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileNotFoundError):
        files.read(2, "a")


def test_a_repeated_round_replaces_its_file_and_keeps_the_one_before(tmp_path):
    files = StateFiles(tmp_path, "a")
    for number in (1, 2, 3):
        files.write(number, b"first")
    files.write(3, b"again")
    assert files.kept() == [(1, "a"), (2, "a"), (3, "a")]
    assert files.read(3, "a") == b"again"


def test_other_files_are_neither_counted_nor_touched(tmp_path):
    (tmp_path / "round-1.safetensors").write_bytes(b"x")
    (tmp_path / ".half.part").write_bytes(b"x")
    files = StateFiles(tmp_path, "a")
    files.write(7, b"7")
    assert files.kept() == [(7, "a")]
    assert (tmp_path / ".half.part").exists()


def test_an_attempt_that_was_given_up_writes_over_nothing_of_the_one_after_it(tmp_path):
    zombie, living = StateFiles(tmp_path, "zombie"), StateFiles(tmp_path, "living")
    zombie.write(1, b"1")
    living.write(2, b"living")
    zombie.write(2, b"zombie")
    assert living.read(2, "living") == b"living"
    assert living.read(1, "zombie") == b"1"
    living.write(3, b"3")
    living.write(4, b"4")
    living.write(5, b"5")
    assert living.kept() == [(3, "living"), (4, "living"), (5, "living")]
