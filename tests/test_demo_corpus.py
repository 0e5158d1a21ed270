"""The demo's corpus: what is held out, times and traits that can be heard, a seed's bytes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer

from hebasr_jax import demo_corpus
from hebasr_jax.audio import SAMPLE_RATE, read_audio
from hebasr_jax.data import espeak
from hebasr_jax.data.espeak import VARIANTS
from hebasr_jax.demo_corpus import (
    WORDS,
    Speaker,
    Utterance,
    draw_utterances,
    learn_merges,
    make_corpus,
    phrases,
)
from hebasr_jax.errors import UserError
from hebasr_jax.tiny import write_byte_tokenizer

SPLITS = ("train", "dev", "test")
CLIPS = (24, 6, 8)
KINDS = ("espeak", "tones")
PHRASE = ("שוטר", "שמח", "צוחק")


@pytest.fixture(scope="module", params=KINDS)
def corpus(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / request.param
    return request.param, folder, make_corpus(folder, 3, kind=request.param, clips=CLIPS)


@pytest.fixture(scope="module", params=KINDS)
def sound_of(request):
    """From a speaker to the same phrase in that speaker's way."""
    make = {
        "espeak": lambda utterance: next(iter(demo_corpus._speak([utterance]))),
        "tones": demo_corpus._play,
    }[request.param]
    plain = Speaker("someone", "m1", rate=1.0, pitch=1.0, tract=1.0)

    def sound(words=PHRASE, **traits):
        return make(Utterance("id", words, dataclasses.replace(plain, **traits), seed=5))

    return sound


@pytest.mark.parametrize("seed", range(5))
def test_speakers_and_phrases_are_held_out_and_every_word_is_taught(seed) -> None:
    plan = draw_utterances(seed, (4000, 96, 240))
    assert [len(plan[split]) for split in SPLITS] == [4000, 96, 240]
    for kind in (lambda u: u.speaker.name, lambda u: u.speaker.voice, lambda u: u.words):
        train, dev, test = ({kind(utterance) for utterance in plan[split]} for split in SPLITS)
        assert len(train | dev | test) == len(train) + len(dev) + len(test)
        assert len(test) >= 6
    taught = {utterance.words for utterance in plan["train"]}
    assert taught >= {(word,) for word in WORDS}  # alone too, and only sequences are held out
    assert {len(words) for words in taught} == {1, 2, 3}
    assert {len(utterance.words) for utterance in plan["test"]} == {2, 3}
    assert len({utterance.id for split in SPLITS for utterance in plan[split]}) == 4336


def test_the_seed_draws_the_plan() -> None:
    assert draw_utterances(1, CLIPS) == draw_utterances(1, CLIPS)
    assert draw_utterances(1, CLIPS) != draw_utterances(2, CLIPS)


def test_phrases_are_distinct_and_made_of_the_words() -> None:
    every = [phrase for group in phrases() for phrase in group]
    assert len(set(every)) == len(every)
    assert {word for phrase in every for word in phrase} == set(WORDS)
    assert len(set(WORDS.values())) == len(WORDS)  # no two words sound alike
    assert all(phonemes.count("'") == 1 for phonemes in WORDS.values())


def test_manifests_say_what_the_files_hold(corpus) -> None:
    _, folder, rows = corpus
    for split, count in zip(SPLITS, CLIPS, strict=True):
        lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows[split]
        for row in rows[split][:count]:
            info = soundfile.info(folder / row["audio"])
            assert (info.samplerate, info.channels) == (SAMPLE_RATE, 1)
            assert row["duration_s"] == info.frames / SAMPLE_RATE
            assert 0.2 < row["duration_s"] < 2.6
            spoken = row["segments"]
            assert " ".join(segment["text"] for segment in spoken) == row["text"]
            times = [segment[end] for segment in spoken for end in ("start_s", "end_s")]
            assert times == sorted(times)
            assert times[-1] <= row["duration_s"] + 5e-4


