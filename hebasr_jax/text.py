"""Text to token ids and back: the prompt, the target with its loss mask, the transcript.

One builder serves training, evaluation and export: a `PromptStyle` says which part of the
assistant's turn is given and which is the model's to write, and both sides read that one value.

    <|im_start|>system\\n{context}<|im_end|>\\n<|im_start|>user\\n<|audio_start|>        before
    (audio embeddings)
    <|audio_end|><|im_end|>\\n<|im_start|>assistant\\n[language X<asr_text>][marker]    after
    [language X<asr_text>]{text, or stamp text stamp ...}<|im_end|>                    target
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hebasr_jax.errors import UserError
from hebasr_jax.timestamps import (
    Segment,
    StampIds,
    Words,
    added_tokens,
    damaged,
    from_grid,
    join_stamps,
    read_json,
    to_grid,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_CONTEXT_TOKENS = 224

# The Qwen2 rule. A local checkpoint may ask for another (`fix_mistral_regex`), whose ids differ
# on contractions, CamelCase and niqqud.
_QWEN2_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A language prefix that a model wrote although the prompt had one already.
_STRAY_PREFIX = re.compile(r"(^|\s)language(\s+[A-Za-z]+)?$", re.IGNORECASE)

_NAMES = ("im_start", "im_end", "endoftext", "audio_start", "audio_end", "audio_pad")
_CONTROL = {name: f"<|{name}|>" for name in _NAMES} | {"asr_text": "<asr_text>"}


@dataclass(frozen=True)
class SpecialIds:
    """The ids of the control tokens, looked up by name in one tokenizer."""

    im_start: int
    im_end: int
    endoftext: int
    audio_start: int
    audio_end: int
    audio_pad: int
    asr_text: int

    @classmethod
    def of(cls, token_to_id: Callable[[str], int | None]) -> "SpecialIds":
        """Look the ids up; raises `UserError` naming a token that is missing."""
        ids = {field: token_to_id(name) for field, name in _CONTROL.items()}
        for field, name in _CONTROL.items():
            if ids[field] is None:
                raise UserError(
                    f"The tokenizer has no token {name}.",
                    "It is not the tokenizer of a Qwen3-ASR model.",
                    "Give a model folder that holds the model's own tokenizer files.",
                )
        return cls(**ids)  # type: ignore[arg-type]  # None was refused above

    @property
    def eos(self) -> tuple[int, int]:
        """The ids that end an output, as both reference packages have them."""
        return self.im_end, self.endoftext

    @property
    def pad(self) -> int:
        """The id that fills rows up; not `im_end`, which must stay in the loss."""
        return self.endoftext


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A model folder's tokenizer: `encode` never makes a control token, `decode` reads any id."""

    full: "Backend"
    plain: "Backend"
    special: SpecialIds
    stamps: StampIds | None

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of text as text: a literal `<|im_end|>` in it becomes letters, not control."""
        try:
            return _encode(self.plain, text)
        except (UnicodeEncodeError, TypeError) as error:
            raise UserError("A text is not valid Unicode.", ascii(text)[:80]) from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without tokens marked special and without ids that name none."""
        return self.full.decode(list(ids), skip_special_tokens=True)


@lru_cache(256)  # the template's words are asked for with every clip, and a clip's text twice
def _encode(backend: "Backend", text: str) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class PromptStyle:
    """What is given in the prompt and what the model writes: one value for training and decoding.

    `language_in_prompt`: `language X<asr_text>` ends the prompt (forced); otherwise it starts the
    target and counts in the loss, and the decoder lets the model choose it. `stamps`: the marker
    token is the last of the prompt, so one token switches time stamps on; it is never in a target
    or in the loss. `language` None is unknown (decoding) or no speech (a target without text).
    """

    language: str | None = "Hebrew"
    language_in_prompt: bool = True
    stamps: bool = False

    def __post_init__(self) -> None:
        name = self.language
        if name is None and self.language_in_prompt:
            raise UserError("A prompt that forces the language needs its name.")
        if name is not None and (not re.fullmatch("[A-Z][a-z]+", name) or name == "None"):
            raise UserError(
                f"{name!r} is not a language name.",
                "The model knows English names with a capital letter.",
                "Write Hebrew, English, Arabic and so on.",
            )


