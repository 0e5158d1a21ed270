"""Batches: what a row holds, and that threads, hosts, resume and bad clips do not change it."""

import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data import pipeline
from hebasr_jax.data.clips import BadClip, Batch, Clip, ClipSet
from hebasr_jax.data.draws import row_words
from hebasr_jax.data.pipeline import Feed, load_batch, make_feed, stream
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Augment, Config, Data
from hebasr_jax.text import PromptStyle, TextTokenizer, build_example, load_tokenizer
from hebasr_jax.timestamps import Segment, add_stamp_tokens
from hebasr_jax.tiny import write_byte_tokenizer

BASE = Config(data=Data(batch_clips=4, buckets=3, threads=0))


@cache
def tokenizer(stamps: bool = True) -> TextTokenizer:
    with TemporaryDirectory() as name:
        write_byte_tokenizer(Path(name), (("×", "©"), ("Ġ", "H")))
        if stamps:
            add_stamp_tokens(Path(name), vocab_size=512)
        return load_tokenizer(Path(name))


def wave_of(index: int, duration_s: float) -> np.ndarray:
    return np.full(round(duration_s * SAMPLE_RATE), index + 1, np.int16)


def clip(index: int, duration_s: float, **fields) -> Clip:
    half = duration_s / 2
    segments = (Segment(0.0, half, f"word{index}"), Segment(half, duration_s, "end"))
    fields = {"text": f"word{index} end", "segments": segments, "context": f"ctx {index}"} | fields
    return Clip(id=str(index), duration_s=duration_s, **fields)


def clip_set(clips: list[Clip], name: str = "a", bad: dict[int, str] | None = None) -> ClipSet:
    """Clip i holds the sample value i + 1; `bad` clips cannot be read."""

    def read(index: int) -> np.ndarray:
        if index in (bad or {}):
            raise BadClip((bad or {})[index])
        return wave_of(index, clips[index].duration_s)

    return ClipSet(name, tuple(clips), read, fingerprint=name)


class Ledger(Quarantine):
    """Quarantine that remembers who was reported."""

    def __init__(self, path: Path, limit_share: float = 1.0, total: int = 100) -> None:
        super().__init__(path, limit_share, total)
        self.seen: list[tuple[str, str, str]] = []

    def add(self, set_name, clip_id, reason, detail="", epoch=None, step=None) -> None:
        self.seen.append((set_name, clip_id, reason))
        super().add(set_name, clip_id, reason, detail, epoch, step)


def feed_of(sets, config: Config = BASE, ledger: Quarantine | None = None) -> Feed:
    if ledger is None:
        ledger = Ledger(Path("/nowhere/quarantine.jsonl"))
    return make_feed(sets, tokenizer(), config, ledger)


def some_clips(count: int, seed: int = 0) -> list[Clip]:
    durations = np.random.default_rng(seed).uniform(0.5, 6.0, count).round(2)
    return [clip(index, float(duration)) for index, duration in enumerate(durations)]


def with_(config: Config = BASE, *, data=None, text=None, augment=None, seed=0) -> Config:
    return replace(
        config,
        seed=seed,
        data=replace(config.data, **(data or {})),
        text=replace(config.text, **(text or {})),
        augment=replace(config.augment, **(augment or {})),
    )


def all_batches(feed: Feed, epochs: int = 1, **where) -> list[tuple[int, int, int, Batch]]:
    with stream(feed, epochs=epochs, **where) as items:
        return [(item.epoch, item.batch, item.bucket, item.data) for item in items]


def assert_same(one: list, two: list) -> None:
    assert [item[:3] for item in one] == [item[:3] for item in two]
    jax.tree.map(np.testing.assert_array_equal, [i[3] for i in one], [i[3] for i in two])


def rows_of(batches: list) -> list[Batch]:
    """Each row as a batch of its own, without those that only fill."""
    parts = [(batch, row) for *_, batch in batches for row in range(len(batch.samples_B))]
    rows = [jax.tree.map(lambda x, row=row: x[row], batch) for batch, row in parts]
    return [row for row in rows if row.samples_B > 0]


