"""The commands as a new user meets them: what comes out where, and what a fault is told like."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from reference import noise, tiny_folder
from safetensors.numpy import load_file

from hebasr_jax.cli import main

ROOT = Path(__file__).parent.parent
FEW = ("--max-new-tokens", "8")  # one program serves all runs of a batch size
TINY = "transformers"
GOOD = {  # samples and rate
    "8k.wav": (4_800, 8_000),
    "stereo.flac": (26_460, 44_100),
    "a.wav": (14_400, 16_000),
    "a.mp3": (9_600, 16_000),
    "שיחה ראשונה/b.ogg": (9_600, 16_000),
    "שיחה ראשונה/תת תיקייה/ג.opus": (9_600, 16_000),
    "short.wav": (159, 16_000),
    "silence.wav": (8_000, 16_000),
}
BAD = {
    "text.wav": "cannot be read as sound",
    "empty.wav": "empty (zero bytes)",
    "cut.flac": "is cut or damaged",
    "nan.wav": "NaN or infinite",
    "שיחה ראשונה/טקסט.wav": "cannot be read as sound",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """The tiny model in each layout."""
    original = tmp_path_factory.mktemp("models") / "original"
    assert main(["convert", str(tiny_folder()), str(original), "--layout", "original"]) == 0
    return {TINY: tiny_folder(), "original": original}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """A folder of every kind of file, good and bad."""
    folder = tmp_path_factory.mktemp("sounds")
    for name, (samples, rate) in GOOD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        wave = noise(samples, samples) * (name != "silence.wav")
        wave = np.stack([wave, wave[::-1]], axis=1) if "stereo" in name else wave
        opus = {"format": "OGG", "subtype": "OPUS"} if name.endswith("opus") else {}
        soundfile.write(folder / name, wave, rate, **opus)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan] * 4_000), 16_000, "FLOAT")
    for name in ("text.wav", "שיחה ראשונה/טקסט.wav", "notes.txt"):
        (folder / name).write_text("שלום, זה לא קול\n" * 50, encoding="utf-8")
    (folder / "empty.wav").touch()
    soundfile.write(folder / "cut.flac", noise(16_000), 16_000)
    os.truncate(folder / "cut.flac", (folder / "cut.flac").stat().st_size // 2)
    return folder


@pytest.fixture
def hebasr(capsys):
    """Runs a command in this process -> exit code, stdout, stderr."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(hebasr):
    """Runs a command that must fail with one to three lines, nothing on stdout and no trace."""

    def run(*words) -> str:
        code, out, err = hebasr(*words)
        assert (code, out) == (1, ""), err
        assert "Traceback" not in err
        before, _, message = err.partition("error: ")
        assert len(before.splitlines()) <= 2  # what runs where, and a warning
        assert 1 <= len(message.splitlines()) <= 3, err
        assert "fault of hebasr" not in message
        return message

    return run


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def outputs(kind: str) -> set[str]:
    """Where the good files' texts go: a.wav and a.mp3 keep their suffixes."""
    keep = {"a.wav", "a.mp3"}
    return {f"{name if name in keep else Path(name).with_suffix('')}.{kind}" for name in GOOD}


def test_a_mixed_folder_in_either_layout(hebasr, models, sounds, tmp_path) -> None:
    written = []
    for layout, model in models.items():
        out_dir = tmp_path / layout / "new"
        words = (model, sounds, "--format", "txt", "json", "--out-dir", out_dir)
        code, out, err = hebasr("transcribe", *words, *FEW)
        assert (code, out) == (1, "")
        assert "Traceback" not in err
        failures = err[err.index("not transcribed: ") :]
        assert failures.count("not transcribed: ") == len(BAD)
        for name, why in BAD.items():
            assert f"not transcribed: {sounds / name}: " in failures
            assert why in failures
        for name in GOOD:
            assert f"/{len(GOOD) + len(BAD)} {Path(name).name}\n" in err
        written.append(tree(out_dir))
    files = written[0]
    assert written[1] == files
    assert files.keys() == outputs("txt") | outputs("json")
    assert len({files[name] for name in outputs("txt")}) >= 5
    for name in outputs("json"):
        content = json.loads(files[name].decode("utf-8"))
        samples, rate = GOOD[str(Path(content["file"]).relative_to(sounds))]
        assert content["duration_s"] == pytest.approx(samples / rate, abs=1e-3)
        assert content["finished"] == (len(content["tokens"]) < 8)
        assert files[name.replace(".json", ".txt")].decode() == content["text"] + "\n"
    assert "תת תיקייה/ג.opus".encode() in files["שיחה ראשונה/תת תיקייה/ג.json"]


