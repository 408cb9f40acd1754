"""The bar as it is seen: whole lines in a pipe, moving in a terminal, nothing where it is switched off."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest
from tqdm.auto import tqdm

import sparkdeep.tracking.progress
from sparkdeep.tracking.progress import Progress
from sparkdeep.tracking.records import RoundRecord


def record(number, **changes):
    return RoundRecord(**{"round": number, "epoch": 1, "rows": 1200, "loss": 0.5, "seconds": 0.5, **changes})


def shown(capsys, rounds=4, committed=0, records=None, **options):
    with Progress(**{"enabled": True, **options}) as progress:
        progress.start(rounds, committed)
        for one in records if records is not None else [record(n) for n in range(committed + 1, rounds + 1)]:
            progress.beat(0, 10)
            progress.advance(one)
        progress.finish("done")
    return capsys.readouterr()


def test_in_a_pipe_the_bar_is_whole_lines_without_control_characters(capsys):
    out, err = shown(capsys, records=[record(n, metrics={"accuracy": 0.75}) for n in range(1, 5)])
    assert out == "done\n"
    assert err.endswith("\n")
    assert "\r" not in err
    assert "\x1b" not in err
    first, last = err.splitlines()  # rounds in between took less than ten seconds
    assert re.match(r"sparkdeep: +0%\|.*\| 0/4 ", first)
    assert re.match(r"sparkdeep: 100%\|.*\| 4/4 .*loss=0.5000, rows/s=2,400, val accuracy=0.7500\]$", last)


def test_in_a_pipe_long_rounds_are_a_line_each(capsys, monkeypatch):
    monkeypatch.setattr(sparkdeep.tracking.progress, "_LINE_EVERY_S", 0.0)
    _, err = shown(capsys)
    assert re.findall(r"\| (\d)/4 ", err)[:5] == ["0", "1", "2", "3", "4"]


def test_a_resumed_run_starts_where_it_was_and_a_roll_back_goes_back(capsys, monkeypatch):
    monkeypatch.setattr(sparkdeep.tracking.progress, "_LINE_EVERY_S", 0.0)
    _, err = shown(capsys, rounds=6, committed=2, records=[record(n) for n in (3, 4, 3, 4, 5, 6)])
    assert re.findall(r"\| (\d)/6 ", err)[:7] == ["2", "3", "4", "3", "4", "5", "6"]


def test_a_loss_that_is_no_number_and_a_round_without_time_are_shown(capsys):
    _, err = shown(capsys, rounds=1, records=[record(1, loss=math.nan, seconds=0.0)])
    assert "loss=nan, rows/s=0]" in err


def test_a_fit_that_fails_leaves_the_bar_where_it_was(capsys):
    def fail():
        with Progress(enabled=True) as progress:
            progress.start(4, 0)
            progress.advance(record(1))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    out, err = capsys.readouterr()
    assert out == ""
    assert " 1/4 " in err.splitlines()[-1]


def test_a_bar_that_is_switched_off_shows_nothing_but_what_replicas_print(capsys):
    with Progress(enabled=False) as progress:
        progress.start(1, 0)
        progress.log(1, "hello")
        progress.advance(record(1))
        progress.finish("done")
    out, err = capsys.readouterr()
    assert (out, err) == ("[replica 1] hello\n", "")


def test_what_replicas_print_does_not_cut_a_line_of_the_bar(capsys):
    with Progress(enabled=True) as progress:
        progress.start(2, 0)
        progress.log(1, "hello")
        progress.advance(record(1))
        progress.advance(record(2))
        progress.finish("done")
    out, err = capsys.readouterr()
    assert out == "[replica 1] hello\ndone\n"
    assert all(line.startswith("sparkdeep:") for line in err.splitlines())


_PROGRAM = """
from sparkdeep.tracking.records import RoundRecord
from sparkdeep.tracking.progress import Progress
with Progress(enabled=True) as progress:
    progress.start(3, 0)
    for n in (1, 2, 3):
        progress.beat(0, 1)
        progress.log(0, f"line {n}")
        progress.advance(RoundRecord(round=n, epoch=1, rows=10, loss=0.5, seconds=1.0))
    progress.finish("done")
"""


def test_in_a_terminal_the_bar_moves_in_place_and_ends_on_a_line_of_its_own():
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdout=follower, stderr=follower)
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 0.2)[0]:
                continue
            try:
                seen += os.read(leader, 65536)
            except OSError:  # Linux's word for the end of a terminal
                break
        assert child.wait(timeout=10) == 0
    finally:
        if child.poll() is None:
            child.kill()
        os.close(leader)
    text = seen.decode()
    assert text.count("\r") > text.count("\r\n") + 3, "it went back to the line's start"
    lines = [line.split("\r")[-1] for line in text.replace("\r\n", "\n").splitlines()]
    assert [line for line in lines if line.startswith("[replica")] == [f"[replica 0] line {n}" for n in (1, 2, 3)]
    assert lines[-1] == "done"
    assert re.search(r"\b3/3\b.*loss=0.5000, rows/s=10\]$", lines[-2])


def test_a_notebook_gets_tqdms_widget_as_it_is(monkeypatch, capsys):
    made = {}

    class Widget(tqdm):
        def __init__(self, **options):
            made.update(options)
            super().__init__(**{**options, "disable": True})

    monkeypatch.setattr(sparkdeep.tracking.progress, "tqdm", Widget)
    Widget.__module__ = "tqdm.notebook"
    with Progress(enabled=True) as progress:
        progress.start(2, 0)
    assert made.get("file") is None
    assert made["total"] == 2
    assert made["dynamic_ncols"] is True
