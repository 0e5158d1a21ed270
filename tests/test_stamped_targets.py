"""Targets with time stamps and prompts with previous text: drawn by clip, true to the sound.

On chanted Hebrew with a human's word times, and on made-up rows whose sound tells its clip.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from conftest import SHARED
from test_pipeline import (
    BASE,
    Ledger,
    all_batches,
    clip,
    clip_set,
    feed_of,
    rows_of,
    some_clips,
    tokenizer,
    wave_of,
    with_,
)

from configs.round2_5 import get_config as round2_5
from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import Batch, Clip, ClipSet
from hebasr_jax.data.draws import row_words
from hebasr_jax.data.pipeline import Feed, make_feed
from hebasr_jax.data.sources import open_source
from hebasr_jax.data.table import count_tokens
from hebasr_jax.run_config import Config, Source, Text
from hebasr_jax.text import (
    PromptStyle,
    TextTokenizer,
    Transcript,
    build_example,
    load_tokenizer,
    parse_output,
)
from hebasr_jax.timestamps import Segment, add_stamp_tokens
from hebasr_jax.tiny import write_byte_tokenizer
from hebasr_jax.validate import load_dev_sets

HALF_A_SLOT_S = 0.04 + 1e-6
CHANT = SHARED / "data" / "he_torah_chant"
READINGS = ("Vayeshev-1", "Vayeshev-2")


@dataclass(frozen=True)
class Told:
    """What one row of a batch says: its context, its prompt's mode, its target.

    letters: the target without stamps; as there is no space beside a stamp, none either.
    """

    context: str
    stamped: bool
    letters: str
    transcript: Transcript
    ids: tuple[int, ...]


def read(row: Batch, by: TextTokenizer) -> Told:
    """A row's tokens, after the mask was found to cover the target, all of it and nothing else."""
    ids = row.text_BX[: row.text_lengths_B].tolist()
    in_loss = row.in_loss_BX[: row.text_lengths_B].tolist()
    assert in_loss == sorted(in_loss)
    assert not row.in_loss_BX[row.text_lengths_B :].any()
    prompt, target = ids[: in_loss.index(True)], ids[in_loss.index(True) :]
    assert prompt[-2:].count(by.special.asr_text) == 1  # the prompt ends behind the language
    assert target[-1] == by.special.im_end
    stamps = by.stamps
    stamped = prompt[-1] == stamps.marker
    assert sum(token in stamps for token in prompt) == stamped
    assert any(token in stamps for token in target) == stamped
    assert stamps.marker not in target
    header = by.decode(ids[: row.audio_at_B])
    assert header.startswith("system\n")
    assert header.endswith("\nuser\n")
    return Told(
        context=header.removeprefix("system\n").removesuffix("\nuser\n"),
        stamped=stamped,
        letters=by.decode([token for token in target if token not in stamps]).replace(" ", ""),
        transcript=parse_output(by, PromptStyle(stamps=stamped), target),
        ids=tuple(ids),
    )


def assert_times(found: tuple[Segment, ...], human: list[tuple[str, float, float]]) -> None:
    """The same words, each time within half a slot of the human's, and in order."""
    assert [segment.text for segment in found] == [text for text, _, _ in human]
    times_s = [time_s for segment in found for time_s in (segment.start_s, segment.end_s)]
    wanted_s = [time_s for _, *times in human for time_s in times]
    np.testing.assert_allclose(times_s, wanted_s, rtol=0, atol=HALF_A_SLOT_S)
    assert times_s == sorted(times_s)


# --- chanted Hebrew ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> TextTokenizer:
    with TemporaryDirectory() as name:
        folder = Path(name) / "model"
        shutil.copytree(SHARED / "qwen3-asr-1.7b", folder, copy_function=shutil.copyfile)
        add_stamp_tokens(folder, vocab_size=151936)
        return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chant() -> dict[str, dict]:
    """Two readings by clip: the human's words and times, and what was read before."""
    lines = (CHANT / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if Path(row["source_path"]).stem in READINGS]
    rows.sort(key=lambda row: (row["source_path"], row["source_offset_s"]))
    before = [{"source_path": "", "text": ""}, *rows]
    return {
        row["id"]: row
        | {"context": last["text"] if last["source_path"] == row["source_path"] else ""}
        | {"times": list(pairwise([*row["word_starts"], row["duration_s"]]))}
        for last, row in zip(before, rows, strict=False)
    }


