"""What a folder holds from before: no text of another system, and no test of other texts."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hebasr_jax import evaluate
from hebasr_jax.comparison import compare_folders
from hebasr_jax.errors import UserError
from hebasr_jax.eval_sets import choose_sets
from hebasr_jax.evaluate import Settings, System, run_sets
from hebasr_jax.hypotheses import read_hypotheses
from hebasr_jax.longform import Cutting, Sound, recognize_long
from hebasr_jax.overlap import write_overlap
from hebasr_jax.text import Transcript
from hebasr_jax.timestamps import Segment
from hebasr_jax.transcribe import Recognition

SETTINGS = Settings(resamples=20)


def says(text: str) -> System:
    def decode(waves, contexts):
        return [Recognition(Transcript("Hebrew", text), (1,), len(w) / 16000, True) for w in waves]

    about = {"name": text, "dtype": "float32", "device": "cpu", "batch": 1, "versions": {}}
    return System(decode, about, text)


def manifest(folder: Path, name: str, bad: int = 0) -> str:
    noise = np.random.default_rng(0).normal(size=16000) * 0.1
    soundfile.write(folder / "a.wav", noise, 16000)
    rows = [{"audio": "a.wav", "text": "one two", "id": f"c{i}"} for i in range(3)]
    rows += [{"audio": "gone.wav", "text": "one", "id": f"b{i}"} for i in range(bad)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(system: System, path: str, out: Path, settings: Settings = SETTINGS) -> dict:
    return run_sets(system, choose_sets((), (path,)), out, settings, say=print)[0]


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["_recognise", "_score"])
def test_a_set_that_another_system_began_is_not_kept(tmp_path, monkeypatch, where) -> None:
    """results.json is still of the first system when the second is stopped in the set."""
    one, other = manifest(tmp_path, "one"), manifest(tmp_path, "other")
    run(says("one"), one, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, where, stop)
        with pytest.raises(KeyboardInterrupt):
            run(says("two"), one, tmp_path / "out")
    assert list(run(says("one"), other, tmp_path / "out")["sets"]) == ["other"]
    assert run(says("one"), one, tmp_path / "out")["sets"].keys() == {"one", "other"}


def test_a_comparison_goes_with_the_texts_it_was_made_of(tmp_path) -> None:
    path, out = manifest(tmp_path, "one"), tmp_path / "out"
    run(says("one"), path, out)
    (out / "compare.json").write_text('{"style": true}')
    run(says("one"), path, out)
    assert (out / "compare.json").exists()
    run(says("two"), path, out)
    assert not (out / "compare.json").exists()


def test_an_overlap_stays_only_with_the_model_and_the_data_it_was_found_in(tmp_path) -> None:
    path, out = manifest(tmp_path, "one"), tmp_path / "out"
    run(says("one"), path, out)
    found = write_overlap(out, {"tests": {"one": {}}})
    run(says("one"), path, out)
    assert found.exists()
    run(says("one"), manifest(tmp_path, "more"), out)
    assert found.exists()
    run(says("two"), manifest(tmp_path, "other"), out)
    assert not found.exists()
    write_overlap(out, {"tests": {"other": {}}})
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    run(says("two"), str(tmp_path / "other.jsonl"), out)
    assert not found.exists()


def test_a_withheld_rate_is_not_told_by_a_comparison(tmp_path) -> None:
    path = manifest(tmp_path, "one", bad=1)
    for text in ("one", "two"):
        assert run(says(text), path, tmp_path / text)["sets"]["one"]["wer"] is None
    with pytest.raises(UserError, match="could not be read"):
        compare_folders(tmp_path / "one", tmp_path / "two", style=True, resamples=20, seed=0)


def test_a_trial_longer_than_the_set_hides_no_missing_clip(tmp_path) -> None:
    path = manifest(tmp_path, "one", bad=1)
    found = run(says("one"), path, tmp_path / "out", Settings(resamples=20, max_clips=100))
    assert (found["sets"]["one"]["missing"], found["sets"]["one"]["wer"]) == (1, None)


def test_a_rounded_length_cuts_nothing_off(tmp_path) -> None:
    path = Path(manifest(tmp_path, "one"))
    path.write_text(path.read_text().replace("}", ', "duration_s": 0.85}'))
    run(says("one"), str(path), tmp_path / "out")
    rows = read_hypotheses(tmp_path / "out" / "one" / "hypotheses.jsonl")
    assert [row.duration_s for row in rows] == [1.0] * 3


def test_a_disk_that_is_full_or_refuses_is_told_and_leaves_nothing_half_written(tmp_path) -> None:
    path, out = manifest(tmp_path, "one"), tmp_path / "out"
    (out / "one").mkdir(parents=True)
    (out / "one" / ".hypotheses.jsonl.partial").symlink_to("/dev/full")
    told = run(says("one"), path, out)["skipped"]["one"]
    assert told.splitlines()[0].endswith("hypotheses.jsonl cannot be written")
    assert not list((out / "one").iterdir())
    (out / "one").rmdir()
    (out / "one").touch()
    assert "one: cannot be written" in run(says("one"), path, out)["skipped"]["one"]
    (out / ".overlap.json.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"overlap\.json cannot be written"):
        write_overlap(out, {})
    assert sorted(file.name for file in out.iterdir()) == ["one", "results.json"]


def test_data_of_ones_own_is_no_benchmark_set_by_its_file_name(tmp_path) -> None:
    with pytest.raises(UserError, match="benchmark set"):
        choose_sets((), (str(tmp_path / "kan.jsonl"),))


def test_a_stamp_beyond_its_piece_ends_with_it() -> None:
    def decode(waves, contexts):
        late = Transcript("Hebrew", "x", (Segment(1.0, 90.0, "x"), Segment(95.0, 99.0, "y")))
        return [Recognition(late, (1,), len(w) / 16000, True) for w in waves]

    wave = np.random.default_rng(0).standard_normal(50 * 16000, np.float32)
    sound = Sound("a", lambda: iter([wave]))
    (found,) = recognize_long(decode, [sound], Cutting())
    times = [at for part in found.segments for at in (part.start_s, part.end_s)]
    assert times == sorted(times)
    assert times[-1] == found.duration_s
