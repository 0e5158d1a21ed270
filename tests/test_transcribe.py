"""transcribe(): each clip as if it were alone, within its own budget, through few programs."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from reference import noise, tiny_folder

from hebasr_jax import transcribe as module
from hebasr_jax.audio import SAMPLE_RATE
from hebasr_jax.errors import UserError
from hebasr_jax.slots import Decoded, Utterance, bucket_s, classes
from hebasr_jax.text import PromptStyle, load_tokenizer, parse_output
from hebasr_jax.timestamps import Segment, add_stamp_tokens
from hebasr_jax.transcribe import (
    MAX_CLIP_S,
    Recognition,
    Recognizer,
    goes_round,
    load_recognizer,
    transcribe,
)
from hebasr_jax.writers import output_stems, write_whole

# Samples: no frame at all, one frame, one token and more; 8 s is the encoder's window.
LENGTHS = (0, 1, 159, 160, 200, 8_000, 16_000, 128_160, 130_000, 336_000)
BUDGET = 12
ROOT = Path(__file__).parent.parent
AUTO = PromptStyle(None, language_in_prompt=False)
STAMPED = PromptStyle(stamps=True)


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    return load_recognizer(str(tiny_folder()))


@pytest.fixture(scope="module")
def stamped(recognizer, tmp_path_factory) -> Recognizer:
    """The same weights, with a tokenizer that has time-stamp tokens."""
    folder = shutil.copytree(tiny_folder(), tmp_path_factory.mktemp("stamped") / "model")
    add_stamp_tokens(Path(folder), recognizer.config.decoder.vocab_size)
    return replace(recognizer, tokenizer=load_tokenizer(Path(folder)))


@pytest.fixture(scope="module")
def alone(recognizer) -> list[Recognition]:
    """Each clip in a call of its own."""
    return [transcribe(recognizer, [noise(n, n)], max_new_tokens=BUDGET)[0] for n in LENGTHS]


def test_outputs_vary_enough_to_prove_something(alone) -> None:
    spoken = [result.tokens for result in alone[3:]]
    assert len(set(spoken)) >= 5
    assert len({token for tokens in spoken for token in tokens}) > 12


@pytest.mark.parametrize("batch_audio_s", [1.0, 4.0, 240.0])
@pytest.mark.parametrize("order", [range(10), (9, 3, 0, 7, 2, 5, 6, 1, 8, 4)])
def test_neighbours_order_and_batch_size_change_nothing(
    recognizer, alone, order, batch_audio_s
) -> None:
    waves = [noise(LENGTHS[i], LENGTHS[i]) for i in order]
    results = transcribe(recognizer, waves, max_new_tokens=BUDGET, batch_audio_s=batch_audio_s)
    assert [replace(r, logprob=0.0) for r in results] == [
        replace(alone[i], logprob=0.0) for i in order
    ]
    logprobs = [r.logprob for r in results]
    assert logprobs == pytest.approx([alone[i].logprob for i in order], abs=1e-5)


def test_a_clip_without_a_frame_is_empty_and_finished(alone) -> None:
    for samples, result in zip(LENGTHS[:3], alone, strict=False):
        assert result.tokens == ()
        assert result.transcript.text == ""
        assert result.transcript.language == "Hebrew"
        assert result.finished
        assert result.duration_s == samples / SAMPLE_RATE
    assert alone[3].tokens


def test_no_clips_give_no_results(recognizer) -> None:
    assert transcribe(recognizer, []) == []


def test_int16_equals_float_also_in_one_batch(recognizer) -> None:
    whole = [(noise(n, n) * 32767).astype(np.int16) for n in (16_000, 8_000, 4_000)]
    floats = [wave / np.float32(32768) for wave in whole]
    expected = transcribe(recognizer, floats, max_new_tokens=BUDGET)
    assert expected[0].tokens != expected[1].tokens
    assert transcribe(recognizer, whole, max_new_tokens=BUDGET) == expected
    for mixed in ([*whole[:1], *floats[1:]], [*floats[:1], *whole[1:]]):
        assert transcribe(recognizer, mixed, max_new_tokens=BUDGET) == expected


def test_a_clip_over_the_limit_is_refused_before_any_is_decoded(recognizer, monkeypatch) -> None:
    monkeypatch.setattr(module, "decode_all", None)
    longest = np.zeros(int(MAX_CLIP_S * SAMPLE_RATE) + 1, np.int16)
    with pytest.raises(UserError, match="nothing is cut") as refused:
        transcribe(recognizer, [noise(16_000), longest])
    assert len(str(refused.value).splitlines()) == 3
    module._check_wave(longest[:-1])


@pytest.mark.parametrize(
    "wave", [np.zeros((2, 900), np.int16), np.zeros(900, np.int32), np.array([0, np.nan] * 450)]
)
def test_what_is_no_clip_is_refused(recognizer, wave) -> None:
    with pytest.raises(UserError, match=r"is no clip|not finite"):
        transcribe(recognizer, [noise(16_000), wave])


@pytest.mark.parametrize(
    ("waves", "options", "told"),
    [
        ([noise(16_000)], {"context": ["a", "b"]}, "contexts, 2, is not that of clips, 1"),
        ([noise(16_000)], {"max_new_tokens": [4, 4]}, "budgets, 2, is not that of clips, 1"),
        ([noise(160).tolist()], {}, "a list is no clip"),
        (noise(160), {}, "shape \\(\\) is no clip"),
    ],
)
def test_arguments_that_do_not_fit_are_told(recognizer, waves, options, told) -> None:
    with pytest.raises(UserError, match=told):
        inspect.unwrap(transcribe)(recognizer, waves, **options)  # not as the hook checks it


@pytest.fixture(scope="module")
def free(recognizer) -> Recognition:
    """One second, up to the default budget."""
    return transcribe(recognizer, [noise(16_000)])[0]


def test_the_default_budget_is_8_tokens_a_second_plus_16(recognizer, free) -> None:
    assert len(free.tokens) == 24
    assert not free.finished
    half = transcribe(recognizer, [noise(8_001)])[0]
    assert (len(half.tokens), half.finished) == (21, False)


@pytest.mark.parametrize("budget", [1, 7])
def test_a_budget_cuts_the_same_tokens_and_says_so(recognizer, free, budget) -> None:
    short = transcribe(recognizer, [noise(16_000)], max_new_tokens=budget)[0]
    assert short.tokens == free.tokens[:budget]
    assert not short.finished


def test_finished_is_false_exactly_when_the_budget_ran_out(recognizer, free) -> None:
    """A token of the output is made an end token; to write it takes one step of the budget."""
    end = free.tokens[9]
    first = free.tokens.index(end)
    special = replace(recognizer.tokenizer.special, endoftext=end)
    ending = replace(recognizer, tokenizer=replace(recognizer.tokenizer, special=special))
    for budget, finished in ((None, True), (first + 1, True), (first, False)):
        result = transcribe(ending, [noise(16_000)], max_new_tokens=budget)[0]
        assert result.tokens == free.tokens[:first]
        assert result.finished == finished


@pytest.mark.parametrize("budget", [0, -1, 4097, 10**12])
def test_a_budget_that_cannot_be_had_is_refused(recognizer, budget) -> None:
    with pytest.raises(UserError, match="4096 positions"):
        transcribe(recognizer, [noise(16_000)], max_new_tokens=budget)


def test_context_and_language_reach_the_model(recognizer, free) -> None:
    def tokens(**options) -> tuple[int, ...]:
        return transcribe(recognizer, [noise(16_000)], **options)[0].tokens

    results = [free.tokens, tokens(context="שלום"), tokens(style=PromptStyle("English"))]
    assert len(set(results)) == 3
    assert tokens(context=" \n") == free.tokens


def test_the_language_is_that_of_the_prompt_or_the_models_own(recognizer, free) -> None:
    assert free.transcript.language == "Hebrew"
    english = transcribe(recognizer, [noise(100)], style=PromptStyle("English"))[0]
    assert english.transcript.language == "English"
    spoken, nothing = transcribe(recognizer, [noise(16_000), noise(100)], style=AUTO)
    assert spoken.tokens != free.tokens
    assert spoken.transcript == parse_output(recognizer.tokenizer, AUTO, spoken.tokens)
    assert nothing.transcript.language is None


def test_stamps_are_asked_of_the_model_that_has_them(recognizer, stamped, free) -> None:
    with pytest.raises(UserError, match="no time-stamp tokens"):
        transcribe(recognizer, [noise(16_000)], style=STAMPED)
    assert transcribe(stamped, [noise(16_000)])[0].tokens == free.tokens
    assert transcribe(stamped, [noise(16_000)], style=STAMPED)[0].tokens != free.tokens


def _answer(monkeypatch, *answers: tuple[int, ...]) -> list[list[Utterance]]:
    """Every clip gets the ids of the call, those of the last call again and again; returns what
    each call was given."""
    asked: list[list[Utterance]] = []

    def decode(params, utterances, **_) -> list[Decoded]:
        ids = answers[min(len(asked), len(answers) - 1)]
        asked.append(list(utterances))
        return [Decoded(ids, np.full(len(ids), -0.5), True) for _ in utterances]

    monkeypatch.setattr(module, "decode_all", decode)
    return asked


def test_stamps_become_segments_that_end_with_their_clip(stamped, monkeypatch) -> None:
    tokenizer = stamped.tokenizer
    words = tokenizer.encode("שלום")
    ids = tokenizer.stamps.encode(0.16) + words + tokenizer.stamps.encode(0.48) + words
    _answer(monkeypatch, ids)
    for result, seconds in zip(
        transcribe(stamped, [noise(16_000), noise(40_000)], style=STAMPED), (1.0, 2.5), strict=True
    ):
        assert result.transcript.text == "שלום שלום"
        assert result.transcript.segments == (
            Segment(0.16, 0.48, "שלום"),
            Segment(0.48, seconds, "שלום"),
        )
        assert result.transcript.segments[0].tokens == words


def test_a_text_in_circles_is_decoded_again_and_counted(recognizer, monkeypatch) -> None:
    """At rising temperatures until one does not loop; if all do, the greedy text stays."""
    loop, good = (65, 66) * 20, (65, 66, 67)
    for answers, calls, tokens in (
        ((loop, good), 2, good),
        ((loop, loop, good), 3, good),
        ((loop, loop, (67,) * 40), 3, loop),
    ):
        asked = _answer(monkeypatch, *answers)
        (result,) = transcribe(recognizer, [noise(32_000)])
        assert (result.tokens, result.loops) == (tokens, 1)
        assert [u.temperature for (u,) in asked] == [0.0, *module.RETRY_TEMPERATURES][:calls]
        assert len({u.seed for (u,) in asked[1:]}) == calls - 1
    asked = _answer(monkeypatch, good)
    assert transcribe(recognizer, [noise(32_000)])[0].loops == 0
    assert len(asked) == 1
    asked = _answer(monkeypatch, loop)
    assert transcribe(recognizer, [noise(32_000)], retries=0)[0].loops == 0
    assert len(asked) == 1


def test_what_goes_round() -> None:
    rng = np.random.default_rng(0)
    assert not goes_round(())
    assert not goes_round((7,) * 23)  # as often as a speaker may
    assert goes_round((7,) * 24)
    assert not goes_round((1, 2, 3, 4) * 5)
    for period in (1, 2, 5, 32):
        pattern = rng.permutation(1000)[:period].tolist()
        times = max(6, 24 // period)
        for around in ([], rng.permutation(1000)[:50].tolist()):
            assert goes_round([*around, *pattern * times, *around])
            assert not goes_round([*around, *pattern * (times - 1), *around])
    assert not goes_round(rng.integers(0, 9, 300).tolist())


@given(st.floats(0.01, MAX_CLIP_S))
def test_a_bucket_holds_its_clip_with_little_padding(seconds) -> None:
    bucket = bucket_s(seconds)
    assert seconds <= bucket <= 1.25 * seconds + 1
    assert bucket_s(float(bucket)) == bucket
    assert bucket_s(seconds / 2) <= bucket


def test_buckets_are_few() -> None:
    buckets = {bucket_s(float(seconds)) for seconds in range(1, int(MAX_CLIP_S) + 1)}
    assert sorted(buckets)[:10] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert len(buckets) == 41


@given(st.lists(st.integers(160, int(MAX_CLIP_S * SAMPLE_RATE)), max_size=60))
def test_each_clip_is_in_the_class_that_holds_it(lengths) -> None:
    found = classes(lengths)
    assert sorted(i for members in found.values() for i in members) == list(range(len(lengths)))
    for seconds, members in found.items():
        samples = [lengths[i] for i in members]
        assert samples == sorted(samples, reverse=True)
        assert max(samples) <= seconds * SAMPLE_RATE
        assert seconds == 4 or min(samples) > seconds * SAMPLE_RATE / 2


def test_no_output_goes_over_another_or_out_of_its_folder(monkeypatch, tmp_path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = ("a.wav", "a.mp3", "a.wav.flac", "../there/a.wav", "b/../b.ogg", "c", "c.d.opus")
    stems = output_stems([Path(name) for name in names], Path("out"))
    assert [str(stem) for stem in stems.values()] == [
        f"out/{below}"
        for below in ("here/a.wav", "here/a.mp3", "here/a.wav.flac", "there/a", "here/b", "here/c")
        + ("here/c.d",)
    ]


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_text_is_written_whole_or_not_at_all(monkeypatch, tmp_path, fault) -> None:
    def fail(*_) -> None:
        raise fault

    write_whole(tmp_path / "new/a.txt", "שלום")
    assert (tmp_path / "new/a.txt").read_text(encoding="utf-8") == "שלום"
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((KeyboardInterrupt, UserError)) as raised:
        write_whole(tmp_path / "new/a.txt", "להתראות")
    assert isinstance(raised.value, KeyboardInterrupt) or "No space left" in str(raised.value)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]
    assert (tmp_path / "new/a.txt").read_text(encoding="utf-8") == "שלום"


def start(*words, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, **pipes)


@pytest.fixture
def sounds(tmp_path) -> Path:
    (tmp_path / "שיחה ראשונה").mkdir()
    for samples in (100, 9_600, 14_400):
        name = tmp_path / "שיחה ראשונה" / f"קול {samples}.wav"
        soundfile.write(name, noise(samples), SAMPLE_RATE)
    return tmp_path / "שיחה ראשונה"


def test_ctrl_c_ends_it_at_once_without_a_trace(sounds, tmp_path) -> None:
    words = ("transcribe", tiny_folder(), sounds, "--out-dir", tmp_path / "out")
    process = start("-m", "hebasr_jax", *words)
    assert "attention: xla" in process.stderr.readline()  # now it reads, compiles and decodes
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_amid_an_import_ends_it_too(tmp_path) -> None:
    """An exception there would abort the process: `nanobind::python_error`, core dumped."""
    interrupted = "import os\ntry: os.kill(os.getpid(), 2)\nexcept BaseException: print('raised')"
    (tmp_path / "slow.py").write_text(interrupted)
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from hebasr_jax import cli\n"
    code += "def run(_): import slow\ncli.Demo.run = run\nsys.exit(cli.main(['demo']))"
    process = start("-c", code)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


def test_a_reader_that_leaves_gets_no_trace(sounds) -> None:
    process = start(ROOT / "scripts/transcribe.py", tiny_folder(), sounds / "קול 100.wav")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141
    assert len(err.splitlines()) == 1  # what runs where


def test_hebrew_in_a_locale_without_it(sounds) -> None:
    """Names and texts come out as UTF-8, on the screen and in files, and so do messages."""
    (sounds / "טקסט.wav").write_text("שלום, זה לא קול\n" * 50, encoding="utf-8")
    words = ("transcribe", tiny_folder(), sounds, "--format", "txt", "json")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start("-m", "hebasr_jax", *words, **plain)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    lines = out.split("\n")[:-1]
    texts, contents = lines[::2], [json.loads(line) for line in lines[1::2]]
    names = [f"{sounds}/קול {samples}.wav" for samples in (100, 14_400, 9_600)]
    assert [content["file"] for content in contents] == names
    for text, content in zip(texts, contents, strict=True):
        assert text == f"{content['file']}\t{' '.join(content['text'].split())}"
    assert not all(content["text"].isascii() for content in contents)
    assert f"not transcribed: {sounds}/טקסט.wav: cannot be read as sound" in err
