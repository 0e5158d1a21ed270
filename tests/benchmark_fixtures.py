"""The six Hebrew test sets in small, with the columns and file names that they have on the hub.

Written from the data sets' own descriptions; nothing here comes from the package.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

REPOS = {
    "eval-d1": "ivrit-ai/eval-d1",
    "eval-whatsapp": "ivrit-ai/eval-whatsapp",
    "saspeech": "upai-inc/saspeech",
    "fleurs": "google/fleurs",
    "common-voice": "mozilla-foundation/common_voice_17_0",
    "kan": "imvladikon/hebrew_speech_kan",
}
GATED = ("eval-whatsapp", "common-voice")
CONVERTED = "refs/convert/parquet"
TEXTS = {
    "eval-d1": ["אז מה שקרה זה שהגענו מאוחר", 'כן, בצה"ל זה עובד אחרת'],
    "eval-whatsapp": ["היי מה נשמע", None, "אני בדרך"],
    "saspeech": ["שלום לכולם", "הכלכלה צומחת", "עד כאן"],
    "fleurs": ["המגדל נבנה ב-1948", "הוא נולד בבן־גוריון", "שלוש מדינות"],
    "common-voice": ["הילד אכל תפוח", "מחר יהיה חם", "לילה טוב"],
    "kan": ["החדשות בכאן", "", "מזג האוויר", "תודה"],
}
_AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def sound(seconds: float, seed: int, *, rate: int = 16000, kind: str = "WAV") -> bytes:
    """An encoded sound: a tone under noise, with pauses."""
    rng = np.random.default_rng(seed)
    time_S = np.arange(round(seconds * rate)) / rate
    level_S = 0.02 + 0.2 * (np.sin(2 * np.pi * (0.4 + 0.1 * seed) * time_S) > -0.7)
    wave_S = level_S * (np.sin(2 * np.pi * 200 * time_S) + 0.1 * rng.standard_normal(len(time_S)))
    file = io.BytesIO()
    soundfile.write(file, wave_S, rate, format=kind)
    return file.getvalue()


def parquet(audio: Sequence[bytes | None], columns: dict[str, list], name: str = "clip") -> bytes:
    """A file as the hub has it: encoded audio with its name, and the columns given."""
    structs = [{"bytes": data, "path": f"{name}{i}"} for i, data in enumerate(audio)]
    table = pa.table({"audio": pa.array(structs, _AUDIO), **columns})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=2)
    return file.getvalue()


def eval_d1() -> dict[str, dict[str, bytes]]:
    audio = [sound(60.0, seed, kind="MP3") for seed in (1, 2)]
    return {
        "main": {"data/test-00000-of-00001.parquet": parquet(audio, {"text": TEXTS["eval-d1"]})}
    }


def eval_whatsapp() -> dict[str, dict[str, bytes]]:
    audio = [sound(3.9, seed, kind="MP3") for seed in (3, 4, 5)]
    file = parquet(audio, {"text": TEXTS["eval-whatsapp"], "uuid": ["a", "b", "c"]})
    return {"main": {"data/test-00000-of-00001-9c7b7d1c5a7ed8aa.parquet": file}}


def saspeech() -> dict[str, dict[str, bytes]]:
    audio = [sound(3.5, seed, rate=44100) for seed in (6, 7, 8)]
    texts = TEXTS["saspeech"]
    files = {
        "data/test-00000-of-00002.parquet": parquet(audio[:2], {"text": texts[:2]}),
        "data/test-00001-of-00002.parquet": parquet(audio[2:], {"text": texts[2:]}),
        "data/train-00000-of-00001.parquet": b"not asked for",
        "README.md": b"---\nlicense: cc-by-nc-4.0\n---\n",
    }
    return {"main": files}


def fleurs() -> dict[str, dict[str, bytes]]:
    """A sentence's id comes once for each speaker."""
    columns = {
        "id": pa.array([1903, 1903, 1747], pa.int32()),
        "num_samples": pa.array([56000] * 3, pa.int32()),
        "path": ["100.wav", "200.wav", "300.wav"],
        "transcription": TEXTS["fleurs"],
        "raw_transcription": [f"{text}." for text in TEXTS["fleurs"]],
        "gender": pa.array([0, 1, 0], pa.int64()),
        "lang_id": pa.array([37] * 3, pa.int64()),
        "language": ["Hebrew"] * 3,
        "lang_group_id": pa.array([2] * 3, pa.int64()),
    }
    file = parquet([sound(3.5, seed) for seed in (9, 10, 11)], columns)
    converted = {
        "he_il/test/0000.parquet": file,
        "he_il/train/0000.parquet": b"not asked for",
        "af_za/test/0000.parquet": b"not asked for",
    }
    return {"main": {"fleurs.py": b"", "data/he_il/test.tsv": b""}, CONVERTED: converted}


def common_voice() -> dict[str, dict[str, bytes]]:
    columns = {
        "client_id": ["x", "y", "y"],
        "path": ["he_1.mp3", "he_2.mp3", "he_3.mp3"],
        "sentence": TEXTS["common-voice"],
        "up_votes": pa.array([2] * 3, pa.int64()),
        "down_votes": pa.array([0] * 3, pa.int64()),
        **{name: [""] * 3 for name in ("age", "gender", "accent", "segment", "variant")},
        "locale": ["he"] * 3,
    }
    file = parquet([sound(3.8, seed, rate=48000, kind="MP3") for seed in (12, 13, 14)], columns)
    converted = {"he/test/0000.parquet": file, "ar/test/0000.parquet": b"not asked for"}
    return {"main": {"audio/he/test/he_test_0.tar": b""}, CONVERTED: converted}


def kan() -> dict[str, dict[str, bytes]]:
    audio, texts = [sound(3.5, seed, kind="FLAC") for seed in (15, 16, 17, 18)], TEXTS["kan"]
    name = "data/validation-0000{}-of-00002-3b2bdbaab9d4de85.parquet"
    files = {
        name.format(0): parquet(audio[:1], {"sentence": texts[:1]}),
        name.format(1): parquet(audio[1:], {"sentence": texts[1:]}),
        "data/train-00000-of-00001-0123456789abcdef.parquet": b"not asked for",
    }
    return {"main": files}


def all_six() -> dict[str, dict[str, dict[str, bytes]]]:
    """Of each set its refs, and the files of each."""
    made = (eval_d1(), eval_whatsapp(), saspeech(), fleurs(), common_voice(), kan())
    return dict(zip(REPOS, made, strict=True))
