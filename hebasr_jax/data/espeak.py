"""eSpeak NG by its C interface: one use at a time in a process, since all of its state is global.

As a program, `python -P espeak.py VOICE SEED OUT` says its standard input into a wav file. It
imports nothing else of this package, so that a process for each text costs little.
"""

import ctypes
import random
import re
import sys
import unicodedata
import wave
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

# Voice variants of eSpeak NG 1.52 that speak clearly (not kaukovalta: first formant at 40 %).
VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
    *("Denis", "Gene", "Gene2", "Lee", "Mario", "Michael", "adam", "announcer", "aunty"),
    *("belinda", "benjamin", "boris", "david", "ed", "edward", "edward2", "grandma"),
    *("john", "linda", "max", "michel", "norbert", "pablo", "paul", "quincy"),
    *("rob", "robert", "sandro", "shelby", "travis", "victor"),
)

# IPA of Hebrew to the phonemes of eSpeak's voice "he".
_PHONEMES = str.maketrans("ʃχʁʔˈɡʒ", "SXR?'gZ")
_STRESS = "ˈ"
_RATES, _PITCHES = (140, 195), (30, 75)  # words a minute; 50 is as recorded
# A letter with its points, and accents, which eSpeak does not know; it reads the points only in
# the order of dagesh, shin dot, vowel, which is not that of normalised Unicode.
_POINTED = re.compile("([\u05d0-\u05ea])([\u0591-\u05bd\u05bf-\u05c2\u05c7]+)")
_SPOKEN_POINTS = "\u05bc\u05c1\u05c2" + "".join(map(chr, range(0x5B0, 0x5BC))) + "\u05c7"
_CLAUSE = re.compile(r"[^\s,.;:!?()\"–—-][^,.;:!?()\"–—-]*")


class Saying(NamedTuple):
    """What eSpeak is told: words a minute, pitch (0 to 99), and a seed for its noise.

    phonemes: the text may have eSpeak's phonemes in it, between [[ and ]].
    """

    text: str
    voice: str
    rate: int
    pitch: int
    seed: int
    phonemes: bool = False


class Said(NamedTuple):
    """int16 samples, their rate, and the sample where each word starts."""

    pcm: bytes
    rate_hz: int
    starts: list[int]


class _Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position_ms", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


def say(sayings: Iterable[Saying]) -> Iterator[Said]:
    """Says one after the other; noise depends on what was said before in this process.

    eSpeak is held until the iterator is exhausted or closed: take no second one before that.
    Raises ValueError for a voice that eSpeak does not have.
    """
    import espeakng_loader

    end_of_list, word_start = 0, 1  # espeak_EVENT_TYPE
    synchronous, rate, volume, pitch = 2, 1, 2, 3  # espeak_AUDIO_OUTPUT, espeak_PARAMETER
    utf8, phonemes = 0x1, 0x100  # espeakCHARS_UTF8, espeakPHONEMES
    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    parts: list[bytes] = []
    starts: list[int] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))
    def take(samples: Any, count: int, events: Any) -> int:
        if samples and count:
            parts.append(ctypes.string_at(samples, 2 * count))
        index = 0
        while events[index].type != end_of_list:
            if events[index].type == word_start:
                starts.append(events[index].sample)
            index += 1
        return 0

    data = espeakng_loader.get_data_path().encode()
    rate_hz = espeak.espeak_Initialize(synchronous, 0, data, 0)
    espeak.espeak_SetSynthCallback(take)
    espeak.espeak_SetParameter(volume, 60, 0)
    try:
        for saying in sayings:
            parts.clear()
            starts.clear()
            espeak.espeak_ng_SetRandSeed(ctypes.c_long(saying.seed))
            if espeak.espeak_SetVoiceByName(saying.voice.encode()):
                raise ValueError(f"eSpeak NG has no voice {saying.voice}")
            espeak.espeak_SetParameter(rate, saying.rate, 0)
            espeak.espeak_SetParameter(pitch, saying.pitch, 0)
            text = saying.text.encode()
            flags = utf8 | (phonemes if saying.phonemes else 0)
            espeak.espeak_Synth(text, len(text) + 1, 0, 1, 0, flags, None, None)
            yield Said(b"".join(parts), rate_hz, [*starts])
    finally:
        espeak.espeak_Terminate()  # a second Initialize frees tables that the voice still reads


def saying_of(text: str, voice: str, seed: int) -> Saying:
    """A text in a voice, at a rate and pitch that follow from the seed.

    A text with an IPA stress mark is IPA of Hebrew, said by its phonemes; its punctuation stays.
    Vowel points are put in the order that eSpeak reads.
    """
    draw = random.Random(seed)
    rate, pitch = round(draw.uniform(*_RATES)), round(draw.uniform(*_PITCHES))
    text = unicodedata.normalize("NFD", text).replace("\u05be", "-")  # maqaf
    text = _POINTED.sub(lambda letter: letter[1] + _ordered(letter[2]), text)
    ipa = _STRESS in text
    if ipa:
        text = _CLAUSE.sub(lambda clause: f"[[{clause[0].translate(_PHONEMES).strip()}]] ", text)
    return Saying(text, voice, rate, pitch, seed, phonemes=ipa)


def _ordered(points: str) -> str:
    return "".join(sorted((p for p in points if p in _SPOKEN_POINTS), key=_SPOKEN_POINTS.index))


def main(voice: str, seed: str, out: str) -> int:
    text = sys.stdin.buffer.read().decode()
    try:
        (said,) = say([saying_of(text, voice, int(seed))])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(said.rate_hz)
        sound.writeframes(said.pcm)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