def test_the_row_of_one_clip() -> None:
    feed = feed_of([clip_set([clip(0, 2.5)])])
    [(_, _, _, batch)] = all_batches(feed)
    example = build_example(tokenizer(), PromptStyle(), "word0 end")
    length = len(example.text_ids)
    assert batch.wave_BS.shape == (4, 3 * SAMPLE_RATE)
    assert batch.wave_BS.dtype == np.int16
    assert batch.samples_B.tolist() == [40_000, 0, 0, 0]
    assert (batch.wave_BS[0, :40_000] == 1).all()
    assert not batch.wave_BS[0, 40_000:].any()
    assert not batch.wave_BS[1:].any()
    assert batch.text_BX[0, :length].tolist() == list(example.text_ids)
    assert not batch.text_BX[0, length:].any()
    assert batch.text_lengths_B.tolist() == [length, 1, 1, 1]
    assert batch.audio_at_B[0] == example.audio_at
    assert batch.in_loss_BX[0, :length].tolist() == list(example.in_loss)
    assert batch.in_loss_BX.sum() == sum(example.in_loss)
    assert batch.seed_B2[0].tolist() == row_words(0, 0, "a/0").tolist()
    assert batch.speed_B.tolist() == [1, 1, 1, 1]


def test_every_clip_once_with_its_own_text() -> None:
    clips = some_clips(30)
    seen = []
    for row in rows_of(all_batches(feed_of([clip_set(clips)]))):
        index = int(row.wave_BS[0]) - 1
        ids = build_example(tokenizer(), PromptStyle(), clips[index].text).text_ids
        assert row.text_BX[: row.text_lengths_B].tolist() == list(ids)
        assert row.samples_B == round(clips[index].duration_s * SAMPLE_RATE)
        seen.append(index)
    assert sorted(seen) == list(range(30))


def test_joined_rows() -> None:
    """Silence between clips, a space between texts, stamps moved by what comes before."""
    config = with_(data={"join_share": 1.0, "join_gap_s": 0.5}, text={"stamp_share": 1.0})
    clips = [clip(0, 6.0, recording="r", text="x " * 40), clip(1, 2.0, recording="r")]
    clips[0] = replace(clips[0], segments=(Segment(0.0, 6.0, "x " * 40),))
    clips.append(clip(2, 1.0, recording="r"))
    rows = rows_of(all_batches(feed_of([clip_set(clips)], config)))
    [row] = [row for row in rows if row.wave_BS[0] == 2]
    parts = [np.full(32_000, 2), np.zeros(8_000), np.full(16_000, 3)]
    assert row.wave_BS[: row.samples_B].tolist() == np.concatenate(parts).tolist()
    times_s = [(0.0, 1.0, "word1"), (1.0, 2.0, "end"), (2.5, 3.0, "word2"), (3.0, 3.5, "end")]
    expected = build_example(
        tokenizer(),
        PromptStyle(stamps=True),
        "word1 end word2 end",
        segments=[Segment(*times) for times in times_s],
    )
    assert row.text_BX[: row.text_lengths_B].tolist() == list(expected.text_ids)
    plain = with_(config, text={"stamp_share": 0.0})
    [row] = [
        r for r in rows_of(all_batches(feed_of([clip_set(clips)], plain))) if r.wave_BS[0] == 2
    ]
    expected = build_example(tokenizer(), PromptStyle(), "word1 end word2 end")
    assert row.text_BX[: row.text_lengths_B].tolist() == list(expected.text_ids)
    without = [*clips[:2], replace(clips[2], segments=())]
    [row] = [
        r for r in rows_of(all_batches(feed_of([clip_set(without)], config))) if r.wave_BS[0] == 2
    ]
    assert row.text_BX[: row.text_lengths_B].tolist() == list(expected.text_ids)


def test_speed_scales_the_stamps_and_fits_the_bucket() -> None:
    config = with_(augment={"speed_factors": (0.8,)}, text={"stamp_share": 1.0})
    [row] = rows_of(all_batches(feed_of([clip_set([clip(0, 4.0)])], config)))
    segments = [Segment(0.0, 2.5, "word0"), Segment(2.5, 5.0, "end")]
    style = PromptStyle(stamps=True)
    expected = build_example(tokenizer(), style, "word0 end", segments=segments)
    assert row.text_BX[: row.text_lengths_B].tolist() == list(expected.text_ids)
    assert row.speed_B == np.float32(0.8)
    assert row.wave_BS.shape == (5 * SAMPLE_RATE,)
    fast = with_(augment={"speed_factors": (1.1,)})
    [row] = rows_of(all_batches(feed_of([clip_set([clip(0, 4.4)])], fast)))
    assert row.samples_B == 70_400
    assert row.wave_BS.shape == (70_400,)


