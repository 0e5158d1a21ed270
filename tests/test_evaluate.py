"""The command `evaluate` as a user gives it: six sets from a stand-in hub, and faults in them."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from benchmark_fixtures import CONVERTED, GATED, REPOS, TEXTS, all_six, kan, parquet, sound
from reference import tiny_folder
from safetensors.numpy import load_file, save_file
from stand_in_hub import TOKEN, child, served

from hebasr_jax.cli import main
from hebasr_jax.data.decode import as_file, read_sound
from hebasr_jax.hypotheses import read_hypotheses, write_hypotheses
from hebasr_jax.transcribe import load_recognizer, transcribe

SIX = tuple(REPOS)


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_folder()


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """One run over the six sets of a hub, and a way to run again."""
    space = tmp_path_factory.mktemp("six")
    with served(None) as hub:
        for name, refs in all_six().items():
            for ref, files in refs.items():
                hub.push_dataset(REPOS[name], files, ref)
        hub.gated.update(REPOS[name] for name in GATED)

        def run(home: str = "home", **env: str):
            words = ("evaluate", str(tiny), "--out", str(space / "out"), "--piece-s", "4")
            words = ("-m", "hebasr_jax", *words, "--sets", *SIX)
            done = child(space / home, hub, *words, JAX_PLATFORMS="cpu", **env)
            return done, json.loads((space / "out" / "results.json").read_text(encoding="utf-8"))

        done, results = run()
        made = SimpleNamespace(hub=hub, out=space / "out", run=run, done=done, results=results)
        made.written = _written(made.out)
        yield made


def _written(out: Path) -> dict[str, int]:
    """When the texts of each set were made."""
    return {f.parent.name: f.stat().st_mtime_ns for f in out.glob("*/hypotheses.jsonl")}


def test_all_six_in_one_run(first) -> None:
    assert first.done.returncode == 0, first.done.stderr
    assert list(first.results["sets"]) == [*SIX]
    assert first.results["skipped"] == {}
    assert not first.hub.asked("resolve.*(train|af_za|/ar/)")
    for name, scores in first.results["sets"].items():
        rows = read_hypotheses(first.out / name / "hypotheses.jsonl")
        assert [row.reference for row in rows] == [text or "" for text in TEXTS[name]]
        assert scores["clips"] == len(rows) == len(TEXTS[name])
        assert scores["words"] == sum(len(_words(text)) for text in TEXTS[name])
        ref = CONVERTED if name in ("fleurs", "common-voice") else "main"
        assert scores["revision"] == first.hub.datasets[REPOS[name]][ref]
        assert scores["audio_s"] == pytest.approx(sum(row.duration_s for row in rows))
        assert scores["draws"] == ("recordings" if name.startswith("eval-") else "clips")
        assert (first.out / name / "missing.jsonl").read_text() == ""
        assert (scores["missing"], scores["withheld"], scores["max_clips"]) == (0, None, None)
        assert scores["rtfx"] == pytest.approx(scores["audio_s"] / scores["recognition_s"])
    long = read_hypotheses(first.out / "eval-d1" / "hypotheses.jsonl")
    assert all(59.9 < row.duration_s < 60.3 and row.pieces >= 15 for row in long)
    wers = [scores["wer"] for scores in first.results["sets"].values()]
    assert first.results["macro"]["wer"] == pytest.approx(np.mean(wers))
    assert first.results["macro"]["complete"]
    assert (first.out / "report.html").is_file()


def _words(text: str | None) -> list[str]:
    return re.sub("[-־]", " ", text or "").split()


def test_the_texts_are_those_of_transcribe(first, tiny) -> None:
    recognizer = load_recognizer(str(tiny))
    waves = []
    for seed in (15, 16, 17, 18):  # of kan
        with as_file(sound(3.5, seed, kind="FLAC")) as file:
            waves.append(read_sound(file, 3.5, ""))
    ours = [found.transcript.text for found in transcribe(recognizer, waves)]
    rows = read_hypotheses(first.out / "kan" / "hypotheses.jsonl")
    assert [row.hypothesis for row in rows] == ours


def test_a_second_run_does_only_what_changed(first) -> None:
    """Another revision of kan."""
    moved = kan()["main"]
    name = next(name for name in moved if "00000-of-00002" in name)
    moved[name] = parquet([sound(3.5, 15, kind="FLAC")], {"sentence": ["נוסח אחר"]})
    sha = first.hub.push_dataset(REPOS["kan"], moved)
    done, results = first.run()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nothing changed since it was decoded") == 5
    written = _written(first.out)
    assert {n for n in SIX if written[n] != first.written[n]} == {"kan"}
    assert results["sets"]["kan"]["revision"] == sha
    assert {**results["sets"], "kan": None} == {**first.results["sets"], "kan": None}


def test_faults_stay_in_their_set(first) -> None:
    """No token, files cut short, a column of another name, a clip that is no sound."""
    hub = first.hub
    cut = {name: data[:-20] for name, data in hub_files(hub, "saspeech").items()}
    hub.push_dataset(REPOS["saspeech"], cut)
    renamed = parquet([sound(1.0, 2)], {"text": ["א"], "path": ["1.wav"]})
    hub.push_dataset(REPOS["fleurs"], {"he_il/test/0000.parquet": renamed}, CONVERTED)
    broken = parquet([sound(3.5, 1), b"RIFF"], {"sentence": ["אחת", "שתיים"]})
    hub.push_dataset(REPOS["kan"], {"data/validation-00000-of-00001.parquet": broken})
    done, results = first.run("empty", HF_TOKEN="")
    assert done.returncode == 1
    assert _written(first.out)["eval-d1"] == first.written["eval-d1"]
    assert set(results["sets"]) == {"eval-d1", "kan"}
    skipped = results["skipped"]
    assert set(skipped) == {"eval-whatsapp", "saspeech", "fleurs", "common-voice"}
    assert all(1 <= len(reason.splitlines()) <= 3 for reason in skipped.values())
    for name in GATED:
        assert "accept the terms" in skipped[name]
        assert "hf auth login" in skipped[name]
    assert "no readable parquet file" in skipped["saspeech"]
    assert "no column 'transcription'" in skipped["fleurs"]
    assert "fleurs@COMMIT" in skipped["fleurs"]
    scores = results["sets"]["kan"]
    assert scores["wer"] is scores["ci95"] is scores["cer"] is None
    assert "1 of 2 clips" in scores["withheld"]
    lost = json.loads((first.out / "kan" / "missing.jsonl").read_text(encoding="utf-8"))
    assert "#1" in lost["id"]
    assert results["macro"]["sets"] == ["eval-d1"]
    assert not results["macro"]["complete"]
    failed = done.stderr.splitlines()[-1]
    assert failed == "not all was evaluated: saspeech, fleurs, kan"
    assert not any(TOKEN.encode() in f.read_bytes() for f in first.out.rglob("*") if f.is_file())


def hub_files(hub, name: str) -> dict[str, bytes]:
    return hub.commits[hub.datasets[REPOS[name]]["main"]]


@pytest.fixture
def evaluate(tiny, tmp_path, capsys, monkeypatch):
    """The command on a folder of kan's files; what it says, and the results."""
    monkeypatch.chdir(tmp_path)
    for name, data in kan()["main"].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)

    def run(*words: str, code: int = 0, model: Path = tiny, sets=("--sets", "kan=data")):
        assert main(["evaluate", str(model), *sets, "--out", "out", *words]) == code
        told = capsys.readouterr().err
        path = tmp_path / "out" / "results.json"
        return told, json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    return run


