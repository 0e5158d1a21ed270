"""Long-form decoding on real speech: strings of digits alone against the same strings as an hour.

    python tests/real_speech/stitch.py --data ../shared/data --work NEW_FOLDER

trains the model of the recipe `fsdd` (or takes `--model`, with the sets in `--work`), joins the
held-out strings, repeated in drawn orders with 0.1 to 0.6 s between them, into an hour, and tells
the WER of both, with pieces as long as the model was trained on. An error lies at a joint when
its word is the first or the last of a piece.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from make_sets import RATE, make_sets
from recipes import Run, make_config, write_model
from train_one import newest_checkpoint, train_in_jax

from hebasr_jax.audio import read_audio
from hebasr_jax.config_file import checked
from hebasr_jax.longform import Cutting, LongRecognition, Sound, recognize_long
from hebasr_jax.metrics import align_words, word_errors
from hebasr_jax.text import PromptStyle
from hebasr_jax.transcribe import load_recognizer, transcribe

_HOUR_S = 3600.0
_CUTTING = Cutting(piece_s=4.0, search_s=2.0)  # strings last 0.6 to 4.5 s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", help="a trained model or run; default: train one")
    given = parser.parse_args()
    sets = given.work / "sets"
    if not sets.exists():
        make_sets(given.data, sets)
    model = given.model or train_model(sets, given.work)
    print(json.dumps(measure(model, sets / "fsdd/test.jsonl"), indent=1))


def train_model(sets: Path, work: Path) -> str:
    run = Run("fsdd", "ours", 0)
    config = checked(make_config(run, sets, work))
    write_model(run, sets, Path(config.model.path))
    train_in_jax(config, float("inf"))
    return str(newest_checkpoint(work / run.name))


def measure(model: str, manifest: Path) -> dict[str, object]:
    """WER of the strings alone and of the hour, and where the hour's errors lie."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    waves = [read_audio(manifest.parent / row["audio"], max_seconds=60.0) for row in rows]
    order, hour = join(waves)
    decode = partial(transcribe, load_recognizer(model), style=PromptStyle("English"))
    alone = [found.transcript.text for found in decode(waves)]
    starts: list[int] = []  # words before each piece

    def decode_pieces(pieces: Sequence[np.ndarray], contexts: Sequence[str]) -> list:
        found = decode(pieces, context=contexts)
        starts.extend(len(one.transcript.text.split()) for one in found)
        return found

    sound = Sound("hour", lambda: iter(np.array_split(hour, 64)))
    [whole] = recognize_long(decode_pieces, [sound], _CUTTING)
    assert isinstance(whole, LongRecognition)
    texts = [rows[n]["text"] for n in order]
    single = word_errors(texts, [alone[n] for n in order])
    joined = word_errors([" ".join(texts)], [whole.text])
    inside, at_joint = errors_by_place(" ".join(texts), whole.text, starts)
    return {
        "hour_s": whole.duration_s,
        "pieces": whole.pieces,
        "words": int(single.length_N.sum()),
        "wer_alone": single.rate,
        "wer_hour": joined.rate,
        "errors_alone": int(single.errors_N.sum()),
        "errors_hour": int(joined.errors_N.sum()),
        "errors_at_joints": at_joint,
        "errors_elsewhere": inside,
        "words_at_joints": sum(min(count, 2) for count in starts),
        "loops": whole.loops,
        "unfinished": len(whole.unfinished_s),
    }


def join(waves: Sequence[np.ndarray]) -> tuple[list[int], np.ndarray]:
    """All strings again and again, each time in another order, until an hour is full."""
    rng = np.random.default_rng(0)
    order: list[int] = []
    parts: list[np.ndarray] = []
    samples = 0
    while samples < _HOUR_S * RATE:
        for n in rng.permutation(len(waves)).tolist():
            gap = np.zeros(round(rng.uniform(0.1, 0.6) * RATE), np.float32)
            order.append(n)
            parts += [waves[n], gap]
            samples += len(waves[n]) + len(gap)
    return order, np.concatenate(parts)


def errors_by_place(reference: str, hypothesis: str, counts: Sequence[int]) -> tuple[int, int]:
    """Errors inside pieces, and at the first or last word of one; a deletion is where it falls."""
    ends = np.cumsum(counts)
    edges = {*ends.tolist(), *(ends - 1).tolist()}
    places = [0, 0]
    at = 0
    for column in align_words(reference, hypothesis):
        if column.operation != "equal":
            places[at in edges] += 1
        at += column.hypothesis is not None
    return places[0], places[1]


if __name__ == "__main__":
    main()
