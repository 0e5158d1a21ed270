"""Training runs by the real command, small enough for tests: words are tones, the model is tiny.

`python tests/tone_runs.py` trains the golden run and renews tests/golden_losses.json: do it when a
change is meant to change the losses, and say so in the commit.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cpu_programs
import jax
import numpy as np
import soundfile
from orbax.checkpoint import v1 as ocp

from hebasr_jax.demo_corpus import learn_merges
from hebasr_jax.tiny import TINY, with_merges, write_tiny_model
from hebasr_jax.tracking import read_metrics

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden_losses.json"
WORDS = ("שלום", "תודה", "בית", "ילד", "ספר", "מים", "שמש", "כלב")
CONFIG = """
from hebasr_jax.run_config import *

def get_config():
    group = Group(2e-3)
    return Config(
        name="whole",
        model=Model("tiny"),
        data=Data(
            train=(Source("tones", "corpus/train.jsonl"),),
            dev=(Source("held", "corpus/dev.jsonl"),),
            batch_clips=8, micro_audio_s=8.0, buckets=2, max_bad_share=0.05, threads=2,
        ),
        augment=Augment(
            speed_factors=(0.9, 1.0, 1.1),
            time_masks=1, time_mask_frames=10, mel_masks=1, mel_mask_bins=8,
        ),
        compute=Computation(dtype="float32", remat="none", cache_dir=PROGRAMS),
        optim=Optim(warmup_steps=3),
        stages=(Stage("train", 1, None, (), False, group, group, group, group, group),),
        train=Train(steps=30, checkpoint_steps=8, keep_last=9, keep_best=0, log_steps=3),
        validation=Validation(every_steps=10, bootstrap=50, batch_audio_s=8.0),
    )
"""

QUICK = (
    *(f"stages.0.{group}.learning_rate=0" for group in ("conv_stem", "encoder", "projector")),
    "stages.0.embedding.learning_rate=0",
    "stages.0.decoder.trained_layers=1",
    "augment.speed_factors=(1.0,)",
    "augment.time_masks=0",
    "augment.mel_masks=0",
)
"""Settings for a step that compiles fast, where it is of no matter what a run trains."""


def tone_words(
    words: list[str], rng: np.random.Generator, noise: float = 0.02, spread: float = 0.06
) -> np.ndarray:
    """Each word is a tone of its own, 0.3 s long, give or take the spread."""
    parts = []
    for word in words:
        time_S = np.arange(int(16000 * rng.uniform(0.3 - spread, 0.3 + spread))) / 16000
        parts.append(0.3 * np.sin(2 * np.pi * 300 * 1.35 ** WORDS.index(word) * time_S))
    wave = np.concatenate(parts)
    return (wave + noise * rng.standard_normal(len(wave))).astype(np.float32)


def write_manifest(path: Path, phrases: list[list[str]], seed: int, **sound: float) -> None:
    """A JSONL manifest of the phrases with a FLAC file each; `sound` is `tone_words`'s."""
    rng, rows = np.random.default_rng(seed), []
    for number, words in enumerate(phrases):
        wave, name = tone_words(words, rng, **sound), f"{path.stem}-{number}"
        soundfile.write(path.with_name(f"{name}.flac"), wave, 16000, subtype="PCM_16")
        row = {"id": name, "audio": f"{name}.flac", "text": " ".join(words)}
        rows.append(row | {"duration_s": len(wave) / 16000, "speaker": f"s{number % 5}"})
    write_rows(path, rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_workspace(made: Path, name: str) -> Path:
    """A folder with a corpus, a broken file in it, a tiny model and config.py; see `train`.

    Args:
      made: pytest's base folder of this worker. What takes time is made once in a session.
    """
    common = made.parent if "PYTEST_XDIST_WORKER" in os.environ else made
    template = common / "tones"
    if not template.exists():
        partial = Path(tempfile.mkdtemp(dir=common))
        write_workspace(partial)
        try:
            partial.rename(template)
        except OSError:  # another worker was quicker
            shutil.rmtree(partial)
    return Path(shutil.copytree(template, made / name))


def write_workspace(folder: Path) -> None:
    (folder / "corpus").mkdir()
    rng = np.random.default_rng(0)
    for name, clips in (("train", 64), ("dev", 12)):
        phrases = [list(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(clips)]
        write_manifest(folder / "corpus" / f"{name}.jsonl", phrases, seed=clips)
    train = folder / "corpus" / "train.jsonl"
    (folder / "corpus" / "broken.flac").write_bytes(b"no sound")
    rows = read_rows(train)
    write_rows(train, [*rows, rows[0] | {"id": "broken", "audio": "broken.flac"}])
    merges = learn_merges([" ".join(WORDS)] * 2 + list(WORDS), 60)
    config = with_merges(TINY, len(merges))
    write_tiny_model(folder / "tiny", config=config, merges=merges, conv_gains=(2.0, 2.0, 2.0))
    programs = str(cpu_programs.FOLDER)
    (folder / "config.py").write_text(f"PROGRAMS = {programs!r}\n{CONFIG}")


def settings(*changes: str) -> list[str]:
    """Command-line words that change config values."""
    return [word for change in changes for word in ("--set", change)]


def start(
    workspace: Path,
    *words: str,
    config: str | Path = "config.py",
    meddle: dict[str, Any] | None = None,
    devices: int = 1,
    platform: str = "cpu",
    **options,
) -> subprocess.Popen:
    """`hebasr train --config config.py` and further words, in a process of its own.

    Args:
      platform: of JAX; "cuda" takes every GPU there is, `devices` counts on a CPU only.
      meddle: what tests/meddled.py does to it; None: nothing, the command as a user gives it.
    """
    program = ["-m", "hebasr_jax"] if meddle is None else [TESTS / "meddled.py", json.dumps(meddle)]
    on_cpu = platform == "cpu"
    compiling = cpu_programs.environment(devices) if on_cpu else {}
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *map(str, program), "train", "--config", str(config), *words],
        cwd=workspace,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": platform} | compiling,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def end(child: subprocess.Popen, code: int = 0) -> str:
    """What a child said on stderr; it must end with this exit code and say nothing on stdout."""
    try:
        out, errors = child.communicate(timeout=300)
    finally:
        child.kill()
    assert child.returncode == code, (child.returncode, errors)
    assert not [line for line in out.splitlines() if not line.startswith("[Gloo]")], out
    return errors


def train(workspace: Path, *words: str, code: int = 0, **options) -> str:
    return end(start(workspace, *words, **options), code)


def losses(run: Path) -> list[float]:
    """The loss of every step, in the order of metrics.jsonl."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    return [loss for line in lines for loss in line["losses"]]


def validations(run: Path) -> list[dict[str, Any]]:
    """The lines of kind validation, without the time."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "validation"]
    return [{key: line[key] for key in ("step", "sets", "scored_on")} for line in lines]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())


def arrays(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its name."""
    folder = run.absolute() / "checkpoints" / str(step)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {}
    for name, described in json.loads((folder / "facts.json").read_text())["leaves"].items():
        dtype, sizes = described.rstrip("]").split("[")
        shape = tuple(int(size) for size in sizes.split(",") if size)
        like[name] = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=place)
    return {name: np.asarray(leaf) for name, leaf in ocp.load(folder, like).items()}


def same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(
        leaf.tobytes() == theirs[name].tobytes() for name, leaf in ours.items()
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        space = make_workspace(Path(made), "golden")
        train(space)
        GOLDEN.write_text(json.dumps(losses(space / "runs" / "whole"), indent=1) + "\n")
