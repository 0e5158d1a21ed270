"""A small synthetic Hebrew corpus of our own words: spoken by eSpeak NG, or as tones and noise.

Speakers and phrases of dev and test are never in training. The split, the phrases and the tones
follow from the seed alone; eSpeak's samples are the same on one machine and nearly so elsewhere.
"""

import importlib.util
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.data.espeak import VARIANTS, Saying, say
from hebasr_jax.errors import UserError

Kind = Literal["espeak", "tones"]
Row = dict[str, Any]  # one line of a manifest, design.md 4.7
Sound = tuple[np.ndarray, list[float]]  # samples at 16 kHz, and the second where each word starts


def _lexicon(listing: str) -> dict[str, str]:
    """Spelling to eSpeak phonemes; ' stands before a stressed vowel."""
    fields = listing.split()
    return dict(zip(fields[::2], fields[1::2], strict=True))


# All masculine singular, so that any may follow any.
NOUNS = _lexicon("""
    ילד j'eled  חתול Xat'ul  סוס s'us  דוב d'ov  איש ?'iS  מורה moR'e  שוטר Sot'eR  אריה aRj'e
    נהג nah'ag""")
ADJECTIVES = _lexicon("""
    גדול gad'ol  קטן kat'an  טוב t'ov  זקן zak'en  צעיר tsa'iR  יפה jaf'e  שמח sam'eaX
    חזק Xaz'ak""")
VERBS = _lexicon("""
    הולך hol'eX  רץ R'ats  אוכל oX'el  ישן jaS'en  כותב kot'ev  קורא koR'e  צוחק tsoX'ek
    יושב joS'ev""")
ADVERBS = _lexicon("""
    היום haj'om  עכשיו aXS'av  בבית bab'ajit  כאן k'an  תמיד tam'id  בחוץ baX'uts""")
WORDS = NOUNS | ADJECTIVES | VERBS | ADVERBS

_SPLITS = ("train", "dev", "test")
_VOICE_SHARES = (0.74, 0.09, 0.17)
_PHRASE_SHARES = (0.8, 0.05, 0.15)
_SPEAKERS_OF_A_VOICE = 6
# Phrases of 1, 2 and 3 words in each split: words alone are all taught, sequences are held out.
_LENGTH_SHARES = ((0.2, 0.35, 0.45), (0, 0.45, 0.55), (0, 0.45, 0.55))

# Letters as they sound alone; each is a low and a high tone, and every third one is noisy.
_LETTERS = "אבגדהוזחטיכלמנסעפצקרשת"
_FINALS = str.maketrans("ךםןףץ", "כמנפצ")


@dataclass(frozen=True)
class Speaker:
    """A voice variant with habits of its own: factors of speed, pitch and all frequencies."""

    name: str
    voice: str
    rate: float
    pitch: float
    tract: float


@dataclass(frozen=True)
class Utterance:
    """One clip before its sound; `seed` draws what differs from clip to clip."""

    id: str
    words: tuple[str, ...]
    speaker: Speaker
    seed: int


def phrases() -> tuple[list[tuple[str, ...]], ...]:
    """Every phrase of one word, of two and of three."""
    return (
        [(word,) for word in WORDS],
        [*product(NOUNS, ADJECTIVES), *product(NOUNS, VERBS), *product(VERBS, ADVERBS)],
        [*product(NOUNS, ADJECTIVES, VERBS), *product(NOUNS, VERBS, ADVERBS)],
    )


def best_kind() -> Kind:
    """`espeak` where the extra `demo` is installed."""
    return "espeak" if importlib.util.find_spec("espeakng_loader") else "tones"


