"""Contamination: copies are found whatever was done to them, and what is no copy is not."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.clips import BadClip, Clip, ClipSet
from hebasr_jax.data.fingerprint import (
    HOP,
    MIN_SHARE,
    Fingerprint,
    build_index,
    find_copies,
    fingerprint,
)
from hebasr_jax.data.sources import open_source
from hebasr_jax.overlap import check_overlap, describe_overlap, trained_on, write_overlap
from hebasr_jax.run_config import Source
from tests.conftest import SHARED
from tests.fingerprint_tables import ALTERATIONS, add_noise, cut, found, gain

LONG_TEXT = "בבוקר יצאנו מן הבית והלכנו לאורך הנחל עד שהגענו אל הגשר הישן שמעבר לשדה"
PROMISED = [name for name in ALTERATIONS if name not in ("Opus, 16 kbit/s", "noise at 10 dB")]


def speech(seconds: float, seed: int) -> np.ndarray:
    """Like speech: a gliding pitch with harmonics under moving formants, syllables and pauses."""
    rng = np.random.default_rng(seed)
    time_S = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    frame_T = np.arange(0, seconds + 0.02, 0.01)

    def curve(low: float, high: float, every_s: float) -> np.ndarray:
        at = np.arange(0, seconds + 2 * every_s, every_s)
        return np.interp(frame_T, at, rng.uniform(low, high, len(at)))

    pitch_T, loud_T = curve(90, 220, 0.3), np.clip(curve(-0.3, 1, 0.1), 0.001, None)
    formants = [curve(300, 800, 0.12), curve(900, 2200, 0.12), curve(2300, 3300, 0.12)]
    phase_S = 2 * np.pi * np.cumsum(np.interp(time_S, frame_T, pitch_T)) / SAMPLE_RATE
    wave_S = rng.normal(scale=0.002, size=len(time_S))
    for k in range(1, 25):
        level_T = sum(np.exp(-(((k * pitch_T - formant) / 150) ** 2)) for formant in formants)
        wave_S += np.interp(time_S, frame_T, loud_T * level_T) * np.sin(k * phase_S)
    return np.rint(8000 * wave_S / np.abs(wave_S).max()).astype(np.int16)


def clip_set(name: str, rows: Sequence[tuple[Clip, np.ndarray | BadClip]]) -> ClipSet:
    def read(number: int) -> np.ndarray:
        wave = rows[number][1]
        if isinstance(wave, BadClip):
            raise wave
        return wave

    return ClipSet(name, tuple(clip for clip, _ in rows), read, fingerprint="")


def clip(name: str, text: str = "", **fields) -> tuple[Clip, np.ndarray]:
    """A clip with a sound that no other name has."""
    return Clip(name, text, 3.0, **fields), speech(3.0, seed=sum(name.encode()))


def one_test(train, tests, **options) -> dict:
    return check_overlap(clip_set("train", train), [clip_set("t", tests)], **options)["tests"]["t"]


def kinds(found: dict) -> dict[str, int]:
    names = ("id", "recording", "text", "phrase", "short_text", "audio")
    return {name: found[name]["clips"] for name in names if found[name]["clips"]}


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    return speech(60.0, seed=1)


@pytest.mark.parametrize("alteration", PROMISED)
@pytest.mark.parametrize("length_s", [1.5, 5.0])
def test_an_altered_piece_is_found_in_its_recording(recording, alteration, length_s) -> None:
    pieces = cut(recording, length_s, 5, seed=0)
    lost = 1 if alteration == "noise at 20 dB" else 0  # a piece may be mostly pause
    assert (
        sum(found(build_index([fingerprint(recording)]), pieces, ALTERATIONS[alteration]))
        >= len(pieces) - lost
    )


@pytest.mark.parametrize("start_s", [20.0, 20.7, 21.4, 22.1])
def test_two_seconds_in_common_are_enough(recording, start_s) -> None:
    """Whichever part of a longer clip they are."""
    common = recording[round(start_s * SAMPLE_RATE) :][: 2 * SAMPLE_RATE]
    one, other = (np.concatenate([speech(7, s), common, speech(6, s + 1)]) for s in (50, 60))
    (match,) = find_copies(build_index([fingerprint(one)]), fingerprint(other))
    assert match.start_s < 7.1
    assert match.end_s > 8.9


def test_the_score_is_the_share_of_equal_bits_and_the_least_share_is_kept(recording) -> None:
    piece = recording[160_000:240_000]
    index = build_index([fingerprint(recording)])
    scores = [
        max([match.score for match in find_copies(index, fingerprint(wave), 0.6)], default=0.0)
        for wave in (piece, *(add_noise(piece, snr_db) for snr_db in range(25, -6, -2)))
    ]
    assert scores[0] == 1.0
    assert scores == sorted(scores, reverse=True)
    between = next(n for n, score in enumerate(scores) if score < MIN_SHARE)
    assert scores[between] > 0.6
    noisy = add_noise(piece, range(25, -6, -2)[between - 1])
    assert find_copies(index, fingerprint(noisy)) == []


@pytest.mark.parametrize(("frames", "is_copy"), [(192, True), (80, True), (40, False)])
def test_less_sound_must_agree_better(frames, is_copy) -> None:
    """78 % of equal bits are enough in 3 s, and not in half a second."""
    rng = np.random.default_rng(0)
    wrong = np.packbits(rng.random((frames, 32)) < 0.22, axis=1).view(np.uint32)[:, 0]
    wrong[frames // 2] = 0  # the word that proposes
    bits = rng.integers(1 << 32, size=frames, dtype=np.uint32)
    one, other = (Fingerprint(part, np.ones(frames, bool)) for part in (bits, bits ^ wrong))
    assert bool(find_copies(build_index([one]), other)) == is_copy


def test_times_of_a_piece_in_both_sounds(recording) -> None:
    """30 to 36 s of the recording stand at 4 s of other sound: the match is that piece."""
    other = np.concatenate([speech(4, 2), recording[480_000:576_000], speech(5, 3)])
    (match,) = find_copies(build_index([fingerprint(recording)]), fingerprint(other))
    assert match.clip == 0
    assert match.score > 0.9
    assert (match.start_s, match.end_s) == pytest.approx((30, 36), abs=1.6)  # half of what decides
    shift_s = match.start_s - match.other_start_s, match.end_s - match.other_end_s
    assert shift_s == pytest.approx((26, 26), abs=HOP / SAMPLE_RATE)


def test_the_index_may_hold_the_shorter_or_the_longer(recording) -> None:
    short, whole = fingerprint(recording[160_000:200_000]), fingerprint(recording)
    (one,) = find_copies(build_index([fingerprint(speech(3, 4)), short]), whole)
    (other,) = find_copies(build_index([whole]), short)
    assert one.clip == 1
    assert (one.other_start_s, one.start_s) == pytest.approx((10, 0), abs=0.02)
    assert (other.start_s, other.other_start_s) == pytest.approx((10, 0), abs=0.02)


def test_blocks_do_not_show(recording) -> None:
    """The bits of a frame are those of its samples alone, wherever the sound begins."""
    later = fingerprint(recording[HOP * 1000 :])
    whole = fingerprint(recording)
    assert len(whole.bits_T) > 3000
    same_T = whole.bits_T[1000:] == later.bits_T
    assert same_T[later.loud_T & whole.loud_T[1000:]].mean() > 0.999  # sums round


def test_other_sound_silence_hum_and_nothing_are_no_copies(recording) -> None:
    hum = np.rint(3000 * np.sin(2 * np.pi * 1000 * np.arange(64_000) / SAMPLE_RATE))
    waves = [recording, np.zeros(64_000), hum, np.zeros(0), np.zeros(2000)]
    waves += [speech(4, seed) for seed in range(10, 25)]
    prints = [fingerprint(wave.astype(np.int16)) for wave in waves]
    assert [part.too_short for part in prints[:5]] == [False, True, False, True, True]
    for number, part in enumerate(prints):
        others = prints[:number] + prints[number + 1 :]
        assert find_copies(build_index(others), part) == []


def test_names_count_where_they_name_something() -> None:
    train = [clip(name, recording=f"r{name}") for name in ("a1", "17", "x.parquet#3", "007.wav")]
    tests = [
        (replace(row, recording=""), speech(3.0, 90 + number))
        for number, (row, _) in enumerate(train)
    ]
    tests.append((Clip("new", "", 3.0, recording="r17"), speech(3.0, 99)))
    result = check_overlap(clip_set("train", train), [clip_set("t", tests)])
    assert kinds(result["tests"]["t"]) == {"id": 1, "recording": 1}
    assert result["tests"]["t"]["id"]["examples"][0]["test"] == "a1"
    assert result["tests"]["t"]["recording"]["examples"] == [
        {"test": "new", "train": "17", "name": "r17"}
    ]
    assert result["train"]["overlapping"] == ["a1", "17"]


def test_texts() -> None:
    words = LONG_TEXT.split()
    given = {
        "תודה רבה לכם": "short_text",
        "אני לא יודע מה לומר": "text",
        LONG_TEXT.replace(" ", " – ", 1) + "!": "text",
        " ".join(words[:8]): "text",
        " ".join(words[:8] + [f"מילה{i}" for i in range(20)]): "phrase",
        " ".join(words[:7]): None,
        "": None,
    }
    train = [
        clip("w", LONG_TEXT),
        clip("x", "תודה רבה, לכם"),
        clip("y", "אני לא יודע מה לומר."),
        clip("z"),
    ]
    for number, (text, kind) in enumerate(given.items()):
        assert kinds(one_test(train, [clip(f"t{number}", text)])) == ({kind: 1} if kind else {}), (
            text
        )


def test_a_long_text_is_pieced_together_of_many_training_clips() -> None:
    words = [f"מילה{chr(0x5D0 + i // 20)}{chr(0x5D0 + i % 20)}" for i in range(200)]
    pieces = [clip(f"p{i}", " ".join(words[i : i + 20])) for i in range(0, 100, 20)]
    (told,) = one_test(pieces, [clip("whole", " ".join(words))])["text"]["examples"]
    assert (told["score"], told["train_clips"]) == (0.5, 5)
    assert kinds(one_test(pieces[1:], [clip("whole", " ".join(words))])) == {"phrase": 1}


def test_sound_with_other_names_and_texts(recording, tmp_path) -> None:
    broken = BadClip("is cut or damaged", "far away")
    train = [
        (Clip("hour", "", 60.0), gain(add_noise(recording, 25), -6)),
        (Clip("bad", "", 3.0), broken),
        (Clip("blip", "", 0.1), speech(0.1, 5)),
        clip("else"),
    ]
    tests = [
        (Clip("copy", "", 4.0), recording[800_000:864_000]),
        (Clip("gone", "", 3.0), broken),
        clip("clean"),
    ]
    calls: list[tuple[int, int]] = []
    sets = [clip_set("one", tests), clip_set("two", [clip("other"), clip("blip", "")])]
    result = check_overlap(
        replace(clip_set("train", train), bad=(("m:7", broken),)),
        sets,
        progress=lambda done, total: calls.append((done, total)),
    )
    one = result["tests"]["one"]
    assert kinds(one) == {"audio": 1}
    (told,) = one["audio"]["examples"]
    assert (told["test"], told["train"], told["train_clips"]) == ("copy", "hour", 1)
    assert told["test_s"] == pytest.approx([0, 4], abs=0.1)
    assert told["train_s"] == pytest.approx([50, 54], abs=0.1)
    assert kinds(result["tests"]["two"]) == {"id": 1}
    assert one["unreadable"]["examples"] == [{"id": "gone", "why": str(broken)}]
    assert [row["id"] for row in result["train"]["unreadable"]["examples"]] == ["m:7", "bad"]
    assert (result["train"]["too_short"], result["train"]["overlapping"]) == (1, ["hour", "blip"])
    assert calls == [(done, 9) for done in range(1, 10)]
    assert json.loads(write_overlap(tmp_path / "new", result).read_text("utf-8")) == result
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["overlap.json"]
    assert describe_overlap(result) == [
        "train: 2 of 4 training clips overlap a test set; 2 unreadable, first m:7; "
        "1 too short for a fingerprint",
        "one: 1 of 3 clips overlap (audio 1); 1 unreadable, first gone",
        "two: 1 of 2 clips overlap (id 1)",
    ]


def test_dev_clips_and_recordings_that_are_trained_on_are_told_by_name() -> None:
    def named(name: str, *clips: Clip) -> ClipSet:
        return ClipSet(name, clips, lambda number: np.zeros(1, np.int16), "")

    train = named(
        "train",
        Clip("a", "א", 1.0, recording="1", source="show"),
        Clip("7", "ב", 1.0, recording="2"),
        Clip("c", "ג", 1.0, source="talk"),
    )
    other = named("same names", Clip("7", "ד", 1.0, recording="2"), Clip("a", "א", 1.001))
    same = named("same", Clip("a", "א.", 1.0), Clip("7", "ב", 1.0))
    stitched = named("long", Clip("talk/0", "ג", 9.0, recording="talk", source="talk"))
    pointed = named("pointed", Clip("7", "בּ", 1.0))
    speaker = named("speaker", Clip("x/0", "ג", 9.0, recording="x", source="talk"))
    apart = named("apart", Clip("e", "א", 1.0, recording="1", source="quiz", speaker="talk"))
    lines = trained_on([train], [other, same, stitched, apart, pointed, speaker])
    assert [line.split(";")[0] for line in lines] == [
        "same: of its 2 clips some are trained on: 2 in train",
        "long: of its 1 recordings some are trained on: 1 in train",
        "pointed: of its 1 clips some are trained on: 1 in train",
    ]


def test_examples_are_the_best_and_no_more_than_asked() -> None:
    rows = [clip(f"c{number}", LONG_TEXT) for number in range(5)]
    noisy = [(row, add_noise(wave, 20 + 5 * n)) for n, (row, wave) in enumerate(rows)]
    found = one_test(noisy, rows, examples=2)
    assert kinds(found) == {"id": 5, "text": 5, "audio": 5}
    assert found["overlapping"] == 5
    assert [row["test"] for row in found["audio"]["examples"]] == ["c4", "c3"]
    assert len(found["id"]["examples"]) == len(found["text"]["examples"]) == 2


@cache
def real(name: str, split: str) -> ClipSet:
    """The first 60 clips of a split."""
    path = SHARED / "data" / name / "manifest.jsonl"
    opened = open_source(Source(f"{name}-{split}", str(path), split=split))
    return replace(opened, clips=opened.clips[:60])


@pytest.mark.shared
@pytest.mark.parametrize("name", ["he_torah_chant", "he_synth_espeak"])
@pytest.mark.parametrize("alteration", PROMISED)
def test_real_speech_altered_is_found(name, alteration) -> None:
    clips = real(name, "dev")
    recording = np.concatenate([clips.read(i) for i in range(20)])
    pieces = cut(recording, 2.0, 8, seed=0)
    assert (
        sum(found(build_index([fingerprint(recording)]), pieces, ALTERATIONS[alteration]))
        >= len(pieces) - 1
    )


@pytest.mark.shared
def test_real_sets_are_clean_of_each_other() -> None:
    """One reader's tunes against another's, a machine's other voices, words and digits said twice.

    The digits are below what a fingerprint needs: they are counted, not passed over.
    """
    chant, synthetic = (real(name, "dev") for name in ("he_torah_chant", "he_synth_espeak"))
    train = clip_set(
        "train", [(a.clips[i], a.read(i)) for a in (chant, synthetic) for i in range(len(a.clips))]
    )
    tests = [real(name, "test") for name in ("he_torah_chant", "he_synth_espeak", "fsdd")]
    result = check_overlap(train, tests)
    for told in result["tests"].values():
        assert told["audio"] == {"clips": 0, "examples": []}
    assert result["tests"]["fsdd-test"]["too_short"] > 30
