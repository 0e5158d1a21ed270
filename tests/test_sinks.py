"""Sinks get the numbers, and whatever they do, the run goes on, ends in time and warns once."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hebasr_jax import sinks
from hebasr_jax.errors import UserError
from hebasr_jax.sinks import check_sinks, numbers_of, open_sinks, scrub
from hebasr_jax.tracking import read_metrics

ROOT = Path(__file__).parents[1]
GRACE_S = 1.0

# A run as train does it. It ends once trackio, which works, has all; wandb may be anywhere by then.
RUN = """
import json, os, sys, time
from pathlib import Path
from hebasr_jax.sinks import open_sinks
from hebasr_jax.tracking import MetricsLog

folder, names, lines, grace_s, resume = json.loads(sys.argv[1])
folder, said, sending = Path(folder), [], 0.0
log = MetricsLog(folder / "metrics.jsonl", resume)
seen = folder / "trackio.seen"
with open_sinks(names, folder, "a run", {"a.b": 1}, resume, said.append, grace_s=grace_s) as send:
    for n in range((resume or 0) + 1, (resume or 0) + 1 + lines):
        line = {"kind": "train", "step": n, "loss": 1 / n}
        log.append(line)
        began = time.perf_counter()
        send(line)
        sending += time.perf_counter() - began
    until = time.monotonic() + 30
    while "trackio" in names and time.monotonic() < until:
        if seen.exists() and seen.read_text().count("\\n") >= lines:
            break
        time.sleep(0.02)
print(json.dumps({"said": said, "send_s": sending / lines, "left": time.monotonic()}))
"""

# The fakes are as noisy as the real ones, and write down what they are given.
FAKE = """
import atexit, getpass, json, os, sys, threading, time
print("noise"); print("noise", file=sys.stderr); os.write(1, b"noise\\n")
folder = os.environ["SEEN"]
def write(name, what):
    with open(f"{folder}/{name}", "a") as file:
        file.write(json.dumps(what) + "\\n")
write("$name.pid", os.getpid())
$at_import
class Run:
    url = "https://there/run"
    def log(self, numbers, step):
        $in_log
        write("$name.seen", [step, numbers])
    def finish(self):
        $in_finish
        write("$name.finished", True)
def init(*places, **settings):
    $in_init
    write("$name.init", [places, settings | {"dir": None}])
    return Run()
