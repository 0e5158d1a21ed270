"""The known Hebrew sets on the hub: how the rows of each become rows of a manifest.

One `Adapter` a set, as documented in 2026. The copies may differ: a column that is not documented
is read under its usual name (`Columns`), and `Source.columns` says otherwise.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Columns, Source

_IVRIT = "ivrit.ai licence v2: CC-BY-4.0 terms, for training AI models or research only"


@dataclass(frozen=True)
class Adapter:
    """One set of the hub.

    hub: its id; "" where the hub has none. config, splits: as the hub names them.
    columns: what the set calls each field; "" is a field that the set has not.
    transcript: plain text, text with Whisper's time stamps, or none (unlabelled).
    licence: None: none is stated. commercial: whether it allows commercial use; None: unknown.
    flags: names of columns; a row is left out where one of them is set.
    repeats: rows may share an id, being transcripts of one clip; the first is kept.
    """

    name: str
    hub: str
    config: str | None
    splits: tuple[str, ...]
    columns: Columns
    transcript: Literal["plain", "whisper", "none"]
    licence: str | None
    commercial: bool | None
    gated: bool
    flags: tuple[str, ...] = ()
    repeats: bool = False


# Languages are codes in some sets, and not documented: `Text.language` names the language.
_PLAIN = Columns(language="")
_WHISPER = Columns(
    text="transcript",
    id="",  # made of the recording and where the slice begins
    duration_s="metadata.duration",
    recording="metadata.entry_id",
    source="metadata.source",
    language="",
    context="prev_transcript",
    segments="",
    quality="metadata.quality_score",
)
_UNUSABLE = ("unintelligible", "skipped", "too_long", "foreign_language")

ADAPTERS = (
    # Noise and several speakers stay in: they are what is to be recognised. `transcriber` is not
    # the speaker; columns for the podcast and its episode are not documented.
    Adapter(
        name="crowd-transcribe-v5",
        hub="ivrit-ai/crowd-transcribe-v5",
        config=None,
        splits=("train", "test"),
        columns=replace(_PLAIN, text="sentence", id="uuid", duration_s="extra_data.duration"),
        transcript="plain",
        licence=_IVRIT,
        commercial=True,
        gated=True,
        flags=tuple(f"extra_data.{flag}" for flag in _UNUSABLE),
        repeats=True,
    ),
    Adapter(
        name="crowd-recital",
        hub="ivrit-ai/crowd-recital-whisper-training",
        config=None,
        splits=("train",),
        columns=_WHISPER,
        transcript="whisper",
        licence=_IVRIT,
        commercial=True,
        gated=True,
    ),
    Adapter(
        name="knesset-plenums",
        hub="ivrit-ai/knesset-plenums-whisper-training",
        config=None,
        splits=("train",),
        columns=_WHISPER,
        transcript="whisper",
        licence=_IVRIT,
        commercial=True,
        gated=True,
    ),
    # Names of columns, and the licence of this derived set, are not documented.
    Adapter(
        name="knesset-committees",
        hub="knesset-asr/knesset-committees-chunks",
        config=None,
        splits=("train",),
        columns=_PLAIN,
        transcript="plain",
        licence=None,
        commercial=None,
        gated=True,
    ),
    # Names of columns are not documented.
    Adapter(
        name="hebdb",
        hub="SLPRL-HUJI/HebDB",
        config="pre",
        splits=("train",),
        columns=_PLAIN,
        transcript="plain",
        licence="CC-BY-4.0",
        commercial=True,
        gated=False,
    ),
    # Its ids are those of sentences, which several people read: they do not name a row.
    Adapter(
        name="fleurs",
        hub="google/fleurs",
        config="he_il",
        splits=("train", "validation"),
        columns=replace(_PLAIN, text="raw_transcription", id=""),
        transcript="plain",
        licence="CC-BY-4.0",
        commercial=True,
        gated=False,
    ),
    # A column for the speaker is not documented.
    Adapter(
        name="common-voice",
        hub="mozilla-foundation/common_voice_17_0",
        config="he",
        splits=("train", "validation"),
        columns=replace(_PLAIN, text="sentence"),
        transcript="plain",
        licence="CC0-1.0",
        commercial=True,
        gated=True,
    ),
    # Its validation part is a test set.
    Adapter(
        name="kan",
        hub="imvladikon/hebrew_speech_kan",
        config=None,
        splits=("train",),
        columns=replace(_PLAIN, text="sentence"),
        transcript="plain",
        licence=None,
        commercial=None,
        gated=False,
    ),
    # Number 134 of OpenSLR; the gold part is a test set. Names of columns are not documented.
    Adapter(
        name="saspeech-automatic",
        hub="",
        config=None,
        splits=("train",),
        columns=_PLAIN,
        transcript="plain",
        licence="non-commercial",
        commercial=False,
        gated=False,
    ),
    # Columns other than the audio are not documented.
    Adapter(
        name="audio-v2",
        hub="ivrit-ai/audio-v2",
        config=None,
        splits=("train",),
        columns=replace(_PLAIN, text="", context="", segments=""),
        transcript="none",
        licence=_IVRIT,
        commercial=True,
        gated=True,
    ),
)


def find_adapter(name: str) -> Adapter:
    """The adapter of that name. Raises UserError with the names there are."""
    for adapter in ADAPTERS:
        if adapter.name == name:
            return adapter
    names = [adapter.name for adapter in ADAPTERS]
    near = difflib.get_close_matches(name, names, 1)
    raise UserError(
        f"schema {name!r} is not known",
        f"Known are {', '.join(names)}.",
        f"Did you mean {near[0]}?" if near else "Leave schema out, and name fields in columns.",
    )


def filled(source: Source) -> Source:
    """The source with the licence and the hub id of its schema, where it names none itself."""
    if not source.schema:
        return source
    adapter = find_adapter(source.schema)
    return replace(
        source, licence=source.licence or adapter.licence, hub=source.hub or adapter.hub or None
    )


def refuse_licence(source: Source) -> None:
    """Raises UserError for a schema whose licence has to be accepted, and is not.

    That is a non-commercial one, and one that neither the set nor `source.licence` states.
    """
    if not source.schema or source.accept_licence:
        return
    adapter = find_adapter(source.schema)
    licence = source.licence or adapter.licence
    if adapter.commercial or (adapter.commercial is None and licence):
        return
    told = f"is {licence}" if licence else "is not stated"
    raise UserError(
        f"{source.name} ({adapter.hub or adapter.name}): its licence {told}",
        "A model that is trained on it may not be yours to use as you like.",
        f"If that is fine: accept_licence=True of the set {source.name!r}, or --accept-licence.",
    )
