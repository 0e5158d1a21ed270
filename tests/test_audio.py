"""audio.read_audio and expand_inputs: what comes in right, and what is refused with what words."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from hebasr_jax import audio
from hebasr_jax.audio import SAMPLE_RATE, expand_inputs, read_audio
from hebasr_jax.errors import UserError

ROOT = Path(__file__).parent.parent
CHILD_IMPORTS = """
import os, sys
from pathlib import Path
import numpy as np, soundfile, soxr
from hebasr_jax.audio import read_audio
from hebasr_jax.errors import UserError
"""
RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 192_000)


def tone(samples: int, rate: int = SAMPLE_RATE, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(samples) / rate)).astype(np.float32)


def speechlike(seconds: float, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Tone and noise with pauses: a variable bit rate, and no two blocks alike."""
    samples = int(seconds * rate)
    noise = np.random.default_rng(5).standard_normal(samples).astype(np.float32)
    loud = np.sin(2 * np.pi * 0.7 * np.arange(samples) / rate) > 0
    return (tone(samples, rate) * 0.5 + 0.05 * noise) * loud


def read(path: Path, max_seconds: float = 60.0) -> np.ndarray:
    wave = read_audio(path, max_seconds=max_seconds)
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert np.abs(wave).max(initial=0) <= 1
    return wave


def refused(path: Path, max_seconds: float = 60.0) -> str:
    with pytest.raises(UserError) as caught:
        read_audio(path, max_seconds=max_seconds)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert 1 <= len(text.splitlines()) <= 3
    return text


def write_av(path: Path, codec: str, rate: int, wave: np.ndarray, **options: str) -> Path:
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        convert = av.AudioResampler(stream.codec_context.format, "mono", rate)
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        for part in [*convert.resample(frame), None]:
            container.mux(stream.encode(part))
    return path


@given(st.sampled_from(RATES), st.integers(0, 3000))
@settings(max_examples=25, deadline=None)
def test_length_at_any_rate(tmp_path_factory, rate, samples):
    path = tmp_path_factory.mktemp("rate") / "a.wav"
    soundfile.write(path, tone(samples, rate), rate)
    if samples == 0:
        assert "zero samples" in refused(path)
    else:
        assert abs(len(read(path)) - samples * SAMPLE_RATE / rate) <= 1


@pytest.mark.parametrize("rate", RATES)
def test_tone_keeps_frequency_phase_and_level(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(2 * rate, rate), rate, subtype="FLOAT")
    wave = read(tmp_path / "a.wav")
    assert np.abs(wave - tone(len(wave)))[200:-200].max() < 1e-4


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_16k_passes_bit_exactly(tmp_path, kind):
    samples = np.random.default_rng(0).integers(-32768, 32768, 300_000, np.int16)
    samples[:2] = -32768, 32767
    soundfile.write(tmp_path / f"a.{kind}", samples, SAMPLE_RATE)
    np.testing.assert_array_equal(read(tmp_path / f"a.{kind}"), samples / np.float32(32768))


@pytest.mark.parametrize("channels", [2, 8])
def test_channels_are_averaged(tmp_path, channels):
    sound = np.random.default_rng(1).uniform(-1, 1, (90_000, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", sound, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(read(tmp_path / "a.wav"), sound.mean(1), atol=1e-6)


STEPS = (
    "wav PCM_U8 -7, wav PCM_16 -15, wav PCM_24 -23, wav PCM_32 -24, wav FLOAT -24, wav DOUBLE -24"
)
STEPS += ", flac PCM_16 -15, flac PCM_24 -23, mp3 MPEG_LAYER_III -6, ogg VORBIS -4, opus OPUS -3"


@pytest.mark.parametrize(("kind", "subtype", "bits"), [row.split() for row in STEPS.split(", ")])
def test_each_sample_format(tmp_path, kind, subtype, bits):
    path = tmp_path / f"שיחה ראשונה.{kind}"
    container = "OGG" if kind == "opus" else kind.upper()
    soundfile.write(path, tone(48_000), SAMPLE_RATE, subtype, format=container)
    wave = read(path)
    assert len(wave) == 48_000
    assert np.abs(wave - tone(48_000))[2000:-2000].max() <= 2.0 ** int(bits)


def test_only_a_peak_above_one_is_divided(tmp_path):
    for gain, expected in ((0.25, 0.125), (1.0, 0.5), (6.0, 1.0)):
        soundfile.write(tmp_path / "a.wav", gain * tone(16_000), SAMPLE_RATE, subtype="FLOAT")
        assert np.abs(read(tmp_path / "a.wav")).max() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_block_size_changes_nothing(tmp_path, monkeypatch, kind, rate):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, speechlike(7, rate), rate)
    expected = read(path)
    for values in (777, 1 << 22):
        monkeypatch.setattr(audio, "_BLOCK_VALUES", values)
        np.testing.assert_allclose(read(path), expected, atol=1e-6)


def test_limit_is_refused_only_above(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(32_000), SAMPLE_RATE)
    assert len(read(tmp_path / "a.flac", max_seconds=2.0)) == 32_000
    text = refused(tmp_path / "a.flac", max_seconds=1.999)
    assert "longer than the limit of 1.999 s" in text
    assert "cut silently" in text
    assert "Split it" in text


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_wav_written_to_a_pipe_is_read_whole(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", tone(16_000), SAMPLE_RATE)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read(tmp_path / "a.wav")) == 16_000


def test_wav_over_4_gib_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), SAMPLE_RATE)
    os.truncate(tmp_path / "a.wav", (1 << 32) + 1000)  # sparse: the length has wrapped around
    assert "4 GiB" in refused(tmp_path / "a.wav")