"""


def fake(folder: Path, name: str, **faults: str) -> None:
    text = FAKE.replace("$name", name)
    for place in ("at_import", "in_init", "in_log", "in_finish"):
        text = text.replace(f"${place}", faults.get(place, "pass"))
    (folder / "fakes").mkdir(exist_ok=True)
    (folder / "fakes" / f"{name}.py").write_text(text)


def run(
    folder: Path, names: list, lines: int = 50, resume: int | None = None, grace_s: float = GRACE_S
) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([str(folder), names, lines, grace_s, resume])],
        capture_output=True,
        text=True,
        input="what a user typed\n",
        env={**os.environ, "PYTHONPATH": f"{folder / 'fakes'}:{ROOT}", "SEEN": str(folder)},
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)  # and so stdout holds no noise
    told["exit_s"] = time.monotonic() - told["left"]
    told["warnings"] = [line for line in told["said"] if line.startswith("warning")]
    return told


def seen(folder: Path, what: str) -> list:
    path = folder / what
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


HANG = "time.sleep(30)"
WAITS = f"atexit.register(time.sleep, 30); threading.Thread(target=lambda: {HANG}).start()"
FAULTS = {
    "hangs at import": ({"at_import": HANG}, "not done at the end"),
    "hangs in init": ({"in_init": HANG}, "not done at the end"),
    "hangs in log": ({"in_log": HANG}, "not done at the end"),
    "hangs in finish": ({"in_finish": HANG}, "not done at the end"),
    "is slow": ({"in_log": "time.sleep(0.3)"}, "not done at the end"),
    "fails at import": ({"at_import": "import no_such_part"}, "ModuleNotFoundError: No module"),
    "raises in init": ({"in_init": "raise OSError('no\\nroute')"}, "OSError: no;"),
    "raises in log": ({"in_log": "raise ValueError('bad number')"}, "ValueError: bad number"),
    "raises in finish": ({"in_finish": "raise ValueError('late')"}, "ValueError: late"),
    "leaves": ({"in_init": "sys.exit('you must log in')"}, "SystemExit: you must log in"),
    "interrupts": ({"in_log": "raise KeyboardInterrupt"}, "KeyboardInterrupt"),
    "dies": ({"in_log": "os._exit(7)"}, "its process ended with code 7"),
    "asks": ({"in_init": "input('your key? ')"}, "EOFError"),
    "shows a key": ({"in_init": "raise ValueError(f'bad key {13:040x}')"}, "bad key ***;"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sink_is_one_warning_and_nothing_else(tmp_path, fault) -> None:
    faults, expected = FAULTS[fault]
    fake(tmp_path, "wandb", **faults)
    fake(tmp_path, "trackio")
    told = run(tmp_path, ["wandb", "trackio"], grace_s=GRACE_S if "not done" in expected else 15.0)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 51)]
    assert told["send_s"] < 1e-3
    assert told["exit_s"] < 1
    (warning,) = told["warnings"]
    assert warning.startswith("warning: wandb: ")
    assert expected in warning
    assert [step for step, _ in seen(tmp_path, "trackio.seen")] == [*range(1, 51)]
    assert seen(tmp_path, "trackio.finished") == [True]
    assert not any(alive(pid) for pid in seen(tmp_path, "wandb.pid"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_hooks_and_threads_that_wait_at_exit_do_not(tmp_path, name) -> None:
    fake(tmp_path, name, at_import=WAITS)
    told = run(tmp_path, [name], grace_s=15.0)
    assert told["warnings"] == []
    assert told["exit_s"] < 1
    assert seen(tmp_path, f"{name}.seen") == [[n, {"train/loss": 1 / n}] for n in range(1, 51)]
    assert seen(tmp_path, f"{name}.finished") == [True]


def test_all_sinks_share_the_time_at_the_end(tmp_path) -> None:
    for name in ("wandb", "trackio"):
        fake(tmp_path, name, in_finish=HANG)
    began = time.monotonic()
    with open_sinks_here(tmp_path, ["wandb", "trackio"]) as (send, said):
        send({"kind": "train", "step": 1, "loss": 1.0})
        began = time.monotonic()
    assert GRACE_S <= time.monotonic() - began < GRACE_S + 1
    assert sum(line.startswith("warning") for line in said) == 2


def test_a_full_queue_drops_lines_and_warns_once(tmp_path) -> None:
    fake(tmp_path, "wandb", in_init=HANG)
    with open_sinks_here(tmp_path, ["wandb"]) as (send, said):
        for n in range(sinks.QUEUE_LINES):
            send({"kind": "train", "step": n, "loss": 1.0})
        assert said == []
        for n in range(sinks.QUEUE_LINES, 3 * sinks.QUEUE_LINES):
            send({"kind": "train", "step": n, "loss": 1.0})
        assert len(said) == 1
    assert len(said) == 1
    assert "misses lines" in said[0]


def test_what_cannot_be_sent_is_a_warning_too(tmp_path) -> None:
    fake(tmp_path, "wandb")
    with open_sinks_here(tmp_path, ["wandb"], grace_s=30.0) as (send, said):
        send({"step": 1})
        began = time.monotonic()
    assert time.monotonic() - began < 10
    assert [line for line in said if line.startswith("warning")] == [
        "warning: wandb: KeyError: 'kind'; the run goes on without it "
        "(metrics.jsonl has every line)"
    ]


def test_a_run_that_fails_sends_what_it_had(tmp_path) -> None:
    fake(tmp_path, "wandb")

    def fail() -> None:
        with open_sinks_here(tmp_path, ["wandb"], grace_s=30.0) as (send, _):
            send({"kind": "train", "step": 1, "loss": 1 / 2})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen(tmp_path, "wandb.seen") == [[1, {"train/loss": 0.5}]]
    assert seen(tmp_path, "wandb.finished") == [True]


def test_a_child_ends_with_a_run_that_was_killed(tmp_path) -> None:
    """With SIGKILL, and also where scheduler and terminal signal the child before that."""
    fake(tmp_path, "wandb", at_import=WAITS)
    code = RUN.replace('"trackio" in names', "True")  # waits for what never comes
    arguments = json.dumps([str(tmp_path), ["wandb"], 5, GRACE_S, None])
    environment = {"PYTHONPATH": f"{tmp_path / 'fakes'}:{ROOT}", "SEEN": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, arguments], env={**os.environ, **environment}
    )
    until = time.monotonic() + 30
    while len(seen(tmp_path, "wandb.seen")) < 5 and time.monotonic() < until:
        time.sleep(0.05)
    (pid,) = seen(tmp_path, "wandb.pid")
    for number in (2, 15, 10, 1):  # INT, TERM, USR1, HUP
        os.kill(pid, number)
    assert os.getsid(pid) == pid  # no terminal, and no Ctrl-C
    time.sleep(0.3)
    assert alive(pid)
    process.kill()
    process.wait()
    until = time.monotonic() + 5
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
    assert seen(tmp_path, "wandb.finished") == [True]


class open_sinks_here:
    """`open_sinks` in this process, with the fakes in place of packages."""

    def __init__(self, folder: Path, names: list, grace_s: float = GRACE_S) -> None:
        self.patch, self.said = pytest.MonkeyPatch(), []
        self.patch.syspath_prepend(str(folder / "fakes"))
        self.patch.setenv("SEEN", str(folder))
        self.block = open_sinks(names, folder, "r", {}, None, self.said.append, grace_s=grace_s)

    def __enter__(self) -> tuple:
        return self.block.__enter__(), self.said

    def __exit__(self, *error: object) -> bool | None:
        try:
            return self.block.__exit__(*error)
        finally:
            self.patch.undo()


# --- what is sent --------------------------------------------------------------------------

SET = {
    "wer": 0.5,
    "ci95": [0.25, 0.75],
    "cer_ci95": (0.125, None),
    "clips": 3,
    "samples": [{"id": "clip-7", "reference": "שלום", "hypothesis": "שלום"}],
}


def test_numbers_alone_are_sent_under_their_names() -> None:
    train = {"kind": "train", "step": 3, "time_s": 1.0, "loss": np.float32(0.5), "losses": [1, 2]}
    train |= {"rates": {"decoder": 0.25}, "grad_norm": float("nan"), "tflops": None, "skipped": 0}
    assert numbers_of(train) == {
        "train/loss": 0.5,
        "train/rates/decoder": 0.25,
        "train/skipped": 0,
    }
    assert numbers_of({"kind": "validation", "step": 3, "sets": {"eval-d1": SET}}) == {
        "validation/eval-d1/wer": 0.5,
        "validation/eval-d1/ci95_low": 0.25,
        "validation/eval-d1/ci95_high": 0.75,
        "validation/eval-d1/cer_ci95_low": 0.125,
        "validation/eval-d1/clips": 3,
    }
    skipped = {"kind": "skipped", "step": 3, "loss": float("inf"), "batch": 2, "clips": ["clip-7"]}
    assert numbers_of(skipped) == {"skipped/batch": 2}


def test_a_resumed_run_goes_on_as_the_same_run(tmp_path) -> None:
    fake(tmp_path, "wandb")
    fake(tmp_path, "trackio")
    for resume in (None, 3, None):
        assert run(tmp_path, ["wandb", "trackio"], 5, resume, grace_s=30.0)["warnings"] == []
    first, resumed, anew = (settings for _, settings in seen(tmp_path, "wandb.init"))
    assert first == resumed
    assert (first["name"], first["config"], first["resume"]) == ("a run", {"a.b": 1}, "allow")
    assert anew["id"] != first["id"]
    names = [places[1] for places, _ in seen(tmp_path, "trackio.init")]
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("a run-")
    assert all(places[0] == "hebasr" for places, _ in seen(tmp_path, "trackio.init"))


def events(folder: Path) -> list:
    """The events of TensorBoard's files in the order in which it reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            found.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
    return found


