"""Loss, WER and CER on the dev sets during training: never augmented, always the plain mode.

A dev set is cut into batches of few shapes once; each shape has one program that gives the loss
of the reference text and a greedy hypothesis.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config import ModelConfig
from hebasr_jax.data.clips import BadClip, Batch, Clip, ClipSet
from hebasr_jax.data.pipeline import load_batch, make_feed
from hebasr_jax.data.plan import Bucket
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.sources import open_sources
from hebasr_jax.distributed import place_whole, to_host
from hebasr_jax.features import HOP
from hebasr_jax.generate import generate
from hebasr_jax.loss import next_token_loss
from hebasr_jax.metrics import score
from hebasr_jax.model.asr import Params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.run_config import Augment, Config, Source
from hebasr_jax.sharding import make_mesh, rows
from hebasr_jax.text import PromptStyle, TextTokenizer, parse_output
from hebasr_jax.train_step import prepare_inputs
from hebasr_jax.transcribe import MAX_CLIP_S, Recognizer, token_budget

_SHAPES = 4  # at most, of each dev set: each is a program of its own


@dataclass(frozen=True, eq=False)
class DevSet:
    """A dev set ready to be scored.

    batches: shape, arrays on the host, and the clip of each row; None fills the batch.
    left_out: clips that no model can take, by reason; scores tell how many.
    """

    name: str
    batches: tuple[tuple[Bucket, Batch, tuple[Clip | None, ...]], ...]
    left_out: Mapping[str, int]


@partial(jax.jit, static_argnames=("config", "compute", "audio_s", "end_ids", "max_new_tokens"))
def score_batch(
    params: Params,
    batch: Batch,
    budget_B: Int[Array, " B"],
    *,
    config: ModelConfig,
    compute: Compute,
    audio_s: int,
    end_ids: tuple[int, ...],
    max_new_tokens: int,
) -> tuple[Array, Array, Array, Array]:
    """Loss sum and count over the targets; greedy tokens and how many each row has."""
    inputs = prepare_inputs(
        batch, None, augment=Augment(), audio_s=audio_s, mel_bins=config.encoder.mel_bins
    )
    asr = bind(params, config, compute)
    loss, count = next_token_loss(asr, inputs, batch.in_loss_BX)
    prompt_B = batch.text_lengths_B - jnp.sum(batch.in_loss_BX, axis=1)
    generated = generate(
        asr,
        replace(inputs, text_lengths_B=prompt_B),
        budget_B,
        end_ids=end_ids,
        max_new_tokens=max_new_tokens,
    )
    return loss, count, generated.tokens_BG, generated.lengths_B


def load_dev_sets(
    sets: Sequence[ClipSet],
    tokenizer: TextTokenizer,
    config: Config,
    quarantine: Quarantine,
    row_multiple: int,
) -> list[DevSet]:
    """Reads the dev sets into memory. A bad clip goes to the quarantine and is not scored."""
    plain = replace(
        config,
        text=replace(config.text, stamp_share=0.0, context_share=0.0),
        augment=Augment(),
        data=replace(
            config.data,
            batch_clips=None,
            batch_audio_s=config.validation.batch_audio_s,
            buckets=min(config.data.buckets, _SHAPES),
            join_share=0.0,
            max_repeats=1.0,
            # What is too long to train on is no less to be recognised.
            min_clip_s=HOP / SAMPLE_RATE,
            max_clip_s=MAX_CLIP_S,
            max_text_tokens=config.data.max_text_tokens * 8,
        ),
    )
    found = []
    for whole in sets:
        good = _read_all(whole, config.validation.max_clips, quarantine)
        feed = make_feed([good], tokenizer, plain, quarantine, row_multiple)
        plan = feed.plan(0)
        batches = []
        for number in range(len(plan)):
            clips = [good.clips[feed.table.clip_C[row.clips[0]]] for row in plan.batch(number)]
            fill = [None] * (plan.bucket(number).rows - len(clips))
            batches.append((plan.bucket(number), load_batch(feed, plan, number), (*clips, *fill)))
        found.append(DevSet(whole.name, tuple(batches), feed.left_out.get(whole.name, {})))
    return found


def _read_all(clips: ClipSet, most: int | None, quarantine: Quarantine) -> ClipSet:
    """The set's first clips that can be read, with their sound in memory."""
    waves, good = [], []
    for index, clip in enumerate(clips.clips[:most]):
        try:
            waves.append(clips.read(index))
            good.append(clip)
        except BadClip as fault:
            quarantine.add(clips.name, clip.id, fault.reason, fault.detail)
    return replace(clips, clips=tuple(good), read=waves.__getitem__, share=None)