@dataclass(frozen=True)
class Prompt:
    """The token ids before and after the audio embeddings; the placeholders are no part of it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Example:
    """One training sequence without placeholders: the audio goes before `text_ids[audio_at]`.

    `in_loss` is True exactly on the target, which ends with `<|im_end|>`.
    """

    text_ids: tuple[int, ...]
    audio_at: int
    in_loss: tuple[bool, ...]


@dataclass(frozen=True)
class Transcript:
    """What an output says; `language` None means unknown or no speech."""

    language: str | None
    text: str
    segments: tuple[Segment, ...] = ()


def load_tokenizer(folder: Path) -> TextTokenizer:
    """Read the tokenizer of a model folder, in either layout, with the Qwen2 splitting rule.

    Takes tokenizer.json, or else vocab.json, merges.txt and tokenizer_config.json. Raises
    `UserError` when a file is missing or damaged, a control token is missing, or the loaded ids
    are not those that the files state.
    """
    from tokenizers import Tokenizer
    from transformers import Qwen2Tokenizer

    stated = _check_files(folder)
    try:
        full = Qwen2Tokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # the Rust side raises plain Exception
        raise damaged(folder, (str(error) or repr(error)).strip().splitlines()[0]) from error
    for name, token_id in stated.items():
        if full.token_to_id(name) != token_id:
            raise UserError(
                f"The tokenizer in {folder} cannot be used.",
                f"Its files give {name} id {token_id}; loaded, it has {full.token_to_id(name)}.",
                "The ids of added tokens must follow each other without a gap.",
            )
    full.pre_tokenizer = _qwen2_rule()
    plain = Tokenizer(full.model)
    plain.normalizer = full.normalizer
    plain.pre_tokenizer = full.pre_tokenizer
    special, stamps = SpecialIds.of(stated.get), StampIds.of(full.token_to_id)
    return TextTokenizer(full, plain, special, stamps)


def build_prompt(tokenizer: TextTokenizer, style: PromptStyle, *, context: str = "") -> Prompt:
    """The prompt of one clip, with the ids of the reference chat template (Qwen3-ASR).

    `context` is text that came before, or hot words; the words in its last 224 tokens fill the
    system turn, which is there also when empty. White space around it is dropped. Raises
    `UserError` when stamps are asked of a tokenizer that has none.
    """
    special, encode = tokenizer.special, tokenizer.encode
    newline = encode("\n")
    context_ids = _last_words(tokenizer, encode(context.strip()))
    before = (special.im_start, *encode("system\n"), *context_ids, special.im_end, *newline)
    before += (special.im_start, *encode("user\n"), special.audio_start)
    after = (special.audio_end, special.im_end, *newline, special.im_start, *encode("assistant\n"))
    if style.language_in_prompt:
        after += _language_prefix(tokenizer, style)
    if style.stamps:
        after += (_stamps_of(tokenizer).marker,)
    return Prompt(before, after)


def build_target(
    tokenizer: TextTokenizer, style: PromptStyle, text: str, segments: Sequence[Segment] = ()
) -> tuple[int, ...]:
    """The ids that the model is to write after the prompt of the same style.

    The language prefix unless the prompt has it, then `text` (or, with stamps, each segment's
    start, text and end), then `<|im_end|>`, and no newline. White space around texts is dropped.
    Raises `UserError` when segments are missing, out of order on the 80-ms grid, later than
    120.96 s or not the same words as `text`, and when text comes without a language.
    """
    if style.language is None and text.strip():
        raise UserError(
            "A text to train on has no language.",
            "`language None` is what the model writes when nobody speaks.",
            "Name the language of the text.",
        )
    prefix = () if style.language_in_prompt else _language_prefix(tokenizer, style)
    body = _stamped(tokenizer, text, segments) if style.stamps else tokenizer.encode(text.strip())
    return prefix + body + (tokenizer.special.im_end,)


def build_example(
    tokenizer: TextTokenizer,
    style: PromptStyle,
    text: str,
    *,
    segments: Sequence[Segment] = (),
    context: str = "",
) -> Example:
    """The prompt and target of one clip as one training sequence; errors as in the two."""
    prompt = build_prompt(tokenizer, style, context=context)
    target = build_target(tokenizer, style, text, segments)
    given = prompt.before + prompt.after
    in_loss = (False,) * len(given) + (True,) * len(target)
    return Example(given + target, len(prompt.before), in_loss)


def parse_output(
    tokenizer: TextTokenizer,
    style: PromptStyle,
    ids: Iterable[int],
    *,
    duration_s: float | None = None,
) -> Transcript:
    """Read the ids that the model wrote after the prompt of the same style.

    Nothing after the first end token counts. Predicted language: what stands before the first
    `<asr_text>` is the language (None for `language None`, an empty tag or an unknown form);
    without a tag all is text in an unknown language, as in qwen-asr and transformers. Forced
    language: that one is reported; a tag written all the same is dropped, with a
    `language X` right before it, and all other words stay (qwen-asr would leave the tag in).

    Stamps become segments as `join_stamps` says; half a stamp is dropped, words never are.
    """
    language = style.language if style.language_in_prompt else None
    header_open = not style.language_in_prompt
    pieces: list[Words | float] = []
    for piece in _pieces(tokenizer, ids):
        if piece is not None:
            pieces.append(piece)
        elif header_open:
            header = " ".join(part.text for part in pieces if isinstance(part, Words))
            language, header_open, pieces = _language_of(header), False, []
        elif isinstance(words := pieces[-1], Words):  # as before every tag
            pieces[-1] = words._replace(text=_STRAY_PREFIX.sub("", words.text))
    pieces = [piece for piece in pieces if not isinstance(piece, Words) or piece.text]
    text = " ".join(piece.text for piece in pieces if isinstance(piece, Words))
    return Transcript(language, text, tuple(join_stamps(pieces, duration_s)))


def _check_files(folder: Path) -> dict[str, int]:
    """The added tokens that the files state; `UserError` when a file is missing or cut short."""
    whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    missing = [path.name for path in parts if not path.is_file()]
    if not whole.is_file() and missing:
        raise UserError(
            f"There is no tokenizer in {folder}.",
            f"It has no tokenizer.json, and no {' and no '.join(missing)}.",
            "Copy the tokenizer files of the model into the folder.",
        )
    stated = added_tokens(folder)
    if not whole.is_file():
        _check_merges(*parts, stated)
    return stated


def _check_merges(vocabulary: Path, merges: Path, stated: dict[str, int]) -> None:
    """A merges file cut between two lines loads without a word and splits text differently."""
    try:
        made = {line.replace(" ", "") for line in merges.read_text(encoding="utf-8").split("\n")}
    except (OSError, ValueError) as error:
        raise damaged(merges, str(error)) from error
    made |= stated.keys()
    orphan = next((p for p in read_json(vocabulary) if len(p) > 1 and p not in made), None)
    if orphan is not None:
        raise damaged(merges, f"No merge makes {orphan!r}, which {vocabulary.name} has.")


def _qwen2_rule() -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_QWEN2_RULE), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, to_bytes])


def _last_words(tokenizer: TextTokenizer, ids: tuple[int, ...]) -> tuple[int, ...]:
    """The last 224 ids, from the first of them that starts a word, if one does."""
    tail = ids[-MAX_CONTEXT_TOKENS:]
    starts = (at for at, token in enumerate(tail) if tokenizer.decode([token])[:1].isspace())
    return tail if tail == ids else tail[next(starts, 0) :]


def _language_prefix(tokenizer: TextTokenizer, style: PromptStyle) -> tuple[int, ...]:
    return (*tokenizer.encode(f"language {style.language}"), tokenizer.special.asr_text)


def _stamps_of(tokenizer: TextTokenizer) -> StampIds:
    if tokenizer.stamps is None:
        raise UserError(
            "This model has no time-stamp tokens.",
            "Its tokenizer was made without them.",
            "Use a model trained with time stamps, or leave them out.",
        )
    return tokenizer.stamps


def _stamped(tokenizer: TextTokenizer, text: str, segments: Sequence[Segment]) -> tuple[int, ...]:
    """Start stamp, text and end stamp of each segment that has text."""
    stamps = _stamps_of(tokenizer)
    spoken = [segment for segment in segments if segment.text.strip()]
    where = f"Text: {text[:60]!r}"
    if " ".join(segment.text for segment in spoken).split() != text.split():
        raise UserError("The segments of a text do not hold the words of the text.", where)
    points = [to_grid(time_s) for part in spoken for time_s in (part.start_s, part.end_s)]
    if points != sorted(points):
        raise UserError("The segments of a text overlap or are out of order.", where)
    ids: tuple[int, ...] = ()
    for segment in spoken:
        words = tokenizer.encode(segment.text.strip())
        ids += stamps.encode(segment.start_s) + words + stamps.encode(segment.end_s)
    return ids


def _pieces(tokenizer: TextTokenizer, ids: Iterable[int]) -> Iterator[Words | float | None]:
    """Cut an output at its control tokens: words, stamps in seconds, None for `<asr_text>`.

    Words, empty ones too, stand before every other piece and at the end.
    """
    special, stamps = tokenizer.special, tokenizer.stamps
    words: list[int] = []
    second: int | None = None
    for token in ids:
        if token in special.eos:
            break
        if token != special.asr_text and (stamps is None or token not in stamps):
            words.append(token)
            second = None
            continue
        yield Words(tokenizer.decode(words).strip(), tuple(words))
        words = []
        if token == special.asr_text:
            yield None
        if stamps is not None:
            slot = stamps.slot_of(token)
            if second is not None and slot is not None:
                yield from_grid(second, slot)
            second = stamps.second_of(token)
    yield Words(tokenizer.decode(words).strip(), tuple(words))


def _language_of(header: str) -> str | None:
    """The name in `language X` or a bare `X`; None for `None` and anything else."""
    found = re.search(r"\blanguage\s+([a-z]+)", header, re.IGNORECASE)
    found = found or re.fullmatch(r"(?!language$)([a-z]+)", header, re.IGNORECASE)
    name = found[1].capitalize() if found else "None"
    return None if name == "None" else name