def test_what_a_stored_text_depends_on(evaluate, tiny, tmp_path) -> None:
    """A key that anything is missing from gives a stale result."""
    _, results = evaluate()
    made = _written(tmp_path / "out")

    def redone(*words: str, **options) -> dict:
        nonlocal made
        before, (_, found) = made, evaluate(*words, **options)
        made = _written(tmp_path / "out")
        assert made != before, words
        return found["sets"]["kan"]

    told, again = evaluate("--no-style", "--bootstrap", "10", "--batch-audio-s", "60")
    assert "nothing changed" in told  # scored anew, not decoded
    assert _written(tmp_path / "out") == made
    assert results["sets"]["kan"]["style"]
    assert again["sets"]["kan"]["style"] is None
    assert redone("--piece-s", "25")["key"] != results["sets"]["kan"]["key"]
    trial = redone("--max-clips", "3")
    assert (trial["clips"], trial["max_clips"]) == (3, 3)
    assert redone("--dtype", "bfloat16")["dtype"] == "bfloat16"
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * leaf for name, leaf in weights.items()}, other / "model.safetensors")
    redone(model=other)
    redone()
    redone("--overwrite")
    file = next((tmp_path / "data").glob("validation-00000*"))
    texts, size = TEXTS["kan"][:1], len(sound(3.5, 15))
    file.write_bytes(parquet([sound(3.5, 15)], {"sentence": texts}))
    redone()
    assert len(sound(3.5, 18)) == size
    file.write_bytes(parquet([sound(3.5, 18)], {"sentence": texts}))
    redone()