def test_tensorboard_shows_each_step_once(tmp_path) -> None:
    """The real tensorboardX, without torch; a start mark hides what it had from that step on."""
    fake(tmp_path, "torch")
    for resume in (None, 15):
        time.sleep(1.1 if resume else 0)  # a file is named by the second
        told = run(tmp_path, ["tensorboard"], 20, resume, grace_s=30.0)
        assert told["warnings"] == []
    assert told["said"] == [f"tensorboard: tensorboard --logdir {tmp_path / 'tensorboard'}"]
    assert seen(tmp_path, "torch.pid") == []
    shown: dict[int, list[tuple[str, float]]] = {}
    for event in events(tmp_path / "tensorboard"):
        if event.session_log.status == 1:
            shown = {step: values for step, values in shown.items() if step < event.step}
        for value in event.summary.value:
            shown.setdefault(event.step, []).append((value.tag, value.simple_value))
    assert shown == {n: [("train/loss", float(np.float32(1 / n)))] for n in range(1, 36)}
    steps = [event.step for event in events(tmp_path / "tensorboard") if event.summary.value]
    assert steps.count(16) == 2  # so it was the mark that hid one


# --- what is refused, what is hidden -------------------------------------------------------


@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_extra_is_refused_at_once(tmp_path, monkeypatch, folder) -> None:
    """Also where there is a folder of that name, which wandb leaves behind."""
    monkeypatch.setattr(sinks, "_PACKAGES", {"trackio": "no_such_package"})
    monkeypatch.syspath_prepend(str(tmp_path))
    if folder:
        (tmp_path / "no_such_package").mkdir()
    with pytest.raises(UserError, match=r"not installed\npip install 'hebasr-jax\[trackio\]'"):
        check_sinks(["trackio"])
    with pytest.raises(UserError), open_sinks(["trackio"], tmp_path, "r", {}, None, print):
        pytest.fail("the run began")


def test_a_package_is_found_without_importing_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sinks, "_PACKAGES", {"wandb": "a_package_of_mine"})
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a_package_of_mine.py").write_text("raise SystemExit")
    check_sinks(["wandb"])
    assert "a_package_of_mine" not in sys.modules


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("401 for key 0123456789abcdef0123456789abcdef01234567", "401 for key ***"),
        ("https://me:pass@host/api is down", "https://***@host/api is down"),
        ("got Authorization: Basic YWJj", "got Authorization: *** ***"),
        ("header 'Bearer abc.def'", "header 'Bearer ***"),
        ("?api_key=abc&x=1", "?api_key=***&x=1"),
        ("API key 'abc def' is bad", "API key *** is bad"),
        ("hf_abcdefghijklmn refused", "*** refused"),
        ("wandb_v1_abcdefgh refused", "*** refused"),
        ("{'token': 'abc'}", "{'token': ***"),
        ("\n\n No API key configured.\nmore", "No API key configured."),
        ("no space on /data/runs/round-2/wandb", "no space on /data/runs/round-2/wandb"),
        ("<urlopen error [Errno -2] Name not known>", "<urlopen error [Errno -2] Name not known>"),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text, shown) -> None:
    assert scrub(text) == shown
