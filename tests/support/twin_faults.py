"""Faults for the in-process twin: something happens when a given replica trains its n-th batch."""

from __future__ import annotations

import itertools
import shutil
import threading
import time

import numpy as np

from sparkdeep.errors import ReplicaLostError

PLANS = {}
_NUMBERS = itertools.count()


class Plan:
    """What happens when; replicas are told apart by the first feature of their rows.

    Args:
        when: (replica, batch) -> action, called once with the features; batches count from 0 over all attempts.
    """

    def __init__(self, when=None):
        self.when = dict(when or {})
        self.calls = {}
        self.launches = 0
        self.launcher = None
        self.running = None
        self._lock = threading.Lock()
        self.key = next(_NUMBERS)
        PLANS[self.key] = self

    def hook(self):
        return Hook(self.key)

    def wrap(self, launcher):
        self.launcher = launcher
        return Watched(self, launcher)

    def meet(self, features):
        replica = int(features[0, 0])
        with self._lock:
            batch = self.calls.get(replica, 0)
            self.calls[replica] = batch + 1
            action = self.when.pop((replica, batch), None)
        result = action(features) if action else None
        return features if result is None else result

    # -- actions --------------------------------------------------------------------------------------------------

    def hang_up(self, replica):
        """The replica's line goes dead."""
        return lambda _features: self.running._links[replica].close()

    def until_relaunched(self, within_s=30.0):
        """Wait until the driver has given this attempt up and begun another; whether it has."""
        before, deadline = self.launches, time.monotonic() + within_s
        while self.launches == before and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.launches > before

    def wipe(self, *replicas):
        """The disks of these replicas are lost, and with them this attempt."""

        def action(_features):
            for replica in replicas:
                shutil.rmtree(self.launcher._state_dir / f"{replica}", ignore_errors=True)
            raise ReplicaLostError("the executor went away")

        return action


def lost(text):
    """What sparkdeep itself raises where the executor fails, not the user's code."""
    return raises(ReplicaLostError(text))


def raises(error):
    def action(_features):
        raise error

    return action


class Hook:
    """An `augment` that travels by name and finds its plan again."""

    def __init__(self, key):
        self.key = key

    def __call__(self, features):
        return PLANS[self.key].meet(features)


class Watched:
    """A launcher that counts, and keeps its last stage at hand."""

    def __init__(self, plan, inner):
        self._plan = plan
        self._inner = inner

    @property
    def num_replicas(self):
        return self._inner.num_replicas

    def launch(self, ticket, description):
        self._plan.launches += 1
        self._plan.running = self._inner.launch(ticket, description)
        return self._plan.running

    def renew(self):
        self._inner.renew()

    def slots(self):
        return self._inner.slots()

    def resize(self, num_replicas):
        return self._inner.resize(num_replicas)


def marked_table(sizes, features=4):
    """Rows whose first feature is the number of their shard; float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(sum(sizes), features)).astype(np.float32)
    x[:, 0] = np.repeat(np.arange(len(sizes)), sizes)
    y = rng.normal(size=(sum(sizes), 1)).astype(np.float32)
    return x, y