def test_sound_longer_than_stated_is_cut_at_the_end_of_the_bucket() -> None:
    stated = clip_set([clip(0, 2.95), clip(1, 3.0)])
    longer = replace(stated, read=lambda index: wave_of(index, 3.1))
    rows = rows_of(all_batches(feed_of([longer])))
    assert [row.samples_B for row in rows] == [3 * SAMPLE_RATE] * 2
    assert all(row.wave_BS.all() for row in rows)


def test_a_joined_clip_that_is_longer_than_stated_takes_no_room_of_the_next() -> None:
    lengths_s = [6.0, 2.0, 2.0]
    clips = [clip(i, length_s, recording="r") for i, length_s in enumerate(lengths_s)]
    stated = clip_set([replace(clips[0], text="x " * 40, segments=()), *clips[1:]])
    longer = replace(stated, read=lambda index: wave_of(index, lengths_s[index] + 0.15))
    config = with_(data={"join_share": 1.0, "join_gap_s": 0.5})
    planned, rows = (rows_of(all_batches(feed_of([one], config))) for one in (stated, longer))
    assert [row.wave_BS.tolist() for row in rows] == [row.wave_BS.tolist() for row in planned]
    assert len(rows) == 2  # the short ones are joined


@pytest.mark.parametrize("field", ["stamp_share", "context_share"])
def test_shares_are_drawn_for_each_clip_and_epoch(field) -> None:
    config = with_(text={field: 0.4})
    feed = feed_of([clip_set(some_clips(300))], config)
    without = {
        index: len(build_example(tokenizer(), PromptStyle(), one.text).text_ids)
        for index, one in enumerate(feed.sets[0].clips)
    }
    drawn = []
    for epoch in range(2):
        rows = rows_of(all_batches(feed, epochs=epoch + 1, epoch=epoch))
        longer = {int(row.wave_BS[0]) - 1: row.text_lengths_B for row in rows}
        drawn.append({index for index, length in longer.items() if length > without[index]})
    assert len(drawn[0]) == pytest.approx(120, abs=35)
    assert len(drawn[0] & drawn[1]) == pytest.approx(48, abs=25)


def test_who_is_silent_writes_none() -> None:
    config = with_(text={"language_in_prompt": False})
    silent, arabic = clip(0, 1.0, text="", segments=()), clip(1, 3.0, language="Arabic")
    rows = rows_of(all_batches(feed_of([clip_set([silent, arabic])], config)))
    told = {
        tokenizer().decode(
            row.text_BX[: row.text_lengths_B][row.in_loss_BX[: row.text_lengths_B]].tolist()
        )
        for row in rows
    }
    assert told == {"language None<asr_text>", "language Arabic<asr_text>word1 end"}


def test_threads_change_nothing_and_epochs_follow_each_other() -> None:
    sets = [clip_set(some_clips(40)), clip_set(some_clips(9, seed=1), name="b")]
    config = with_(data={"join_share": 0.5}, augment={"speed_factors": (0.9, 1.0, 1.1)})
    whole = all_batches(feed_of(sets, config), epochs=3)
    assert {item[0] for item in whole} == {0, 1, 2}
    for threads in (1, 4):
        threaded = with_(config, data={"threads": threads})
        assert_same(all_batches(feed_of(sets, threaded), epochs=3), whole)


@settings(max_examples=10)
@given(st.data())
def test_a_stream_resumes_anywhere(data) -> None:
    feed = feed_of([clip_set(some_clips(30))])
    whole = all_batches(feed, epochs=2)
    start = data.draw(st.integers(0, len(whole) - 1))
    epoch, number = whole[start][:2]
    assert_same(all_batches(feed, epochs=2, epoch=epoch, batch=number), whole[start:])


def test_a_stream_at_its_end_and_between_epochs() -> None:
    feed = feed_of([clip_set(some_clips(30))])
    length = len(feed.plan(0))
    assert all_batches(feed, epochs=1, batch=length) == []
    assert all_batches(feed, epochs=2, epoch=2) == []
    assert_same(all_batches(feed, epochs=2, batch=length), all_batches(feed, epochs=2, epoch=1))