def test_only_results_go_to_stdout(hebasr, models, sounds) -> None:
    one, two = sounds / "8k.wav", sounds / "שיחה ראשונה/b.ogg"
    code, out, err = hebasr("transcribe", models[TINY], one, two, "--format", "json", *FEW)
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert first["text"] != second["text"]
    assert "attention: xla" in err
    assert f"warning: {one}: the budget of tokens ran out between 0.0 and 0.6 s" in err
    assert "2/2 b.ogg" in err
    for content in (first, second):
        code, out, err = hebasr("transcribe", models[TINY], content["file"], *FEW)
        assert (code, out) == (0, content["text"] + "\n")
        assert "1/1" not in err
    _, out, _ = hebasr("transcribe", models[TINY], f"{sounds}/8k.w?v", two, *FEW)
    lines = [f"{c['file']}\t{' '.join(c['text'].split())}" for c in (first, second)]
    assert out.split("\n") == [*lines, ""]


def test_no_option_is_ignored(hebasr, models, sounds) -> None:
    def run(name: str, *option: str) -> tuple[dict, str]:
        _, out, err = hebasr(
            "transcribe", models[TINY], sounds / name, "--format", "json", *FEW, *option
        )
        return json.loads(out), err

    plain = run("a.wav")[0]["tokens"]
    assert run("a.wav", "--context", "שלום")[0]["tokens"] != plain
    assert run("a.wav", "--language", "English")[0]["tokens"] != plain
    assert run("a.wav", "--max-new-tokens", "5")[0]["tokens"] == plain[:5]
    assert run("short.wav", "--language", "English")[0]["language"] == "English"
    assert run("short.wav", "--language", "auto")[0]["language"] is None
    assert "bfloat16 on" in run("short.wav", "--dtype", "bfloat16")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "transcribe"),
        (("transcibe", "m", "a.wav"), "convert"),
        (("transcribe",), "MODEL"),
        (("transcribe", "m", "a.wav", "--max-new-tokenz", "4"), "--max-new-tokens"),
        (("transcribe", "m", "a.wav", "--format", "docx"), "docx"),
        (("transcribe", "m", "a.wav", "--max-new-tokens", "many"), "many"),
        (("convert", "m", "n"), "--layout"),
        (("convert", "m", "n", "--layout", "whisper"), "original"),
    ],
)
def test_what_is_no_command_is_answered_with_help(hebasr, words, told) -> None:
    code, out, err = hebasr(*words)
    assert (code, out) == (2, "")
    assert told in err
    assert "--help" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--language hebrew", "'hebrew' is not a language name"),
        ("--max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("--max-new-tokens 99999999", "99999999 tokens cannot be had"),
        ("--batch-audio-s nan", "--batch-audio-s must be positive"),
        ("--format", "--format names nothing"),
        ("--attention cudnn", "cudnn attention kernel needs a GPU"),
        ("--timestamps", "no time-stamp tokens"),
        ("--revision main", "a folder has no revision main"),
        ("--out-dir {sounds}/a.wav", "a.wav is no folder"),
        ("--out-dir {sounds}/a.wav/x/y", "a.wav is no folder"),
        ("{sounds}/none.wav", "none.wav: no such file"),
    ],
)
def test_what_transcribe_cannot_do_is_said_in_three_lines(
    refused, models, sounds, option, told
) -> None:
    words = option.format(sounds=sounds).split()
    assert told in refused("transcribe", models[TINY], sounds / "8k.wav", *words)