def make_corpus(
    folder: Path, seed: int, *, kind: Kind, clips: tuple[int, int, int] = (4000, 96, 240)
) -> dict[str, list[Row]]:
    """Writes `clips` of train, dev and test as FLAC with a manifest each; returns the rows.

    The rows have word times as segments. train.jsonl ends with one more row, whose file is cut in
    the middle on purpose. Raises `UserError` where eSpeak is asked for and not installed.
    """
    if kind == "espeak" and best_kind() != "espeak":
        raise UserError(
            "eSpeak NG is not installed",
            "the package espeakng-loader is missing",
            'pip install "hebasr-jax[demo]", or take the tones',
        )
    (folder / "clips").mkdir(parents=True)
    plan = draw_utterances(seed, clips)
    every = [utterance for split in _SPLITS for utterance in plan[split]]
    halves = every[: len(every) // 2], every[len(every) // 2 :]
    # A fresh process for each half: eSpeak's state, and so its noise, depends on what it said.
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        written = pool.map(partial(_write_clips, folder, kind), halves)
        rows = iter([row for half in written for row in half])
    made = {split: [next(rows) for _ in plan[split]] for split in _SPLITS}
    made["train"].append(_break_a_copy(folder, made["train"][0]))
    for split in _SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in made[split]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return made


def draw_utterances(seed: int, clips: Sequence[int]) -> dict[str, list[Utterance]]:
    """Speakers and phrases of each split, and `clips` utterances of them."""
    rng = np.random.default_rng(seed)
    voices = _cut(rng, VARIANTS, _VOICE_SHARES)
    words, *longer = phrases()
    pools = [[words, [], []], *(_cut(rng, every, _PHRASE_SHARES) for every in longer)]
    plan: dict[str, list[Utterance]] = {}
    for part, split in enumerate(_SPLITS):
        speakers = [
            Speaker(f"{voice}-{n}", voice, *rng.uniform((0.92, 0.7, 0.92), (1.15, 1.4, 1.1)))
            for n in range(_SPEAKERS_OF_A_VOICE)
            for voice in voices[part]
        ]
        plan[split] = []
        for index in range(clips[part]):
            pool = pools[rng.choice(3, p=_LENGTH_SHARES[part])][part]
            phrase, speaker = pool[rng.integers(len(pool))], speakers[index % len(speakers)]
            seed_of_clip = int(rng.integers(2**31))
            plan[split].append(Utterance(f"{split}-{index:05d}", phrase, speaker, seed_of_clip))
    return plan


def learn_merges(texts: Iterable[str], merges: int) -> list[tuple[str, str]]:
    """The first byte-pair merges of the texts, for `demo.write_byte_tokenizer`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _cut(rng: np.random.Generator, items: Sequence[Any], shares: Sequence[float]) -> list[list]:
    """The items in random order, cut into the shares; no part is empty."""
    order = [items[index] for index in rng.permutation(len(items))]
    sizes = [max(1, round(share * len(items))) for share in shares[1:]]
    ends = np.cumsum([0, len(items) - sum(sizes), *sizes])
    return [order[start:end] for start, end in pairwise(ends)]


def _write_clips(folder: Path, kind: Kind, utterances: Sequence[Utterance]) -> list[Row]:
    import soundfile

    sounds = _speak(utterances) if kind == "espeak" else map(_play, utterances)
    rows = []
    for utterance, (wave, starts_s) in zip(utterances, sounds, strict=True):
        wave, lead_s = _record(wave, utterance)
        audio, length_s = f"clips/{utterance.id}.flac", len(wave) / SAMPLE_RATE
        soundfile.write(folder / audio, wave, SAMPLE_RATE, subtype="PCM_16")
        times_s = [round(lead_s + start_s, 3) for start_s in starts_s] + [round(length_s, 3)]
        segments = [
            {"start_s": start_s, "end_s": end_s, "text": word}
            for word, (start_s, end_s) in zip(utterance.words, pairwise(times_s), strict=True)
        ]
        row = {"audio": audio, "id": utterance.id, "text": " ".join(utterance.words)}
        row |= {"speaker": utterance.speaker.name, "language": "Hebrew"}
        rows.append(row | {"duration_s": length_s, "segments": segments})
    return rows


def _break_a_copy(folder: Path, row: Row) -> Row:
    """A row whose file ends in the middle, as after a broken download."""
    broken = row | {"id": "train-broken", "audio": "clips/train-broken.flac"}
    whole = (folder / row["audio"]).read_bytes()
    (folder / broken["audio"]).write_bytes(whole[: len(whole) // 2])
    return broken


def _record(wave: np.ndarray, utterance: Utterance) -> tuple[np.ndarray, float]:
    """The sound at a drawn level, with a pause before and after it and faint noise; the pause."""
    rng = np.random.default_rng((utterance.seed, 1))
    lead, rest = (round(pause_s * SAMPLE_RATE) for pause_s in rng.uniform(0.02, 0.12, 2))
    peak, noise = 10 ** (rng.uniform((-18, -50), (-3, -35)) / 20)
    wave = np.pad(wave / np.abs(wave).max(), (lead, rest))
    wave = peak * (wave + noise * rng.standard_normal(len(wave)))
    return np.clip(wave, -1, 1).astype(np.float32), lead / SAMPLE_RATE


def _play(utterance: Utterance) -> Sound:
    """Each letter as two tones, of which the speaker's `pitch` sets the buzz and `tract` both."""
    rng = np.random.default_rng((utterance.seed, 0))
    speaker, starts_s = utterance.speaker, []
    parts: list[np.ndarray] = []
    for word in utterance.words:
        starts_s.append(sum(part.size for part in parts) / SAMPLE_RATE)
        for index in (_LETTERS.index(letter) for letter in word.translate(_FINALS)):
            duration_s = 0.09 / speaker.rate * rng.uniform(0.85, 1.15)
            time_S = np.arange(round(duration_s * SAMPLE_RATE)) / SAMPLE_RATE
            low_hz, high_hz = 300 * 1.35 ** (index % 5), 1500 * 1.35 ** (index // 5)
            turns_S = 2 * np.pi * speaker.tract * time_S
            tone_S = np.sin(low_hz * turns_S) + np.sin(high_hz * turns_S)
            tone_S *= 1 + 0.5 * np.sin(2 * np.pi * 120 * speaker.pitch * time_S)
            noise_S = rng.standard_normal(len(time_S)) * (index % 3 == 0)
            parts.append((tone_S + noise_S) * np.hanning(len(time_S)) ** 0.3)
        parts.append(np.zeros(round(0.06 / speaker.rate * SAMPLE_RATE)))
    return np.concatenate(parts), starts_s


def _speak(utterances: Sequence[Utterance]) -> Iterable[Sound]:
    """Each utterance by eSpeak NG, in a process where nothing else was said."""
    import soxr

    sayings = map(_saying, utterances)
    for utterance, said in zip(utterances, say(sayings), strict=True):
        wave = np.frombuffer(said.pcm, np.int16).astype(np.float32)
        played_hz = said.rate_hz * utterance.speaker.tract  # faster: all resonances are higher
        yield (
            soxr.resample(wave, played_hz, SAMPLE_RATE),
            [start / played_hz for start in said.starts],
        )


def _saying(utterance: Utterance) -> Saying:
    speaker, rng = utterance.speaker, np.random.default_rng((utterance.seed, 0))
    return Saying(
        text=f"[[{' '.join(WORDS[word] for word in utterance.words)}]]",
        voice=f"he+{speaker.voice}",
        rate=round(170 * speaker.rate * rng.uniform(0.93, 1.07)),
        pitch=round(50 * speaker.pitch * rng.uniform(0.9, 1.1)),
        seed=utterance.seed,
        phonemes=True,
    )
