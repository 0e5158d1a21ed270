"""An audit finds what was planted in a made-up set, and its verdict can come out as stop."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hebasr_jax.audit_command import Audit
from hebasr_jax.cli import main
from hebasr_jax.data.audit import (
    Limits,
    audit_set,
    cer,
    measure_sound,
    rate_bounds,
    script_shares,
    stratified,
    wilson,
)
from hebasr_jax.data.clips import Clip
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Source

RATE = 16_000
CLIPS = 48
LETTERS = "אבגדהוזחטיכלמנסעפצקרשת"
SHARED = Path(__file__).parents[2] / "shared" / "data" / "he_synth_espeak"


def speech(number: int, seconds: float) -> np.ndarray:
    """Noise whose spectrum and level change ten times a second, as those of speech do."""
    rng = np.random.default_rng(number)
    parts = []
    for _ in range(round(10 * seconds)):
        spectrum = np.fft.rfft(rng.normal(size=RATE // 10))
        hz = np.arange(len(spectrum)) * 10
        shape = sum(np.exp(-(((hz - rng.uniform(200, 3500)) / 200) ** 2)) for _ in range(3))
        parts.append(np.fft.irfft(spectrum * shape) * rng.uniform(0.5, 1))
    wave = np.concatenate(parts)
    return 0.4 * wave / np.abs(wave).max()


def words(number: int, seconds: float) -> str:
    rng = np.random.default_rng(1000 + number)
    count = max(6, round(2.4 * seconds))
    return " ".join("".join(rng.choice(list(LETTERS), rng.integers(3, 7))) for _ in range(count))


class Planted:
    """A manifest in a folder, built row by row, and a perfect second transcript of it."""

    def __init__(self, folder: Path, clips: int = CLIPS) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.rows, self.second = folder, [], {}
        for number in range(clips):
            seconds = 2.0 + 0.1 * (number % 20)
            self.add(f"c{number:02}", words(number, seconds), speech(number, seconds))

    def add(self, name: str, text: str, wave: np.ndarray, kind: str = "wav", **fields) -> None:
        soundfile.write(self.folder / f"{name}.{kind}", wave, RATE)
        seconds = round(len(wave) / RATE, 3)
        row = {"id": name, "audio": f"{name}.{kind}", "text": text, "duration_s": seconds}
        self.rows.append(row | fields)
        self.second[name] = text

    def swap(self, numbers) -> set[str]:
        """Gives neighbours each other's texts; the second transcript stays with the sound."""
        for i in numbers:
            left, right = self.rows[i], self.rows[i + 1]
            left["text"], right["text"] = right["text"], left["text"]
        return {self.rows[k]["id"] for i in numbers for k in (i, i + 1)}

    def write(self) -> Source:
        for name, rows in (
            ("m.jsonl", self.rows),
            ("second.jsonl", [{"id": k, "text": v} for k, v in self.second.items()]),
        ):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (self.folder / name).write_text("".join(lines), encoding="utf-8")
        return Source("made", str(self.folder / "m.jsonl"))


def run(source: Source, out: Path, *flags: str, second: bool = True) -> int:
    told = ["--second", str(Path(source.path).parent / "second.jsonl")] if second else []
    return main(
        ["audit", "--source", source.path, "--name", "made", "--out", str(out), *told, *flags]
    )


