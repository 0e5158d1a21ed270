"""The demo's recipe learns from sound: from lengths and texts alone it does not."""

import json
from dataclasses import replace
from pathlib import Path

import cpu_programs
import numpy as np
import pytest
import soundfile

from hebasr_jax.config_file import LoadedConfig, flatten, load_config
from hebasr_jax.demo import SMALL, make_files
from hebasr_jax.run_config import Average, Config, Export, Model, Source
from hebasr_jax.tiny import with_merges
from hebasr_jax.tracking import read_metrics
from hebasr_jax.train import train

ROOT = Path(__file__).parents[1]
STEPS, CLIPS = 300, 1600


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, Config]:
    """Tones and noise, the tiny model, and the demo's config cut to fewer steps."""
    files = tmp_path_factory.mktemp("demo")
    demo = load_config(ROOT / "configs" / "demo.py").config
    make_files(files, demo, CLIPS, lambda line: None, "tones")
    config = replace(
        demo,
        runs_dir=str(files / "runs"),
        model=Model(str(files / "model")),
        data=replace(demo.data, max_bad_share=0.01, test=()),
        average=Average(),
        export=Export(),
        compute=replace(demo.compute, cache_dir=str(cpu_programs.FOLDER)),
        train=replace(demo.train, steps=STEPS, checkpoint_steps=STEPS),
        validation=replace(demo.validation, every_steps=STEPS, bootstrap=50),
    )
    return files / "corpus", config


def changed(corpus: Path, name: str, change) -> dict[str, Source]:
    """The manifests after `change(rows)`; audio stays where it is unless the change moves it."""
    sources = {}
    for split in ("train", "dev"):
        lines = (corpus / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = change([json.loads(line) for line in lines if "broken" not in line])
        path = corpus / f"{name}-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources[split] = Source(split, str(path))
    return sources


def wer(config: Config, name: str, sources: dict[str, Source]) -> float:
    """The dev set's WER after training on the sources."""
    data = replace(config.data, train=(sources["train"],), dev=(sources["dev"],))
    config = replace(config, name=name, data=data)
    loaded = LoadedConfig(config, dict.fromkeys(flatten(config), "the test"))
    assert train(loaded, lambda line: None) == 0
    lines = read_metrics(Path(config.runs_dir) / name / "metrics.jsonl")
    last = [line for line in lines if line["kind"] == "validation"][-1]
    assert last["step"] == STEPS
    return last["sets"]["dev"]["wer"]


def test_it_learns_from_the_sound(corpus) -> None:
    folder, config = corpus

    def silent(rows: list[dict]) -> list[dict]:
        for row in rows:
            samples = round(row["duration_s"] * 16000)
            row["audio"] = row["audio"].replace("clips/", "silent-")
            soundfile.write(folder / row["audio"], np.zeros(samples, np.int16), 16000)
        return rows

    learned = wer(config, "learned", changed(folder, "same", lambda rows: rows))
    assert learned < 0.4
    assert wer(config, "silent", changed(folder, "silent", silent)) > 0.6


def test_the_demo_model_has_room_for_its_tokens() -> None:
    config = with_merges(SMALL, 12)
    assert config.decoder.vocab_size == 256 + 12 + 7 + 136
    assert config.audio_token_id == 256 + 12 + 5
