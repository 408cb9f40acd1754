"""The fuzzer: readers of foreign bytes against seeded mutants, in a child process that may crash.

An input must be read, or refused with a SparkdeepError, within `DEADLINE_S` and with little memory beside its own; anything
else is a finding. An input follows from (seed, target, number), so that a finding is repeated by its number.

    python tests/faults/fuzzing.py --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paths import ROOT, SUPPORT

from sparkdeep.errors import SparkdeepError

HERE = Path(__file__).resolve().parent
DEADLINE_S = 15.0  # far above what any takes: the clock runs on while the machine does something else
"""For one input; connections under test have shorter deadlines of their own."""
_MIB = 1 << 20
_START_S = 120.0
"""For the child to import and to build its targets, on a busy machine."""


class FoundError(AssertionError):
    """Inputs that were neither read nor refused by a named error."""


class TooSlowError(BaseException):
    """An input took longer than `DEADLINE_S`; no reader catches this."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader of foreign bytes."""

    name: str
    seeds: list[Any]
    """Valid inputs: each must be read without an error."""
    cases: list[Any] = field(default_factory=list)
    """Inputs that were findings once: each must be refused by a named error."""
    mutate: Any
    """(rng, seed) -> input."""
    read: Any
    """(input) -> None."""
    allowed: tuple[type[BaseException], ...] = (SparkdeepError,)
    """What may be raised beside a result."""
    bound_mib: int = 64
    """Memory that all inputs together may take, beside what the process had."""
    deadline_s: float = DEADLINE_S
    share: float = 1.0
    """Of the time, relative to other targets."""


def fuzz(seconds, seed, *, only=(), report=print):
    """Run every target for its share of `seconds`; returns target -> inputs tried.

    Raises:
        FoundError: with every distinct finding.
    """
    counts, found = {}, []
    deadline = time.monotonic() + seconds
    crash = True
    while crash:  # a target that crashed is left out of the next child
        left = max(0.1, deadline - time.monotonic()) if counts else seconds
        results, crash = _child(left, seed, only, skip=list(counts))
        for result in results:
            counts[result["target"]] = result["inputs"]
            found += result["findings"]
        if crash:
            counts[crash["target"]] = max(0, crash["number"])
            found.append(crash)
    for name, count in counts.items():
        report(f"fuzz {name}: {count} inputs")
    report(f"fuzz: {sum(counts.values())} inputs of {len(counts)} targets in {seconds:g} s, seed {seed}")
    if found:
        raise FoundError("\n\n".join(_shown(one) for one in found))
    return counts


