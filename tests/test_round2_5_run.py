"""Round 2.5 for fifty steps on local copies of its sets: the shares of what reached the step.

Every row is counted from the batch that the training loop hands to its program. A clip's first two
samples name its set and its number, so that nothing of the plan is asked. Tolerances are four
standard deviations of a binomial draw.
"""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import cpu_programs
import jax
import numpy as np
import pytest
import soundfile
from hub_rows import a_slice, crowd, write
from test_stamped_targets import read
from tone_runs import settings

from hebasr_jax import train
from hebasr_jax.cli import main
from hebasr_jax.data.clips import Batch
from hebasr_jax.text import TextTokenizer, load_tokenizer
from hebasr_jax.tiny import write_tiny_model

ROOT = Path(__file__).parents[1]
RATE, SAMPLES, STEPS, DEVIATIONS = 16_000, 12_800, 50, 4
SPEEDS = (0.9, 1.0, 1.1)
STAMPS, CONTEXT, WRONG = 0.4, 0.5, 0.1  # of configs/round2_5.py
MIX = {"knesset": 0.5, "crowd-transcribe": 0.3, "crowd-recital": 0.2}
OTHERS = {
    "fleurs": 0.1,
    "common-voice": 0.05,
    "knesset-committees": 0.05,
    "hebdb": 0.03,
    "kan": 0.02,
}
MANY = MIX | {"crowd-transcribe": 0.05} | OTHERS
SCHEMAS = {
    "knesset": "knesset-plenums",
    "crowd-transcribe": "crowd-transcribe-v5",
    "crowd-recital": "crowd-recital",
}
TEXT_COLUMNS = {"fleurs": "raw_transcription", "common-voice": "sentence", "kan": "sentence"}
NAMES = (*MIX, *OTHERS)
WIDE = ("stages.1.decoder.trained_layers=2", "stages.1.encoder.trained_layers=1")

CONFIG = """
from dataclasses import replace
from configs.round2_5 import get_config as round2_5
from hebasr_jax.run_config import Mix, Source

SETS, MIX = {sets!r}, {mix!r}

def get_config():
    config = round2_5()
    local = tuple(Source(n, p, schema=s, accept_licence=True) for n, (p, s) in SETS.items())
    stages = config.stages
    if MIX:  # with sets that the recipe does not have
        mix = tuple(Mix(name, share) for name, share in MIX.items())
        stages = tuple(replace(stage, mix=mix) for stage in stages[:1])
    dev = (replace(local[-1], name="dev"),)
    data = replace(config.data, train=local[:-1], dev=dev, test=())
    return replace(config, data=data, stages=stages)
"""


def sound(set_number: int, number: int) -> dict:
    """A tone, bit-exact in FLAC, that begins with the numbers of its set and its clip."""
    wave = 3000 * np.sin(np.arange(SAMPLES) * 0.05 * (1 + number % 7))
    wave = wave.astype(np.int16)
    wave[:2] = set_number, number
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="FLAC", subtype="PCM_16")
    return {"bytes": file.getvalue(), "path": f"{number}.flac"}


def told_context(name: str, number: int) -> str:
    """What comes before a slice in its recording of five; the first has nothing."""
    return f"לפני {name[0]}{number}" if name in ("knesset", "crowd-recital") and number % 5 else ""


def row_of(name: str, number: int) -> dict:
    """A row as the set's documentation has it, with times and what came before where it has."""
    if name == "crowd-transcribe":
        row = crowd(number)
        return row | {"extra_data": row["extra_data"] | {"duration": SAMPLES / RATE}}
    if name in SCHEMAS:
        before = told_context(name, number)
        text = f"<|0.00|>שלום {number}<|0.40|><|0.50|>סוף<|0.70|>"
        prev = f"<|0.00|>{before}<|0.90|>" if before else None
        return a_slice(
            number % 5, text, prev, duration=SAMPLES / RATE, entry_id=f"{name}{number // 5}"
        )
    return {TEXT_COLUMNS.get(name, "text"): f"משפט {number}"}


def make_sets(folder: Path, clips: dict[str, int]) -> dict[str, tuple[str, str]]:
    """Parquet files of each set's schema; the last set is the dev set."""
    made = {}
    for name, count in (clips | {"dev": 4}).items():
        of = "crowd-transcribe" if name == "dev" else name
        number = NAMES.index(of)
        rows = [{"audio": sound(number, n)} | row_of(of, n) for n in range(count)]
        source = write(folder / "sets" / name, SCHEMAS.get(of, of), rows)
        made[name] = source.path, source.schema
    return made


@dataclass(frozen=True)
class Row:
    """One row that a step was given."""

    stage: str
    epoch: int
    step: int
    name: str
    number: int
    speed: float
    stamped: bool
    context: str


def rows_in(batch: Batch, by: TextTokenizer, stage: str, epoch: int, step: int) -> list[Row]:
    found = []
    for index in np.flatnonzero(batch.samples_B):
        row = jax.tree.map(lambda array, index=index: array[index], batch)
        told, (of, number) = read(row, by), row.wave_BS[:2].tolist()
        assert row.samples_B == SAMPLES
        speed = round(float(row.speed_B), 3)
        place = stage, epoch, step
        found.append(Row(*place, NAMES[of], number, speed, told.stamped, told.context))
    return found


