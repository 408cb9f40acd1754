"""A driver in a process of its own, that a test kills, interrupts, or takes the cluster away from.

    python fault_driver.py <folder>

`job.json` in the folder holds the cluster's `url`, the fit's `options`, and what else is to happen (`stop_at`: the
session is stopped after that round; `interrupts`: Ctrl-C comes once in each of these phases, in a fit of its own).
`plan.pkl` is an injector, if there is one. Left there are `pid`, `session` (the application's id), `rounds` (a line a
round), `changes` (of the number of replicas), and `weights.pt`, or `error` (type and message) where the fit failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from cluster_fixtures import FAULT_CONF, HOSTS, session_on
from fault_models import Signal, Tell, estimator, rows
from leaks import Leaks
from py4j.protocol import Py4JJavaError

from sparkdeep.errors import SparkdeepError
from sparkdeep.testing.injection import Injector


def main(folder):
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    session = session_on(job["url"], **{**FAULT_CONF, **job["conf"]})
    frame = rows(session)
    (folder / "session").write_text(session.sparkContext.applicationId)
    Tell(folder, "pid")()
    if job["interrupts"]:
        interrupted(session, frame, folder, job)
        return
    plan = folder / "plan.pkl"
    injector = pickle.loads(plan.read_bytes()) if plan.exists() else Injector(folder / "nothing")

    def told(record):
        note(folder / "rounds", record.round)
        if record.num_workers_changed:
            note(folder / "changes", f"{record.round}: {record.num_workers_changed}")
        if record.round == job["stop_at"]:
            session.stop()

    try:
        with injector.installed():
            model = estimator(injector, callbacks=[told], **job["options"]).fit(frame)
    except SparkdeepError as error:
        (folder / "error").write_text(json.dumps([type(error).__name__, str(error)]))
        return
    torch.save(model.model.state_dict(), folder / "weights.pt")


def note(path, text):
    with path.open("a") as file:
        file.write(f"{text}\n")


def interrupted(session, frame, folder, job):
    """Each fit must end by KeyboardInterrupt, and leave nothing; a line in `rounds` says so."""
    for phase in job["interrupts"]:
        leaks = Leaks(session, [Path(job["root"]) / f"local-{host}" for host in HOSTS])
        injector = Injector(folder / f"plan-{phase}")
        held = None
        if phase == "waiting":
            held = _held_slot(session)
            threading.Timer(6.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            round_number = {"slots": None}.get(phase, 2)
            injector.call_at(phase, round_number, action=Signal(folder / "pid", signal.SIGINT))
        try:
            with injector.installed():
                estimator(injector, checkpoint_dir=str(folder / f"checkpoints-{phase}")).fit(frame)
        except KeyboardInterrupt:
            began = time.monotonic()
            if held is not None:
                session.sparkContext.cancelJobsWithTag("holds a slot")
                held.join(timeout=10)
            injector.check_fired()
            leaks.check()
            note(folder / "rounds", f"{phase} interrupted")
            assert time.monotonic() - began < 15


def _held_slot(session):
    """Another job of the session keeps one of its two slots, so that a barrier stage of two tasks has to wait."""
    from pyspark import InheritableThread

    def hold():
        session.sparkContext.addJobTag("holds a slot")
        with contextlib.suppress(Py4JJavaError):  # it is cancelled
            session.sparkContext.parallelize([0], 1).foreach(_sleep)

    thread = InheritableThread(target=hold, daemon=True)
    thread.start()
    time.sleep(2.0)
    return thread


def _sleep(_):
    time.sleep(60)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
