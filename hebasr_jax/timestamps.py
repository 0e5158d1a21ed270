"""Time stamps as tokens: the 80-ms grid, the token names, and their place in a tokenizer.

A stamp is two tokens, a whole second and a sub-slot of 80 ms, on the encoder's own grid of 13
positions a second. The tokens sit in spare embedding rows, so that no row is added to a model.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hebasr_jax.errors import UserError

SLOT_S = 0.08
SLOTS_PER_SECOND = 13
MAX_SECOND = 120
MAX_STAMP_S = 120.96

MARKER = "<|timestamps|>"
SECONDS = tuple(f"<|{second}s|>" for second in range(MAX_SECOND + 1))
SLOTS = tuple(f"<|+{slot}|>" for slot in range(SLOTS_PER_SECOND))
STAMP_TOKENS = (MARKER, *SECONDS, *SLOTS)

# The forced aligner's token takes the first spare id: an id left free would silently shift
# every later one down when tokenizers or transformers load the file.
FILLER = "<timestamp>"

# Where a tokenizer folder lists the tokens that are not in its byte-pair vocabulary.
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ADDED_TOKENS, VOCABULARY = "added_tokens.json", "vocab.json"


def to_grid(time_s: float) -> tuple[int, int]:
    """The nearest grid point to a time, as (whole second, sub-slot 0..12).

    Exact to 40 ms and monotone; 0.98 s and later belong to the next second. Raises `UserError`
    outside 0..120.96 s (NaN too).
    """
    if not 0.0 <= time_s <= MAX_STAMP_S:
        raise UserError(
            f"A time stamp of {time_s} s cannot be written.",
            f"Time stamps reach from 0 to {MAX_STAMP_S} s within one piece of audio.",
            "Cut the audio into shorter pieces, or leave the segments out.",
        )
    second = int(time_s)
    rest_s = time_s - second
    last_slot_s = (SLOTS_PER_SECOND - 1) * SLOT_S
    if rest_s >= (last_slot_s + 1.0) / 2 and second < MAX_SECOND:
        return second + 1, 0
    return second, min(math.floor(rest_s / SLOT_S + 0.5), SLOTS_PER_SECOND - 1)


def from_grid(second: int, slot: int) -> float:
    """The time in seconds of a grid point; the inverse of `to_grid` on the grid."""
    return round(second + slot * SLOT_S, 2)


class Words(NamedTuple):
    """A stretch of text without a stamp in it, and its token ids as the model wrote them."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Segment:
    """A stretch of speech and its text; times in seconds from the start of the audio.

    `tokens` are the text's ids where a model wrote them, without stamps; equality ignores them.
    """

    start_s: float
    end_s: float
    text: str
    tokens: tuple[int, ...] = field(default=(), compare=False)


def join_stamps(pieces: Sequence[Words | float], duration_s: float | None = None) -> list[Segment]:
    """Segments from words and stamps (seconds) in the order in which the model wrote them.

    A stamp after words ends their segment, a stamp without words starts one. Words without a
    start begin at the stamp before them (or 0 s); last words without an end stamp end at
    `duration_s`, or where they began. A stamp that runs backwards counts as the one before it, so
    that segments never do. No stamps, no segments.
    """
    segments: list[Segment] = []
    start_s = 0.0
    spoken: list[Words] = []
    last_s = [duration_s or 0.0] if any(isinstance(piece, float) for piece in pieces) else []
    for piece in [*pieces, *last_s]:
        if isinstance(piece, Words):
            spoken.append(piece)
            continue
        if spoken:
            text = " ".join(words.text for words in spoken)
            tokens = tuple(token for words in spoken for token in words.tokens)
            segments.append(Segment(start_s, max(start_s, piece), text, tokens))
            spoken = []
        start_s = max(start_s, piece)
    return segments


@dataclass(frozen=True)
class StampIds:
    """The ids of the stamp tokens of one tokenizer: consecutive, so the marker's id says all."""

    marker: int

    @classmethod
    def of(cls, token_to_id: Callable[[str], int | None]) -> "StampIds | None":
        """Look the tokens up by name; None where the tokenizer has no marker.

        Raises `UserError` when the filler or a stamp is missing or out of its place.
        """
        marker = token_to_id(MARKER)
        if marker is None:
            return None
        for offset, name in enumerate((FILLER, *STAMP_TOKENS), start=-1):
            if token_to_id(name) != marker + offset:
                raise UserError(
                    f"The tokenizer has {MARKER} at id {marker}, but {name} is not at its place.",
                    f"It should be id {marker + offset}; it is {token_to_id(name)}.",
                    "Take the tokenizer files of the export again.",
                )
        return cls(marker)

    def encode(self, time_s: float) -> tuple[int, int]:
        """The two ids that stamp a time; see `to_grid` for precision and errors."""
        second, slot = to_grid(time_s)
        return self.marker + 1 + second, self.marker + 1 + len(SECONDS) + slot

    def second_of(self, token: int) -> int | None:
        """The whole second that an id stands for, or None."""
        second = token - self.marker - 1
        return second if 0 <= second < len(SECONDS) else None

    def slot_of(self, token: int) -> int | None:
        """The sub-slot that an id stands for, or None."""
        slot = token - self.marker - 1 - len(SECONDS)
        return slot if 0 <= slot < len(SLOTS) else None

    def __contains__(self, token: int) -> bool:
        """Whether an id is a stamp, the marker or the filler, none of which is text."""
        return self.marker - 1 <= token < self.marker + len(STAMP_TOKENS)


