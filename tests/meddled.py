"""The hebasr command with something done to it: `meddled.py '{"call": ...}' train --config ...`.

call: dotted name of a function; at its `at`-th call the process sends itself `signal`; a list
  of signals is sent with half a second between them.
file_bytes: no file may grow beyond so many bytes, as on a disk that is full.
clock: seconds by which each call of `time.time` moves the clock.
poison: [epoch, number] of a batch of which a clip makes the loss NaN, if this host is to `mark` it.
rows: a file that gets a line, "set epoch batch clip...", for each row of a batch that is read.
"""

import importlib
import itertools
import json
import os
import resource
import signal
import sys
import time

import poison

from hebasr_jax.cli import main
from hebasr_jax.data import pipeline

ASKED = json.loads(sys.argv[1])


def signal_at(name: str, at: int, *numbers: signal.Signals) -> None:
    module, function = name.rsplit(".", 1)
    owner, calls = importlib.import_module(module), itertools.count(1)
    original = getattr(owner, function)

    def called(*arguments, **named):
        if next(calls) == at:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.5 * (len(numbers) > 1))
        return original(*arguments, **named)

    setattr(owner, function, called)


def shift_clock(seconds: float) -> None:
    clock, count = time.time, itertools.count(1)
    time.time = lambda: clock() + seconds * next(count)


def write_rows(path: str) -> None:
    original = pipeline._load_row

    def called(feed, plan, number, row):
        with open(path, "a") as file:
            file.write(
                " ".join(map(str, (feed.sets[0].name, plan.epoch, number, *row.clips))) + "\n"
            )
        return original(feed, plan, number, row)

    pipeline._load_row = called


if "call" in ASKED:
    names = ASKED["signal"] if isinstance(ASKED["signal"], list) else [ASKED["signal"]]
    signal_at(ASKED["call"], ASKED["at"], *(signal.Signals[name] for name in names))
if "file_bytes" in ASKED:
    resource.setrlimit(resource.RLIMIT_FSIZE, (ASKED["file_bytes"], resource.RLIM_INFINITY))
if "clock" in ASKED:
    shift_clock(ASKED["clock"])
if "poison" in ASKED:
    poison.know_the_mark()
    if ASKED["mark"]:
        poison.mark(*ASKED["poison"])
if "rows" in ASKED:
    write_rows(ASKED["rows"])
sys.exit(main(sys.argv[2:]))