BOMB = """
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_audio(Path(sys.argv[1]), max_seconds=60)
except UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (48_000, 8)])
def test_hours_of_zeros_stop_with_bounded_memory(tmp_path, rate, channels):
    path = tmp_path / "bomb.flac"
    zeros = np.zeros((20 * rate, channels), np.int16)
    with soundfile.SoundFile(path, "w", rate, channels, "PCM_16") as file:
        for _ in range(30 if channels == 8 else 540):  # 10 minutes or 3 hours
            file.write(zeros)
    assert path.stat().st_size < 3_000_000
    *text, mib = run_child(BOMB, path).splitlines()
    assert "longer than the limit of 60 s" in text[0]
    assert int(mib) < 32


@pytest.mark.parametrize("kind", ["wav", "rf64", "aiff", "au", "w64", "flac", "ogg", "opus"])
@pytest.mark.parametrize("share", [0.02, 0.37, 0.5, 0.98])
def test_cut_file_is_refused(tmp_path, kind, share):
    path = tmp_path / f"a.{kind}"
    container, subtype = ("OGG", "OPUS") if kind == "opus" else (kind.upper(), None)
    soundfile.write(path, speechlike(5), SAMPLE_RATE, subtype, format=container)
    os.truncate(path, int(path.stat().st_size * share))
    assert re.search("cut|damaged|cannot be read", refused(path))


def test_flac_cut_between_two_frames_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.flac", speechlike(5), SAMPLE_RATE)
    data = (tmp_path / "a.flac").read_bytes()
    frames = [match.start() for match in re.finditer(rb"\xff\xf8[\x00-\xff]{2}", data)]
    told = set()
    for frame in frames[1:]:  # libsndfile reads most of these without a word
        (tmp_path / "a.flac").write_bytes(data[:frame])
        told |= set(re.findall("promised samples|lost sync", refused(tmp_path / "a.flac")))
    assert "promised samples" in told


def test_flac_of_unknown_length_is_read_whole(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(50_000), SAMPLE_RATE)
    (tmp_path / "a.flac").write_bytes(with_flac_length((tmp_path / "a.flac").read_bytes(), 0))
    assert len(read(tmp_path / "a.flac")) == 50_000


def with_flac_length(data: bytes, samples: int) -> bytes:
    field = int.from_bytes(data[18:26], "big") >> 36 << 36 | samples
    return data[:18] + field.to_bytes(8, "big") + data[26:]


def half_described(folder: Path) -> dict[str, float]:
    """Files whose head describes only a part of their sound -> seconds that are in them."""
    for kind in ("mp3", "ogg", "flac"):
        soundfile.write(folder / f"a.{kind}", speechlike(12), SAMPLE_RATE)
    mp3, ogg, flac = ((folder / f"a.{kind}").read_bytes() for kind in ("mp3", "ogg", "flac"))
    (folder / "joined.mp3").write_bytes(mp3 + mp3)
    (folder / "untagged.mp3").write_bytes(mp3.replace(b"Xing", b"Zing", 1))
    (folder / "chained.ogg").write_bytes(ogg + ogg)
    (folder / "short.flac").write_bytes(with_flac_length(flac, 1000))
    return {"joined.mp3": 24, "untagged.mp3": 12, "chained.ogg": 24, "short.flac": 12}


def test_sound_beyond_the_head_goes_through_av(tmp_path):
    for name, seconds in half_described(tmp_path).items():
        assert len(read(tmp_path / name)) / SAMPLE_RATE == pytest.approx(seconds, abs=0.2), name


def test_sound_beyond_the_head_is_not_dropped_without_av(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for name in half_described(tmp_path):
        text = refused(tmp_path / name)
        assert "only a part" in text
        assert "hebasr-jax[av]" in text
    assert len(read(tmp_path / "a.mp3")) == 12 * SAMPLE_RATE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_samples_that_are_not_finite(tmp_path, value, rate):
    sound = tone(rate, rate)
    sound[rate // 2] = value
    soundfile.write(tmp_path / "a.wav", sound, rate, subtype="FLOAT")
    assert "NaN or infinite" in refused(tmp_path / "a.wav")


def test_what_is_no_sound(tmp_path):
    (tmp_path / "empty.wav").touch()
    assert "zero bytes" in refused(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("שלום, זה לא קול\n" * 50)
    assert "cannot be read as sound" in refused(tmp_path / "text.wav")
    assert "folder" in refused(tmp_path)
    assert "no such file" in refused(tmp_path / "missing.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    assert "not a file" in refused(tmp_path / "pipe.wav")


def test_damaged_rate_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), 5_000_000)
    assert "5000000 samples per second" in refused(tmp_path / "a.wav")


def test_ffmpeg_may_not_follow_a_playlist_to_other_files(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(16_000), SAMPLE_RATE)
    (tmp_path / "list.m4a").write_text("ffconcat version 1.0\nfile 'a.wav'\n")
    assert "cannot be read as sound" in refused(tmp_path / "list.m4a")


FORBIDDEN = """
os.chmod(sys.argv[1], 0)
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    read_audio(Path(sys.argv[1]), max_seconds=60)
except UserError as error:
    print(error)
