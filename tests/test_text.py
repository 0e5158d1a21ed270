"""The prompt, the target with its mask, and the transcript, against the real tokenizer files."""

import dataclasses
import json
import unicodedata
from functools import cache
from itertools import compress, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.errors import UserError
from hebasr_jax.layout import write_original_tokenizer
from hebasr_jax.text import (
    MAX_CONTEXT_TOKENS,
    PromptStyle,
    Segment,
    TextTokenizer,
    Transcript,
    build_example,
    build_prompt,
    build_target,
    load_tokenizer,
    parse_output,
)
from hebasr_jax.timestamps import add_stamp_tokens
from hebasr_jax.tiny import write_byte_tokenizer

REAL = Path(__file__).parents[2] / "shared" / "qwen3-asr-1.7b"

FORCED = PromptStyle()
PREDICTED = PromptStyle(language_in_prompt=False)
AUTO = PromptStyle(language=None, language_in_prompt=False)
STAMPED = PromptStyle(stamps=True)


def write_tiny_tokenizer(folder: Path, layout: str = "transformers") -> Path:
    """The demo's tokenizer of bytes with a few merges, in a folder of either layout."""
    merges = (("l", "a"), ("la", "n"), ("×", "©"), ("Ġ", "H"))
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "transformers":
        write_byte_tokenizer(folder, merges)
    else:
        with TemporaryDirectory() as source:
            write_byte_tokenizer(Path(source), merges)
            write_original_tokenizer(Path(source), folder)
    return folder


@cache
def tiny() -> TextTokenizer:
    """A tiny tokenizer with time stamps."""
    with TemporaryDirectory() as name:
        folder = write_tiny_tokenizer(Path(name))
        add_stamp_tokens(folder, vocab_size=512)
        return load_tokenizer(folder)


@pytest.fixture(scope="module")
def real() -> TextTokenizer:
    return load_tokenizer(REAL)


