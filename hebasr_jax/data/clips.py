"""What the parts of the data path hand to each other: clips, sets of clips, batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct

from hebasr_jax.timestamps import Segment

_ROUNDING = 1e-6


class BadClip(Exception):
    """One clip cannot be used. `reason` is short and the same for the same fault, so that faults
    can be counted; `detail` tells the rest."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Removed(Exception):
    """A row is left out on purpose: it is not bad. `reason` is counted, as that of a bad clip."""

    def __init__(self, clip_id: str, reason: str) -> None:
        super().__init__(f"{clip_id}: {reason}")
        self.clip_id, self.reason = clip_id, reason


@dataclass(frozen=True)
class Clip:
    """One row of a manifest. Ids are unique within a set. Empty text means: nobody speaks.

    source: where the recording came from, such as a podcast's name.
    quality: how well text and sound agree, as the set's makers measured it; None: not known.
    synthetic: no person spoke; made from the text.
    pseudo_label: the text is a model's.
    """

    id: str
    text: str
    duration_s: float
    speaker: str = ""
    recording: str = ""
    source: str = ""
    language: str = ""
    context: str = ""
    segments: tuple[Segment, ...] = ()
    quality: float | None = None
    synthetic: bool = False
    pseudo_label: bool = False


def quality_fault(clip: Clip, least: float) -> str:
    """Why a clip's score is too low; "" where it is not. A clip without a score has none to show.

    A score may be stored as float32, so that 0.7 is a little less.
    """
    if clip.quality is None:
        return "has no quality score"
    return f"has a quality below {least:g}" if clip.quality < least - _ROUNDING else ""


def group_field(clips: Sequence[Clip]) -> str:
    """What an interval draws: "recording" where all are known and differ, else "speaker", else "".

    "" means that the clips are drawn one by one.
    """
    for field in ("recording", "speaker"):
        names = {getattr(clip, field) for clip in clips}
        if "" not in names and len(names) > 1:
            return field
    return ""


@dataclass(frozen=True, eq=False)
class ClipSet:
    """A data set: what is known of its clips, and how to read their audio.

    read: from a clip's index to its int16 samples at 16 kHz; raises `BadClip`. Thread-safe.
    fingerprint: sha256 of everything in `clips` and of where the audio lies.
    bad: rows that are no clip at all (id or line, `BadClip`); they count as bad clips.
    files: absolute, of each clip, what holds its sound and no other; "" where there is none.
    removed: rows left out on purpose (id, reason); they are not bad.
    notes: what the files lack of the set's schema, each told once.
    """

    name: str
    clips: tuple[Clip, ...]
    read: Callable[[int], np.ndarray]
    fingerprint: str
    bad: tuple[tuple[str, BadClip], ...] = ()
    share: float | None = None
    files: tuple[str, ...] = ()
    removed: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def synthetic_warnings(sets: Iterable[ClipSet]) -> list[str]:
    """A line for each dev or test set that has synthetic speech in it."""
    counts = {one.name: (sum(clip.synthetic for clip in one.clips), len(one.clips)) for one in sets}
    return [
        f"{name}: {made:,} of its {clips:,} clips are synthetic speech; scores on them say nothing "
        "about how well people are understood"
        for name, (made, clips) in counts.items()
        if made
    ]


@struct.dataclass
class Batch:
    """One optimiser step's rows, right-padded; a row is one clip or several joined.

    Fields hold numpy arrays on the host, JAX arrays on devices, or shapes; hence `Any`.

    wave_BS: int16 samples at 16 kHz, before speed perturbation.
    samples_B: int32, valid samples of each row; 0 marks a row that only fills the batch.
    speed_B: float32, speed factor of each row.
    seed_B2: uint32, two words from (seed, visit, id); every draw in the step comes from them.
    text_BX, text_lengths_B, audio_at_B: int32, as in `model.asr.Inputs`.
    in_loss_BX: bool, tokens that the model is to write.
    """

    wave_BS: Any
    samples_B: Any
    speed_B: Any
    seed_B2: Any
    text_BX: Any
    text_lengths_B: Any
    audio_at_B: Any
    in_loss_BX: Any
