"""`make demo`: the whole system on a CPU, from made-up speech to an exported model."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hebasr_jax.average import describe
from hebasr_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from hebasr_jax.config_file import load_config
from hebasr_jax.demo_corpus import Kind, best_kind, learn_merges, make_corpus
from hebasr_jax.errors import UserError
from hebasr_jax.finish import FINAL
from hebasr_jax.run_config import Config
from hebasr_jax.run_folder import EXIT_RUN_AGAIN, read_json
from hebasr_jax.tiny import with_merges, write_tiny_model
from hebasr_jax.transcribe import load_recognizer, transcribe

SMALL = ModelConfig(
    encoder=EncoderConfig(
        mel_bins=128,
        conv_channels=8,
        width=64,
        layers=2,
        heads=4,
        mlp_width=256,
        window_chunks=8,
    ),
    decoder=DecoderConfig(
        vocab_size=1,  # `with_merges` says how many
        width=64,
        layers=2,
        heads=4,
        kv_heads=4,
        head_dim=16,
        mlp_width=170,
        max_positions=4096,
        rope_theta=1e4,
        norm_eps=1e-6,
    ),
    audio_token_id=0,
)
_MERGES = 200
_CONV_GAINS = (8.0, 2.0, 2.0)
_STOP_AT = 0.4  # of the steps
_PROMPT = ["system\n", "user\n", "assistant\n", "language Hebrew"]

Say = Callable[[str], None]


def run(config_path: Path, clips: int, say: Say) -> None:
    """Makes a corpus and a model, trains with a stop in between, and tries what was exported."""
    config = load_config(config_path).config
    files = Path(config.model.path).parent
    folder = Path(config.runs_dir) / config.name
    for path in (files / "corpus", files / "model", folder):
        shutil.rmtree(path, ignore_errors=True)
    began = time.perf_counter()
    make_files(files, config, clips, say, best_kind())
    say(f"[{time.perf_counter() - began:.0f} s]")
    train_with_a_stop(config_path, config, folder, say)
    say(f"[{time.perf_counter() - began:.0f} s]")
    try_exports(folder, files, say)
    say(f"[{time.perf_counter() - began:.0f} s in all]")


def make_files(files: Path, config: Config, clips: int, say: Say, kind: Kind) -> None:
    """The corpus and the model that training starts from."""
    voices = "eSpeak NG" if kind == "espeak" else "tones and noise (eSpeak NG is not installed)"
    say(f"1. A corpus of synthetic Hebrew, spoken by {voices}; one file is broken on purpose")
    made = make_corpus(files / "corpus", config.seed, kind=kind, clips=(clips, 96, 240))
    for split, rows in made.items():
        speakers = {row["speaker"] for row in rows}
        minutes = sum(row["duration_s"] for row in rows) / 60
        say(f"   {split}: {len(rows)} clips, {minutes:.1f} min, {len(speakers)} speakers")
    merges = learn_merges([*_PROMPT * 50, *(row["text"] for row in made["train"])], _MERGES)
    say(f"2. A tiny Qwen3-ASR with random weights and a tokenizer of {len(merges)} merges")
    write_tiny_model(
        files / "model",
        seed=config.seed,
        config=with_merges(SMALL, len(merges)),
        merges=merges,
        conv_gains=_CONV_GAINS,
    )


def train_with_a_stop(config_path: Path, config: Config, folder: Path, say: Say) -> None:
    """Runs `hebasr train` until a real SIGTERM stops it, then the same command again."""
    command = [sys.executable, "-m", "hebasr_jax", "train", "--config", str(config_path)]
    say(f"3. Training: {' '.join(['hebasr', *command[3:]])}")
    stop_at = round(_STOP_AT * (config.train.steps or 0))
    first = subprocess.Popen(command)
    while first.poll() is None and steps_taken(folder) < stop_at:
        time.sleep(0.2)
    say(f"4. Stopped by SIGTERM at step {steps_taken(folder)}")
    first.send_signal(signal.SIGTERM)
    if first.wait() != EXIT_RUN_AGAIN:
        raise UserError(
            "the first part of the training did not stop as it should",
            f"exit code {first.returncode} instead of {EXIT_RUN_AGAIN}",
            f"see the lines above, and {folder}",
        )
    say("5. The same command goes on")
    if subprocess.run(command, check=False).returncode:
        raise UserError("training failed", "see the lines above", f"the run is in {folder}")


def steps_taken(folder: Path) -> int:
    """The last step that a running training has written down."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def try_exports(folder: Path, files: Path, say: Say) -> None:
    """Loads each export again and lets it transcribe one test clip."""
    import soundfile

    chosen = read_json(folder / FINAL)
    say(f"6. What the run ended with: {chosen['chosen']}")
    for name, scores in chosen["scores"]["test"].items():
        say(f"   {describe(name, {name: scores})}: speakers and phrases that training never had")
    rows = (files / "corpus" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(rows[0])
    wave, _ = soundfile.read(files / "corpus" / row["audio"], dtype="int16")
    texts = []
    for path in sorted((folder / "export").iterdir()):
        (result,) = transcribe(load_recognizer(str(path), dtype="float32"), [wave])
        texts.append(result.transcript.text)
        say(f"7. {path} transcribes {row['audio']}: {result.transcript.text}")
    say(f"   it was: {row['text']}")
    if len(set(texts)) != 1:
        raise UserError("the two exports disagree", f"{texts}", "report this")
    say(f"   report: {folder / 'report.html'}, model card: {path / 'README.md'}")
    say(f"Next: hebasr transcribe {path} YOUR_FILES, or your own data:")
    say("      hebasr train --config configs/finetune.py --dry-run")