@pytest.fixture(scope="module")
def feed(chant, real, tmp_path_factory) -> Feed:
    """The chant's feed with Round 2.5's shares and speeds, each row one clip."""
    folder = tmp_path_factory.mktemp("chant")
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in chant.values():
            entry = {key: row[key] for key in ("id", "text", "duration_s", "context")}
            entry |= {"audio": str(CHANT / row["audio"]), "recording": row["source_path"]}
            entry["segments"] = [
                {"start_s": start_s, "end_s": end_s, "text": word}
                for word, (start_s, end_s) in zip(row["words"], row["times"], strict=True)
            ]
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    opened = open_source(Source("chant", str(folder / "train.jsonl")))
    assert not opened.bad
    return real_feed(opened, real, batch_clips=8)


def real_feed(opened: ClipSet, by: TextTokenizer, **data) -> Feed:
    config = with_(
        round2_5(),
        text={"wrong_context_share": 0.0},
        data={"join_share": 0.0, "buckets": 3, "threads": 0} | data,
    )
    ledger = Ledger(Path("/nowhere/quarantine.jsonl"), limit_share=0.0)
    return make_feed([opened], by, config, ledger)


def epoch_of(feed: Feed, epoch: int, **where) -> dict[str, tuple[Told, float]]:
    """What each clip's row says in an epoch that draws each clip once, and its speed."""
    (opened,) = feed.sets
    names = {
        row_words(feed.config.seed, epoch, f"{opened.name}/{one.id}").tobytes(): one.id
        for one in opened.clips
    }
    rows = rows_of(all_batches(feed, epochs=epoch + 1, epoch=epoch, **where))
    told = {
        names[row.seed_B2.tobytes()]: (read(row, feed.tokenizer), float(row.speed_B))
        for row in rows
    }
    assert len(told) == len(rows)
    return told


@pytest.fixture(scope="module")
def epochs(feed) -> list[dict[str, tuple[Told, float]]]:
    return [epoch_of(feed, epoch) for epoch in range(2)]


@pytest.mark.shared
def test_real_rows_hold_the_text_and_the_humans_times(epochs, chant) -> None:
    for told in epochs:
        assert told.keys() == chant.keys()
        assert {round(speed, 1) for _, speed in told.values()} == {0.9, 1.0, 1.1}
        for name, (row, speed) in told.items():
            words = chant[name]["words"]
            assert row.transcript.text == chant[name]["text"] == " ".join(words)
            assert row.letters == "".join(words)
            times = [(start_s / speed, end_s / speed) for start_s, end_s in chant[name]["times"]]
            spoken = zip(words, times, strict=True)
            human = [(word, *pair) for word, pair in spoken] if row.stamped else []
            assert_times(row.transcript.segments, human)


@pytest.mark.shared
def test_real_targets_are_written_as_they_are_read(epochs, real) -> None:
    """From the target's ids to segments and back to the very ids of the whole row."""
    for told in epochs:
        for row, _ in told.values():
            again = build_example(
                real,
                PromptStyle(stamps=row.stamped),
                row.transcript.text,
                segments=row.transcript.segments,
                context=row.context,
            )
            assert again.text_ids == row.ids


@pytest.mark.shared
def test_real_rows_are_drawn_at_the_shares_and_anew_each_epoch(epochs, chant, feed) -> None:
    assert (feed.config.text.stamp_share, feed.config.text.context_share) == (0.4, 0.5)
    assert sum(not row["context"] for row in chant.values()) == len(READINGS)
    able = {name for name, row in chant.items() if row["context"]}
    for what, share, among in (("stamped", 0.4, chant.keys()), ("context", 0.5, able)):
        drawn = [{name for name, (row, _) in told.items() if getattr(row, what)} for told in epochs]
        assert all(names <= among for names in drawn)
        rows, share = len(among), share * len(chant) / len(among)  # the target is of all rows
        four_sigma = 4 * (rows * share * (1 - share)) ** 0.5
        assert [len(names) for names in drawn] == [pytest.approx(rows * share, abs=four_sigma)] * 2
        both = share**2
        four_sigma = 4 * (rows * both * (1 - both)) ** 0.5
        assert len(drawn[0] & drawn[1]) == pytest.approx(rows * both, abs=four_sigma)
    for told in epochs:
        assert all(row.context in ("", chant[name]["context"]) for name, (row, _) in told.items())


