"""Speech from texts: by eSpeak and by commands, stopped and resumed, tagged, capped in a mix."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from hebasr_jax import dry_run
from hebasr_jax.card import write_card
from hebasr_jax.config_file import load_config
from hebasr_jax.data.clips import synthetic_warnings
from hebasr_jax.data.draws import SetInfo, refuse_synthetic
from hebasr_jax.data.espeak import saying_of
from hebasr_jax.data.prepare_command import Prepare
from hebasr_jax.data.sources import open_source
from hebasr_jax.errors import UserError
from hebasr_jax.layout import write_settings
from hebasr_jax.run_config import Columns, Data, Source
from hebasr_jax.text import load_tokenizer
from hebasr_jax.tiny import TINY, write_byte_tokenizer

# Says a text as a tone whose pitch is its length; what it does otherwise, the text asks for.
VOICE = """
import math, os, signal, struct, subprocess, sys, time, wave
given, out = sys.argv[1:3]
text = sys.stdin.read() if given == "-" else open(given).read() if os.path.exists(given) else given
text = text.rstrip("\\n")
with open(os.path.join(os.path.dirname(__file__), "log"), "a") as log:
    log.write(text + "|" + " ".join(sys.argv[3:]) + "\\n")
if "fail" in text:
    print("no such word", file=sys.stderr)
    sys.exit(3)
if "hang" in text:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(os.path.join(os.path.dirname(__file__), "child"), "w") as file:
        file.write(str(child.pid))
    time.sleep(60)
if "kill" in text and not os.path.exists(os.path.join(os.path.dirname(__file__), "calm")):
    os.kill(os.getppid(), signal.SIGKILL)
loud = 0 if "hush" in text else 9000
count = 400 if "short" in text else 4000
if "nothing" in text:
    sys.exit(0)
if "noise" in text:
    open(out, "wb").write(b"no sound at all" * 9)
    sys.exit(0)
samples = [round(loud * math.sin(n * (1 + len(text)) / 50)) for n in range(count)]
with wave.open(out, "wb") as sound:
    sound.setnchannels(1)
    sound.setsampwidth(2)
    sound.setframerate(8000)
    sound.writeframes(struct.pack(f"<{count}h", *samples))
