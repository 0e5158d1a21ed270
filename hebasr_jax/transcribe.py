"""Clips to transcripts: load a model once, decode all clips in slots, parse what was written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config import (
    Layout,
    ModelConfig,
    layout_of,
    model_config,
    read_config,
)
from hebasr_jax.errors import UserError
from hebasr_jax.features import HOP, frame_count
from hebasr_jax.hub import ModelFolder, find_model
from hebasr_jax.model.asr import Params
from hebasr_jax.model.attention import Kernel, pick_kernel
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.model.layers import Compute
from hebasr_jax.sharding import local_mesh, replicated
from hebasr_jax.slots import Decoded, Utterance, decode_all, search_all
from hebasr_jax.text import (
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
_BATCH_AUDIO_S = (240.0, 4096.0)  # on a CPU, on a GPU
_LONGEST_LOOP = 32
RETRY_TEMPERATURES = (0.3, 0.6)


@dataclass(frozen=True)
class Recognizer:
    """A loaded model with its tokenizer and the way it computes.

    mesh: this process's devices that decode; `params` are whole on each.
    """

    params: Params
    config: ModelConfig
    tokenizer: TextTokenizer
    compute: Compute
    folder: ModelFolder
    mesh: Mesh = field(default_factory=local_mesh)

    @property
    def description(self) -> str:
        """One line on what runs where; each run prints it."""
        device = jax.devices()[0]
        millions = sum(leaf.size for leaf in jax.tree.leaves(self.params)) / 1e6
        return (
            f"{millions:.1f}M parameters, {np.dtype(self.compute.dtype).name} on "
            f"{device.device_kind}, attention: {self.compute.kernel} in encoder windows and "
            "prefill, and, without beams, in cached decoding"
        )


@dataclass(frozen=True)
class Recognition:
    """A transcript with what it was made of.

    tokens: the generated ids without the end token.
    duration_s: of the audio, in seconds.
    finished: False if the token budget ran out first: text may be missing.
    loops: 1 if the greedy text went round in circles and was decoded again.
    logprob: mean log-probability of the tokens, in nats; 0 without tokens.
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
    mesh = local_mesh()
    place = partial(jax.device_put, device=replicated(mesh))
    params = load_weights(source, folder, config, layout, dtype=compute.dtype, place=place)
    return Recognizer(params, config, tokenizer, compute, folder, mesh)


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
    context: str | Sequence[str] = "",
    max_new_tokens: int | Sequence[int] | None = None,
    batch_audio_s: float | None = None,
    beams: int = 1,
    retries: int = len(RETRY_TEMPERATURES),
    stopped: Callable[[], bool] = lambda: False,
) -> list[Recognition]:
    """Transcripts of clips, each as if it were decoded alone: greedy, and drawn again on a loop.

    Args:
      waves: mono float32 or int16 samples at 16 kHz, at most MAX_CLIP_S each. Under 160 samples
        there is no mel frame: an empty transcript, without running the model.
      style: what the prompt gives (`text.PromptStyle`): language, time stamps.
      context: text for the system turn, of all clips or one for each.
      max_new_tokens: budget of every clip, or of each; None is 8 a second plus 16.
      batch_audio_s: seconds of audio decoded together on each device; memory, not results,
        depends on it. None is 240, and 4096 on a GPU.
      beams: hypotheses that a beam search keeps; 1 takes the best token each time.
      retries: how often a text that goes round in circles (`goes_round`) is decoded again, at the
        temperatures of RETRY_TEMPERATURES, without beams. When all do, the first one stays.
      stopped: asked now and then; when it says so the result is an empty list.

    Raises:
      UserError: a clip longer than the model takes in one piece; a budget that it cannot have.
    """
    style = style or PromptStyle()
    for wave in waves:
        _check_wave(wave)
    contexts = [context] * len(waves) if isinstance(context, str) else list(context)
    _check_count("contexts", len(contexts), waves)
    made = {text: build_prompt(recognizer.tokenizer, style, context=text) for text in {*contexts}}
    utterances = {}
    budgets = _budgets(waves, max_new_tokens)
    for i, (wave, text, budget) in enumerate(zip(waves, contexts, budgets, strict=True)):
        utterance = Utterance(wave, made[text], budget)
        _check_positions(utterance, recognizer.config.decoder.max_positions)
        if len(wave) >= HOP:
            utterances[i] = utterance
    decode = partial(_decode, recognizer, batch_audio_s=batch_audio_s, stopped=stopped)
    decoded = decode(utterances, beams=beams)
    circling = {i for i, row in decoded.items() if retries and goes_round(row.tokens)}
    looping = circling
    for attempt, temperature in enumerate(RETRY_TEMPERATURES[:retries]):
        again = {
            i: replace(utterances[i], temperature=temperature, seed=attempt)
            for i in sorted(looping)
        }
        good = {i: row for i, row in decode(again).items() if not goes_round(row.tokens)}
        decoded, looping = decoded | good, looping - good.keys()
    if stopped():
        return []
    return [
        _recognition(recognizer, style, wave, decoded.get(i), int(i in circling))
        for i, wave in enumerate(waves)
    ]