def add_stamp_tokens(folder: Path, vocab_size: int) -> StampIds:
    """Add the filler and the 135 stamp tokens to the tokenizer files of a model folder.

    They follow the last token (ids 151705 and 151706..151840 of Qwen3-ASR), are not special, and
    go into every file that lists added tokens, so that transformers 4.57.6 and 5.x agree on the
    ids. Nothing else changes; a second call changes nothing; a call cut short is completed by the
    next. Raises `UserError` when the ids do not fit below `vocab_size` (embedding rows), or
    another token has one of them, or the files are damaged or contradict each other.
    """
    listed = added_tokens(folder)
    known = _base_vocabulary(folder) | listed
    files = {path.name: read_json(path) for path in _listing_files(folder)}
    first = known.get(FILLER, 1 + max(known.values(), default=-1))
    wanted = {name: first + offset for offset, name in enumerate((FILLER, *STAMP_TOKENS))}
    _refuse_bad_ids(folder, known, wanted, vocab_size)
    for name, content in files.items():
        if _list_tokens(name, content, wanted):
            _write_json(folder / name, content)
    return StampIds(wanted[MARKER])


def added_tokens(folder: Path) -> dict[str, int]:
    """The added tokens (name -> id) that the files of a tokenizer folder list, taken together.

    Raises `UserError` when a file is damaged, two files disagree, or no file lists any.
    """
    tokens: dict[str, int] = {}
    for path in _listing_files(folder):
        for name, token_id in _listed(path):
            if tokens.setdefault(name, token_id) != token_id:
                raise UserError(
                    f"The tokenizer files in {folder} contradict each other.",
                    f"{name} has id {tokens[name]} in one and {token_id} in {path.name}.",
                    "Take all the tokenizer files from one source.",
                )
    if not tokens:
        raise UserError(
            f"No special tokens are listed in {folder}.",
            f"{TOKENIZER_JSON}, {TOKENIZER_CONFIG} or {ADDED_TOKENS} should list them.",
            "Copy all the tokenizer files of the model into the folder.",
        )
    return tokens


def _listing_files(folder: Path) -> list[Path]:
    """Those files of the folder that list added tokens."""
    present = [
        folder / name
        for name in (TOKENIZER_JSON, TOKENIZER_CONFIG, ADDED_TOKENS)
        if (folder / name).is_file()
    ]
    return [
        path
        for path in present
        if path.name != TOKENIZER_CONFIG or "added_tokens_decoder" in read_json(path)
    ]


def _listed(path: Path) -> Iterator[tuple[str, int]]:
    """The (name, id) pairs of one listing file."""
    content = read_json(path)
    try:
        if path.name == TOKENIZER_JSON:
            yield from ((token["content"], int(token["id"])) for token in content["added_tokens"])
        elif path.name == TOKENIZER_CONFIG:
            listed = content["added_tokens_decoder"].items()
            yield from ((token["content"], int(token_id)) for token_id, token in listed)
        else:
            yield from ((name, int(token_id)) for name, token_id in content.items())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, repr(error)) from error


def _base_vocabulary(folder: Path) -> dict[str, int]:
    """The byte-pair vocabulary (piece -> id), from whichever file holds it."""
    whole = folder / TOKENIZER_JSON
    path = whole if whole.is_file() else folder / VOCABULARY
    content = read_json(path)
    try:
        pieces = content["model"]["vocab"] if path == whole else content
        return {piece: int(token_id) for piece, token_id in pieces.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, repr(error)) from error


def _list_tokens(name: str, content: dict[str, Any], wanted: dict[str, int]) -> bool:
    """Put the wanted tokens into the content of one listing file; False if all were there."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    flags["special"] = False
    if name == TOKENIZER_JSON:
        have = {token["content"] for token in content["added_tokens"]}
        new = {token: token_id for token, token_id in wanted.items() if token not in have}
        content["added_tokens"] += [{"id": i, "content": t, **flags} for t, i in new.items()]
        content["added_tokens"].sort(key=lambda token: token["id"])
        return bool(new)
    if name == TOKENIZER_CONFIG:
        content = content["added_tokens_decoder"]
        entries: dict[str, Any] = {str(i): {"content": t, **flags} for t, i in wanted.items()}
    else:
        entries = dict(wanted)
    new_keys = entries.keys() - content.keys()
    content.update({key: value for key, value in entries.items() if key in new_keys})
    return bool(new_keys)


def _refuse_bad_ids(
    folder: Path, known: dict[str, int], wanted: dict[str, int], vocab_size: int
) -> None:
    """Raise `UserError` when the wanted ids are not free, not in a row, or not in the model."""
    owner = {token_id: name for name, token_id in known.items()}
    what = f"The time-stamp tokens cannot be added to the tokenizer in {folder}."
    for name, token_id in wanted.items():
        if known.get(name, token_id) != token_id:
            raise UserError(what, f"{name} is there already, with id {known[name]}.")
        if owner.get(token_id, name) != name:
            raise UserError(what, f"Id {token_id} belongs to {owner[token_id]}.")
    if len(owner) != 1 + max(owner):
        why = f"It names {len(owner)} ids but the last is {max(owner)}: loaders would shift ids."
        raise UserError(what, why)
    last = max(wanted.values())
    if last >= vocab_size:
        raise UserError(what, f"Id {last} needs {last + 1} embedding rows; there are {vocab_size}.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a tokenizer file; `UserError` when it cannot be read as one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(content, dict):
        raise damaged(path, "it holds no JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part."""
    new = path.with_name(path.name + ".tmp")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def damaged(path: Path, why: str) -> UserError:
    """The error for a tokenizer file that cannot be used."""
    return UserError(
        f"Cannot read the tokenizer in {path}.", why, "Copy it again from the model's source."
    )