"""
SONG = (
    rb"\u05d4\u05b7\u05e9\u05bc\u05c1\u05b4\u05d9\u05e8"  # dagesh, dot, vowel, as eSpeak reads them
)
WORDS = ("שלום", "תודה רבה", "בוקר טוב לכולם", "מה שלומך היום")


@pytest.fixture
def command(tmp_path) -> str:
    (tmp_path / "voice.py").write_text(VOICE, encoding="utf-8")
    return f"{sys.executable} -I -S {tmp_path / 'voice.py'} - {{out}}"


def write_texts(folder: Path, rows, name: str = "t.jsonl") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder / name


def prepare(texts: Path, out: Path, **flags) -> Path:
    """The folder of the set that was made."""
    assert Prepare(out, **{"synthesize": texts, "name": "said", "processes": 1} | flags).run() == 0
    return out / "said"


def opened(folder: Path):
    return open_source(Source("said", str(folder)))


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def log(folder: Path) -> list[str]:
    return sorted((folder / "log").read_text(encoding="utf-8").splitlines())


def test_espeak_says_texts_as_speakers_that_follow_from_seed_and_id(tmp_path, capsys) -> None:
    rows = [{"id": f"r{n}", "text": f"{WORDS[n % 4]} [מחיאות] בְּרֵאשִׁית"} for n in range(5)]
    texts = write_texts(tmp_path, [*rows, {"id": "s1", "text": "כן", "speaker": "דנה"}])
    first = prepare(texts, tmp_path / "a", normalizer="hebrew-v1", licence="CC0")
    told = capsys.readouterr().err
    assert "6 of 6 texts have neither vowel points" in told  # the normaliser took them
    made = opened(first)
    assert made.clips[0].text == "שלום בראשית"
    assert all(clip.synthetic and clip.duration_s > 0.3 for clip in made.clips)
    lines = (first / "00000-of-00001.jsonl").read_bytes().splitlines()
    assert all(json.loads(line)["synthetic"] is True for line in lines)
    assert len({clip.speaker for clip in made.clips}) > 3
    assert made.clips[-1].speaker == "דנה"
    assert all(np.abs(made.read(n)).max() > 1000 for n in range(6))
    told = json.loads((first / "origin.json").read_bytes())
    assert told["voice"].startswith("eSpeak NG")
    assert (told["synthetic"], told["licence"], told["seed"]) == (True, "CC0", 0)
    # Some of the texts in another order and a new process each: the same sound by id.
    fewer = write_texts(tmp_path, [rows[4], rows[1]], "f.jsonl")
    again = opened(prepare(fewer, tmp_path / "b", normalizer="hebrew-v1", processes=2))
    assert np.array_equal(again.read(0), made.read(4))
    assert np.array_equal(again.read(1), made.read(1))
    other = opened(prepare(fewer, tmp_path / "c", normalizer="hebrew-v1", seed=1))
    assert not np.array_equal(other.read(0), made.read(4))


def test_ipa_is_said_by_phonemes_and_text_is_not() -> None:
    said = saying_of("ʃalˈom, ʁaχˈav.", "he", 3)
    assert said.phonemes
    assert re.findall(r"\[\[(.*?)\]\]", said.text) == ["Sal'om", "RaX'av"]
    for pointed in ("הַשִּׁיר", "הַשִּׁ֖יר", "הַ\ufb2cִיר"):  # NFC, with an accent, a presentation form
        assert saying_of(pointed, "he", 3).text.encode("unicode_escape") == SONG
    plain = saying_of("[[a]] שלום", "he", 3)
    assert (plain.text, plain.phonemes) == ("[[a]] שלום", False)
    assert saying_of("א", "he", 3)[2:4] == plain[2:4] != saying_of("א", "he", 4)[2:4]


def test_the_voice_can_be_given_another_field(tmp_path, command) -> None:
    rows = [{"id": "a", "text": "שָׁלוֹם", "ipa": "ʃalˈom"}, {"id": "b", "text": "כן"}]
    rows += [
        {"id": "c", "text": "תודה (צחוק)", "ipa": "todˈa tsχˈok"}
    ]  # would say more than it has
    flags = {"spoken": "ipa", "voice_command": command, "normalizer": "hebrew-v1"}
    folder = prepare(write_texts(tmp_path, rows), tmp_path / "o", **flags)
    assert [clip.text for clip in opened(folder).clips] == ["שלום"]
    assert log(tmp_path) == ["ʃalˈom|"]
    removed = (folder / "removed.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["id"] for line in removed] == ["b", "c"]


@pytest.mark.parametrize("how", ["-", "{text}", "{text_file}"])
def test_a_command_gets_texts_as_they_are(tmp_path, command, how) -> None:
    """Without a shell, without filling places in the text; voice, seed and speaker with it."""
    texts = ['א; echo "$HOME" {out} {seed} \'x', "שלום"]
    rows = [{"text": text, "words": text} for text in texts]
    rows += [{"text": "ג", "words": "ג", "voice": "mine"}]
    given = write_texts(tmp_path, rows)
    word = command.replace(" - ", f" {how} ") + " {voice} {seed}"
    folder = prepare(given, tmp_path / "o", voice_command=word, voices=("v/a.onnx", "v/b.onnx"))
    made = opened(folder)
    assert [clip.text for clip in made.clips] == [*texts, "ג"]
    assert [clip.id for clip in made.clips] == ["t-000001", "t-000002", "t-000003"]
    lines = dict(line.split("|") for line in log(tmp_path))
    assert set(lines) == {*texts, "ג"}
    assert all(re.fullmatch(r"(v/[ab]\.onnx|mine) \d+", line) for line in lines.values())
    assert lines["ג"].startswith("mine ")
    assert {clip.speaker for clip in made.clips} <= {"a.onnx", "b.onnx", "mine"}
    assert [len(made.read(n)) for n in range(3)] == [8000] * 3  # 8 kHz is resampled


def test_a_text_file_has_a_sentence_a_line(tmp_path, command) -> None:
    texts = tmp_path / "he.txt"
    texts.write_bytes("שלום\r\n\r\nתודה\n".encode() + b"\xff\xfe\n")
    folder = prepare(texts, tmp_path / "o", voice_command=command, max_bad_share=0.5)
    said = {clip.id: clip.text for clip in opened(folder).clips}
    assert said == {"he-000001": "שלום", "he-000003": "תודה"}
    bad = json.loads((folder / "quarantine.jsonl").read_text())
    assert (bad["id"], bad["reason"]) == ("he.txt:4", "is not UTF-8")


def test_columns_name_the_fields_and_bad_rows_are_told(tmp_path, command) -> None:
    rows = [{"t": "שלום", "no": 1}, {"t": "כן", "no": 1}, {"t": "", "no": 2}, "{", {"no": 5}]
    rows += [{"t": "\0", "no": 6}, {"t": "א", "no": 7, "voice": 5}]
    texts = write_texts(tmp_path, rows)
    flags = {"columns": Columns(text="t", id="no"), "voice_command": command}
    folder = prepare(texts, tmp_path / "o", max_bad_share=0.9, **flags)
    assert [clip.text for clip in opened(folder).clips] == ["שלום"]
    lines = (folder / "quarantine.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [
        "has the id of another row",
        "has no text to say",
        "is not JSON",
        "has no 't'",
        "has what no voice can be given",
        "'voice' is not a string",
    ]
    with pytest.raises(UserError, match=r"1 of 7 clips are bad"):
        prepare(texts, tmp_path / "p", **flags)
    assert log(tmp_path) == ["שלום|"]  # no voice was asked then


def test_what_is_no_speech_is_a_bad_row_with_its_reason(tmp_path, command) -> None:
    words = ["fail", "hang", "hush", "short", "nothing", "noise"]
    texts = write_texts(tmp_path, [{"id": word, "text": word} for word in [*words, *WORDS]])
    flags = {"voice_command": command, "voice_limit_s": 1.0}
    folder = prepare(texts, tmp_path / "o", max_bad_share=0.6, **flags)
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in lines} == {
        "fail": "voice command failed",
        "hang": "voice command took too long",
        "hush": "voice made silence",
        "short": "voice made hardly any sound",
        "nothing": "voice command wrote no sound",
        "noise": lines[5]["reason"],
    }
    assert "decoded" in lines[5]["reason"] or "read" in lines[5]["reason"]
    assert "exit code 3: no such word" in lines[0]["detail"]
    assert [clip.id for clip in opened(folder).clips] == [*WORDS]
    assert json.loads((folder / "origin.json").read_bytes())["bad"] == 6
    assert ended(int((tmp_path / "child").read_text()))  # what the command started, too


def test_too_many_bad_texts_stop_it_before_all_are_tried(tmp_path, command) -> None:
    texts = write_texts(tmp_path, [f"fail {n}" for n in range(60)], "t.txt")
    with pytest.raises(UserError, match=r"of 60 clips are bad.*\n2 x voice command failed"):
        prepare(texts, tmp_path / "o", voice_command=command, max_bad_share=0.02, processes=2)
    assert len(log(tmp_path)) < 20
    assert not list((tmp_path / "o").glob("*/*.arrayrecord"))


def test_nothing_is_left_of_a_set_without_speech(tmp_path, command) -> None:
    texts = write_texts(tmp_path, ["fail"], "t.txt")
    with pytest.raises(UserError, match="no text became speech\n1 x voice command failed"):
        prepare(texts, tmp_path / "o", voice_command=command, max_bad_share=1.0)


def test_killed_at_any_text_the_same_command_goes_on(tmp_path, command) -> None:
    rows = [{"text": f"{word} {n}"} for n in range(3) for word in WORDS] + [{"text": "kill"}]
    texts = write_texts(tmp_path, [*rows[:7], rows[-1], *rows[7:-1]])
    (tmp_path / "calm").touch()
    flags = {"voice_command": command, "shard_mb": 0.05}
    whole = content(prepare(texts, tmp_path / "whole", **flags))
    assert sum(name.endswith(".arrayrecord") for name in whole) > 2
    (tmp_path / "calm").unlink()
    (tmp_path / "log").unlink()
    code = """
        import sys
        from pathlib import Path
        from hebasr_jax.data.prepare_command import Prepare
        texts, out, command = sys.argv[1:]
        Prepare(Path(out), synthesize=Path(texts), name="said", voice_command=command,
                shard_mb=0.05, processes=1).run()
    """
    words = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(texts),
        str(tmp_path / "out"),
        command,
    ]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run(words, env=env, capture_output=True).returncode == -signal.SIGKILL
    sounds = [*(tmp_path / "out/said/.speech").glob("*.flac")]
    assert len(sounds) >= 5
    assert not (tmp_path / "out/said/origin.json").exists()
    (tmp_path / "calm").touch()
    (tmp_path / "log").unlink()
    assert content(prepare(texts, tmp_path / "out", **flags)) == whole
    assert len(log(tmp_path)) == 13 - len(sounds)  # the rest alone were said
    # A shard lost later on comes back as it was; of a whole set nothing is said again.
    prepare(texts, tmp_path / "out", **flags)
    assert len(log(tmp_path)) == 13 - len(sounds)
    next((tmp_path / "out/said").glob("00001*.arrayrecord")).unlink()
    assert content(prepare(texts, tmp_path / "out", **flags)) == whole


def test_other_texts_or_voices_do_not_mix_with_shards_that_are_there(tmp_path, command) -> None:
    texts = write_texts(tmp_path, WORDS, "t.txt")
    folder = prepare(texts, tmp_path / "o", voice_command=command)
    before, said = content(folder), log(tmp_path)
    for changed in ({"seed": 1}, {"normalizer": "hebrew-v1"}, {"format": "pcm"}):
        with pytest.raises(UserError, match=f"begun with other.*\n{next(iter(changed))} "):
            prepare(texts, tmp_path / "o", voice_command=command, **changed)
    write_texts(tmp_path, WORDS[1:], "t.txt")
    with pytest.raises(UserError, match=r"begun with other.*\nsha256"):
        prepare(texts, tmp_path / "o", voice_command=command)
    assert (content(folder), log(tmp_path)) == (before, said)
    write_texts(tmp_path, WORDS, "t.txt")
    prepare(texts, tmp_path / "o", voice_command=command, licence="CC0")  # a note may change
    assert json.loads((folder / "origin.json").read_bytes())["licence"] == "CC0"
    assert {**content(folder), "origin.json": b""} == {**before, "origin.json": b""}
    assert log(tmp_path) == said


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"voice_command": "say {txt} {out}"}, "{txt} is not known"),
        ({"voice_command": "cat"}, "has no {out}"),
        ({"voice_command": "no-such-program {out}"}, "no program no-such-program"),
        ({"voice_command": "cat 'a {out}"}, "No closing quotation"),
        ({"voice_command": "cat {out}", "voices": ("a",)}, "has no {voice}"),
        ({"voice_limit_s": 0.0}, "must be positive"),
        ({"shard": "1/2"}, "--shard is not for --synthesize"),
        ({"source": "x"}, "give --config, or --source"),
        ({"synthesize": Path("none.txt")}, "none.txt: no such file"),
    ],
)
def test_what_cannot_be_asked_for_is_told_and_nothing_written(tmp_path, flags, told) -> None:
    given = {"synthesize": write_texts(tmp_path, WORDS, "t.txt"), "name": "said"} | flags
    with pytest.raises(UserError, match=re.escape(told)):
        Prepare(tmp_path / "o", **given).run()
    assert not (tmp_path / "o").exists()


def test_the_tag_changes_a_fingerprint_and_is_true_or_false(tmp_path, command) -> None:
    folder = prepare(write_texts(tmp_path, WORDS, "t.txt"), tmp_path / "o", voice_command=command)
    tagged = opened(folder)
    manifest = folder / "00000-of-00001.jsonl"
    lines = [json.loads(line) for line in manifest.read_bytes().splitlines()]
    copy = [row | {"audio": str(folder / row["audio"])} for row in lines]
    prints = []
    for tag in (True, False, None):
        rows = [row | {"synthetic": tag} for row in copy]
        prints.append(open_source(Source("m", str(write_texts(tmp_path, rows, "m.jsonl")))))
    plain = [{k: row[k] for k in row if k != "synthetic"} for row in copy]
    bare = open_source(Source("m", str(write_texts(tmp_path, plain, "m.jsonl"))))
    assert bare.fingerprint == prints[1].fingerprint == prints[2].fingerprint
    assert prints[0].fingerprint != bare.fingerprint
    assert synthetic_warnings([bare]) == []
    assert synthetic_warnings([tagged, bare])[0].startswith("said: 4 of its 4 clips are synthetic")
    wrong = [row | {"synthetic": "yes"} for row in copy[:1]] + plain[1:]
    ((_, fault),) = open_source(Source("m", str(write_texts(tmp_path, wrong, "m.jsonl")))).bad
    assert fault.reason == "'synthetic' is neither true nor false"


def test_a_mix_with_more_synthetic_clips_than_the_limit_is_refused() -> None:
    people, half, made = (
        SetInfo(n, 100, None, n, s) for n, s in zip("phm", (0, 50, 100), strict=True)
    )
    refuse_synthetic([people, made], Data())
    refuse_synthetic([people, half], Data(max_synthetic_share=0.25))
    refuse_synthetic([people], Data(max_synthetic_share=0.0))
    refuse_synthetic([made], Data(max_synthetic_share=1.0))
    for sets, share, limit in (
        ([people, half], "25.0%", 0.24),
        ([people, half, made], "50.0%", 0.49),
        ([made], "100.0%", 0.5),
        ([people._replace(share=0.3), made._replace(share=0.7)], "70.0%", 0.5),
    ):
        told = rf"^{share} of an epoch.*= {limit:g}\nBy set: .*\nGive"
        with pytest.raises(UserError, match=told):
            refuse_synthetic(sets, Data(max_synthetic_share=limit))


def test_a_dry_run_tells_and_refuses(tmp_path, command, capsys) -> None:
    model = tmp_path / "model"  # no weights: a dry run reads none
    model.mkdir()
    write_byte_tokenizer(model)
    write_settings(model, TINY, load_tokenizer(model), "transformers", "float32")
    made = prepare(write_texts(tmp_path, WORDS, "t.txt"), tmp_path / "o", voice_command=command)
    rows = [json.loads(line) for line in (made / "00000-of-00001.jsonl").read_bytes().splitlines()]
    rows = [row | {"audio": str(made / row["audio"]), "synthetic": False} for row in rows]
    people = write_texts(tmp_path, rows, "people.jsonl")
    config = tmp_path / "config.py"
    config.write_text(f"""
