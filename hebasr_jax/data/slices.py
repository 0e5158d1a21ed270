"""Recordings cut into slices at their segments, as Whisper's training sets are made."""

import hashlib
import json
from dataclasses import replace

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, Clip, ClipSet
from hebasr_jax.data.rows import Place
from hebasr_jax.data.shards import SUFFIX
from hebasr_jax.data.sounds import Sounds
from hebasr_jax.data.whisper import Cut, cut_slices
from hebasr_jax.errors import UserError
from hebasr_jax.timestamps import Segment

_SHORTEST_S = 0.1


def sliced(clip_set: ClipSet, longest_s: float) -> ClipSet:
    """The set with each clip that is longer cut by `whisper.cut_slices`; the others stay.

    A slice has the id CLIP@START, the recording's name (or else the clip's id), its segments, and
    for a context the text of the slice before. Where the next segment crosses its end it ends
    there: sound without its words is never trained on. Slices without words are in `removed`; a
    long clip without segments, or with segments in disorder, is bad. Raises UserError for shards,
    whose sound cannot be cut.
    """
    sounds = clip_set.read
    assert isinstance(sounds, Sounds)
    clips: list[Clip] = []
    places: list[Place] = []
    bad, removed = list(clip_set.bad), list(clip_set.removed)
    for clip, place in zip(clip_set.clips, sounds.places, strict=True):
        if clip.duration_s <= longest_s:
            clips.append(clip)
            places.append(place)
            continue
        if place.file.suffix == SUFFIX:
            raise UserError(
                f"{clip_set.name}: shards cannot be cut into slices",
                f"{clip.id} lasts {clip.duration_s:.1f} s",
                "Cut the recordings that the shards were made of.",
            )
        try:
            cuts = _cuts(clip, longest_s)
        except BadClip as fault:
            bad.append((clip.id, fault))
            continue
        for cut in cuts:
            piece = _piece(clip, cut)
            if piece.duration_s < _SHORTEST_S or not piece.text:
                removed.append((piece.id, "is a slice without words"))
                continue
            start_s = (place.start_s or 0.0) + cut.seek_s
            clips.append(piece)
            places.append(replace(place, start_s=start_s, end_s=start_s + piece.duration_s))
    if not clips:
        raise UserError(f"{clip_set.name}: no slice is left", f"{len(bad):,} recordings are bad")
    made = json.dumps([clip_set.fingerprint, "slices 1", longest_s]).encode()
    return replace(
        clip_set,
        clips=tuple(clips),
        read=Sounds(places, [clip.duration_s for clip in clips], sounds.parquet),
        fingerprint=hashlib.sha256(made).hexdigest(),
        bad=tuple(bad),
        removed=tuple(removed),
        files=("",) * len(clips),
    )


def _cuts(clip: Clip, longest_s: float) -> list[Cut]:
    if not clip.segments:
        raise BadClip("is too long and has no segments to be cut by", f"{clip.duration_s:.1f} s")
    return cut_slices(clip.segments, longest_s=longest_s, duration_s=clip.duration_s)


def _piece(clip: Clip, cut: Cut) -> Clip:
    text, segments, open_s = cut.slice
    length_s = cut.duration_s if open_s is None else min(open_s, cut.duration_s)
    length_s = round(length_s * SAMPLE_RATE) / SAMPLE_RATE
    return replace(
        clip,
        id=f"{clip.id}@{cut.seek_s:.2f}",
        text=text.strip(),
        duration_s=length_s,
        recording=clip.recording or clip.id,
        context=cut.previous,
        segments=tuple(Segment(s.start_s, min(s.end_s, length_s), s.text) for s in segments),
    )
