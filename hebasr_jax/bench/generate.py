"""Decoding in slots, its numbers of new tokens forced: random weights never stop by themselves."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

from hebasr_jax.audio import SAMPLE_RATE, stream_audio
from hebasr_jax.bench import work
from hebasr_jax.bench.figures import Row, read_bytes_per_s
from hebasr_jax.config import CHUNK_TOKENS, ModelConfig
from hebasr_jax.hub import ModelFolder
from hebasr_jax.longform import Cutting, LongRecognition, Sound, recognize_long
from hebasr_jax.model.asr import Params, init_params
from hebasr_jax.model.layers import Compute
from hebasr_jax.sharding import local_mesh, replicated
from hebasr_jax.slots import Utterance, classes, decode_all
from hebasr_jax.text import Prompt, PromptStyle, load_tokenizer
from hebasr_jax.throughput import peak_bytes
from hebasr_jax.transcribe import Recognition, Recognizer, transcribe

_FILLINGS = 4  # clips for each slot where slots are refilled
_LAW = 0.25  # sigma of a clip's new tokens
_REPEATS = 2
_GIB = 2**30


@dataclass(frozen=True)
class Settings:
    """What is measured.

    slots: on each device. clip_s: of all clips. tokens: new ones of each where they are forced.
    """

    model: ModelConfig
    compute: Compute
    slots: tuple[int, ...]
    clip_s: int = work.CLIP_S
    tokens: int = work.TARGET_TOKENS


def random_params(model: ModelConfig, compute: Compute) -> Params:
    """Random weights in the compute dtype, whole on every device of this process."""

    def make() -> Params:
        return jax.tree.map(
            lambda w: w.astype(compute.dtype), init_params(model, jax.random.key(0))
        )

    return jax.jit(make, out_shardings=replicated(local_mesh()))()


def in_slots(settings: Settings, params: Params) -> Iterator[Row]:
    """For each number of slots: filled once, refilled, refilled with lengths that follow a law."""
    reads = read_bytes_per_s() if jax.default_backend() == "gpu" else None
    for slots in settings.slots:
        clips = slots * local_mesh().size
        whole_s, row = _decoded(
            settings, params, slots, [settings.tokens] * clips, f"{settings.tokens} each"
        )
        first_s, _ = _decoded(settings, params, slots, [2] * clips, "2 each")
        step_s = (whole_s - first_s) / (settings.tokens - 2)
        row |= {"prefill audio-s/s": clips * settings.clip_s / first_s, "step ms": 1e3 * step_s}
        if reads:
            row["floor"] = step_s / (step_bytes(settings, slots) / reads)
        yield row
        law = forced_law(settings, _FILLINGS * clips)
        for budgets, told in (
            ([settings.tokens] * len(law), "the same, refilled"),
            (law, f"by a law, mean {np.mean(law):.0f}, refilled"),
        ):
            yield _decoded(settings, params, slots, budgets, told)[1]


def a_file(settings: Settings, params: Params, folder: Path, minutes: float) -> Row:
    """A long file as `hebasr transcribe` reads, cuts and decodes it; the second time.

    Each piece has the number of tokens that a law gives it; that random weights write no end token
    before is checked.
    """
    path = folder / "long.wav"
    rng = np.random.default_rng(0)
    soundfile.write(path, work.noise(rng, int(60 * minutes) * SAMPLE_RATE), SAMPLE_RATE)
    work.write_model_files(settings.model, folder)
    tokenizer = load_tokenizer(folder)
    source = ModelFolder(folder, str(folder), None)
    recognizer = Recognizer(params, settings.model, tokenizer, settings.compute, source)
    asked: list[int] = []
    cutting = Cutting(float(settings.clip_s), settings.clip_s / 3)

    def decode(waves: Sequence[np.ndarray], before: Sequence[str]) -> list[Recognition]:
        rng = np.random.default_rng(len(waves))
        expected = (work.target_tokens(len(wave) / SAMPLE_RATE) for wave in waves)
        tokens = [_law(rng, count) for count in expected]
        asked.append(sum(tokens))
        return transcribe(recognizer, waves, style=PromptStyle(), max_new_tokens=tokens, retries=0)

    for _ in range(2):  # the first one compiles
        asked.clear()
        start = time.perf_counter()
        sound = Sound(path.name, partial(stream_audio, path))
        told = next(iter(recognize_long(decode, [sound], cutting)))
        taken_s = time.perf_counter() - start
    assert isinstance(told, LongRecognition), told
    if len(told.tokens) != sum(asked):
        raise AssertionError(f"{len(told.tokens)} tokens, {sum(asked)} were asked for")
    return {
        "clips": f"{minutes:g} minutes of audio in {told.pieces} pieces",
        "new tokens": f"by a law, {len(told.tokens)} in all",
        "RTFx": told.duration_s / taken_s,
        "audio-s/s": told.duration_s / taken_s,
        "seconds": taken_s,
    }


def forced_law(settings: Settings, clips: int) -> list[int]:
    """Numbers of new tokens of mean `settings.tokens`, lognormal, at most twice that; seeded."""
    rng = np.random.default_rng(0)
    return [_law(rng, settings.tokens) for _ in range(clips)]


def step_bytes(settings: Settings, slots: int) -> float:
    """Bytes that a decoding step must read at least: the decoder, its head, the rows' own cache."""
    decoder, size = settings.model.decoder, jnp.dtype(settings.compute.dtype).itemsize
    heads = 2 * decoder.heads + 2 * decoder.kv_heads
    layer = decoder.width * (heads * decoder.head_dim + 3 * decoder.mlp_width)
    weights = decoder.layers * layer + decoder.vocab_size * decoder.width
    prompt = work.PROMPT_TOKENS + CHUNK_TOKENS * settings.clip_s
    positions = slots * (prompt + settings.tokens / 2)
    return size * (weights + positions * 2 * decoder.layers * decoder.kv_heads * decoder.head_dim)


def _law(rng: np.random.Generator, mean: int) -> int:
    drawn = mean * rng.lognormal(-(_LAW**2) / 2, _LAW)
    return int(np.clip(round(drawn), 1, 2 * mean))


def _decoded(
    settings: Settings, params: Params, slots: int, budgets: Sequence[int], told: str
) -> tuple[float, Row]:
    """Seconds of the quicker of two calls after a first one, and its row."""
    wave = work.noise(np.random.default_rng(0), settings.clip_s * SAMPLE_RATE)
    slot_s = next(iter(classes([len(wave)])))
    prompt = Prompt(tuple(range(9)), tuple(range(work.PROMPT_TOKENS - 9)))
    utterances = [Utterance(wave, prompt, int(budget)) for budget in budgets]
    decode = partial(
        decode_all,
        params,
        utterances,
        config=settings.model,
        compute=settings.compute,
        mesh=local_mesh(),
        end_ids=(),
        batch_audio_s=float(slots * slot_s),
    )
    decode()
    taken = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        decoded = decode() or []
        taken.append(time.perf_counter() - start)
    taken_s = min(taken)
    if [len(one.tokens) for one in decoded] != [int(budget) for budget in budgets]:
        raise AssertionError("a row did not get the number of tokens that was asked for")
    return taken_s, {
        "slots": slots,
        "clips": len(budgets),
        "new tokens": told,
        "audio-s/s": len(budgets) * settings.clip_s / taken_s,
        "peak so far GiB": (peak_bytes() or 0) / _GIB,
    }