"""


def test_unreadable_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(100), SAMPLE_RATE)
    text = run_child(FORBIDDEN, tmp_path / "a.wav")
    assert "a.wav: cannot be read" in text
    assert "Permission denied" in text


MUTATE = """
rng = np.random.default_rng(17)
outcomes = {}
for source in sorted(Path(sys.argv[1]).iterdir()):
    data = np.frombuffer(source.read_bytes(), np.uint8)
    target = source.with_name("mutant" + source.suffix)
    for turn in range(60):
        mutant = data.copy()
        span = min(len(data), 200) if turn % 2 else len(data)  # heads first, then anywhere
        mutant[rng.integers(0, span, 1 + turn % 9)] = rng.integers(0, 256, 1 + turn % 9)
        end = rng.integers(1, len(data)) if turn % 7 == 0 else len(data)
        target.write_bytes(mutant[:end].tobytes())
        try:
            wave = read_audio(target, max_seconds=20)
            assert wave.dtype == np.float32 and np.abs(wave).max(initial=0) <= 1
            assert len(wave) <= 20 * 16000 + 1
            outcome = "array"
        except UserError as error:
            assert len(str(error).splitlines()) <= 3
            outcome = "refused"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
print(outcomes["array"], outcomes["refused"])
"""


def test_mutated_files_give_sound_or_a_user_error(tmp_path):
    for kind in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"a.{kind}", speechlike(0.7), SAMPLE_RATE)
    arrays, refusals = map(int, run_child(MUTATE, tmp_path).split())
    assert arrays + refusals == 240
    assert min(arrays, refusals) > 40


def run_child(code: str, path: Path) -> str:
    command = [sys.executable, "-c", CHILD_IMPORTS + code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("name", "codec", "rate"),
    [("a.m4a", "aac", 44_100), ("קול א.mp4", "aac", 16_000), ("a.webm", "libopus", 48_000)],
)
def test_av_formats(tmp_path, name, codec, rate):
    path = write_av(tmp_path / name, codec, rate, tone(2 * rate, rate))
    wave = read(path)
    assert len(wave) == pytest.approx(2 * SAMPLE_RATE, abs=0.15 * SAMPLE_RATE)
    spectrum = np.abs(np.fft.rfft(wave[4000:20_000]))
    assert np.argmax(spectrum) == 440  # bins of 1 Hz
    assert np.sqrt(np.mean(wave[4000:20_000] ** 2)) == pytest.approx(0.5 / 2**0.5, rel=0.05)
    assert "limit of 1 s" in refused(path, max_seconds=1.0)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm"])
def test_cut_av_file_is_refused(tmp_path, name):
    codec, rate = ("aac", 16_000) if name == "a.mp4" else ("libopus", 48_000)
    path = write_av(tmp_path / name, codec, rate, speechlike(6, rate), movflags="faststart")
    os.truncate(path, path.stat().st_size // 2)
    assert re.search("cut or damaged|cannot be read", refused(path))


def test_av_absent_is_named(tmp_path, monkeypatch):
    path = write_av(tmp_path / "a.m4a", "aac", 16_000, tone(16_000))
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'hebasr-jax[av]'" in refused(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ב/א ב.WAV", "ב/sub/c.mp3", "ב/notes.txt", "ב/._c.mp3", "a[1].wav", "a1.wav"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["a[1].wav"], ["a[1].wav"]),  # a file's name, not a glob
        (["a?.wav"], ["a1.wav"]),
        (["ב"], ["ב/sub/c.mp3", "ב/א ב.WAV"]),
        (["**/*.mp3", "ב/*.txt"], ["ב/sub/c.mp3", "ב/notes.txt"]),
        (["*"], ["a1.wav", "a[1].wav", "ב/sub/c.mp3", "ב/א ב.WAV"]),
        (["ב/א ב.WAV", "./ב", "ב/../ב/א ב.WAV"], ["ב/א ב.WAV", "ב/sub/c.mp3"]),
    ],
)
def test_inputs(folder, patterns, expected):
    assert [str(path) for path in expand_inputs(patterns)] == expected


@pytest.mark.parametrize("pattern", ["none.wav", "*.opus", "bare"])
def test_inputs_that_match_nothing(folder, pattern):
    Path("bare").mkdir()
    with pytest.raises(UserError, match=re.escape(pattern)):
        expand_inputs(["a1.wav", pattern])