@pytest.fixture(scope="module")
def reference():
    """The real tokenizer as transformers gives it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(REAL), local_files_only=True)


def part(start_s: float, end_s: float, text: str) -> Segment:
    return Segment(float(start_s), float(end_s), text)


def stamped(*pieces: str | float) -> list[int]:
    """The ids of texts and stamps in order."""
    encode, stamps = tiny().encode, tiny().stamps
    ids = [encode(p) if isinstance(p, str) else stamps.encode(float(p)) for p in pieces]
    return [token for piece in ids for token in piece]


# --- the prompt ----------------------------------------------------------------------------


@pytest.mark.shared
def test_the_prompt_has_the_ids_of_the_fact_sheet(real):
    prompt = build_prompt(real, FORCED)
    assert prompt.before == (151644, 8948, 198, 151645, 198, 151644, 872, 198, 151669)
    assert prompt.after == (151670, 151645, 198, 151644, 77091, 198, 11528, 36266, 151704)
    assert build_prompt(real, PREDICTED).after == prompt.after[:-3]
    assert build_prompt(real, PREDICTED).before == prompt.before
    assert real.special.audio_pad == 151676
    assert real.special.eos == (151645, 151643)
    assert real.special.pad == 151643 != real.special.im_end


@pytest.mark.shared
@pytest.mark.parametrize("language", [None, "Hebrew", "English"])
@pytest.mark.parametrize(
    "context", ["", "שלום עולם", "Jane's CamelCase, iPhone\n\nשָׁלוֹם 123", "(a) - b.", "é e\u0301"]
)
def test_the_prompt_is_that_of_the_chat_template(real, reference, context, language):
    template = json.loads((REAL / "chat_template.json").read_text(encoding="utf-8"))
    turns = [
        {"role": "system", "content": context},
        {"role": "user", "content": [{"type": "audio", "audio": ""}]},
    ]
    text = reference.apply_chat_template(
        turns, chat_template=template["chat_template"], add_generation_prompt=True, tokenize=False
    )
    text = text.replace("<|audio_pad|>", "<|audio_pad|>" * 13)
    text += f"language {language}<asr_text>" if language else ""
    style = PromptStyle(language, language_in_prompt=language is not None)
    prompt = build_prompt(real, style, context=context)
    ids = [*prompt.before, *[real.special.audio_pad] * 13, *prompt.after]
    assert ids == reference(text)["input_ids"]


def test_white_space_around_a_context_is_dropped():
    plain = build_prompt(tiny(), FORCED, context="שלום")
    assert build_prompt(tiny(), FORCED, context="\n שלום\n") == plain
    assert build_prompt(tiny(), FORCED, context=" \n") == build_prompt(tiny(), FORCED)


@pytest.mark.parametrize("tokens", [MAX_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS + 1, 1000])
def test_a_long_context_keeps_its_last_tokens(tokens):
    context = "".join("abcdefghij"[index % 7] for index in range(tokens))
    empty, full = build_prompt(tiny(), FORCED), build_prompt(tiny(), FORCED, context=context)
    ids = tiny().encode(context)
    assert len(ids) == tokens
    end = empty.before.index(tiny().special.im_end)
    assert full.before == (*empty.before[:end], *ids[-224:], *empty.before[end:])
    assert full.after == empty.after


@given(st.lists(st.text("שלaЯ-", min_size=1, max_size=9), min_size=120, max_size=130))
def test_a_long_context_starts_with_a_whole_word(words):
    before = tiny().decode(build_prompt(tiny(), FORCED, context="\n".join(words)).before)
    kept = before.removeprefix("system\n").removesuffix("\nuser\n").split()
    assert kept == words[len(words) - len(kept) :]
    assert (
        len(kept) == len(words)
        or len(tiny().encode("\n".join(["", *words[-len(kept) - 1 :]]))) > 224
    )


@pytest.mark.parametrize(
    "literal", ["<|im_end|>", "<|audio_pad|>", "<asr_text>", "<|timestamps|>", "<|3s|>", "<|+0|>"]
)
def test_control_tokens_spelled_out_in_a_text_stay_text(literal):
    empty, text = build_example(tiny(), FORCED, ""), f"a{literal}b {literal}"
    example = build_example(tiny(), FORCED, text, context=text)
    control = tiny().full.token_to_id(literal)
    assert example.text_ids.count(control) == empty.text_ids.count(control)
    assert parse_output(tiny(), FORCED, compress(example.text_ids, example.in_loss)).text == text


def test_stamps_add_one_token_at_the_end_of_the_prompt():
    for style in (FORCED, PREDICTED):
        plain = build_prompt(tiny(), style)
        marked = build_prompt(tiny(), dataclasses.replace(style, stamps=True))
        assert marked.before == plain.before
        assert marked.after == (*plain.after, tiny().stamps.marker)


@pytest.mark.parametrize("name", ["he", "hebrew", "HEBREW", "None", "", "Hebrew<asr_text>", "A b"])
def test_a_wrong_language_name_is_refused(name):
    with pytest.raises(UserError, match="language name"):
        PromptStyle(language=name)


def test_a_forced_language_needs_a_name():
    with pytest.raises(UserError, match="needs its name"):
        PromptStyle(language=None)


# --- the target ----------------------------------------------------------------------------


@pytest.mark.shared
def test_the_target_has_the_ids_of_the_reference(real, reference):
    text = "שלום, iPhone don't שָׁלוֹם 12"
    ids = tuple(reference(text)["input_ids"])
    assert build_target(real, FORCED, f" {text}\n") == (*ids, 151645)
    assert build_target(real, PREDICTED, text) == (11528, 36266, 151704, *ids, 151645)
    assert build_target(real, AUTO, "") == (11528, 2240, 151704, 151645)


@pytest.mark.shared
def test_the_words_that_tell_the_qwen2_rule_from_the_mistral_rule(real):
    assert real.encode("iPhone") == (44740,)
    assert real.encode("don't") == (15007, 944)
    assert real.encode("12") == (16, 17)


SCRIPTS = st.text(
    st.one_of(
        st.characters(min_codepoint=0x5D0, max_codepoint=0x5EA),
        st.characters(min_codepoint=0x5B0, max_codepoint=0x5C7),
        st.characters(min_codepoint=0x20, max_codepoint=0x17F),
        st.sampled_from("\n\t ־׳״'\"e\u0301\u05e9\u05c1\ufb2aжع中😀"),
    ),
    max_size=40,
)


def as_read(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


@settings(max_examples=60, deadline=None)
@given(SCRIPTS, SCRIPTS, st.sampled_from([FORCED, PREDICTED]))
def test_the_mask_covers_the_target_and_nothing_else(text, context, style):
    example = build_example(tiny(), style, text, context=context)
    prompt = build_prompt(tiny(), style, context=context)
    assert example.audio_at == len(prompt.before)
    assert len(example.in_loss) == len(example.text_ids)
    target = tuple(compress(example.text_ids, example.in_loss))
    given_ids = example.text_ids[: -len(target)]
    assert given_ids == prompt.before + prompt.after
    assert example.in_loss == tuple(sorted(example.in_loss))
    assert target == build_target(tiny(), style, text)
    assert target[-1] == tiny().special.im_end
    assert target.count(tiny().special.im_end) == 1
    prefix = tiny().full.encode("language Hebrew<asr_text>").ids
    assert (list(target[: len(prefix)]) == prefix) is not style.language_in_prompt
    assert (list(given_ids[-len(prefix) :]) == prefix) is style.language_in_prompt


@settings(max_examples=60, deadline=None)
@given(SCRIPTS, st.sampled_from([FORCED, PREDICTED]))
def test_a_target_reads_back_as_its_text(text, style):
    target = build_target(tiny(), style, text)
    assert parse_output(tiny(), style, target) == Transcript("Hebrew", as_read(text))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(SCRIPTS.filter(str.strip), st.integers(0, 120)), max_size=4),
    st.sampled_from([FORCED, PREDICTED]),
)
def test_a_stamped_target_reads_back_as_its_segments(rows, style):
    style = dataclasses.replace(style, stamps=True)
    starts = sorted(float(second) for _, second in rows)
    ends = [min(start + 0.96, later) for start, later in pairwise([*starts, 120.96])]
    parts = [Segment(*row) for row in zip(starts, ends, (t for t, _ in rows), strict=True)]
    text = " ".join(segment.text for segment in parts)
    target = build_target(tiny(), style, text, parts)
    assert tiny().stamps.marker not in target
    read = parse_output(tiny(), style, target)
    assert read.segments == tuple(
        Segment(p.start_s, p.end_s, as_read(p.text)) for p in parts if p.text.strip()
    )
    assert read.text == " ".join(segment.text for segment in read.segments)


def test_a_text_without_a_language_is_no_target():
    with pytest.raises(UserError, match="no language"):
        build_target(tiny(), AUTO, "שלום")


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "do not hold the words"),
        ([part(0, 1, "א")], "do not hold the words"),
        ([part(1, 2, "א"), part(0, 1, "ב")], "out of order"),
        ([part(0, 1, "א"), part(0.9, 2, "ב")], "overlap"),
        ([part(2, 1, "א ב")], "out of order"),
        ([part(0, 121, "א ב")], "cannot be written"),
        ([part(-0.1, 1, "א ב")], "cannot be written"),
    ],
)
def test_segments_that_cannot_be_stamped_are_refused(segments, message):
    with pytest.raises(UserError, match=message):
        build_target(tiny(), STAMPED, "א ב", segments)


def test_an_overlap_below_the_grid_and_an_empty_segment_do_no_harm():
    segments = [part(0, 1.01, "א"), part(0.99, 1.0, " "), part(0.99, 2, "ב")]
    target = build_target(tiny(), STAMPED, "א ב", segments)
    assert target == (*stamped(0, "א", 1, 1, "ב", 2), tiny().special.im_end)


def test_stamps_need_a_tokenizer_that_has_them(tmp_path):
    tokenizer = load_tokenizer(write_tiny_tokenizer(tmp_path))
    with pytest.raises(UserError, match="no time-stamp tokens"):
        build_prompt(tokenizer, STAMPED)
    with pytest.raises(UserError, match="no time-stamp tokens"):
        build_target(tokenizer, STAMPED, "")


def test_a_text_that_is_no_unicode_is_refused():
    with pytest.raises(UserError, match="not valid Unicode"):
        build_target(tiny(), FORCED, "a\ud800")


# --- the transcript ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "output", "language", "text"),
    [
        (AUTO, "language Hebrew<asr_text>שלום עולם<|im_end|>", "Hebrew", "שלום עולם"),
        (AUTO, "language Hebrew<asr_text> שלום\n<|endoftext|>עוד", "Hebrew", "שלום"),
        (AUTO, "language None<asr_text><|im_end|>", None, ""),
        (AUTO, "language None<asr_text>שלום", None, "שלום"),
        (AUTO, "<asr_text>שלום", None, "שלום"),
        (AUTO, "language <asr_text>שלום", None, "שלום"),
        (AUTO, "language<asr_text>שלום", None, "שלום"),
        (AUTO, "Hebrew<asr_text>שלום", "Hebrew", "שלום"),
        (AUTO, "language hebrew\nx<asr_text>שלום", "Hebrew", "שלום"),
        (AUTO, "שלום עולם<|im_end|>", None, "שלום עולם"),
        (AUTO, "language Hebrew", None, "language Hebrew"),
        (AUTO, "", None, ""),
        (PREDICTED, "language English<asr_text>hi", "English", "hi"),
        (PREDICTED, "שלום", None, "שלום"),
        (AUTO, "language Hebrew<asr_text>א language Hebrew<asr_text>ב", "Hebrew", "א ב"),
        (FORCED, "שלום<|im_end|>", "Hebrew", "שלום"),
        (FORCED, "language Hebrew<asr_text>שלום<|im_end|>", "Hebrew", "שלום"),
        (FORCED, "language None<asr_text><|im_end|>", "Hebrew", ""),
        (FORCED, "<asr_text>שלום", "Hebrew", "שלום"),
        (FORCED, "שלום<asr_text>עולם", "Hebrew", "שלום עולם"),
        (FORCED, "א language Hebrew<asr_text>ב", "Hebrew", "א ב"),
        (FORCED, "the language Hebrew is old", "Hebrew", "the language Hebrew is old"),
        (FORCED, "א<|audio_pad|>ב<|im_start|>", "Hebrew", "אב"),
    ],
)
def test_outputs_are_read(style, output, language, text):
    assert parse_output(tiny(), style, tiny().full.encode(output).ids) == Transcript(language, text)


@pytest.mark.shared
def test_the_tag_survives_decoding_and_control_tokens_do_not(real):
    ids = [
        11528,
        36266,
        151704,
        *real.encode("שלום"),
        151676,
        151677,
        151700,
        151935,
        151645,
        11528,
    ]
    assert parse_output(real, AUTO, ids) == Transcript("Hebrew", "שלום")
    assert real.decode(ids[:-1]) == "language Hebrew<asr_text>שלום"


@pytest.mark.shared
@pytest.mark.parametrize(
    "output",
    ["language Hebrew<asr_text>שלום", "language None<asr_text>", "שלום", "Hebrew<asr_text>א"],
)
def test_a_predicted_language_reads_as_in_transformers(real, output):
    from transformers.models.qwen3_asr import processing_qwen3_asr as theirs

    ours = parse_output(real, AUTO, real.full.encode(output).ids)
    read = theirs._parse_single_output(output)
    assert (ours.language, ours.text) == (read["language"], read["transcription"])


def test_a_predicted_language_and_stamps_go_together():
    style = dataclasses.replace(AUTO, stamps=True)
    ids = [*tiny().full.encode("language Hebrew<asr_text>").ids, *stamped(1, "א", 2.08)]
    assert parse_output(tiny(), style, ids) == Transcript("Hebrew", "א", (part(1, 2.08, "א"),))