def test_up_to_one_clip_in_a_hundred_may_be_missing(evaluate, tmp_path) -> None:
    names = [f"{number}.wav" for number in range(101)]
    for number, name in enumerate(names):
        soundfile.write(tmp_path / name, np.full(1600, 0.1 * (number % 2)), 16000)
    rows = [
        {"audio": name, "text": "מילה", "duration_s": 0.1, "speaker": f"s{number % 3}"}
        for number, name in enumerate(names)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "own.jsonl").write_text(lines, encoding="utf-8")
    own = ("--manifest", "own.jsonl")
    scores = evaluate(sets=own)[1]["sets"]["own"]
    assert (scores["clips"], scores["draws"], scores["missing"]) == (101, "speakers", 0)
    found = read_hypotheses(tmp_path / "out" / "own" / "hypotheses.jsonl")
    assert {row.group for row in found} == {"s0", "s1", "s2"}
    assert [row.silent for row in found[:4]] == [True, False, True, False]
    assert found[5].audio == str(tmp_path / "5.wav")

    (tmp_path / "5.wav").write_bytes(b"no sound")
    scores = evaluate(sets=own)[1]["sets"]["own"]
    assert (scores["clips"], scores["missing"], scores["withheld"]) == (100, 1, None)
    assert scores["wer"] is not None
    lost = json.loads((tmp_path / "out" / "own" / "missing.jsonl").read_text(encoding="utf-8"))
    assert lost["id"] == "5.wav"

    (tmp_path / "7.wav").write_bytes(b"no sound")
    told, results = evaluate(sets=own, code=1)
    assert results["sets"]["own"]["wer"] is None
    assert "2 of 101 clips" in results["sets"]["own"]["withheld"]
    assert "2 of 101 clips" in told
    for name in names:
        (tmp_path / name).write_bytes(b"no sound")
    told, results = evaluate(sets=own, code=1)
    assert "own" in results["skipped"]
    assert results["sets"] == {}


