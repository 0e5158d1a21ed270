"""Loss, WER and CER on the dev sets during training: never augmented, always the plain mode.

A dev set is cut into batches of few shapes once, for the loss of the reference texts; the
hypotheses come from `transcribe`, the same code that a user runs.
"""

import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.config import ModelConfig
from hebasr_jax.data.clips import BadClip, Batch, Clip, ClipSet, group_field
from hebasr_jax.data.pipeline import check_length, load_batch, make_feed
from hebasr_jax.data.plan import Bucket
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.sources import open_sources
from hebasr_jax.distributed import from_all_hosts, local_copy, place_whole, to_host
from hebasr_jax.features import HOP
from hebasr_jax.hub import ModelFolder
from hebasr_jax.identity import key_of
from hebasr_jax.loss import next_token_loss
from hebasr_jax.metrics import score
from hebasr_jax.model.asr import Params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.run_config import Augment, Config, Source
from hebasr_jax.sharding import local_mesh, rows
from hebasr_jax.text import PromptStyle, TextTokenizer
from hebasr_jax.train_step import prepare_inputs
from hebasr_jax.transcribe import MAX_CLIP_S, Recognizer, transcribe

_SHAPES = 4  # at most, of each dev set: each is a program of its own


@dataclass(frozen=True, eq=False)
class DevSet:
    """A dev set ready to be scored.

    batches: shape, arrays on the host, and the clip of each row; None fills the batch.
    left_out: clips that cannot be read or that no model can take, by reason; scores tell how many.
    digest: changes with the clips: their ids, texts, languages, sounds.
    """

    name: str
    batches: tuple[tuple[Bucket, Batch, tuple[Clip | None, ...]], ...]
    left_out: Mapping[str, int]
    digest: str


@partial(jax.jit, static_argnames=("config", "compute", "audio_s"))
def loss_of_batch(
    params: Params, batch: Batch, *, config: ModelConfig, compute: Compute, audio_s: int
) -> tuple[Array, Array]:
    """Loss sum and count over the targets."""
    inputs = prepare_inputs(
        batch, None, augment=Augment(), audio_s=audio_s, mel_bins=config.encoder.mel_bins
    )
    return next_token_loss(bind(params, config, compute), inputs, batch.in_loss_BX)


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
        ),
    )
    found = []
    for whole in sets:
        good = _read_all(whole, config.validation.max_clips, quarantine)
        limits = replace(plain.data, max_text_tokens=_most_tokens(good, config))
        feed = make_feed([good], tokenizer, replace(plain, data=limits), quarantine, row_multiple)
        plan = feed.plan(0)
        batches = []
        for number in range(len(plan)):
            bucket, batch = plan.bucket(number), load_batch(feed, plan, number)
            own = [int(feed.table.clip_C[row.clips[0]]) for row in plan.batch(number)]
            clips = [good.clips[index] for index in own]
            _check_sound(bucket, batch, clips, [good.read(index) for index in own])
            batches.append((bucket, batch, (*clips, *[None] * (bucket.rows - len(clips)))))
        left_out = dict(feed.left_out.get(whole.name, {}))
        if unread := len(whole.clips[: config.validation.max_clips]) - len(good.clips):
            left_out["cannot be read"] = unread
        found.append(DevSet(whole.name, tuple(batches), left_out, _digest(batches)))
    return found


def scored_on(dev_sets: Sequence[DevSet], config: Config, tokenizer_sha256: str) -> str:
    """Names what validations are of: only where it is equal may their figures be ranked together.

    Limits that leave no clip out, and how clips lie in batches, make no difference.
    """
    sets = sorted((dev.name, dev.digest) for dev in dev_sets)
    style = [config.text.language, config.text.language_in_prompt, config.compute.dtype]
    return key_of([sets, style, tokenizer_sha256])[:16]


def _digest(batches: Sequence[tuple[Bucket, Batch, tuple[Clip | None, ...]]]) -> str:
    digests = []
    for _, batch, clips in batches:
        for row, clip in enumerate(clips):
            if clip is not None:
                sound = np.ascontiguousarray(batch.wave_BS[row, : batch.samples_B[row]])
                heard = hashlib.sha256(sound.view(np.uint8).data).hexdigest()
                digests.append(key_of([clip.id, clip.text, clip.language, heard]))
    return key_of(sorted(digests))