def test_hosts_read_only_their_rows_and_together_all() -> None:
    clips, read = some_clips(30), []
    base = clip_set(clips)
    counted = replace(base, read=lambda index: read.append(index) or base.read(index))
    feed = feed_of([counted])
    whole = all_batches(feed_of([base]))
    halves = [
        all_batches(feed, local_rows=lambda rows, h=host: slice(h * rows // 2, (h + 1) * rows // 2))
        for host in (0, 1)
    ]
    assert sorted(read) == list(range(30))
    joined = [
        (*a[:3], jax.tree.map(lambda x, y: np.concatenate([x, y]), a[3], b[3]))
        for a, b in zip(*halves, strict=True)
    ]
    assert_same(joined, whole)


def test_a_bad_clip_is_replaced_the_same_way_everywhere(tmp_path) -> None:
    clips = some_clips(40)
    clips[7] = replace(clips[7], segments=(Segment(0.0, 1.0, "other words"),))
    bad = {3: "damaged", 5: "damaged"}
    base = clip_set(clips, bad=bad)

    def read(index: int) -> np.ndarray:
        wave = base.read(index)
        return wave[: len(wave) // 2] if index == 9 else wave

    config = with_(text={"stamp_share": 1.0})
    runs, ledgers = [], []
    for threads in (0, 4):
        ledgers.append(Ledger(tmp_path / f"{threads}.jsonl"))
        threaded = with_(config, data={"threads": threads})
        runs.append(all_batches(feed_of([replace(base, read=read)], threaded, ledgers[-1])))
    assert_same(*runs)
    for ledger in ledgers:
        assert {(name, reason) for _, name, reason in ledger.seen} == {
            ("3", "damaged"),
            ("5", "damaged"),
            ("7", "text cannot be trained on"),
            ("9", "audio is not as long as stated"),
        }
    played = [int(row.wave_BS[0]) - 1 for row in rows_of(runs[0])]
    assert len(played) == 40
    assert set(played) == set(range(40)) - {3, 5, 7, 9}
    feed = feed_of([replace(base, read=read)], config, ledgers[0])
    good = feed_of([clip_set(some_clips(40))], config)
    for number in range(len(feed.plan(0))):
        ours, theirs = (
            load_batch(feed, feed.plan(0), number),
            load_batch(good, good.plan(0), number),
        )
        same = [row.clips[0] not in (3, 5, 7, 9) for row in feed.plan(0).batch(number)]
        rows = np.flatnonzero(same)
        np.testing.assert_array_equal(ours.wave_BS[rows], theirs.wave_BS[rows])


def test_joined_clips_do_without_a_bad_one() -> None:
    config = with_(data={"join_share": 1.0, "join_gap_s": 0.5})
    clips = [clip(0, 6.0, text="x" * 60)] + [clip(n, 1.0, recording="r") for n in (1, 2, 3)]
    rows = rows_of(all_batches(feed_of([clip_set(clips, bad={2: "damaged"})], config)))
    [row] = [row for row in rows if row.wave_BS[0] == 2]
    parts = [np.full(16_000, 2), np.zeros(8_000), np.full(16_000, 4)]
    assert row.wave_BS[: row.samples_B].tolist() == np.concatenate(parts).tolist()


@pytest.mark.parametrize("threads", [0, 3])
def test_too_many_bad_clips_stop_the_stream(tmp_path, threads) -> None:
    feed = feed_of(
        [clip_set(some_clips(40), bad=dict.fromkeys(range(20), "damaged"))],
        with_(data={"threads": threads}),
        Ledger(tmp_path / "q.jsonl", limit_share=0.05, total=40),
    )
    with pytest.raises(UserError, match="2 that may be"):
        all_batches(feed)
    feed = feed_of([clip_set(some_clips(3), bad=dict.fromkeys(range(3), "damaged"))])
    with pytest.raises(UserError, match="stand in"):
        all_batches(feed)


def test_a_stream_left_early_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    feed = feed_of([clip_set(some_clips(40))], with_(data={"threads": 4}))
    with stream(feed, epochs=10**6) as items:
        item = next(items)
        assert item.waited_s > 0
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
    assert set(threading.enumerate()) <= before


def test_an_interpreter_with_an_open_stream_exits() -> None:
    code = (
        "from tests.test_pipeline import *\n"
        "feed = feed_of([clip_set(some_clips(40))], with_(data={'threads': 2}))\n"
        "opened = stream(feed, epochs=10**6)\n"
        "next(opened.__enter__())\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_shapes_of_a_bucket() -> None:
    feed = feed_of([clip_set([clip(0, 3.0)])], with_(augment={"speed_factors": (0.5, 1.0)}))
    batch = pipeline.empty_batch(feed.buckets[-1], Augment(speed_factors=(0.5, 1.0)), 2)
    assert batch.wave_BS.shape == (2, 6 * SAMPLE_RATE)
    assert batch.text_BX.shape == batch.in_loss_BX.shape == (2, feed.buckets[-1].text_tokens)