def test_two_folders_are_compared_clip_by_clip(evaluate, tiny, tmp_path, capsys) -> None:
    evaluate()
    shutil.copytree("out", "b")
    path = tmp_path / "b" / "kan" / "hypotheses.jsonl"
    rows = read_hypotheses(path)
    write_hypotheses(path, [replace(row, hypothesis=row.reference) for row in rows])
    assert main(["evaluate", "--compare", "out", "b"]) == 0
    table = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    pair = content["sets"]["kan"]
    assert pair["wer_second"] == 0
    assert pair["difference"] == pair["wer_first"] > 0
    assert f"{100 * pair['wer_first']:.1f} %" in table
    assert main(["evaluate", "--compare", "b", "out", "--out", "c"]) == 0
    assert main(["evaluate", str(tiny), "--out", "d", "--compare", "b", "out"]) == 1
    assert "--compare is of folders" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    turned = json.loads((tmp_path / "c" / "compare.json").read_text(encoding="utf-8"))
    assert turned["sets"]["kan"]["difference"] == -pair["difference"]
    capsys.readouterr()
    for changed, why in (
        (rows[1:], "not the same clips (1 on one side only)"),
        ([replace(rows[0], reference="אחר"), *rows[1:]], "1 references are not the same"),
    ):
        write_hypotheses(path, changed)
        assert main(["evaluate", "--compare", "out", "b"]) == 1
        assert why in capsys.readouterr().err
    evaluate()
    assert (tmp_path / "out" / "compare.json").exists()
    evaluate("--no-style")  # its page would show two rates of the first
    assert not (tmp_path / "out" / "compare.json").exists()
    assert main(["evaluate", "--compare", "out", "none"]) == 1
    assert "none: holds no results" in capsys.readouterr().err


def test_other_sets_of_the_folder_stay_only_if_the_same_system_made_them(evaluate) -> None:
    evaluate()
    soundfile.write("a.wav", np.zeros(56000), 16000)
    lines = [json.dumps({"audio": "a.wav", "id": str(row), "text": ""}) for row in range(3)]
    Path("mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    mine = ("--manifest", "mine.jsonl")
    assert set(evaluate(sets=mine)[1]["sets"]) == {"kan", "mine"}
    assert set(evaluate("--piece-s", "25", sets=mine)[1]["sets"]) == {"mine"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sets", "eval-d2"), ["eval-d2: is no set", ", ".join(SIX), "--manifest"]),
        ((), ["no set given", "--sets"]),
        (("--sets", "kan", "kan=data"), ["kan: cannot be the name"]),
        (("--manifest", "control.jsonl"), ["control: cannot be the name"]),
        (("--sets", "kan=data", "--piece-s", "0"), ["--piece-s must be positive"]),
        (("--sets", "kan=data", "--max-clips", "0"), ["--max-clips must be positive"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_read(evaluate, words, told) -> None:
    err, results = evaluate(*words, code=1, model=Path("none"), sets=())
    assert [text for text in told if text not in err] == []
    assert len(err.splitlines()) <= 3
    assert results == {}


def test_an_out_that_cannot_be_written_is_told_before_a_model_is_read(
    tiny, tmp_path, capsys
) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    outs = {"taken/out": "is no folder", "dangling": "is no folder", "x" * 300: "name too long"}
    for out, why in outs.items():
        words = ["evaluate", "none", "--sets", "kan=data", "--out", str(tmp_path / out)]
        assert main(words) == 1
        told = capsys.readouterr().err
        assert f"{why}\nname another folder" in told
        assert "fault of hebasr" not in told


def test_published_figures_stand_beside_ours(evaluate) -> None:
    published = evaluate()[1]["published"]
    assert list(published) == [*SIX]
    ivrit = [published[name][0]["wer"] for name in SIX]
    assert ivrit == pytest.approx([0.051, 0.072, 0.064, 0.174, 0.149, 0.081])
    assert all(row["source"] for rows in published.values() for row in rows)


def test_training_data_are_looked_for_in_the_sets(evaluate, tmp_path) -> None:
    """A manifest that is not there is told before anything is decoded."""
    told, results = evaluate("--check-overlap", "none.jsonl", code=1)
    assert "none.jsonl: no such file" in told
    assert results == {}
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "all.parquet").write_bytes(parquet([sound(1, 1)], {"text": ["א"]}))
    evaluate("--check-overlap", "train")
    content = json.loads((tmp_path / "out" / "overlap.json").read_text(encoding="utf-8"))
    assert set(content["tests"]) == {"kan"}


def test_a_control_that_is_not_installed_is_told_before_anything_is_decoded(
    evaluate, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    told, results = evaluate("--control", "org/whisper", code=1)
    assert "pip install 'hebasr-jax[control]'" in told
    assert results == {}
