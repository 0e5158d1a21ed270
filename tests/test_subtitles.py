"""srt, vtt and tsv: lines as whisper's command breaks them, times and marks as players need."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hebasr_jax.subtitles import Lines, cues, to_srt, to_tsv, to_vtt
from hebasr_jax.timestamps import Segment

HEBREW = (
    Segment(0.5, 4.5, "שלום לכם, מה שלומכם היום?"),
    Segment(5.0, 7.0, "הכול בסדר"),
    Segment(3661.5, 3662.0, "סוף"),
)
PLAIN = Lines()


def test_srt() -> None:
    assert to_srt(HEBREW, PLAIN) == (
        "1\n00:00:00,500 --> 00:00:04,500\nשלום לכם, מה שלומכם היום?\n\n"
        "2\n00:00:05,000 --> 00:00:07,000\nהכול בסדר\n\n"
        "3\n01:01:01,500 --> 01:01:02,000\nסוף\n\n"
    )


def test_vtt_and_what_would_break_it() -> None:
    text = "a < b & c > d\n\n--> 5"
    assert to_vtt([Segment(0.0, 1.9996, text)], PLAIN) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\na &lt; b &amp; c &gt; d --&gt; 5\n\n"
    )
    assert "a < b & c > d -> 5\n\n" in to_srt([Segment(0.0, 2.0, text)], PLAIN)


def test_tsv_is_a_segment_a_line_in_milliseconds() -> None:
    text = to_tsv([Segment(0.0004, 1.2346, "א\tב\nג"), Segment(2.0, 3.0, "ד")])
    assert text == "start\tend\ttext\n0\t1235\tא ב ג\n2000\t3000\tד\n"


def test_a_subtitle_without_length_is_given_some() -> None:
    assert "00:00:01,000 --> 00:00:01,001" in to_srt([Segment(1.0, 1.0, "א")], PLAIN)


def test_nothing_gives_an_empty_file_with_its_head() -> None:
    assert (to_srt((), PLAIN), to_vtt((), PLAIN)) == ("", "WEBVTT\n\n")
    assert to_tsv(()) == "start\tend\ttext\n"


def test_a_width_alone_breaks_lines_within_a_segment() -> None:
    shown = list(cues(HEBREW, Lines(width=12)))
    assert [cue.text for cue in shown] == ["שלום לכם, מה\nשלומכם היום?", "הכול בסדר", "סוף"]
    assert [cue[:2] for cue in shown] == [(0.5, 4.5), (5.0, 7.0), (3661.5, 3662.0)]


def test_a_width_and_a_count_let_text_run_on_until_a_long_pause() -> None:
    segments = [
        Segment(0.0, 4.0, "aa bb cc dd"),
        Segment(4.5, 6.0, "ee ff"),
        Segment(9.1, 10.0, "gg"),
    ]
    shown = list(cues(segments, Lines(width=5, count=2)))
    assert [cue.text for cue in shown] == ["aa bb\ncc dd", "ee ff", "gg"]
    segments[1] = Segment(4.5, 6.2, "ee ff")  # 2.9 s before gg
    shown = list(cues(segments, Lines(width=5, count=2)))
    assert [cue.text for cue in shown] == ["aa bb\ncc dd", "ee ff\ngg"]
    assert shown[1].start_s == 4.5
    assert shown[1].end_s == 10


def test_a_words_time_is_its_share_of_the_characters() -> None:
    [first, second] = cues([Segment(10.0, 21.0, "aaaa bbbbbb")], Lines(width=6, count=1))
    assert first[:2] == pytest.approx((10, 14))
    assert second[:2] == pytest.approx((15, 21))


def test_a_count_alone_and_a_word_wider_than_a_line() -> None:
    assert [cue.text for cue in cues(HEBREW[:1], Lines(count=1))] == [HEBREW[0].text]
    assert [
        cue.text for cue in cues([Segment(0.0, 1.0, "a longer b")], Lines(width=3, count=1))
    ] == [*("a", "longer", "b")]


@given(
    st.lists(st.lists(st.text("אבג-,", min_size=1, max_size=9), max_size=8), max_size=6),
    st.none() | st.integers(1, 30),
    st.none() | st.integers(1, 3),
)
def test_no_word_is_lost_and_lines_and_times_are_in_order(texts, width, count) -> None:
    segments = [Segment(2.0 * n, 2.0 * n + 1.5, " ".join(words)) for n, words in enumerate(texts)]
    shown = list(cues(segments, Lines(width, count)))
    assert " ".join(cue.text for cue in shown).split() == [w for words in texts for w in words]
    times = [time for cue in shown for time in cue[:2]]
    assert times == pytest.approx(sorted(times))
    for line in (line for cue in shown for line in cue.text.split("\n")):
        assert width is None or len(line) <= width or " " not in line
    if width and count:
        assert all(len(cue.text.split("\n")) <= count for cue in shown)
    for text in (to_srt(segments, Lines(width, count)), to_vtt(segments, Lines(width, count))):
        assert len(re.findall(r" --> ", text)) == len(shown)
