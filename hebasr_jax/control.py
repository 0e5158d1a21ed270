"""The system to beat, a Whisper model in CTranslate2's form, through the very same evaluation."""

import hashlib
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError
from hebasr_jax.evaluate import System
from hebasr_jax.hub import find_model
from hebasr_jax.identity import code_version, imports_of, key_of
from hebasr_jax.text import Transcript
from hebasr_jax.transcribe import Recognition

OPTIONS = {"language": "he", "beam_size": 5}
"""As ivrit.ai's `engines/faster_whisper_engine.py`: all else is the library's default."""

_FILES = ("model.bin", "*.json", "*.txt")  # CTranslate2's own format, no pickle


def load_control(source: str) -> System:
    """A folder or hub id such as ivrit-ai/whisper-large-v3-ct2, for `evaluate.run_sets`.

    Each piece is recognised on its own, by beam search with the fallback to higher temperatures.
    Raises `UserError` where faster-whisper is not installed or the model cannot be loaded.
    """
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        do = "Install it: pip install 'hebasr-jax[control]'."
        raise UserError(f"{source}: needs faster-whisper", str(error), do) from error
    folder = find_model(source, files=_FILES)
    for name in ("model.bin", "tokenizer.json"):  # without it, one is fetched from elsewhere
        if not (folder.path / name).is_file():
            why = f"It has no {name}."
            raise UserError(f"{source}: is no Whisper model of CTranslate2", why)
    try:
        model = WhisperModel(str(folder.path), local_files_only=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{source}: cannot be loaded", str(error).splitlines()[0]) from error
    if not model.model.is_multilingual:
        why = "faster-whisper would take it for English without an error."
        raise UserError(f"{source}: is no multilingual Whisper model", why)
    digests = {
        file.name: hashlib.file_digest(file.open("rb"), "sha256").hexdigest()
        for file in sorted(folder.path.iterdir())
        if file.suffix in (".bin", ".json", ".txt")
    }
    ours = imports_of("control", "longform", "data.decode") - imports_of("transcribe")
    named = {
        "fingerprint": key_of(digests),
        "tokenizer": digests["tokenizer.json"],
        "dtype": model.model.compute_type,
        "options": OPTIONS,
        "versions": {n: metadata.version(n) for n in ("faster-whisper", "ctranslate2")},
        "code": code_version(ours | {"audio"}),
    }
    more = {"name": source, "revision": folder.revision, "device": model.model.device, "batch": 1}
    _recognise(model, np.zeros(SAMPLE_RATE, np.float32))  # what is set up once is no recognition

    def decode(waves: Sequence[np.ndarray], contexts: Sequence[str]) -> list[Recognition]:
        return [_recognise(model, wave) for wave in waves]

    return System(decode, {**more, **named}, key_of(named))


def _recognise(model: Any, wave_S: np.ndarray) -> Recognition:
    """Texts of the segments joined by a space, as ivrit.ai's engine does."""
    if wave_S.dtype.kind == "i":
        wave_S = wave_S.astype(np.float32) / 32768
    segments, _ = model.transcribe(wave_S, **OPTIONS)
    segments = [*segments]  # the work is done here
    text = " ".join(segment.text.strip() for segment in segments)
    tokens = tuple(token for segment in segments for token in segment.tokens)
    return Recognition(Transcript("Hebrew", text), tokens, len(wave_S) / SAMPLE_RATE, finished=True)