def _budgets(waves: Sequence[np.ndarray], given: int | Sequence[int] | None) -> list[int]:
    if given is None:
        return [token_budget(len(wave)) for wave in waves]
    if np.ndim(given):
        _check_count("budgets", len(np.asarray(given)), waves)
    return [int(budget) for budget in np.broadcast_to(np.asarray(given), len(waves))]


def _decode(
    recognizer: Recognizer,
    utterances: Mapping[int, Utterance],
    *,
    batch_audio_s: float | None,
    stopped: Callable[[], bool],
    beams: int = 1,
) -> dict[int, Decoded]:
    """What each utterance gave; nothing when `stopped` says so."""
    if not utterances:
        return {}
    platform = recognizer.mesh.devices.flat[0].platform
    run = partial(search_all, beams=beams) if beams > 1 else decode_all
    decoded = run(
        recognizer.params,
        list(utterances.values()),
        config=recognizer.config,
        compute=recognizer.compute,
        mesh=recognizer.mesh,
        end_ids=recognizer.tokenizer.special.eos,
        batch_audio_s=batch_audio_s or _BATCH_AUDIO_S[platform == "gpu"],
        stopped=stopped,
    )
    return dict(zip(utterances, decoded, strict=True)) if decoded is not None else {}


def _recognition(
    recognizer: Recognizer,
    style: PromptStyle,
    wave: np.ndarray,
    decoded: Decoded | None,
    loops: int,
) -> Recognition:
    """None is a clip without a mel frame."""
    seconds = len(wave) / SAMPLE_RATE
    if decoded is None:
        return Recognition(parse_output(recognizer.tokenizer, style, ()), (), seconds, True)
    transcript = parse_output(recognizer.tokenizer, style, decoded.tokens, duration_s=seconds)
    mean = float(decoded.logprobs_G.mean()) if decoded.tokens else 0.0
    return Recognition(transcript, decoded.tokens, seconds, decoded.finished, loops, mean)


def goes_round(ids: Sequence[int]) -> bool:
    """Whether some stretch of at most 32 tokens follows itself for 24 tokens and six times.

    Speakers do say a word five times over; a decoder in a loop does not stop by itself.
    """
    tokens_G = np.asarray(ids)
    for period in range(1, 1 + min(_LONGEST_LOOP, len(tokens_G) // 6)):
        same = np.concatenate([[False], tokens_G[period:] == tokens_G[:-period], [False]])
        ends = np.flatnonzero(~same)
        if np.diff(ends).max() - 1 >= max(5 * period, 24 - period):
            return True
    return False


def token_budget(samples: int) -> int:
    return math.ceil(_TOKENS_PER_S * samples / SAMPLE_RATE) + _TOKENS_SPARE


def _check_count(what: str, count: int, waves: Sequence[np.ndarray]) -> None:
    if count != len(waves):
        told = f"the number of {what}, {count}, is not that of clips, {len(waves)}"
        raise UserError(told, do="give one for all, not in a list, or one for each")


def _check_wave(wave: Any) -> None:
    """Refuses what would give a wrong transcript in silence."""
    if not hasattr(wave, "dtype"):
        raise UserError(
            f"a {type(wave).__name__} is no clip",
            "clips are arrays: one row of float or int16 samples, at 16 kHz",
            "give a list of clips, each as numpy.asarray(clip, 'float32')",
        )
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


def _check_positions(utterance: Utterance, most: int) -> None:
    """Refuses a budget that is none, or that the model's positions cannot hold."""
    audio, budget = audio_tokens(frame_count(len(utterance.wave_S))), utterance.budget
    prompt_tokens = len(utterance.prompt.before) + len(utterance.prompt.after)
    if budget < 1 or audio + prompt_tokens + budget > most:
        raise UserError(
            f"a budget of {budget} tokens cannot be had",
            f"{audio} audio tokens, {prompt_tokens} of prompt and the budget must fit into "
            f"{most} positions",
            "leave the budget out, give another, or cut the audio",
        )
