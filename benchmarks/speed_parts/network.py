"""Training and exchange under a bandwidth cap: every node on a cable of its own, in network namespaces."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
from measuring.processes import Processes, together
from measuring.rows import interleaved, over, row
from torch import nn

from sparkdeep.models.program import Program
from sparkdeep.settings.run import LocalSettings, RunSettings
from sparkdeep.tracking.records import RoundRecord
from speed_parts.codecs import CODECS, coded
from speed_parts.ddp_loop import Goal, train_ddp
from speed_parts.fake_replicas import open_fake_fit
from speed_parts.images import Images, load_images
from speed_parts.namespaces import DEVICE, address_of, capped_network, why_not
from speed_parts.plain_replicas import plain_fit, write_shards

__all__ = ["measure"]

REPLICAS: Final = 2
MEGABITS: Final = (1000, 100)
TARGET_LOSS: Final = 0.25
BATCH: Final = 32
SYNC_EVERY: Final = 50
MAX_STEPS: Final = 1_500
HIDDEN: Final = 128
EXCHANGED_MB: Final = 40
DDP: Final = "DDP, gloo, every step"
# Rates at which each reaches the target in few steps; DiLoCo's outer step is Nesterov's.
RATES: Final = {DDP: 0.2, "averaging": 0.2, "DiLoCo": 0.2}
OUTER: Final = {"averaging": None, "DiLoCo": functools.partial(torch.optim.SGD, lr=0.7, momentum=0.6, nesterov=True)}


def perceptron(width: int) -> nn.Module:
    """Two hidden layers."""
    layers = [nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10)]
    return nn.Sequential(*layers)


def _reached(loss: float, _right: float) -> bool:
    return loss <= TARGET_LOSS


def _driver(rank: int, connection: Connection, images: Images, folder: Path, replicas: Sequence[str]) -> None:
    """A driver in a namespace of its own: asked for (contender, seed), it fits, and tells seconds, steps and loss."""
    del rank
    shards = sorted(folder.glob("shard-*"))
    per_epoch = -(-images.train_rows // REPLICAS // BATCH)
    settings = RunSettings(
        num_workers=REPLICAS,
        epochs=-(-MAX_STEPS // per_epoch),
        sync_every=SYNC_EVERY,
        validate_every=1,
        rounds_per_stage=1_000_000,
        max_stage_s=600.0,
    )
    while True:
        name, seed = connection.recv()
        torch.manual_seed(seed)
        program = Program(
            model=perceptron(images.pixels.shape[1]),
            loss=nn.CrossEntropyLoss(),
            optimizer=functools.partial(torch.optim.SGD, lr=RATES[name]),
        )
        local = LocalSettings(batch_size=BATCH, seed=seed)
        outer = OUTER[name]
        with plain_fit(
            program, local, settings, shards, host=address_of(0), inside=replicas, outer_optimizer=outer
        ) as fit:
            connection.send((False, _to_the_target(fit.rounds())))


def _to_the_target(rounds: Generator[RoundRecord]) -> tuple[float, int, float]:
    """Seconds of training, scoring left out, with steps and loss."""
    seconds, steps, loss = 0.0, 0, float("inf")
    with contextlib.closing(rounds):
        for record in rounds:
            seconds += record.seconds - record.stage_seconds - record.validation_seconds
            steps += record.replicas[0].steps
            loss = record.metrics["loss"]
            if _reached(loss, 0.0):
                break
    return seconds, steps, loss


def _exchange(rank: int, connection: Connection, replicas: Sequence[str], megabytes: int) -> None:
    """A driver in a namespace of its own: asked for a codec, it tells the seconds of one round with it."""
    del rank
    with contextlib.ExitStack() as stack:
        fits = {}
        for codec in CODECS:
            opened = open_fake_fit(
                len(replicas), megabytes * 250_000, local=coded(codec), host=address_of(0), inside=replicas
            )
            fits[codec] = stack.enter_context(opened)
            fits[codec].round()  # the first round of a stage sends whole parameters, this one what changed
        while True:
            connection.send((False, fits[connection.recv()].round()))


def _train_ddp(images: Images, seed: int, replicas: Sequence[str]) -> tuple[float, int, float]:
    """Seconds, steps and loss of DistributedDataParallel."""
    goal = Goal(
        model=functools.partial(perceptron, images.pixels.shape[1]),
        optimizer=functools.partial(torch.optim.SGD, lr=RATES[DDP]),
        batch_size=BATCH,
        score_every=SYNC_EVERY,
        max_steps=MAX_STEPS,
        reached=_reached,
    )
    with tempfile.TemporaryDirectory(prefix="sparkdeep-gloo-") as store:
        arguments = (REPLICAS, f"{store}/store", images, goal, seed, DEVICE)
        last = together(train_ddp, REPLICAS, *arguments, inside=replicas)[0][-1]
    return last.seconds, last.step, last.loss


@contextlib.contextmanager
def _asked(target: Callable[..., None], *arguments: Any, inside: str) -> Iterator[Callable[[Any], Any]]:
    """A process in a namespace, as a function of a question."""
    process = Processes(target, 1, *arguments, inside=[inside])
    try:
        yield lambda question: process.ask(question)[0]
    finally:
        process.kill()


def _train(images: Images, names: Sequence[str], folder: Path, seeds: int) -> list[dict[str, tuple[float, int, float]]]:
    """Seconds, steps and loss by contender, seed by seed."""
    runs = []
    with _asked(_driver, images, folder, names[1:], inside=names[0]) as ask:
        for seed in range(seeds):
            found = {DDP: _train_ddp(images, seed, names[1:])}
            runs.append(found | {name: ask((name, seed)) for name in OUTER})
    return runs


def _exchanges(names: Sequence[str], megabytes: int, pairs: int) -> dict[str, list[float]]:
    """Seconds of a round by codec, interleaved."""
    with _asked(_exchange, names[1:], megabytes, inside=names[0]) as ask:
        return interleaved({codec: functools.partial(ask, codec) for codec in CODECS}, pairs)


def measure(*, pairs: int, quick: bool, data: Path | None) -> dict[str, Any]:
    """Wall-clock to equal loss, and exchange time, by cap."""
    title = "Under a bandwidth cap"
    if problem := why_not():
        return {"title": title, "rows": [], "notes": [f"Skipped: {problem}."]}
    images = load_images(None if quick else data)
    caps, seeds, size_mb = ((1000,), 1, 4) if quick else (MEGABITS, min(pairs, 3), EXCHANGED_MB)
    rows = []
    with tempfile.TemporaryDirectory(prefix="sparkdeep-network-") as made:
        folder = Path(made)
        write_shards(folder, images, REPLICAS)
        for megabits in caps:
            with capped_network(REPLICAS + 1, megabits) as names:
                runs = _train(images, names, folder, seeds)
                exchanged = _exchanges(names, size_mb, min(pairs, 5)) if megabits == max(caps) else {}
            for i, unit in enumerate((f"s to loss {TARGET_LOSS}", "local steps to it", "held-out loss reached")):
                for name in RATES:
                    values = [run[name][i] for run in runs]
                    beside = {DDP: over(values, [run[DDP][i] for run in runs])} if i == 0 and name != DDP else None
                    rows.append(row(f"{megabits} Mb/s, {name}", unit, values, ratios=beside))
            for codec, values in exchanged.items():
                whole = exchanged["identity"]
                faster = {f"{codec}, how much faster": over(whole, values)} if codec != "identity" else None
                name = f"{megabits} Mb/s, {size_mb} MB x {REPLICAS}, {codec}"
                rows.append(row(name, "s an exchange", values, ratios=faster))
    parameters = sum(p.numel() for p in perceptron(images.pixels.shape[1]).parameters())
    return {
        "title": title,
        "rows": rows,
        "notes": [
            (
                f"{images.name}, a perceptron of {parameters:,} parameters ({4 * parameters / 1e6:.1f} MB), {REPLICAS} "
                f"replicas, batch {BATCH} on each, SGD; the driver and every replica on a cable of its own in a network "
                f"namespace (veth, tc tbf), capped both ways. Averaging and DiLoCo with sync_every={SYNC_EVERY} on the real "
                f"wire; scored on held-out rows every {SYNC_EVERY} steps or at the epoch's end, with the clock stopped."
            )
        ],
    }
