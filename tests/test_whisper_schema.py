"""Transcripts with Whisper's stamps: read, written, and cut from whole recordings."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hebasr_jax.data.clips import BadClip
from hebasr_jax.data.whisper import (
    Slice,
    cut_slices,
    parse_transcript,
    without_stamps,
    write_transcript,
)
from hebasr_jax.errors import UserError
from hebasr_jax.timestamps import Segment

WORDS = st.lists(st.sampled_from(["שלום", 'צה"ל', "<", "|", "a", "3"]), min_size=1, max_size=4)


@st.composite
def slices(draw) -> Slice:
    """Any slice of 30 s with times on the grid."""
    ticks = sorted(draw(st.lists(st.integers(0, 1500), max_size=9)))
    times = [tick / 50 for tick in ticks]
    segments = tuple(
        Segment(start, end, " ".join(draw(WORDS)))
        for start, end in zip(times[::2], times[1::2], strict=False)
    )
    open_s = times[-1] if len(times) % 2 else None
    return Slice(" ".join(segment.text for segment in segments), segments, open_s)


@settings(max_examples=300, deadline=None)
@given(slices())
def test_what_is_written_is_read_again(slice) -> None:
    assert parse_transcript(write_transcript(slice), 30.0) == slice
    assert without_stamps(write_transcript(slice)) == slice.text


@pytest.mark.parametrize(
    ("transcript", "text", "spans", "open_s"),
    [
        ("<|0.00|> א ב<|2.40|><|3.00|> ג<|5.00|>", "א ב ג", [(0, 2.4), (3, 5)], None),
        ("<|0.00|>א<|2.40|><|2.40|>", "א", [(0, 2.4)], 2.4),
        ("<|0.00|>א<|2.40|> <|29.00|>", "א", [(0, 2.4)], 29.0),
        ("<|12.00|>", "", [], 12.0),
        ("<|0.00|><|30.00|>", "", [], None),
        ("", "", [], None),
        (" שלום לכם ", "שלום לכם", [], None),
        ("<|0|>א<|30.06|>", "א", [(0, 30.0)], None),
        ("<|1.00|>א<|1.00|>", "א", [(1, 1)], None),
    ],
)
def test_a_transcript_is_its_segments(transcript, text, spans, open_s) -> None:
    found = parse_transcript(transcript, 30.0)
    assert (found.text, found.open_s) == (text, open_s)
    assert [(s.start_s, s.end_s) for s in found.segments] == spans


@pytest.mark.parametrize(
    ("transcript", "reason"),
    [
        ("<|2.00|>א<|1.00|>", "time stamps out of order"),
        ("<|0.00|>א<|2.00|><|1.00|>ב<|3.00|>", "time stamps out of order"),
        ("<|-1.00|>א<|1.00|>", "negative time stamp"),
        ("<|0.00|>א<|30.20|>", "time stamp beyond the end"),
        ("<|0.00|>א<|" + "9" * 5000 + "|>", "time stamp beyond the end"),
        ("א<|0.00|>ב<|1.00|>", "words outside of time stamps"),
        ("<|0.00|>א<|1.00|>ב", "words outside of time stamps"),
        ("<|0.00|>א<|1.00|>ב<|2.00|>ג<|3.00|>", "words outside of time stamps"),
        ("<|0.00|>א<|1.00|><|1.00|>ב", "words outside of time stamps"),
        ("<|0.00|>א<|1.00>", "malformed time stamp"),
        ("<|nan|>א<|1.00|>", "malformed time stamp"),
        ("<|he|>א", "malformed time stamp"),
        ("<|٠.00|>א<|1.00|>", "malformed time stamp"),
    ],
)
def test_a_wrong_transcript_is_a_bad_clip_with_its_reason(transcript, reason) -> None:
    with pytest.raises(BadClip) as error:
        parse_transcript(transcript, 30.0)
    assert error.value.reason == reason


STAMPS = ["<|0.00|>", "<|2.50|>", "<|30.04|>", "<|31|>", "<|-1|>", "<|", "|>", "<|1e5|>", "<|.|>"]


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(
        st.lists(st.sampled_from([*STAMPS, "א", " ", "\n", "\ud800"]), max_size=10).map("".join),
        st.text("<|>0123456789.-א ", max_size=20),
        st.text(max_size=20),
    ),
    st.floats(),
)
@example("<|0.00|>א<|1.00|>", float("nan"))
def test_anything_is_a_slice_or_a_bad_clip(transcript, duration_s) -> None:
    assert not re.search(r"<\|[0-9.]+\|>", without_stamps(transcript))
    try:
        text, segments, open_s = parse_transcript(transcript, duration_s)
    except BadClip:
        return
    times = [time for s in segments for time in (s.start_s, s.end_s)]
    times += [] if open_s is None else [open_s]
    assert times == sorted(times)
    assert all(0 <= time <= duration_s for time in times)
    assert without_stamps(transcript) == " ".join(text.split())
    assert not segments or text == " ".join(s.text for s in segments)


def test_a_slice_that_cannot_be_read_again_is_not_written() -> None:
    for slice in (
        Slice("<|1|>", (), None),
        Slice("א", (), 3.0),
        Slice("א", (Segment(0.0, 1.0, "ב"),), None),
    ):
        with pytest.raises(BadClip):
            write_transcript(slice)


# --- cutting -------------------------------------------------------------------------------


def cut(*spans: tuple[float, float], **options) -> list[tuple[float, str, str]]:
    """Seek, transcript and previous text of each slice; the words are the segments' numbers."""
    segments = [Segment(float(start), float(end), str(i)) for i, (start, end) in enumerate(spans)]
    cuts = cut_slices(segments, **options)
    return [(c.seek_s, write_transcript(c.slice), c.previous) for c in cuts]