def test_the_first_word_starts_where_its_segment_says(corpus) -> None:
    """Before it is faint noise, in its first 200 ms is speech."""
    _, folder, rows = corpus
    for row in rows["train"][:-1]:
        wave = read_audio(folder / row["audio"], max_seconds=5.0)
        start = round(row["segments"][0]["start_s"] * SAMPLE_RATE)
        before, after = wave[: start - 8], wave[start : start + SAMPLE_RATE // 5]
        assert after.std() > 2 * before.std(), row["id"]


def test_a_word_starts_where_those_before_it_end(sound_of) -> None:
    _, starts_s = sound_of()
    for index in (1, 2):
        before, _ = sound_of(words=PHRASE[:index])
        assert starts_s[index] == pytest.approx(len(before) / SAMPLE_RATE, abs=0.16)
    assert starts_s[0] == 0
    assert np.all(np.diff(starts_s) > 0.2)


def test_one_file_is_broken_and_no_other(corpus) -> None:
    _, folder, rows = corpus
    assert len(rows["train"]) == CLIPS[0] + 1
    *whole, broken = rows["train"]
    with pytest.raises(UserError):
        read_audio(folder / broken["audio"], max_seconds=5.0)
    for row in [*whole, *rows["dev"], *rows["test"]]:
        assert len(read_audio(folder / row["audio"], max_seconds=5.0)) > 0


def test_the_same_seed_gives_the_same_bytes(corpus, tmp_path) -> None:
    kind, folder, rows = corpus
    assert make_corpus(tmp_path / "again", 3, kind=kind, clips=CLIPS) == rows
    names = sorted(path.name for path in (folder / "clips").iterdir())
    assert len(names) == sum(CLIPS) + 1
    for name in names:
        again = (tmp_path / "again" / "clips" / name).read_bytes()
        assert (folder / "clips" / name).read_bytes() == again


def test_each_trait_of_a_speaker_is_heard(sound_of) -> None:
    plain, _ = sound_of()
    fast, _ = sound_of(rate=1.25)
    assert 0.7 < len(fast) / len(plain) < 0.9
    small, _ = sound_of(tract=1.12)
    assert 1.06 < _centroid_hz(small) / _centroid_hz(plain) < 1.18
    high, _ = sound_of(pitch=1.5)
    assert _pulse_hz(high) / _pulse_hz(plain) > 1.08


def test_espeak_takes_the_speakers_voice() -> None:
    """eSpeak itself says nothing of an unknown variant: it speaks in the plain voice."""
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    assert {path.name for path in variants.iterdir()} >= set(VARIANTS)

    def hertz(voice: str) -> float:
        speaker = Speaker("x", voice, rate=1.0, pitch=1.0, tract=1.0)
        return _pulse_hz(next(iter(demo_corpus._speak([Utterance("id", PHRASE, speaker, 5)])))[0])

    assert hertz("f5") > 1.2 * hertz("m1")


def test_espeak_is_used_again_in_a_process() -> None:
    """Its old tables are unmapped, and the new ones elsewhere: a voice of old tables crashes."""
    code = "import espeak, mmap; say = [espeak.Saying('[[Sal\\'om]]', 'he+m1', 170, 50, 5, True)]\n"
    code += "rooms = [mmap.mmap(-1, 1 << 20) for _ in range(4)]\n"
    code += "for room in rooms: print(len(next(espeak.say(say)).pcm)); room.close()"
    environment = os.environ | {"PYTHONPATH": str(Path(espeak.__file__).parent)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "16384"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert min(map(int, ran.stdout.split())) > 2 * 5000


def test_espeak_asked_for_but_missing(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo_corpus.best_kind() == "tones"
    with pytest.raises(UserError, match="eSpeak NG is not installed"):
        make_corpus(tmp_path / "none", 0, kind="espeak", clips=CLIPS)
    assert not (tmp_path / "none").exists()


def test_merges_make_every_word_one_token(tmp_path) -> None:
    texts = [" ".join(u.words) for u in draw_utterances(0, (2000, 1, 1))["train"]]
    merges = learn_merges(texts, 190)
    assert merges == learn_merges(texts, 190)
    assert learn_merges(texts, 20) == merges[:20]
    write_byte_tokenizer(tmp_path, merges)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "שוטר שמח צוחק"
    assert len(tokenizer.encode(text).ids) == 3
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def _centroid_hz(wave: np.ndarray) -> float:
    power = np.abs(np.fft.rfft(wave.astype(np.float64))) ** 2
    return float((power * np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)).sum() / power.sum())


def _pulse_hz(wave: np.ndarray) -> float:
    """The strongest rate, from 60 to 400 Hz, at which the sound's energy goes up and down."""
    envelope = wave.astype(np.float64) ** 2
    power = np.abs(np.fft.rfft(envelope * np.hanning(len(envelope)))) ** 2
    hertz = np.fft.rfftfreq(len(envelope), 1 / SAMPLE_RATE)
    inside = (hertz > 60) & (hertz < 400)
    return float((power * hertz)[inside].sum() / power[inside].sum())