def reasons(out: Path) -> dict[str, str]:
    lines = (out / "removed.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["id"]: row["reason"] for row in map(json.loads, lines)}


def scores(planted: set[str], found: set[str], name: str) -> tuple[float, float]:
    hits = len(planted & found)
    precision, recall = hits / max(1, len(found)), hits / len(planted)
    print(f"{name}: precision {precision:.2f}, recall {recall:.2f} of {len(planted)}")
    return precision, recall


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The set with one of each fault, the expected reasons, and the folder of the audit."""
    made = Planted(tmp_path_factory.mktemp("planted") / "set")
    swapped = made.swap([10, 14, 20])
    truth = dict.fromkeys(swapped, "disagrees with the second transcript")
    for i, kind in ((0, "ogg"), (1, "mp3"), (2, "ogg"), (3, "mp3")):
        wave = 0.6 * speech(i, 2.0 + 0.1 * i)
        made.add(f"near{i}", words(500 + i, 2.0 + 0.1 * i), wave, kind)
        truth[f"near{i}"] = "has the sound of another clip"
    for i in (4, 5):
        made.add(f"exact{i}", words(500 + i, 2.4), speech(i, 2.0 + 0.1 * i))
        truth[f"exact{i}"] = "has the samples of another clip"
    for i in (6, 7, 8):
        made.add(f"text{i}", f"{made.rows[i]['text']}!", speech(700 + i, 2.0 + 0.1 * i))
        truth[f"text{i}"] = "has the text of another clip of its speaker"
    made.add("silent", words(600, 2), np.zeros(2 * RATE))
    made.add("clipped", words(601, 2), np.clip(20 * speech(601, 2), -1, 1))
    made.add("latin", "the quick brown fox jumps over", speech(602, 2))
    made.add("long", words(603, 2), speech(603, 2), duration_s=4.0)
    made.add("short", words(604, 2), speech(604, 2), duration_s=1.0)
    made.add("fast", words(605, 12), speech(605, 2))
    made.add("empty", "", speech(606, 2))
    made.add("instant", "", np.full(1, 0.1), duration_s=0.0001)
    truth |= {
        "silent": "is nearly all silence",
        "clipped": "is clipped",
        "latin": "has few Hebrew letters",
        "long": "is shorter than its row says",
        "short": "lasts longer than its row says",
        "fast": "has too much or too little text for its length",
    }
    source, out = made.write(), made.folder.parent / "audit"
    code = run(source, out)
    return source, out, truth, code


def test_what_was_planted_is_found_and_nothing_else(everything, capsys) -> None:
    _, out, truth, _ = everything
    found = reasons(out)
    kinds = {
        "copies of sound": lambda reason: reason.startswith(("has the so", "has the sa")),
        "copies of text": lambda reason: reason.startswith("has the text"),
        "misaligned": lambda reason: reason.startswith("disagrees"),
    }
    with capsys.disabled():
        print()
        for name, of_kind in kinds.items():
            planted = {k for k, reason in truth.items() if of_kind(reason)}
            got = {k for k, reason in found.items() if of_kind(reason)}
            assert min(scores(planted, got, name)) >= 0.9
        assert min(scores(set(truth), set(found), "all faults")) >= 0.9
    assert found == truth


def test_the_list_is_one_that_a_set_can_be_read_without(everything) -> None:
    source, out, truth, _ = everything
    left = open_source(Source("made", source.path, without=(str(out / "removed.jsonl"),)))
    assert dict(left.removed) == truth
    result = json.loads((out / "audit.json").read_text(encoding="utf-8"))
    assert result["kept"]["clips"] == len(left.clips)
    assert sum(row["clips"] for row in result["removed"].values()) == len(truth)
    hours = sum(clip.duration_s for clip in left.clips) / 3600
    assert result["kept"]["hours"] == pytest.approx(hours, abs=1e-3)


def test_two_audits_are_the_same_bytes_with_any_threads(everything, tmp_path) -> None:
    source, out, _, code = everything
    assert run(source, tmp_path / "again", "--threads", "1") == code
    for name in ("removed.jsonl", "audit.json", "card.html"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_verdict_follows_the_data(tmp_path, capsys) -> None:
    good = Planted(tmp_path / "good", 30).write()
    assert run(good, tmp_path / "a") == 0
    assert "made: proceed: 0 of 30" in capsys.readouterr().err
    bad = Planted(tmp_path / "bad", 30)
    bad.swap([0, 4, 8])
    assert run(bad.write(), tmp_path / "b") == 3
    told = capsys.readouterr().err.splitlines()[-3:]
    assert told[0].startswith("made: stop: 6 of 30 sampled texts")
    assert "agreement" in told[1]
    assert "card.html" in told[2]
    some = Planted(tmp_path / "some", 30)
    some.swap([0, 4])
    assert run(some.write(), tmp_path / "c") == 0
    assert "made: caution: 4 of 30" in capsys.readouterr().err


def test_without_a_second_transcript_the_verdict_says_what_it_cannot_see(tmp_path, capsys) -> None:
    made = Planted(tmp_path / "set", 40)
    made.swap([0, 4, 8, 12])
    assert run(made.write(), tmp_path / "out", second=False) == 0
    assert "characters a second alone" in capsys.readouterr().err
    for row in made.rows[:8]:
        row["text"] = row["text"] * 6
    assert run(made.write(), tmp_path / "out", second=False) == 3


def test_a_copy_of_a_clip_that_goes_anyway_stays(tmp_path) -> None:
    made = Planted(tmp_path / "set", 6)
    made.add("right", made.rows[2]["text"], speech(2, 2.2))
    made.rows[2]["text"] = words(900, 2)
    found = audit_set(open_source(made.write()), second=made.second).findings_N
    assert [bool(finding) for finding in found] == [False, False, True] + 4 * [False]


def test_near_copies_are_looked_for_in_this_group_and_the_one_before(tmp_path) -> None:
    made = Planted(tmp_path / "set", 12)
    made.add("near11", words(901, 3), 0.5 * speech(11, 3.1), "ogg")
    made.add("near0", words(902, 2), 0.5 * speech(0, 2.0), "ogg")
    clip_set = open_source(made.write())

    def found(limits: Limits) -> set[str]:
        findings = audit_set(clip_set, limits).findings_N
        return {c.id for c, f in zip(clip_set.clips, findings, strict=True) if f}

    assert found(Limits()) == {"near11", "near0"}
    assert found(Limits(group_hours=5 / 3600)) == {"near11"}


def test_other_speakers_may_say_the_same(tmp_path) -> None:
    made = Planted(tmp_path / "set", 2)
    for row, name in zip(made.rows, "אב", strict=True):
        row |= {"text": words(0, 2), "speaker": name}
    audit = audit_set(open_source(made.write()))
    assert audit.findings_N == (None, None)
    assert audit.other_speakers == 2


def test_quality_and_bad_second_transcripts(tmp_path) -> None:
    made = Planted(tmp_path / "set", 3)
    made.rows[0]["quality"] = float(np.float32(0.7))
    made.rows[1]["quality"] = 0.2
    source = made.write()
    assert run(source, tmp_path / "o", "--min-quality", "0.7") == 0
    chosen = open_source(replace(source, min_quality=0.7))
    assert [clip.id for clip in chosen.clips] == ["c00"]
    assert reasons(tmp_path / "o") == dict(chosen.removed)
    for content in ('{"id": "other", "text": "א"}', '{"id": "c00"}', "", "[]"):
        file = tmp_path / "bad.jsonl"
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError):
            Audit(tmp_path / "o", source=source.path, name="made", second=file).run()


def test_a_second_transcript_of_few_texts_does_not_decide(tmp_path, capsys) -> None:
    made = Planted(tmp_path / "set", 30)
    made.swap([0, 4])
    whole, made.second = made.second, {k: v for k, v in made.second.items() if k < "c14"}
    assert run(made.write(), tmp_path / "few") == 0
    assert "alone, which cannot see" in (told := capsys.readouterr().err)
    assert "has only 14 of 30 texts" in told
    made.second = {k: v for k, v in whole.items() if k < "c15"}
    assert run(made.write(), tmp_path / "half") == 3
    assert "4 of 15 sampled texts" in (told := capsys.readouterr().err)
    assert "by agreement" in told


def test_of_a_config_sets_without_a_second_transcript_are_judged_too(tmp_path, capsys) -> None:
    sets = []
    for name in ("one", "two"):
        made = Planted(tmp_path / name, 8)
        made.rows = [row | {"id": f"{name}{row['id']}"} for row in made.rows]
        made.second = {f"{name}{key}": text for key, text in made.second.items()}
        sets.append(f"Source({name!r}, {made.write().path!r})")
    (tmp_path / "c.py").write_text(
        "from hebasr_jax.run_config import *\n"
        f"def get_config(): return Config(data=Data(train=({', '.join(sets)},)))\n"
    )
    second = ["--second", str(tmp_path / "two" / "second.jsonl")]
    out = tmp_path / "out"
    assert main(["audit", "--config", str(tmp_path / "c.py"), "--out", str(out), *second]) == 0
    assert "one: " + second[1] + " has none of its clips" in capsys.readouterr().err
    files = [out / "train" / name / "audit.json" for name in ("one", "two")]
    by = [json.loads(file.read_text(encoding="utf-8"))["alignment"]["by"] for file in files]
    assert by == ["rate", "agreement"]


def test_rows_that_are_no_clip_are_listed_without_an_id(tmp_path) -> None:
    made = Planted(tmp_path / "set", 3)
    made.rows.append({"audio": "c00.wav"})
    source, out = made.write(), tmp_path / "out"
    assert run(source, out) == 0
    (row,) = map(json.loads, (out / "removed.jsonl").read_text(encoding="utf-8").splitlines())
    assert row["row"].endswith("m.jsonl:4")
    assert "id" not in row
    left = open_source(replace(source, without=(str(out / "removed.jsonl"),)))
    assert left.notes == ()
    assert len(left.clips) == 3


def test_the_list_of_a_prepared_set_is_not_replaced(tmp_path, capsys) -> None:
    source, out = Planted(tmp_path / "set", 3).write(), tmp_path / "shards"
    out.mkdir()
    (out / "set.json").write_text("{}")
    assert run(source, out) == 1
    assert "is a prepared set" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["set.json"]


def test_an_out_that_cannot_be_written_is_told_before_anything_is_decoded(
    tmp_path, capsys, monkeypatch
) -> None:
    source = Planted(tmp_path / "set", 3).write()
    (tmp_path / "taken").touch()
    with monkeypatch.context() as patch:
        patch.setattr("hebasr_jax.data.audit.audit_set", None)
        assert run(source, tmp_path / "taken" / "out") == 1
    assert "taken is no folder" in capsys.readouterr().err
    out = tmp_path / "out"
    out.mkdir()
    (out / ".audit.json.partial").symlink_to("/dev/full")
    assert run(source, out) == 1
    assert "audit.json cannot be written\nNo space left on device" in capsys.readouterr().err
    assert not list(out.rglob("*partial*"))


def test_measures() -> None:
    tone = np.sin(np.arange(RATE) / 5) * 32767
    half = np.concatenate([tone / 2, np.zeros(RATE)]).astype(np.int16)
    assert measure_sound(half).silence == pytest.approx(0.5, abs=0.02)
    assert measure_sound(half).clipping == 0
    assert measure_sound(np.full(1, -32768, np.int16)).silence == 1
    assert measure_sound(np.full(9, -32768, np.int16)).clipping == 1
    assert script_shares("שלום abcd 12") == (0.5, 0)
    assert script_shares("12 !") == (None, 0)
    assert script_shares("וואָס װאָס")[1] > 0.02
    assert cer("שלום, עולם", "שלום עולם") == 0
    assert cer("", "") == 0
    assert cer("א", "") == 1
    assert wilson(10, 100) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(0, 20)[0] == pytest.approx(0)
    assert wilson(20, 20)[1] == pytest.approx(1)
    assert rate_bounds([14.0] * 5, Limits()) == Limits.usual_rate
    low, high = rate_bounds([*np.random.default_rng(0).normal(14, 2, 500), *[90.0] * 50], Limits())
    assert 5 < low < 10
    assert 20 < high < 40


def test_a_sample_has_each_stratum_in_proportion() -> None:
    clips = [Clip(f"{i}", "א", 1.0 + i % 9, quality=(i % 2) / 2) for i in range(900)]
    drawn = stratified(clips, range(900), 90, seed=3)
    assert drawn == stratified(clips, range(900), 90, seed=3)
    assert len(set(drawn)) == 90
    assert drawn != stratified(clips, range(900), 90, seed=4)
    for third in range(3):
        assert sum((clips[i].duration_s - 1) // 3 == third for i in drawn) == 30
    assert stratified(clips, [5, 7], 90, seed=0) == [5, 7]


def test_the_card_is_one_file_with_texts_from_the_right(everything) -> None:
    _, out, _, _ = everything
    page = (out / "card.html").read_text(encoding="utf-8")
    assert 'dir="rtl"' in page
    assert page.count("<figure>") >= 3
    assert "<script" not in page
    assert "src=" not in page
    assert "http:" not in page


@pytest.mark.chromium
def test_the_card_is_drawn_by_a_browser(everything, tmp_path) -> None:
    _, out, _, _ = everything
    shot = tmp_path / "card.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,3000"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        ["chromium", *flags, profile, f"--screenshot={shot}", (out / "card.html").as_uri()],
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert shot.stat().st_size > 20_000


@pytest.mark.shared
def test_synthetic_speech_is_not_taken_for_broken(tmp_path) -> None:
    """One voice, alike throughout: the copies found must be those that are there."""
    source = Source("espeak", str(SHARED / "manifest.jsonl"), split="dev")
    clip_set = open_source(source)
    audit = audit_set(clip_set, threads=2)
    lost = [f for f in audit.findings_N if f]
    assert len(lost) < 0.05 * len(clip_set.clips), lost