from hebasr_jax.run_config import *
def get_config():
    sets = Source("people", {str(people)!r}), Source("said", {str(made)!r}, share=0.4)
    data = Data(train=sets, dev=(Source("dev", {str(made)!r}),), batch_clips=8)
    return Config(
        runs_dir={str(tmp_path)!r}, model=Model({str(tmp_path / "model")!r}), data=data,
        compute=Computation(dtype="float32", devices=1))
""")
    dry_run.dry_run(load_config(config))
    out = capsys.readouterr().out
    assert re.search(r"^said +4 +3 +0\.375 .* 1$", out, re.MULTILINE)
    assert "warning: dev: 4 of its 4 clips are synthetic" in out
    with pytest.raises(UserError, match=r"37.5% of an epoch's clips are synthetic .* = 0.3"):
        dry_run.dry_run(load_config(config, ["data.max_synthetic_share=0.3"]))


def test_the_model_card_tells_it(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    facts = {"data": {"said": {"path": "said", "clips": 1200, "synthetic": 1000}, "people": {}}}
    write_card(tmp_path, tmp_path / "run", facts)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.count("synthetic speech") == 1
    assert "1,000 of the 1,200 clips of said are synthetic speech" in text


def ended(process: int) -> bool:
    """Whether a process ends within two seconds; one that nobody waited for counts as ended."""
    for _ in range(20):
        try:
            os.kill(process, 0)
            if Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:  # gone, from the one or the other
            return True
        time.sleep(0.1)
    return False