def _environment():
    paths = [str(ROOT), str(SUPPORT), str(HERE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


def _child(seconds, seed, only, skip):
    """Run targets in a process of its own; returns their results, and where it crashed or hung, if it did."""
    with tempfile.TemporaryDirectory() as folder:
        out, at = Path(folder) / "results", Path(folder) / "at"
        out.touch()
        command = [sys.executable, str(HERE / "fuzzing.py"), "--child", folder, "--seed", str(seed)]
        command += ["--seconds", str(seconds), "--only", ",".join(only), "--skip", ",".join(skip)]
        child = subprocess.Popen(
            command, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            _, errors = child.communicate(timeout=2 * seconds + _START_S)
            ended = f"exit {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            _, errors = child.communicate(timeout=30.0)
            ended = "it hung, in code that no signal interrupts"
        results = [json.loads(line) for line in out.read_text().splitlines()]
        if child.returncode == 0:
            return results, None
        assert at.exists(), f"the fuzzer itself failed: {errors[-4000:]}"
        target, number = at.read_text().split()
        return results, {"target": target, "number": int(number), "seed": seed, "what": ended, "text": errors[-4000:]}


def _shown(one):
    return f"{one['target']} input {one['number']} of seed {one['seed']}: {one['what']}\n{one['text']}"


# -- in the child -------------------------------------------------------------------------------------------------------


def input_of(target, seed, number):
    """The input of a number."""
    rng = random.Random(f"{seed}/{target.name}/{number}")
    return target.mutate(rng, rng.choice(target.seeds))


class Runner:
    """Runs targets, and notes what they did wrong."""

    def __init__(self, seed, note=lambda _target, _number: None):
        self.seed = seed
        self._note = note
        self._stray = []
        threading.excepthook = lambda args: self._stray.append(args.exc_value)
        signal.signal(signal.SIGALRM, _too_slow)

    def run(self, target, seconds):
        """Seeds, then cases, then mutants until the time is over; returns the result as JSON values."""
        findings = {}
        for value in target.seeds:
            if error := self._try(target, -1, value):
                raise AssertionError(f"{target.name} does not read its own seed") from error
        gc.collect()
        with _memory(target.bound_mib):
            for value in target.cases:
                error = self._try(target, -2, value)
                if error is None or not _named(error, target):
                    missed = AssertionError("this case must be refused, and was read")
                    self._add(findings, target, -2, value, error or missed)
            number, deadline = 0, time.monotonic() + seconds
            while time.monotonic() < deadline and len(findings) < 12:
                value = input_of(target, self.seed, number)
                error = self._try(target, number, value)
                if error is not None and not _named(error, target):
                    self._add(findings, target, number, value, error)
                number += 1
        return {"target": target.name, "inputs": number, "findings": list(findings.values())}

    def _try(self, target, number, value):
        self._note(target.name, number)
        signal.setitimer(signal.ITIMER_REAL, target.deadline_s)
        try:
            target.read(value)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        return self._stray.pop() if self._stray else None

    def _add(self, findings, target, number, value, error):
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/sparkdeep/" in f.filename]
        where = (type(error).__name__, frames[-1].filename, frames[-1].lineno) if frames else type(error).__name__
        findings.setdefault(
            where,
            {
                "target": target.name,
                "number": number,
                "seed": self.seed,
                "what": f"{type(error).__name__}: {error}"[:400],
                "text": f"{''.join(traceback.format_exception(error))[-3000:]}\ninput: {value!r:.1000}",
            },
        )


def _named(error, target):
    """Whether an error is one that the target may raise, and hides no failure to get memory."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    starved = any(isinstance(one, MemoryError) or "allocate memory" in str(one) for one in chain)
    return isinstance(error, target.allowed) and not starved


def _too_slow(_signal, _frame):
    raise TooSlowError("one input took too long")


@contextlib.contextmanager
def _memory(bound_mib):
    """At most so much more memory than now: what asks for more gets a MemoryError, which is no named error."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now = int(status["VmData"].split()[0]) << 10
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (now + bound_mib * _MIB, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def targets(folder, only):
    """All targets, or those of these names; `folder` is for their files."""
    if any(name.startswith("planted-") for name in only):
        import fuzz_planted

        return fuzz_planted.targets(folder)
    import fuzz_files
    import fuzz_lines
    import fuzz_replica
    import fuzz_states
    import fuzz_texts

    return [
        made
        for module in (fuzz_lines, fuzz_replica, fuzz_files, fuzz_states, fuzz_texts)
        for made in module.targets(folder)
    ]


def main():
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", type=Path)
    parser.add_argument("--skip", default="")
    given = parser.parse_args()
    only, skip = (tuple(filter(None, names.split(","))) for names in (given.only, given.skip))
    if given.child is None:
        fuzz(given.seconds, given.seed, only=only)
        return
    # In memory where there is such a place: folders are made and removed for every input.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        made = [one for one in targets(Path(folder), only) if one.name not in skip and (not only or one.name in only)]
        at = (given.child / "at").open("w")

        def note(target, number):
            at.seek(0)
            at.write(f"{target} {number}".ljust(60))
            at.flush()

        runner = Runner(given.seed, note)
        whole = sum(target.share for target in made)
        with (given.child / "results").open("a") as out:
            for target in made:
                print(json.dumps(runner.run(target, given.seconds * target.share / whole)), file=out, flush=True)
    # Threads that still wait for a fake replica's silence are no reason to wait here.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
