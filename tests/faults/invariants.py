"""A fit on the in-process twin, and what must hold after every fault in it, whatever it was."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field
from functools import partial

import psutil
import torch
from torch import nn
from torch.optim import AdamW
from twin import deal, local_coordinator, make_fit, schema_of
from twin_faults import Plan, marked_table

from sparkdeep.models.program import Program

# Batches of 4 are 6 and 5 steps: rounds of 2 steps are 3 an epoch, 6 in all, and both replicas work in each of them.
SIZES = [22, 18]
EPOCHS = 2
ROUNDS = 6
X, Y = marked_table(SIZES)
OPTIONS = {
    "epochs": EPOCHS,
    "batch_size": 4,
    "sync_every": 2,
    "retry_backoff_s": 0.001,
    "rounds_per_stage": 100,
    "max_retries": 12,
}
LEFT_S = 40.0


@dataclass
class Outcome:
    """What a fit gave, and where it listened."""

    tensors: dict
    records: list
    address: object
    seconds: float
    plan: Plan = field(repr=False)


def program(plan=None, **parts):
    """Dropout, batch norm, momentum and a schedule: what is lost, or counted twice, shows in the bits."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 1))
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.7)
    whole = {"loss": nn.MSELoss(), "optimizer": partial(AdamW, lr=0.01), "lr_scheduler": schedule, **parts}
    if plan is not None:
        whole["augment"] = plan.hook()
    return Program(model=model, **whole)


def tensors_of(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def train(folder, *, plan=None, injector=None, sizes=SIZES, parts=None, **options):
    """A whole fit, or the exception that ended it; what it leaves behind is looked at either way."""
    plan = plan or Plan()
    began = time.monotonic()
    coordinator = local_coordinator()
    try:
        fit = make_fit(
            folder,
            program(plan, **(parts or {})),
            deal(X, Y, sizes),
            schema_of(X, Y),
            coordinator=coordinator,
            wrap=plan.wrap,
            **{**OPTIONS, **options},
        )
        plan.fit = fit
        records = list(fit.rounds())
        fit.load_result()
    finally:
        coordinator.close()
        if injector is not None:
            injector.check_fired()
        assert_nothing_is_left(coordinator.address)
    return Outcome(tensors_of(fit.program.model), records, coordinator.address, time.monotonic() - began, plan)


def last_word(records):
    """Rounds after the last snapshot are run and told again: the last record of each counts, in order."""
    told = {record.round: record for record in records}
    return [told[number] for number in sorted(told)]


def assert_invariants(got, undisturbed, *, sizes=SIZES, first_round=1, within_s=60.0):
    """The bits of the undisturbed run; every row once an epoch; no gap; no longer than deadlines allow."""
    assert got.tensors.keys() == undisturbed.tensors.keys()
    for name, tensor in undisturbed.tensors.items():
        assert torch.equal(got.tensors[name], tensor), f"{name} differs from the undisturbed run"
    records = last_word(got.records)
    expected = undisturbed.records[first_round - 1 :]
    assert [record.round for record in records] == list(range(first_round, len(undisturbed.records) + 1))
    assert [(r.rows, r.loss) for r in records] == [(r.rows, r.loss) for r in expected]
    if first_round == 1:
        for epoch in range(1, EPOCHS + 1):
            of_epoch = [record.replicas for record in records if record.epoch == epoch]
            for replica, rows in enumerate(sizes):
                assert sum(parts[replica].rows for parts in of_epoch) == rows
                assert sum(parts[replica].weight for parts in of_epoch) == rows
    assert got.seconds < within_s


def assert_nothing_is_left(address):
    """No thread of ours, and nobody who listens, within ten seconds."""
    deadline = time.monotonic() + LEFT_S
    while (left := threads() + listening(address)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left == []


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sparkdeep-")]


def listening(address):
    """Whoever answers at the address, and whatever socket of this process listens there."""
    found = []
    try:
        socket.create_connection((address.host, address.port), timeout=1.0).close()
        found.append(f"{address.host}:{address.port} answers")
    except OSError:
        pass
    found += [
        f"port {one.laddr.port} is open"
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == address.port
    ]
    if address.nearby:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            try:
                sock.connect(f"\0{address.nearby}")
                found.append(f"{address.nearby} answers")
            except OSError:
                pass
    return found


def digest_of(tensors):
    """The bits of a module as one word."""
    import hashlib

    whole = hashlib.sha256()
    for name, tensor in tensors.items():
        whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


def kept_bits(folder):
    """The bits of a fit that keeps checkpoints below `folder`, for a process of its own."""
    from sparkdeep.storage.checkpoints import CheckpointDirectory
    from sparkdeep.storage.local import LocalStore

    torch.set_num_threads(1)
    directory = CheckpointDirectory(LocalStore(folder / "checkpoints"), identity={"run": "x"}, keep=3)
    outcome = train(folder, checkpoints=directory, checkpoint_every=1, replica_state="durable", rounds_per_stage=2)
    assert directory.latest().round_number == ROUNDS
    return digest_of(outcome.tensors)
