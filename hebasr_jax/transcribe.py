"""Clips to transcripts: load a model once, batch clips by length, decode, parse."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config import (
    CHUNK_TOKENS,
    Layout,
    ModelConfig,
    layout_of,
    model_config,
    read_config,
)
from hebasr_jax.errors import UserError
from hebasr_jax.features import HOP, frame_count
from hebasr_jax.generate import Clips, Generated, generate_from_wave
from hebasr_jax.hub import ModelFolder, find_model
from hebasr_jax.model.asr import Params
from hebasr_jax.model.attention import Kernel, pick_kernel
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.model.layers import Compute
from hebasr_jax.text import (
    Prompt,
    PromptStyle,
    TextTokenizer,
    Transcript,
    build_prompt,
    load_tokenizer,
    parse_output,
)
from hebasr_jax.trained import find_checkpoint, load_trained, model_files
from hebasr_jax.weights import load_params

MAX_CLIP_S = 1200.0  # what qwen-asr gives the model in one piece; longer audio must be cut
_TOKENS_PER_S = 8  # Hebrew runs at 3 to 6 tokens a second (hebrew-asr.md, 6.1)
_TOKENS_SPARE = 16


@dataclass(frozen=True)
class Recognizer:
    """A loaded model with its tokenizer and the way it computes."""

    params: Params
    config: ModelConfig
    tokenizer: TextTokenizer
    compute: Compute
    folder: ModelFolder

    @property
    def description(self) -> str:
        """One line on what runs where; each run prints it."""
        device = jax.devices()[0]
        millions = sum(leaf.size for leaf in jax.tree.leaves(self.params)) / 1e6
        return (
            f"{millions:.1f}M parameters, {np.dtype(self.compute.dtype).name} on "
            f"{device.device_kind}, attention: {self.compute.kernel} in encoder windows and "
            "prefill, xla in cached decoding"
        )


@dataclass(frozen=True)
class Recognition:
    """A transcript with what it was made of.

    tokens: the generated ids without the end token.
    duration_s: of the audio, in seconds.
    finished: False if the token budget ran out first: text may be missing.
    loops: how often its text went round in circles and it was decoded again.
    logprob: mean log-probability of its tokens.
    """

    transcript: Transcript
    tokens: tuple[int, ...]
    duration_s: float
    finished: bool
    loops: int = 0
    logprob: float = 0.0


def load_recognizer(
    source: str,
    *,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    kernel: Kernel | Literal["auto"] = "auto",
) -> Recognizer:
    """Loads a model folder in either layout, a hub id, a training run or one of its checkpoints.

    Args:
      revision: branch, tag or commit of a hub id.
      dtype: compute and weight type; None is bfloat16 on a GPU, else float32.
      kernel: attention kernel; one that cannot be had is a UserError.
    """
    platform = jax.default_backend()
    dtype = dtype or ("bfloat16" if platform == "gpu" else "float32")
    try:
        compute = Compute(jnp.dtype(dtype), pick_kernel(kernel, jnp.dtype(dtype), platform))
    except ValueError as error:
        raise UserError(str(error)) from None
    folder, config, layout, tokenizer = open_model(source, revision=revision)
    params = load_weights(source, folder, config, layout, dtype=compute.dtype)
    return Recognizer(params, config, tokenizer, compute, folder)


def open_model(
    source: str, *, revision: str | None = None
) -> tuple[ModelFolder, ModelConfig, Layout, TextTokenizer]:
    """All of a model but its weights; UserError where its files are damaged or do not agree."""
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        folder = find_model(source, revision=revision)
    else:
        folder = ModelFolder(model_files(checkpoint), str(checkpoint), None)
    content = read_config(folder.path)
    config = model_config(content)
    tokenizer = load_tokenizer(folder.path)
    if tokenizer.special.audio_pad != config.audio_token_id:
        raise UserError(
            f"config.json and tokenizer of {folder.path} disagree",
            f"audio_token_id is {config.audio_token_id}, <|audio_pad|> is "
            f"{tokenizer.special.audio_pad}",
            "use config.json and tokenizer files of one and the same model",
        )
    tokens = tokenizer.full.get_vocab_size(with_added_tokens=True)
    if tokens > config.decoder.vocab_size:
        raise UserError(
            f"the tokenizer of {folder.path} has {tokens} tokens",
            f"the model has {config.decoder.vocab_size} rows for them",
            "use config.json and tokenizer files of one and the same model",
        )
    return folder, config, layout_of(content), tokenizer


def load_weights(
    source: str,
    folder: ModelFolder,
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: Any = None,
    place: Callable[[np.ndarray], Any] = jax.device_put,
) -> Params:
    """The weights of what `open_model` opened; arguments as in `weights.load_params`."""
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        return load_params(folder.path, config, layout, dtype=dtype, place=place)
    return jax.tree.map(
        lambda leaf: place(leaf.astype(dtype or leaf.dtype)), load_trained(checkpoint)
    )


def transcribe(
    recognizer: Recognizer,
    waves: Sequence[np.ndarray],
    *,
    style: PromptStyle | None = None,
    context: str = "",
    max_new_tokens: int | None = None,
    batch_audio_s: float = 240.0,
) -> list[Recognition]:
    """Greedy transcripts of clips, each as if it were decoded alone.

    Args:
      waves: mono float32 or int16 samples at 16 kHz, at most MAX_CLIP_S each. Under 160 samples
        there is no mel frame: an empty transcript, without running the model.
      style: what the prompt gives (`text.PromptStyle`): language, time stamps.
      context: text for the system turn.
      max_new_tokens: budget of every clip; None is 8 a second plus 16.
      batch_audio_s: seconds of padded audio decoded together; memory, not results, depends on it.

    Raises:
      UserError: a clip longer than the model takes in one piece; a budget that it cannot have.
    """
    style = style or PromptStyle()
    prompt = build_prompt(recognizer.tokenizer, style, context=context)
    prompt_tokens = len(prompt.before) + len(prompt.after)
    for wave in waves:
        _check_wave(wave)
        budget = max_new_tokens if max_new_tokens is not None else token_budget(len(wave))
        _check_positions(len(wave), prompt_tokens, budget, recognizer.config.decoder.max_positions)
    found: dict[int, Recognition] = {}
    for batch in _batches([len(wave) for wave in waves], batch_audio_s, max_new_tokens):
        generated = _decode(recognizer, [waves[i] for i in batch], prompt, max_new_tokens)
        tokens_BG, lengths_B = np.asarray(generated.tokens_BG), np.asarray(generated.lengths_B)
        finished_B = np.asarray(generated.finished_B)
        for row, i in enumerate(batch):
            ids = tuple(tokens_BG[row, : lengths_B[row]].tolist())
            seconds = len(waves[i]) / SAMPLE_RATE
            transcript = parse_output(recognizer.tokenizer, style, ids, duration_s=seconds)
            found[i] = Recognition(transcript, ids, seconds, bool(finished_B[row]))
    nothing = parse_output(recognizer.tokenizer, style, ())
    return [
        found.get(i, Recognition(nothing, (), len(wave) / SAMPLE_RATE, finished=True))
        for i, wave in enumerate(waves)
    ]


def _decode(
    recognizer: Recognizer,
    waves: Sequence[np.ndarray],
    prompt: Prompt,
    max_new_tokens: int | None,
) -> Generated:
    """One padded batch through the program of its shape; rows and columns come in few sizes."""
    rows = _next_power(len(waves))
    samples = _bucket_s(max(map(len, waves)) / SAMPLE_RATE) * SAMPLE_RATE
    text = prompt.before + prompt.after
    columns = 32 * math.ceil(len(text) / 32)
    wave_BS = np.zeros((rows, samples), np.float32)
    samples_B = np.zeros(rows, np.int32)
    budget_B = np.zeros(rows, np.int32)
    for row, wave in enumerate(waves):
        scale = np.float32(32768 if wave.dtype.kind == "i" else 1)
        wave_BS[row, : len(wave)] = wave / scale
        samples_B[row], budget_B[row] = len(wave), max_new_tokens or token_budget(len(wave))
    text_BX = np.zeros((rows, columns), np.int32)
    text_BX[:, : len(text)] = text
    clips = Clips(
        wave_BS=jnp.asarray(wave_BS),
        samples_B=jnp.asarray(samples_B),
        text_BX=jnp.asarray(text_BX),
        text_lengths_B=jnp.full(rows, len(text)),
        audio_at_B=jnp.full(rows, len(prompt.before)),
    )
    return generate_from_wave(
        recognizer.params,
        clips,
        jnp.asarray(budget_B),
        config=recognizer.config,
        compute=recognizer.compute,
        end_ids=recognizer.tokenizer.special.eos,
        max_new_tokens=32 * math.ceil((max_new_tokens or token_budget(samples)) / 32),
    )


def _batches(
    lengths: list[int], batch_audio_s: float, max_new_tokens: int | None = None
) -> list[list[int]]:
    """Indices of clips with at least one frame, in batches of like length.

    A new token takes the cache room of a token of audio, so that a budget beyond the usual 8 a
    second counts as audio of its length.
    """
    batches: list[list[int]] = []
    bucket = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[i] < HOP:
            continue
        seconds = _bucket_s(lengths[i] / SAMPLE_RATE)
        room = max(seconds, (max_new_tokens or 0) / CHUNK_TOKENS)
        full = bool(batches) and _next_power(len(batches[-1]) + 1) * room > batch_audio_s
        if not batches or full or seconds != bucket:
            batches.append([])
            bucket = seconds
        batches[-1].append(i)
    return batches


def _bucket_s(seconds: float) -> int:
    """The length in whole seconds that a clip is padded to: 1, 2, 3, 4, then steps of a quarter."""
    whole = max(1, math.ceil(seconds))
    step = 2 ** max(0, (whole - 1).bit_length() - 3)
    return step * math.ceil(whole / step)


def token_budget(samples: int) -> int:
    return math.ceil(_TOKENS_PER_S * samples / SAMPLE_RATE) + _TOKENS_SPARE


def _next_power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _check_wave(wave: np.ndarray) -> None:
    """Refuses what would give a wrong transcript in silence."""
    kind = (np.asarray(wave).dtype.kind, np.asarray(wave).dtype.itemsize)
    if np.ndim(wave) != 1 or not (kind[0] == "f" or kind == ("i", 2)):
        raise UserError(
            f"a wave of dtype {np.asarray(wave).dtype} and shape {np.shape(wave)} is no clip",
            "clips are one row of float or int16 samples, at 16 kHz",
            "average the channels and scale other integers to [-1, 1]",
        )
    if kind[0] == "f" and not np.isfinite(wave).all():
        raise UserError("a wave holds samples that are not finite", do="repair or drop the clip")
    seconds = len(wave) / SAMPLE_RATE
    if seconds > MAX_CLIP_S:
        raise UserError(
            f"a clip of {seconds:.0f} s is too long",
            f"the model takes at most {MAX_CLIP_S:.0f} s in one piece, and nothing is cut silently",
            "cut it into pieces at silences",
        )


def _check_positions(samples: int, prompt_tokens: int, budget: int, most: int) -> None:
    """Refuses a budget that is none, or that the model's positions cannot hold."""
    audio = audio_tokens(frame_count(samples))
    if budget < 1 or audio + prompt_tokens + budget > most:
        raise UserError(
            f"a budget of {budget} tokens cannot be had",
            f"{audio} audio tokens, {prompt_tokens} of prompt and the budget must fit into "
            f"{most} positions",
            "leave the budget out, give another, or cut the audio",
        )
