"""One run of the experiment, in a process of its own: `train_one.py RECIPE ENGINE SEED ...`."""

import argparse
import json
import os
import signal
import threading
import time
from pathlib import Path

from recipes import RECIPES, Run, make_config, write_model

from hebasr_jax.config_file import LoadedConfig, checked, flatten
from hebasr_jax.data.sources import open_source
from hebasr_jax.run_config import Config
from hebasr_jax.text import PromptStyle
from hebasr_jax.train import train
from hebasr_jax.transcribe import load_recognizer, transcribe

_DECODE_S = 200.0  # for transcripts with time stamps, whose programs are compiled first


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("engine", choices=("ours", "torch", "torch-reversed"))
    parser.add_argument("seed", type=int)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, default=float("inf"), help="time.time() to stop at")
    parser.add_argument("--shrink", type=float, default=1.0)
    given = parser.parse_args()
    run = Run(given.recipe, given.engine, given.seed)
    config = checked(make_config(run, given.sets, given.out, given.shrink))
    write_model(run, given.sets, Path(config.model.path))
    if run.engine == "ours":
        train_in_jax(config, given.until)
    else:
        from torch_twin import train_in_torch

        train_in_torch(config, given.until, reverse=run.engine == "torch-reversed")


def train_in_jax(config: Config, until_s: float) -> None:
    """The engine as `hebasr train` runs it; at `until_s` it is sent the signal that it saves on."""
    left_s = until_s - time.time() - (_DECODE_S if config.text.stamp_share else 0.0)
    if left_s < threading.TIMEOUT_MAX:
        stop = threading.Timer(max(0.0, left_s), os.kill, (os.getpid(), signal.SIGTERM))
        stop.daemon = True
        stop.start()
    train(LoadedConfig(config, dict.fromkeys(flatten(config), "rung 13")), print)
    if left_s < threading.TIMEOUT_MAX:
        stop.cancel()
    if config.text.stamp_share:
        write_stamped(config)


def newest_checkpoint(run: Path) -> Path:
    saved = [path for path in (run / "checkpoints").iterdir() if path.name.isdecimal()]
    return max(saved, key=lambda path: int(path.name))


def write_stamped(config: Config) -> None:
    """Transcripts of the test part with time stamps, by the newest checkpoint, as JSON lines."""
    folder = Path(config.runs_dir) / config.name
    newest = newest_checkpoint(folder)
    recognizer = load_recognizer(str(newest), dtype="float32")
    [source] = config.data.dev
    test = open_source(source)
    found = transcribe(
        recognizer,
        [test.read(index) for index in range(len(test.clips))],
        style=PromptStyle(config.text.language, stamps=True),
    )
    with (folder / "stamped.jsonl").open("w", encoding="utf-8") as file:
        for clip, recognition in zip(test.clips, found, strict=True):
            spoken = recognition.transcript.segments
            row = {"step": int(newest.name), "id": clip.id, "duration_s": clip.duration_s}
            row["reference"] = [[s.start_s, s.text] for s in clip.segments]
            row["text"] = recognition.transcript.text
            row["hypothesis"] = [[s.start_s, s.text] for s in spoken]
            print(json.dumps(row, ensure_ascii=False), file=file)


if __name__ == "__main__":
    main()
