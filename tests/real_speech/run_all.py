"""Rung 13 in one command: real speech, our engine against torch, and what small models reach.

Makes the sets, trains every run of `recipes.RUNS` in a process of its own, several side by side,
and writes results.json and results.md whenever one ends. At the deadline runs stop where they are
and count as far as they got.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from compare import collect, markdown
from make_sets import make_sets
from recipes import RUNS, Run

_HERE = Path(__file__).parent
_LAST_S = 45.0  # for runs to save and decode after they were told to stop
# Processes that share a GPU take memory as they need it, and do not time kernels on a device that
# others use: for models so small that takes minutes. torch stays on the CPU: its encoder waits for
# the device a hundred times a step, which takes long where processes take turns on a GPU.
_GPU = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--data", type=Path, required=True, help="has the folders of ../shared/data"
    )
    parser.add_argument("--out", type=Path, required=True, help="results.json, results.md, logs")
    parser.add_argument("--work", type=Path, default=Path("rung13-work"), help="new folder")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--jobs", type=int, default=11, help="runs side by side")
    parser.add_argument("--shrink", type=float, default=1.0, help="divide all steps: a quick look")
    parser.add_argument("--cpu", action="store_true", help="leave the GPU alone")
    parser.add_argument("--only", nargs="*", help="names of runs; default: all")
    given = parser.parse_args()
    until = time.time() + 60 * given.minutes - _LAST_S
    given.out.mkdir(parents=True, exist_ok=True)
    given.work.mkdir(parents=True)
    hours = make_sets(given.data, given.work / "sets")
    print("hours:", json.dumps({name: round(h, 3) for name, h in hours.items()}), flush=True)
    waiting = [run for run in RUNS if not given.only or run.name in given.only]
    running: dict[Run, subprocess.Popen] = {}
    while waiting or running:
        if time.time() > until + _LAST_S:
            for process in running.values():
                process.kill()
        ended = {run: process for run, process in running.items() if process.poll() is not None}
        for run, process in ended.items():
            del running[run]
            told = f"{run.name} ended with {process.returncode}"
            print(
                f"[{60 * given.minutes - _LAST_S - until + time.time():.0f} s] {told}", flush=True
            )
            if process.returncode:
                print(_tail(given.work / f"{run.name}.log"), flush=True)
            write_results(given.work, given.out)
        if time.time() > until:
            waiting = []
        while waiting and len(running) < given.jobs:
            run = waiting.pop(0)
            print(f"start {run.name}", flush=True)
            running[run] = start(run, given.work, until, given.shrink, given.cpu)
        time.sleep(0.5)
    print(write_results(given.work, given.out))


def start(run: Run, work: Path, until: float, shrink: float, cpu: bool) -> subprocess.Popen:
    command = [sys.executable, str(_HERE / "train_one.py"), run.recipe, run.engine, str(run.seed)]
    command += ["--sets", str(work / "sets"), "--out", str(work), "--until", str(until)]
    command += ["--shrink", str(shrink)]
    extra = _GPU if run.engine == "ours" and not cpu else _CPU
    with (work / f"{run.name}.log").open("w") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **extra}
        )


def write_results(work: Path, out: Path) -> str:
    """results.json and results.md from what the runs have written until now; the latter's text."""
    found = collect(work)
    (out / "results.json").write_text(json.dumps(found, ensure_ascii=False, indent=1))
    (out / "results.md").write_text(text := markdown(found), encoding="utf-8")
    return text


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


if __name__ == "__main__":
    main()
