"""What listeners hear, in which order, and what their exceptions do."""

from __future__ import annotations

import pytest

from sparkdeep.errors import ConfigError
from sparkdeep.tracking.callbacks import Callback, Callbacks, FitInfo
from sparkdeep.tracking.records import RoundRecord

RECORD = RoundRecord(round=1, epoch=1, rows=8, loss=0.5)
INFO = FitInfo(run="r", num_rounds=3, committed=0, rows=8, num_parameters=2, settings={"epochs": 1})


class Listener(Callback):
    """Writes what it hears to `heard`, and raises at `fails`."""

    def __init__(self, name, heard, fails="", needs_spark=False):
        self.name, self.heard, self.fails, self.needs_spark = name, heard, fails, needs_spark

    def _hear(self, what):
        self.heard.append(f"{self.name} {what}")
        if self.fails == what:
            raise RuntimeError(f"{self.name} at {what}")

    def on_fit_start(self, info):
        self._hear("start")

    def on_round_end(self, record):
        self._hear("round")

    def on_fit_end(self, model, error):
        self.model, self.error = model, error
        self._hear("end")


def nothing():
    raise AssertionError("no slots had to be freed")


def test_listeners_hear_in_order_and_the_end_in_reverse():
    heard = []
    first, second = Listener("a", heard), Listener("b", heard)
    callbacks = Callbacks([first, lambda record: heard.append(f"function {record.round}"), second])
    callbacks.start(INFO)
    assert callbacks.round(RECORD, nothing) == ""
    callbacks.end("model", None)
    assert heard == ["a start", "b start", "a round", "function 1", "b round", "b end", "a end"]
    assert (first.model, first.error) == ("model", None)


def test_every_listener_hears_a_round_that_one_of_them_makes_the_last():
    heard = []

    def enough(record):
        return True

    assert Callbacks([enough, Listener("a", heard), lambda _: 1]).round(RECORD, nothing) == "enough"
    assert heard == ["a round"]
    assert Callbacks([lambda _: 1]).round(RECORD, nothing) == "", "only True itself ends a run, so append() does not"


def test_slots_are_freed_before_a_listener_that_needs_them():
    heard = []
    callbacks = Callbacks([Listener("a", heard), Listener("b", heard, needs_spark=True)])
    callbacks.round(RECORD, lambda: heard.append("free"))
    assert heard == ["a round", "free", "b round"]


def test_an_exception_in_a_round_is_the_fits_and_later_listeners_do_not_hear_the_round():
    heard = []
    callbacks = Callbacks([Listener("a", heard, fails="round"), Listener("b", heard)])
    with pytest.raises(RuntimeError, match="a at round"):
        callbacks.round(RECORD, nothing)
    assert heard == ["a round"]


def test_a_listener_that_fails_at_the_start_still_hears_the_end_and_those_after_it_hear_nothing():
    heard = []
    callbacks = Callbacks([Listener("a", heard), Listener("b", heard, fails="start"), Listener("c", heard)])
    with pytest.raises(RuntimeError) as raised:
        callbacks.start(INFO)
    callbacks.end(None, raised.value)
    assert heard == ["a start", "b start", "b end", "a end"]


def test_listeners_are_told_of_the_error_that_ended_the_fit():
    heard = []
    listener, error = Listener("a", heard), ValueError("x")
    callbacks = Callbacks([listener])
    callbacks.start(INFO)
    callbacks.end(None, error)
    assert (listener.model, listener.error) == (None, error)


def test_the_end_is_told_once():
    heard = []
    callbacks = Callbacks([Listener("a", heard)])
    callbacks.start(INFO)
    callbacks.end(None, ValueError())
    callbacks.end("model", None)
    assert heard.count("a end") == 1


def test_one_that_fails_at_the_end_silences_no_other_and_is_raised():
    heard = []
    callbacks = Callbacks([Listener("a", heard), Listener("b", heard, fails="end")])
    callbacks.start(INFO)
    with pytest.raises(RuntimeError, match="b at end"):
        callbacks.end("model", None)
    assert heard[-2:] == ["b end", "a end"]


def test_one_that_fails_at_the_end_of_a_failed_fit_is_noted_on_the_fits_own_error():
    error = ValueError("the fit's")
    callbacks = Callbacks([Listener("b", [], fails="end")])
    callbacks.start(INFO)
    callbacks.end(None, error)
    assert error.__notes__ == ["a callback's on_fit_end then raised RuntimeError: b at end"]


def test_a_callback_without_overridden_methods_is_fine():
    callbacks = Callbacks([Callback()])
    callbacks.start(INFO)
    assert callbacks.round(RECORD, nothing) == ""
    callbacks.end(None, None)


def test_trackers_whose_package_is_missing_say_what_to_install(monkeypatch):
    import sys

    from sparkdeep.tracking import MLflowCallback, TensorBoardCallback

    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'sparkdeep\[mlflow\]'"):
        MLflowCallback()
    with pytest.raises(ConfigError, match=r"pip install 'sparkdeep\[tensorboard\]'"):
        TensorBoardCallback("runs")


@pytest.mark.parametrize(
    ("given", "shown"), [(3, "hold 3: give functions"), (Callback, r"objects, Callback\(\.\.\.\)\.")]
)
def test_what_cannot_listen_is_refused(given, shown):
    from sparkdeep.settings.run import LocalSettings, RunSettings
    from sparkdeep.spark.fit.settings import FitSettings

    with pytest.raises(ConfigError, match=shown):
        FitSettings(
            local=LocalSettings(), run=RunSettings(), model=None, feature_cols="x", label_cols="y", optimizer=print,
            loss=print, callbacks=[given],
        )  # fmt: skip
