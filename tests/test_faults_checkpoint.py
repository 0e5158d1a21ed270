"""Saves that are killed: whatever the instant, what a run goes on from is whole, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS, KILLS = 4, 5

# Each life restores what the one before it left, checks every bit, and saves on until it is killed.
# All of them are forks of one process that has the imports and no JAX thread yet.
LIVES = """
import json, os, pathlib, random, signal, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import SingleDeviceSharding
from hebasr_jax.checkpoint import CheckpointStore, find_fault

SHAPES = {"w": ((700, 1000), "float32"), "m": ((1 << 19,), "float32"), "n": ((7,), "int32")}

def bits(step):
    draw = np.random.default_rng(step)
    return {k: draw.integers(-9, 9, shape).astype(t) for k, (shape, t) in SHAPES.items()}

def shapes(facts):
    place = SingleDeviceSharding(jax.devices()[0])
    return {k: jax.ShapeDtypeStruct(s, t, sharding=place) for k, (s, t) in SHAPES.items()}

def live(run, pipe):
    told = []
    store = CheckpointStore(run, keep_last=1, keep_best=1, warn=told.append)
    back = store.restore(shapes)
    step = back.step if back else 0
    if back:
        want = bits(step)
        assert all(np.asarray(back.state[k]).tobytes() == want[k].tobytes() for k in SHAPES)
        assert back.facts["data"] == {"batch": step}
    names = [path.name for path in store.folder.iterdir()]
    assert not told and all(name.isdecimal() for name in names), (told, names)
    assert not [fault for s in store.steps() if (fault := find_fault(store.path(s)))]
    os.write(pipe, b"r%d." % step)
    while True:
        step += 1
        store.record(step, loss=1 / step)
        store.save(step, jax.tree.map(jnp.asarray, bits(step)), {"data": {"batch": step}})
        store.wait()
        os.write(pipe, b"s%d." % step)

def begin(run):
    reader, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            live(run, pipe)
        finally:
            os._exit(1)
    os.close(pipe)
    return child, reader

def end(child, reader, delay_s):
    said = os.read(reader, 1 << 16)  # restored; the first save of this life begins
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 1 << 16):
        said += more
    return said.decode()

draw, top, count, kills = random.Random(0), pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])
lives = {n: [] for n in range(count)}
for _ in range(kills):
    started = {n: begin(top / str(n)) for n in lives}
    for n, life in started.items():
        lives[n].append(end(*life, draw.uniform(0, 0.3)))
        left = [path.name for path in (top / str(n) / "checkpoints").iterdir()]
        lives[n][-1] += "cut" if any(not name.isdecimal() for name in left) else "between"
print(json.dumps(list(lives.values())))
"""


def test_killed_at_20_instants_of_a_save_a_whole_checkpoint_is_there(tmp_path) -> None:
    child = subprocess.run(
        [sys.executable, "-c", LIVES, tmp_path, str(FOLDERS), str(KILLS)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    in_mid_save = 0
    for lives in json.loads(child.stdout):
        before = 0  # the step of the last save that was said to be finished
        for life in lives:
            assert life.startswith("r"), f"restored nothing: {lives}\n{child.stderr}"
            restored, *saved, how = life.split(".")
            step = int(restored[1:])
            assert step in (before, before + 1), lives  # finished, or finished and not yet told
            before = int(saved[-1][1:]) if saved else step
            in_mid_save += how == "cut"
    assert in_mid_save >= FOLDERS * KILLS // 4  # else the instants missed the saves