@pytest.mark.shared
def test_a_real_row_is_the_same_in_another_batch_and_on_another_host(epochs, feed) -> None:
    other = real_feed(feed.sets[0], feed.tokenizer, batch_clips=6, buckets=2)
    hosts = [
        epoch_of(
            other, 0, local_rows=lambda rows, h=host: slice(h * rows // 2, rows * (h + 1) // 2)
        )
        for host in (0, 1)
    ]
    assert hosts[0].keys().isdisjoint(hosts[1])
    assert hosts[0] | hosts[1] == epochs[0]


# --- made-up rows --------------------------------------------------------------------------


def told_rows(clips: list[Clip], config: Config, bad=None) -> list[tuple[Batch, Told]]:
    """The rows of one epoch; none but the `bad` clips is refused."""
    ledger = Ledger(Path("/nowhere/quarantine.jsonl"))
    ledger.add = lambda name, clip_id, *_: refused.append(clip_id)
    refused: list[str] = []
    rows = rows_of(all_batches(feed_of([clip_set(clips, bad=bad)], config, ledger)))
    assert set(refused) == {clips[index].id for index in bad or {}}
    return [(row, read(row, tokenizer())) for row in rows]


def heard(row: Batch) -> list[int]:
    """The clips that a row plays, in order."""
    sound = row.wave_BS[row.wave_BS > 0]
    return (sound[np.diff(sound, prepend=0) != 0] - 1).tolist()


def test_stamps_of_joined_rows_are_where_the_sound_is_at_any_speed() -> None:
    """A row with a clip without segments has none; the context is that of the first sound."""
    clips = [replace(one, recording=f"r{n // 12}") for n, one in enumerate(some_clips(96))]
    clips = [replace(one, segments=()) if n % 12 == 5 else one for n, one in enumerate(clips)]
    long = "x " * 100  # makes room for a row of several clips
    clips.append(clip(96, 20.0, text=long.strip(), segments=(Segment(0.0, 20.0, long),)))
    config = with_(
        data={"join_share": 1.0, "join_gap_s": 0.5},
        augment={"speed_factors": (0.9, 1.0, 1.1)},
        text={"stamp_share": 0.2, "context_share": 0.5},
    )
    seen = Counter()
    for row, told in told_rows(clips, config):
        played = heard(row)
        able = all(clips[index].segments for index in played)
        seen[able, told.stamped, len(played) > 1, bool(told.context)] += 1
        assert told.transcript.text == " ".join(clips[index].text for index in played)
        assert told.context in ("", clips[played[0]].context)
        assert able or not told.stamped
        human = []
        for index in played if told.stamped else ():
            start_s = int(np.flatnonzero(row.wave_BS == index + 1)[0]) / SAMPLE_RATE
            human += [
                (
                    part.text.strip(),
                    *((start_s + t) / row.speed_B for t in (part.start_s, part.end_s)),
                )
                for part in clips[index].segments
            ]
        assert_times(told.transcript.segments, human)
    assert {(True, True, True), (True, False, True), (False, False, True)} <= {k[:3] for k in seen}
    assert {True, False} == {key[3] for key in seen if key[2]}


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_no_stamp_lies_behind_the_end_of_the_sound(speed) -> None:
    """Of the last words, when sound is shorter than stated, or longer and cut."""
    stated = [clip(0, 2.95), clip(1, 3.0)]
    config = with_(augment={"speed_factors": (speed,)}, text={"stamp_share": 1.0})
    for length_s in (2.9, 3.1):
        stretched = [replace(one, segments=(Segment(0.0, 3.1, one.text),)) for one in stated]
        opened = replace(clip_set(stretched), read=lambda index, s=length_s: wave_of(index, s))
        for row in rows_of(all_batches(feed_of([opened], config))):
            end_s = float(row.samples_B) / SAMPLE_RATE / speed
            (segment,) = read(row, tokenizer()).transcript.segments
            wanted_s = min(3.1 / speed, end_s)
            assert segment.end_s == pytest.approx(wanted_s, abs=HALF_A_SLOT_S)


def test_a_row_too_long_for_stamps_is_trained_without() -> None:
    """120.96 s is the last stamp; at 0.9 a row of 115 s ends later, at 1.1 one of 125 s does not,
    but its own times do."""
    clips = [clip(0, 100.0), clip(1, 115.0), clip(2, 125.0)]
    stamped = {}
    for speed in (0.9, 1.0, 1.1):
        config = with_(
            data={"max_clip_s": 200.0},
            augment={"speed_factors": (speed,)},
            text={"stamp_share": 1.0},
        )
        rows = told_rows(clips, config)
        stamped[speed] = {heard(row)[0] for row, told in rows if told.stamped}
        assert {heard(row)[0] for row, _ in rows} == {0, 1, 2}
    assert stamped == {0.9: {0}, 1.0: {0, 1}, 1.1: {0, 1}}


@pytest.mark.parametrize("in_prompt", [True, False])
def test_the_mode_is_that_of_the_final_text(in_prompt) -> None:
    """Who is silent has nothing to stamp, takes no stamps from others, and names no language."""
    silent = clip(0, 1.0, text="", segments=(), recording="r")
    clips = [clip(2, 6.0), silent, replace(clip(1, 1.0), id="1", recording="r")]
    clips[0] = replace(clips[0], text="x " * 40, segments=(Segment(0.0, 6.0, "x " * 40),))
    config = with_(
        data={"join_share": 1.0},
        text={"stamp_share": 1.0, "language_in_prompt": in_prompt, "context_share": 1.0},
    )
    marker = tokenizer().stamps.marker
    for bad, wanted in (({}, "Hebrew"), ({2: "damaged"}, None)):
        rows = rows_of(all_batches(feed_of([clip_set(clips, bad=bad)], config)))
        [row] = [row for row in rows if row.wave_BS[0] == 2]
        ids, in_loss = row.text_BX[: row.text_lengths_B], row.in_loss_BX[: row.text_lengths_B]
        style = PromptStyle("Hebrew" if in_prompt else None, in_prompt, stamps=True)
        told = parse_output(tokenizer(), style, ids[in_loss].tolist())
        assert (marker in ids) == bool(told.segments) == (not bad)
        assert told.text == ("" if bad else "word1 end")
        assert told.language == ("Hebrew" if in_prompt else wanted)


def test_evaluation_has_neither() -> None:
    text = Text(stamp_share=1.0, context_share=1.0, wrong_context_share=0.5)
    ledger = Ledger(Path("/nowhere/quarantine.jsonl"))
    clips = some_clips(9)
    config = replace(BASE, text=text)
    [dev] = load_dev_sets([clip_set(clips)], tokenizer(), config, ledger, 1)
    rows = rows_of([(batch,) for _, batch, _ in dev.batches])
    told = {heard(row)[0]: read(row, tokenizer()) for row in rows}
    assert told.keys() == set(range(9))
    for index, row in told.items():
        said = (row.transcript.text, row.stamped, row.context)
        assert said == (clips[index].text, False, "")


@cache
def longer_without_a_space() -> TextTokenizer:
    """As Qwen's of many words, this tokenizer has " ab" in one piece, and "ab" in two."""
    with TemporaryDirectory() as name:
        write_byte_tokenizer(Path(name), (("Ġ", "a"), ("Ġa", "b")))
        add_stamp_tokens(Path(name), vocab_size=512)
        return load_tokenizer(Path(name))


@pytest.mark.parametrize("stamps", [False, True])
def test_the_plan_has_room_for_words_behind_a_silent_clip(stamps) -> None:
    by = longer_without_a_space()
    spoken = Clip("1", "ab", 1.0, segments=(Segment(0.0, 1.0, "ab"),))
    config = Text(stamp_share=0.5 * stamps)
    alone, added = count_tokens([Clip("0", "", 1.0), spoken], by, config, joined=True)
    style = PromptStyle(stamps=stamps)
    ids = build_example(by, style, "ab", segments=spoken.segments).text_ids
    assert len(ids) <= alone[0] + added[1]
