"""From sets of clips to the plan's table: tokens counted, unusable clips left out and counted."""

from collections.abc import Sequence

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import Clip, ClipSet
from hebasr_jax.data.draws import SetInfo, Table, clip_key
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Data, Text
from hebasr_jax.text import (
    MAX_CONTEXT_TOKENS,
    PromptStyle,
    TextTokenizer,
    build_example,
    build_prompt,
)

_CHUNK = 10_000  # texts encoded at a time


def make_table(
    sets: Sequence[ClipSet], tokenizer: TextTokenizer, text: Text, data: Data
) -> tuple[Table, dict[str, dict[str, int]]]:
    """Columns of the clips that can be trained on; and per set the others, counted by reason.

    Raises `UserError` when there is no set, two have one name, or one has no usable clip; when
    the default language has no proper name, or stamps are asked of a tokenizer without them.
    """
    build_prompt(tokenizer, PromptStyle(text.language, stamps=text.stamp_share > 0))
    names = [clip_set.name for clip_set in sets]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"Training needs data sets with names of their own; there are: {names}.",
            "The name of a set tells its clips from those of others.",
            "Give data.train one or more sources with different names.",
        )
    left_out, infos = {}, []
    columns: list[list[np.ndarray]] = []
    languages: dict[str, int] = {}
    for clip_set in sets:
        counts = count_tokens(clip_set.clips, tokenizer, text, joined=data.join_share > 0)
        usable_C, left_out[clip_set.name] = _usable(clip_set, counts[0], data)
        index_C = np.flatnonzero(usable_C)
        clips = [clip_set.clips[index] for index in index_C]
        synthetic = sum(clip.synthetic for clip in clips)
        told = clip_set.name, len(clips), clip_set.share, clip_set.fingerprint, synthetic
        infos.append(SetInfo(*told))
        recordings: dict[str, int] = {"": -1}
        columns.append(
            [
                index_C,
                np.array([clip_key(clip_set.name, clip.id) for clip in clips], np.uint64),
                np.array([round(clip.duration_s * SAMPLE_RATE) for clip in clips]),
                *(count[index_C] for count in counts),
                np.array([recordings.setdefault(c.recording, len(recordings) - 1) for c in clips]),
                np.array([languages.setdefault(c.language, len(languages)) for c in clips]),
                np.array([_timed(clip) for clip in clips], np.int8),
                np.array([bool(clip.context.strip()) for clip in clips], np.int8),
            ]
        )
    joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
    return Table(tuple(infos), *joined), left_out


def count_tokens(
    clips: Sequence[Clip], tokenizer: TextTokenizer, text: Text, *, joined: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens of each clip alone (prompt and target), and those it adds behind another clip.

    Both are the most that any draw of stamps and context can make them; -1 where the language has
    no proper name or the text is not valid Unicode. The second is 0 unless `joined`.
    """
    prompts = {
        language: _prompt_tokens(tokenizer, text, language)
        for language in {clip.language for clip in clips}
    }
    prompt_C = np.array([prompts[clip.language] for clip in clips])
    texts = [clip.text.strip() for clip in clips]
    own_C = _lengths(tokenizer, texts)
    # The Qwen2 rule cuts at spaces, so that tokens of joined texts are those of the parts.
    added_C = own_C * 0
    if joined:
        spaced_C = _lengths(tokenizer, [" " + words if words else "" for words in texts])
        added_C = np.maximum(own_C, spaced_C)  # no space behind a clip without words
    bad_C = (prompt_C < 0) | (own_C < 0)
    if text.stamp_share > 0:
        stamped_C = _stamped_lengths(tokenizer, clips)
        own_C, added_C = np.maximum(own_C, 1 + stamped_C), np.maximum(added_C, stamped_C)
    if text.context_share > 0:
        context_C = _lengths(tokenizer, [clip.context.strip() for clip in clips])
        bad_C |= context_C < 0
        prompt_C = prompt_C + np.minimum(context_C, MAX_CONTEXT_TOKENS)
    return np.where(bad_C, -1, prompt_C + own_C), np.where(bad_C, -1, added_C)


def prompt_style(text: Text, language: str, *, spoken: bool, stamps: bool) -> PromptStyle:
    """The style of a clip; `language` may be empty. Where nobody speaks the model writes None."""
    name = language or text.language
    known = spoken or text.language_in_prompt
    return PromptStyle(name if known else None, text.language_in_prompt, stamps)


def _usable(
    clip_set: ClipSet, tokens_C: np.ndarray, data: Data
) -> tuple[np.ndarray, dict[str, int]]:
    """Which clips of a set can be used, and how many cannot, by the first reason that holds."""
    duration_C = np.array([clip.duration_s for clip in clip_set.clips], np.float64)
    usable_C = np.ones(len(duration_C), bool)
    left_out = {}
    for reason, fault_C in {
        f"shorter than data.min_clip_s = {data.min_clip_s}": ~(duration_C >= data.min_clip_s),
        f"longer than data.max_clip_s = {data.max_clip_s}": duration_C > data.max_clip_s,
        "text or language cannot be written in tokens": tokens_C < 0,
        f"more than data.max_text_tokens = {data.max_text_tokens}": tokens_C > data.max_text_tokens,
    }.items():
        if count := int((fault_C & usable_C).sum()):
            left_out[reason] = count
        usable_C &= ~fault_C
    if not usable_C.any():
        told = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(
            f"The data set {clip_set.name} has no clip to train on.",
            f"{len(clip_set.bad)} rows are bad; of the others: {told or 'there are none'}.",
            "Check the manifest, the columns and the limits in the config.",
        )
    return usable_C, left_out


def _prompt_tokens(tokenizer: TextTokenizer, text: Text, language: str) -> int:
    """Tokens of a clip beside its text, with or without speech; -1: no proper language."""
    try:
        styles = [prompt_style(text, language, spoken=s, stamps=False) for s in (True, False)]
    except UserError:
        return -1
    return max(len(build_example(tokenizer, style, "").text_ids) for style in styles)


def _stamped_lengths(tokenizer: TextTokenizer, clips: Sequence[Clip]) -> np.ndarray:
    """Tokens of each clip's segments with a start and an end stamp each; -1: words without."""
    texts = [segment.text.strip() for clip in clips for segment in clip.segments]
    owner = np.repeat(np.arange(len(clips)), [len(clip.segments) for clip in clips])
    lengths = np.bincount(owner, _lengths(tokenizer, texts) + 4, minlength=len(clips))
    timed_C = np.array([_timed(clip) for clip in clips])
    return np.where(timed_C >= 0, lengths, -1).astype(np.int64)


def _timed(clip: Clip) -> int:
    """1: words with times; 0: no words; -1: words without times."""
    if not clip.text.strip():
        return 0
    return 1 if clip.segments else -1


def _lengths(tokenizer: TextTokenizer, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, as `TextTokenizer.encode` makes them, in parallel; -1: bad Unicode."""
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        try:
            encoded = tokenizer.plain.encode_batch_fast(chunk, add_special_tokens=False)
            lengths += map(len, encoded)
        except (UnicodeEncodeError, TypeError):
            lengths += [_length(tokenizer, text) for text in chunk]
    return np.array(lengths, np.int64)


def _length(tokenizer: TextTokenizer, text: str) -> int:
    try:
        return len(tokenizer.encode(text))
    except UserError:
        return -1