def score_sets(recognizer: Recognizer, sources: Sequence[Source], config: Config) -> dict[str, Any]:
    """Scores of a loaded model on whole sets, as `validate` gives them, on one device."""
    sets = open_sources(sources)
    whole = replace(config, validation=replace(config.validation, max_clips=None))
    total = sum(len(s.clips) + len(s.bad) for s in sets)
    with tempfile.TemporaryDirectory() as folder:
        quarantine = Quarantine(Path(folder) / "bad.jsonl", config.data.max_bad_share, total)
        dev_sets = load_dev_sets(sets, recognizer.tokenizer, whole, quarantine, 1)
    scores = validate(
        recognizer.params,
        dev_sets,
        recognizer.config,
        recognizer.tokenizer,
        whole,
        compute=recognizer.compute,
        mesh=make_mesh(1),
    )
    return scores or {}


def validate(
    params: Params,
    dev_sets: Sequence[DevSet],
    model: ModelConfig,
    tokenizer: TextTokenizer,
    config: Config,
    *,
    compute: Compute,
    mesh: Mesh,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Scores of every dev set, as metrics.jsonl has them; None when `stopped` says so midway.

    Args:
      params: whole tree, on every device of the mesh.
    """
    scores = {}
    for dev in dev_sets:
        loss, count = 0.0, 0
        texts: list[tuple[Clip, str]] = []
        for bucket, batch, clips in dev.batches:
            if stopped():
                return None
            total, tokens, hypotheses = _score(
                params, bucket, batch, model, tokenizer, config, compute, mesh
            )
            loss, count = loss + total, count + tokens
            pairs = zip(clips, hypotheses, strict=True)
            texts += [(clip, text) for clip, text in pairs if clip is not None]
        texts.sort(key=lambda pair: pair[0].id)
        groups = _groups([clip for clip, _ in texts])
        scores[dev.name] = {
            "loss": loss / max(count, 1),
            "left_out": sum(dev.left_out.values()),
            **score(
                [clip.text for clip, _ in texts],
                [text for _, text in texts],
                groups,
                resamples=config.validation.bootstrap,
                seed=config.seed,
            ),
            "samples": [
                {"id": clip.id, "group": group, "reference": clip.text, "hypothesis": text}
                for (clip, text), group in zip(texts, groups or [""] * len(texts), strict=True)
            ][:: max(1, len(texts) // max(config.validation.samples, 1))][
                : config.validation.samples
            ],
        }
    return scores


def _score(
    params: Params,
    bucket: Bucket,
    batch: Batch,
    model: ModelConfig,
    tokenizer: TextTokenizer,
    config: Config,
    compute: Compute,
    mesh: Mesh,
) -> tuple[float, int, list[str]]:
    """One batch's loss sum, target tokens and hypotheses."""
    budget_B = np.asarray([token_budget(int(n)) if n else 0 for n in batch.samples_B], np.int32)
    placed = jax.tree.map(lambda x: place_whole(x, rows(mesh)), (batch, budget_B))
    loss, count, tokens_BG, lengths_B = to_host(
        score_batch(
            params,
            *placed,
            config=model,
            compute=compute,
            audio_s=bucket.audio_s,
            end_ids=tokenizer.special.eos,
            max_new_tokens=32 * math.ceil(token_budget(bucket.audio_s * SAMPLE_RATE) / 32),
        )
    )
    style = PromptStyle(config.text.language, config.text.language_in_prompt)
    ids = [row[:length].tolist() for row, length in zip(tokens_BG, lengths_B, strict=True)]
    return float(loss), int(count), [parse_output(tokenizer, style, row).text for row in ids]


def _groups(clips: Sequence[Clip]) -> list[str] | None:
    """What the interval resamples: recordings where all are known, else speakers, else clips."""
    for names in ([clip.recording for clip in clips], [clip.speaker for clip in clips]):
        if all(names) and len(set(names)) > 1:
            return names
    return None