def test_a_crossing_segment_is_an_open_stamp_and_begins_the_next_slice() -> None:
    assert cut((0, 10), (12, 28), (29, 35)) == [
        (0, "<|0.00|>0<|10.00|><|12.00|>1<|28.00|><|29.00|>", ""),
        (28, "<|1.00|>2<|7.00|>", "0 1"),
    ]


def test_a_segment_that_ends_with_the_window_is_whole() -> None:
    assert cut((0, 30), (30, 40)) == [
        (0, "<|0.00|>0<|30.00|>", ""),
        (30, "<|0.00|>1<|10.00|>", "0"),
    ]


def test_an_only_crossing_segment_leaves_an_empty_slice_and_ends_the_chain() -> None:
    assert cut((0, 25), (26, 31), (45, 70)) == [
        (0, "<|0.00|>0<|25.00|><|26.00|>", ""),
        (25, "<|1.00|>1<|6.00|><|20.00|>", "0"),
        (31, "<|14.00|>", "1"),
        (45, "<|0.00|>2<|25.00|>", ""),
    ]


def test_a_long_silence_is_an_empty_slice() -> None:
    assert cut((0, 5), (100, 105)) == [
        (0, "<|0.00|>0<|5.00|>", ""),
        (5, "", "0"),
        (100, "<|0.00|>1<|5.00|>", ""),
    ]


def test_small_gaps_and_overlaps_are_merged() -> None:
    assert cut((0, 5), (5.28, 8), (7.9, 9), (9.3, 12)) == [
        (0, "<|0.00|>0 1 2<|9.00|><|9.30|>3<|12.00|>", "")
    ]


def test_a_slice_begins_no_later_than_its_words() -> None:
    assert cut((0, 29.9), (29.8, 40)) == [
        (0, "<|0.00|>0<|29.90|><|29.90|>", ""),
        (29.8, "<|0.00|>1<|10.20|>", "0"),
    ]


def test_long_and_empty_segments_are_skipped() -> None:
    assert cut((0, 5), (5, 5), (6, 40), (41, 45)) == [
        (0, "<|0.00|>0<|5.00|><|6.00|>", ""),
        (5, "<|1.00|>", "0"),
        (41, "<|0.00|>3<|4.00|>", ""),
    ]
    assert cut((0, 5), (6, 40), (41, 45), longest_s=60.0) == [
        (0, "<|0.00|>0<|5.00|><|6.00|>1<|40.00|><|41.00|>2<|45.00|>", "")
    ]


def test_a_poor_segment_drops_its_slice() -> None:
    spans = ((0, 5), (6, 10), (11, 15), (16, 40), (41, 44))
    assert cut(*spans, quality=[0.9, 0.1, 0.2, 0.9, 0.9], min_quality=0.5) == [
        (16, "<|0.00|>3<|24.00|><|25.00|>4<|28.00|>", "")
    ]
    assert cut(*spans, quality=[0.1] * 5, min_quality=0.5) == []
    later = ((0, 10), (12, 28), (29, 35), (36, 40))
    assert cut(*later, quality=[0.9, 0.9, 0.1, 0.9], min_quality=0.5) == [
        (0, "<|0.00|>0<|10.00|><|12.00|>1<|28.00|><|29.00|>", ""),
        (36, "<|0.00|>3<|4.00|>", ""),
    ]


def test_disorder_and_wrong_lengths_are_refused() -> None:
    for spans in (((5, 6), (0, 1)), ((-1, 1),), ((0, float("inf")),)):
        with pytest.raises(BadClip):
            cut(*spans)
    for longest_s in (0.0, 121.0, float("nan")):
        with pytest.raises(UserError):
            cut((0, 1), longest_s=longest_s)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-20, 3000), st.integers(1, 2000)), max_size=30),
    st.sampled_from([30.0, 60.0, 120.0]),
)
def test_every_word_is_in_one_slice_at_its_time(steps, longest_s) -> None:
    segments: list[Segment] = []
    end = start = 0
    for number, (gap, length) in enumerate(steps):
        start = max(start, end + gap)  # gaps down to an overlap of 0.2 s
        end = max(end, start + length)
        segments.append(Segment(start / 100, end / 100, str(number)))
    cuts = cut_slices(segments, longest_s=longest_s)
    short = [s for s in segments if s.end_s - s.start_s <= longest_s + 1e-9]
    assert " ".join(c.slice.text for c in cuts).split() == [s.text for s in short]
    for c in cuts:
        assert 0 < c.duration_s <= longest_s
        assert parse_transcript(write_transcript(c.slice), longest_s) == c.slice
        parse_transcript(write_transcript(c.slice), c.duration_s)
        for s in c.slice.segments:
            first, last = (segments[int(s.text.split()[i])] for i in (0, -1))
            assert abs(c.seek_s + s.start_s - first.start_s) < 0.011
            assert c.seek_s + s.end_s > last.end_s - 0.011