def test_no_audio_and_no_model(refused, models, sounds, tmp_path) -> None:
    assert "no audio files given" in refused("transcribe", models[TINY])
    assert "has no audio file in it" in refused("transcribe", models[TINY], tmp_path)
    a_file = refused("transcribe", sounds / "8k.wav", sounds / "8k.wav")
    assert "is a file, not a model folder" in a_file
    mixed = shutil.copytree(models["original"], tmp_path / "model")
    shutil.copyfile(models[TINY] / "config.json", mixed / "config.json")
    message = refused("transcribe", mixed, sounds / "8k.wav")
    assert "do not fit its config.json (transformers layout)" in message
    assert "thinker." in message


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file grows over `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ('edit config.json qwen3_asr" whisper"', "model_type is 'whisper'"),
        ("edit config.json head_dim other", "no 'head_dim'"),
        ("edit config.json 399 400", "embed_tokens.weight (399, 48) for (400, 48)"),
        ("edit config.json 261 7", "config.json and tokenizer"),
        ("remove config.json", "it has no config.json"),
        ("cut config.json", "config.json cannot be read"),
        ("cut model.safetensors", "model.safetensors cannot be read\nit is damaged or cut short"),
        ("cut model-00002-of-00006.safetensors", "model-00002-of-00006.safetensors cannot be read"),
        ("remove model-00002-of-00006.safetensors", "lacks model-00002-of-00006.safetensors"),
        ("remove model.safetensors", "has no model.safetensors"),
        ("rename model.safetensors pytorch_model.bin", "pytorch_model.bin may be a pickle"),
        ("remove tokenizer.json", "There is no tokenizer"),
        ("cut tokenizer.json", "Cannot read the tokenizer"),
        ("remove .", "no such model"),
    ],
)
def test_a_damaged_model_is_refused_by_both_commands(
    hebasr, refused, sounds, tmp_path, damage, told
) -> None:
    model = tmp_path / "model"
    if "-of-" in damage:
        hebasr("convert", tiny_folder(), model, "--layout", TINY, "--shard-gb", "0.0001")
    else:
        shutil.copytree(tiny_folder(), model)
    harm(model, *damage.split())
    assert told in refused("transcribe", model, sounds / "8k.wav", "--out-dir", tmp_path / "out")
    for layout in (TINY, "original"):
        assert told in refused("convert", model, tmp_path / "new", "--layout", layout)
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


def harm(model: Path, verb: str, name: str, *rest: str) -> None:
    path = model / name
    if verb == "cut":
        os.truncate(path, path.stat().st_size * 2 // 3)
    elif verb == "edit":
        path.write_text(path.read_text(encoding="utf-8").replace(*rest), encoding="utf-8")
    elif verb == "rename":
        path.rename(model / rest[0])
    else:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_trace_is_shown_with_debug_only(hebasr, refused, models, sounds, monkeypatch) -> None:
    words = ("transcribe", models[TINY], sounds / "none.wav")
    refused(*words)
    code, out, err = hebasr("--debug", *words)
    assert (code, out) == (1, "")
    assert "Traceback" in err
    monkeypatch.setattr("hebasr_jax.audio.expand_inputs", lambda _: [][0])
    code, out, err = hebasr(*words)
    assert (code, out) == (1, "")
    assert err.startswith("error: IndexError: list index out of range\nthis is a fault of hebasr")
    assert len(err.splitlines()) == 2
    assert "IndexError" in hebasr(*words, "--debug")[2].splitlines()[-1]


def test_there_and_back_leaves_the_source_as_it_was(hebasr, models, tmp_path) -> None:
    before = tree(models["original"])
    words = ("convert", models["original"], tmp_path / "back", "--layout", TINY)
    code, out, err = hebasr(*words)
    assert (code, out) == (0, "")
    assert f"wrote {tmp_path / 'back'} (transformers layout)" in err
    assert tree(models["original"]) == before
    weights = "model.safetensors"
    assert stored(tmp_path / "back" / weights) == stored(tiny_folder() / weights)
    assert [path.name for path in tmp_path.iterdir()] == ["back"]


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    tensors = load_file(path).items()
    return {key: (tensor.dtype.name, tensor.tobytes()) for key, tensor in tensors}


def test_options_of_convert(hebasr, models, sounds, tmp_path) -> None:
    words = ("convert", models["original"], tmp_path / "new", "--layout", TINY)
    assert hebasr(*words, "--dtype", "float16", "--shard-gb", "0.0001", "--add-timestamps")[0] == 0
    shards = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(shards) >= 3
    assert max(path.stat().st_size for path in shards) < 110_000
    assert {dtype for path in shards for dtype, _ in stored(path).values()} == {"float16"}
    again = ("transcribe", tmp_path / "new", sounds / "a.wav", "--format", "json", *FEW)
    code, stamped, _ = hebasr(*again, "--timestamps")
    assert code == 0
    assert json.loads(stamped)["tokens"] != json.loads(hebasr(*again)[1])["tokens"]


@pytest.mark.parametrize(
    ("option", "told"),
    [(f"--shard-gb {size}", "--shard-gb must be positive") for size in (0, -1, "nan", "inf")]
    + [("--revision main", "a folder has no revision main")],
)
def test_what_convert_cannot_do_is_said_too(refused, models, tmp_path, option, told) -> None:
    words = ("convert", models[TINY], tmp_path / "new", "--layout", TINY, *option.split())
    assert told in refused(*words)


def test_nothing_is_overwritten(refused, models, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    before = tree(tmp_path)
    for taken in (tmp_path / "mine", tmp_path / "mine/notes.txt"):
        assert "exists" in refused("convert", models[TINY], taken, "--layout", "original")
    assert tree(tmp_path) == before
    assert "exists" in refused("convert", tmp_path / "none", tmp_path, "--layout", TINY)
    source = tree(models["original"])
    assert "exists" in refused("convert", *[models["original"]] * 2, "--layout", TINY)
    assert tree(models["original"]) == source


@pytest.mark.parametrize("size", [100, 3_000, 7_000, 400_000])
def test_a_full_disk_under_a_model_leaves_nothing(refused, models, tmp_path, size) -> None:
    for layout, model in models.items():
        with file_limit(size):
            message = refused("convert", model, tmp_path / "new", "--layout", layout)
        assert "new cannot be written" in message
        assert "File too large" in message
        assert list(tmp_path.iterdir()) == []


# Stops where everything is on disk under the temporary name.
SLOW_CONVERT = """
import sys, time
from hebasr_jax import cli, export
def sync(path):
    print("on disk", flush=True)
    time.sleep(60)
export._sync = sync
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_convert_stopped_in_mid_write_leaves_no_folder(models, tmp_path, how) -> None:
    words = ("-c", SLOW_CONVERT, models[TINY], tmp_path / "new", "--layout", "original")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, *map(str, words)], env=environment, **pipes)
    assert process.stdout.readline() == "on disk\n"
    (partial,) = tmp_path.iterdir()
    assert (partial / "model.safetensors").exists()
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert not (tmp_path / "new").exists()
    assert "Traceback" not in err
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted"
        assert list(tmp_path.iterdir()) == []