def _check_sound(
    bucket: Bucket, batch: Batch, clips: Sequence[Clip], waves: Sequence[np.ndarray]
) -> None:
    """Each row has its clip's own sound: a stand-in would be scored against another's text."""
    for row, (clip, wave_S) in enumerate(zip(clips, waves, strict=True)):
        own_S = wave_S[: bucket.audio_s * SAMPLE_RATE]
        assert np.array_equal(batch.wave_BS[row, : batch.samples_B[row]], own_S), clip.id


def _most_tokens(clips: ClipSet, config: Config) -> int:
    """Text tokens that a row of the set may have: as many a second as in training, or eight times
    what a row has there."""
    longest_s = max((clip.duration_s for clip in clips.clips), default=0.0)
    rows = max(8, math.ceil(longest_s / config.data.max_clip_s))
    return config.data.max_text_tokens * rows


def _read_all(clips: ClipSet, most: int | None, quarantine: Quarantine) -> ClipSet:
    """The set's first clips that can be read, with their sound in memory."""
    waves, good = [], []
    for index, clip in enumerate(clips.clips[:most]):
        try:
            wave = clips.read(index)
            check_length(wave, clip.duration_s)
            waves.append(wave)
            good.append(clip)
        except BadClip as fault:
            quarantine.add(clips.name, clip.id, fault.reason, fault.detail)
    return replace(clips, clips=tuple(good), read=waves.__getitem__, share=None)


def score_sets(recognizer: Recognizer, sources: Sequence[Source], config: Config) -> dict[str, Any]:
    """Scores of a loaded model on whole sets, as `validate` gives them, on its devices."""
    sets = open_sources(sources)
    whole = replace(config, validation=replace(config.validation, max_clips=None))
    total = sum(len(s.clips) + len(s.bad) for s in sets)
    with tempfile.TemporaryDirectory() as folder:
        quarantine = Quarantine(Path(folder) / "bad.jsonl", config.data.max_bad_share, total)
        dev_sets = load_dev_sets(
            sets, recognizer.tokenizer, whole, quarantine, recognizer.mesh.size
        )
    scores = validate(
        recognizer.params,
        dev_sets,
        recognizer.config,
        recognizer.tokenizer,
        whole,
        compute=recognizer.compute,
        mesh=recognizer.mesh,
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
    recognizer = _local_recognizer(params, model, tokenizer, config, compute, mesh)
    for dev in dev_sets:
        loss, count = 0.0, 0
        for bucket, batch, _ in dev.batches:
            if stopped():
                return None
            placed = jax.tree.map(lambda x: place_whole(x, rows(mesh)), batch)
            found = loss_of_batch(
                params, placed, config=model, compute=compute, audio_s=bucket.audio_s
            )
            total, tokens = to_host(found)
            loss, count = loss + float(total), count + int(tokens)
        heard = _hear(recognizer, dev, config, stopped)
        if heard is None:
            return None
        texts = sorted(heard, key=lambda pair: pair[0].id)
        field = group_field([clip for clip, _ in texts])
        groups = [getattr(clip, field) for clip, _ in texts] if field else None
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


def _local_recognizer(
    params: Params,
    model: ModelConfig,
    tokenizer: TextTokenizer,
    config: Config,
    compute: Compute,
    mesh: Mesh,
) -> Recognizer:
    """The weights on this process's devices: each process decodes its part of a set."""
    mesh = local_mesh(mesh)
    folder = ModelFolder(Path(config.model.path), config.model.path, None)
    return Recognizer(local_copy(params, mesh), model, tokenizer, compute, folder, mesh)


def _hear(
    recognizer: Recognizer, dev: DevSet, config: Config, stopped: Callable[[], bool]
) -> list[tuple[Clip, str]] | None:
    """Each clip and its greedy text, as `transcribe` has it; None when stopped midway.

    Nothing is decoded again here: an untrained model goes round in circles on every clip.
    """
    clips, waves = [], []
    for _, batch, of_rows in dev.batches:
        for row, clip in enumerate(of_rows):
            if clip is not None:
                clips.append(clip)
                waves.append(batch.wave_BS[row, : batch.samples_B[row]])
    hosts = jax.process_count()
    texts = transcribe(
        recognizer,
        waves[jax.process_index() :: hosts],
        style=PromptStyle(config.text.language, config.text.language_in_prompt),
        batch_audio_s=config.validation.batch_audio_s,
        retries=0,
        # Hosts decode at their own pace; only a single one may stop between two of them.
        stopped=stopped if hosts == 1 else lambda: False,
    )
    told = from_all_hosts([result.transcript.text for result in texts])
    if sum(map(len, told)) < len(clips):
        return None
    return [(clip, told[n % hosts][n // hosts]) for n, clip in enumerate(clips)]