@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    """A tiny model for both runs."""
    folder = tmp_path_factory.mktemp("round2_5")
    write_tiny_model(folder / "tiny")
    return folder


@pytest.fixture
def run(space, tmp_path, monkeypatch):
    """Trains by the command in a folder of its own; gives the rows of all steps.

    Without a mix the recipe is as it is; with one it has its first stage only.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.delenv("HF_REPO_ID", raising=False)

    def runs(clips: dict[str, int], mix: dict[str, float] | None, steps: int) -> list[Row]:
        sets = make_sets(tmp_path, clips)
        (tmp_path / "local.py").write_text(CONFIG.format(sets=sets, mix=mix), encoding="utf-8")
        seen: list[tuple[Batch, str, int, int]] = []
        original = train.one_step

        def one_step(run, trainee, item):
            seen.append((item.data, run.part(trainee).stage.name, item.epoch, trainee.step))
            original(run, trainee, item)

        monkeypatch.setattr(train, "one_step", one_step)
        words = settings(
            "name=local",
            f"model.path={space / 'tiny'}",
            "data.buckets=1",
            "data.threads=2",
            "compute.dtype=float32",
            "compute.remat=none",
            f"compute.cache_dir={cpu_programs.FOLDER}",
            f"train.steps={steps}",
            f"train.checkpoint_steps={steps}",
            "train.log_steps=1",
            "validation.every_steps=0",
            "export.layouts=()",
            "optim.warmup_steps=2",
            "stages.0.decoder.trained_layers=1",
            *WIDE[: 0 if mix else 2],
        )
        assert main(["train", "--config", "local.py", *words]) == 0
        by = load_tokenizer(tmp_path / "runs" / "local" / "model")
        return [row for batch, *place in seen for row in rows_in(batch, by, *place)]

    return runs


def check_share(what: str, count: int, of: int, expected: float) -> None:
    """A count of independent draws lies within four standard deviations; shown with `-s`."""
    deviation = (expected * (1 - expected) / of) ** 0.5
    found = count / of
    told = f"{what}: {count} of {of} = {found:.4f}, expected {expected:.4f}"
    print(f"{told}, {(found - expected) / deviation:+.1f} deviations")
    assert abs(found - expected) <= DEVIATIONS * deviation, what


def check_rows(rows: list[Row], mix: dict[str, float], what: str) -> None:
    """The mix, time stamps, contexts and speeds of these rows are as the recipe states."""
    for name, share in mix.items():
        check_share(f"{what}: rows of {name}", sum(r.name == name for r in rows), len(rows), share)
    check_share(f"{what}: time stamps", sum(row.stamped for row in rows), len(rows), STAMPS)
    contexts = [row for row in rows if row.context]
    check_share(f"{what}: previous text", len(contexts), len(rows), CONTEXT)
    wrong = sum(row.context != told_context(row.name, row.number) for row in contexts)
    check_share(f"{what}: of these another recording's", wrong, len(contexts), WRONG)
    for speed in SPEEDS:
        count = sum(row.speed == speed for row in rows)
        check_share(f"{what}: speed {speed}", count, len(rows), 1 / 3)
    assert {row.speed for row in rows} == set(SPEEDS)
    slices = ("knesset", "crowd-recital")
    assert not any(row.stamped or row.context for row in rows if row.name not in slices)


def drawn(rows: list[Row]) -> Counter:
    """How often each clip came in each epoch."""
    return Counter((row.stage, row.epoch, row.name, row.number) for row in rows)


def test_fifty_steps_are_of_the_shares_that_the_recipe_states(run, tmp_path) -> None:
    """Ten steps an epoch: two epochs of the first stage and three of the second, as in the file."""
    rows = run({"knesset": 320, "crowd-transcribe": 192, "crowd-recital": 128}, None, STEPS)
    assert Counter(row.step for row in rows) == dict.fromkeys(range(STEPS), 64)
    lines = (tmp_path / "runs" / "local" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [loss for line in lines for loss in json.loads(line).get("losses", [])]
    assert len(losses) == STEPS
    assert np.isfinite(losses).all()
    epochs = {(row.stage, row.epoch) for row in rows}
    assert epochs == {("top", 0), ("top", 1), ("wide", 0), ("wide", 1), ("wide", 2)}
    assert set(drawn(rows).values()) == {1}
    check_rows(rows, MIX, "all")
    for stage in ("top", "wide"):
        check_rows([row for row in rows if row.stage == stage], MIX, stage)


def test_with_all_other_sets_a_small_one_is_drawn_four_times_an_epoch_at_most(run) -> None:
    clips = {"knesset": 220, "crowd-transcribe": 60, "crowd-recital": 8}
    clips |= dict(zip(OTHERS, (30, 20, 20, 13, 13), strict=True))
    asked = {name: sum(clips.values()) * share for name, share in MANY.items()}
    given = {name: min(count, 4 * clips[name]) for name, count in asked.items()}
    assert [name for name in MANY if given[name] < asked[name]] == ["crowd-recital"]
    rows = run(clips, MANY, 12)
    mix = {name: count / sum(given.values()) for name, count in given.items()}
    check_rows(rows, mix, "nine sets")
    assert {row.name for row in rows} == set(MANY)
    counts = drawn(rows)
    assert max(counts.values()) == 4
    assert {name for (*_, name, _), count in counts.items() if count > 2} == {"crowd-recital"}
