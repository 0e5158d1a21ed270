"""Recordings cut at their segments: no word is lost or heard twice, and sound has its words."""

import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from hebasr_jax.data.decode import read_piece, read_sound
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.slices import sliced
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

RATE = 16_000
LENGTHS = [(0.0, 4.0), (4.5, 9.0), (9.4, 13.0), (13.0, 19.0), (26.0, 29.0), (29.0, 33.0)]


def ramp(seconds: float) -> np.ndarray:
    """Each sample tells its place, in steps of 1 / 20 s."""
    return (np.arange(round(seconds * RATE)) // (RATE // 20) * 40).astype(np.int16)


@pytest.fixture(params=["manifest", "parquet"])
def source(request, tmp_path) -> Source:
    """A recording of 34 s with six segments, a short clip, and a long one without segments."""
    rows = []
    for name, seconds, spoken in (("talk", 34.0, LENGTHS), ("short", 5.0, []), ("dumb", 25.0, [])):
        soundfile.write(tmp_path / f"{name}.wav", ramp(seconds), RATE, subtype="PCM_16")
        segments = [
            {"start_s": start, "end_s": end, "text": f"מילה{n}"}
            for n, (start, end) in enumerate(spoken)
        ]
        text = " ".join(s["text"] for s in segments) or "שלום"
        row = {"id": name, "text": text, "duration_s": seconds, "speaker": "a"}
        rows.append(row | {"segments": segments, "audio": f"{name}.wav"})
    if request.param == "manifest":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / "m.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return Source("talks", str(tmp_path / "m.jsonl"))
    for row in rows:
        row["audio"] = {"bytes": (tmp_path / row["audio"]).read_bytes()}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    return Source("talks", str(tmp_path / "m.parquet"))


@pytest.mark.parametrize("longest_s", [7.0, 10.0, 20.0])
def test_each_word_is_in_one_slice_with_its_sound(source, longest_s) -> None:
    made = sliced(open_source(source), longest_s)
    slices = [clip for clip in made.clips if clip.recording == "talk"]
    assert " ".join(clip.text for clip in slices) == " ".join(f"מילה{n}" for n in range(6))
    assert [clip.id for clip in made.clips if clip.recording != "talk"] == ["short"]
    assert [(where, fault.reason) for where, fault in made.bad] == [
        ("dumb", "is too long and has no segments to be cut by")
    ]
    spans_s = []
    for index, clip in enumerate(made.clips):
        if clip.recording != "talk":
            continue
        assert clip.duration_s <= longest_s
        at_s, wave = float(clip.id.split("@")[1]), made.read(index)
        assert len(wave) == round(clip.duration_s * RATE)
        assert abs(int(wave[0]) - round(at_s * 20) * 40) <= 40
        for segment in clip.segments:
            spoken = LENGTHS[int(segment.text.split()[0][-1])]
            assert at_s + segment.start_s == pytest.approx(spoken[0], abs=0.02)
            assert segment.end_s <= clip.duration_s
        first_s = clip.segments[0].start_s if clip.segments else 0.0
        spans_s.append((at_s + first_s, at_s + clip.duration_s))  # silence may be in two
    assert all(end <= start + 0.02 for (_, end), (start, _) in pairwise(spans_s))


def test_contexts_are_the_slices_before_and_shards_are_made(source, tmp_path) -> None:
    flags = {"source": source.path, "name": "talks", "slice_s": 10.0, "max_bad_share": 0.5}
    assert Prepare(tmp_path / "out", **flags).run() == 0
    made, prepared = sliced(open_source(source), 10.0), Source("talks", str(tmp_path / "out/talks"))
    back = open_source(prepared)
    assert back.clips == made.clips
    assert all(np.array_equal(back.read(n), made.read(n)) for n in range(len(made.clips)))
    talk = [clip for clip in made.clips if clip.recording == "talk"]
    assert talk[1].context == talk[0].text
    with pytest.raises(UserError, match="shards cannot be cut"):
        sliced(back, 3.0)
    with pytest.raises(UserError, match="0 to 120 s"):
        sliced(open_source(source), 0.0)


@pytest.mark.parametrize(("subtype", "peak"), [("PCM_16", 1.0), ("FLOAT", 3.0)])
def test_a_piece_over_full_scale_is_scaled_as_a_file_is(tmp_path, subtype, peak) -> None:
    """Resampling takes noise of full scale over it."""
    wave, file = np.random.default_rng(0).choice([-peak, peak], 44_100), tmp_path / "loud.wav"
    soundfile.write(file, wave, 44_100, subtype=subtype)
    whole, piece = read_sound(file, 1.0, "x"), read_piece(file, 0.0, 1.0, "x")
    assert np.abs(whole.astype(int) - piece).max() <= 3
