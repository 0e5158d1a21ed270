"""`prepare --ray` gives the bytes of one process: on Ray where it is installed, else a stand-in."""

import importlib.util
import sys
import types
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hebasr_jax.data import workers
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.errors import UserError

RATE = 16_000
CLIPS = 24
INSTALLED = importlib.util.find_spec("ray") is not None


class StandIn(types.ModuleType):
    """What is called of Ray, by a pool of threads; work and answers are sent as Ray sends them."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[str] = []
        self.exceptions = types.SimpleNamespace(RayTaskError=TaskError, RayError=LookupError)

    def init(self, address: str, **_: object) -> None:
        if address == "auto":
            raise ConnectionError("Could not find any running Ray instance.")
        self.calls.append(f"init {address}")
        self.pool = ThreadPoolExecutor(2)

    def remote(self, **options: object):
        assert options["num_cpus"] == 1

        def decorate(function):
            def sent(work: bytes):
                try:
                    work = reduced(work)
                    assert work.folder.is_absolute()
                    assert all(place.file.is_absolute() for place in work.read.places)
                    return function(work)
                except Exception as error:
                    raise TaskError(error) from error

            return types.SimpleNamespace(
                remote=lambda work: self.pool.submit(sent, reduced(work)),
            )

        return decorate

    def get(self, made: Future):
        try:
            return made.result()
        except CancelledError as error:
            raise LookupError("the task was cancelled") from error

    def cancel(self, made: Future) -> None:
        made.cancel()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        self.pool.shutdown()


class TaskError(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"a long trace\n{cause}")
        self.cause = cause


def reduced(work):
    """The work as another process gets it: fails for what cannot be sent."""
    import multiprocessing.connection

    here, there = multiprocessing.Pipe()
    with ThreadPoolExecutor(1) as reader:
        received = reader.submit(there.recv)
        here.send(work)
        return received.result()


@pytest.fixture
def ray(monkeypatch):
    if INSTALLED:
        yield sys.modules.get("ray") or importlib.import_module("ray")
        return
    module = StandIn()
    monkeypatch.setitem(sys.modules, "ray", module)
    yield module
    assert module.calls.count("shutdown") == sum(call.startswith("init") for call in module.calls)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    lines = []
    for number in range(CLIPS):
        wave = np.random.default_rng(number).uniform(-0.3, 0.3, RATE)
        soundfile.write(folder / f"{number}.wav", wave, RATE)
        lines.append(f'{{"audio": "{number}.wav", "text": "{number}"}}\n')
    (folder / "5.wav").write_bytes(b"RIFF of no sound")
    lines[5] = '{"audio": "5.wav", "text": "5", "duration_s": 1.0}\n'
    (folder / "m.jsonl").write_text("".join(lines))
    return folder / "m.jsonl"


def prepare(source: Path, out: Path, **flags) -> dict[str, bytes]:
    flags = {"shard_mb": 0.13, "max_bad_share": 0.1} | flags
    assert Prepare(out, source=str(source), name="clips", **flags).run() == 0
    return {file.name: file.read_bytes() for file in sorted((out / "clips").iterdir())}


def test_the_same_bytes_as_of_one_process(ray, source, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(source.parent)  # Ray's processes are elsewhere
    made = prepare(Path(source.name), Path("ray"), ray="local")
    assert made == prepare(source, tmp_path / "one", processes=1)
    assert sum(name.endswith(".arrayrecord") for name in made) == 6
    assert b"5.wav" in made["quarantine.jsonl"]


def test_faults_are_told_as_in_one_process(ray, source, tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"1 of 24 clips are bad, more than the 0"):
        prepare(source, tmp_path / "out", ray="local", max_bad_share=0.01)
    assert not [file for file in (tmp_path / "out" / "clips").iterdir() if "partial" in file.name]
    with pytest.raises(UserError, match=r"--ray auto: no Ray cluster is reached\n.*\n.*ray start"):
        prepare(source, tmp_path / "out", ray="auto")
    with pytest.raises(UserError, match="--processes is not for --ray"):
        prepare(source, tmp_path / "out", ray="local", processes=2)

    def refused(work, stopped=None):
        raise UserError("the disk is full", "", "Free space.")

    if not INSTALLED:
        monkeypatch.setattr(workers, "make_shard", refused)
        with pytest.raises(UserError, match=r"^the disk is full\nFree space\.$"):
            prepare(source, tmp_path / "full", ray="local")


def test_without_ray_the_extra_is_named(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"not installed\npip install 'hebasr-jax\[ray\]'"):
        prepare(source, tmp_path / "out", ray="auto")
