"""Equality with the original package: its checkpoints in, ours out, every stage between."""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from reference import load_ours, make_inputs, noise, relative, tiny_folder
from safetensors.numpy import load_file, save_file

from hebasr_jax.config import ModelConfig, layout_of, read_config
from hebasr_jax.errors import UserError
from hebasr_jax.export import write_model
from hebasr_jax.layout import (
    write_original_tokenizer,
    write_settings,
    write_transformers_tokenizer,
)
from hebasr_jax.model.asr import bind
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.model.layers import Compute
from hebasr_jax.text import Prompt, PromptStyle, build_prompt, load_tokenizer
from hebasr_jax.tiny import TINY, write_byte_tokenizer
from hebasr_jax.transcribe import load_recognizer, transcribe
from hebasr_jax.weights import original_key

REAL = Path(__file__).parents[3] / "shared" / "qwen3-asr-1.7b"

UNDER_1_S = [1600, 9600, 15680]
# 99 frames are 50 after the first convolution, as 100 are; 52877 is no whole number of hops.
UP_TO_8_S = [15840, 16000, 52877, 127840, 128000]
OVER_8_S = [128160, 244800, 336000]
CLIPS = UNDER_1_S + UP_TO_8_S + OVER_8_S
GREEDY_CLIPS = [16000, 52877, 128000, 336000]
EXPORT_CLIPS = [50000, 60000]
NEW_TOKENS = 20  # qwen-asr cleans up what repeats more often

PROMPTS = [("", None), ("", "Hebrew"), ("שלום, עולם 12", "Hebrew"), ("Hello, don't", "English")]
PLAIN = ["שלום עולם", "Hello world", "היום דיברנו על machine learning, 12 שעות.", 'ד"ר כהן\nצה״ל']
PLAIN += ["don't", "DON'T", "שָׁלוֹם"]
MISTRAL = ["iPhone", "WhatsApp", "a'them", "תּוֹרָה"]  # trap 31 of qwen3-asr.md


def _wave(samples: int) -> np.ndarray:
    """Noise, its first fifth so quiet that the floor of the features shows."""
    wave = noise(samples, samples)
    wave[: samples // 5] *= 1e-6
    return wave


@dataclass(frozen=True)
class Answer:
    """What qwen-asr makes of a model folder; `arrays` as in run_reference.run_model."""

    folder: Path
    arrays: dict[str, np.ndarray]
    report: dict

    def of(self, clip: int, stage: str) -> np.ndarray:
        return self.arrays[f"{clip}/{stage}"]

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every stored tensor; the head must be the embeddings, which it is tied to."""
        found = {k.removeprefix("state/"): v for k, v in self.arrays.items() if "state/" in k}
        head = found.pop("thinker.lm_head.weight")
        assert np.array_equal(head, found["thinker.model.embed_tokens.weight"])
        return found


def _job(folder: Path, models: list[Path], clips: list[int], **more) -> dict:
    waves = folder / "waves.npz"
    np.savez(waves, **{str(n): _wave(n) for n in clips})
    empty = {"encode": [], "texts": [], "prompts": PROMPTS, "new_tokens": NEW_TOKENS}
    return {**empty, "models": models, "waves": waves, **more}


def _answer(job: Path, report: dict, folder: Path) -> Answer:
    assert report["version"] == "4.57.6"
    with np.load(job / f"{folder.name}.npz", allow_pickle=False) as arrays:
        return Answer(folder, dict(arrays), report["models"][folder.name])


@pytest.fixture(scope="session")
def original(tmp_path_factory, run_reference) -> Answer:
    """A checkpoint that the original classes wrote, and what they make of it."""
    folder = tmp_path_factory.mktemp("original")
    seed, model = folder / "seed", folder / "checkpoint"
    (folder / "bytes").mkdir()
    seed.mkdir()
    write_byte_tokenizer(folder / "bytes")
    write_original_tokenizer(folder / "bytes", seed)
    write_settings(seed, TINY, load_tokenizer(seed), "original", "float32")
    report = run_reference(folder / "job", _job(folder, [model], CLIPS, write=[model, seed]))
    return _answer(folder / "job", report, model)


@dataclass(frozen=True)
class Ours:
    """The same stages by our code, all clips in one padded batch."""

    mel_BTM: np.ndarray
    audio_BAD: np.ndarray
    logits_BLV: np.ndarray
    ids: list[tuple[int, ...]]
    tokens: dict[int, tuple[int, ...]]


@functools.partial(jax.jit, static_argnames="config")
def _forward(params, inputs, config):
    asr = bind(params, config, Compute())
    audio_BAD = asr.projector(asr.encoder(inputs.mel_BTM, inputs.frames_B))
    return audio_BAD, asr.decoder.logits(asr.hidden(inputs))


@pytest.fixture(scope="session")
def ours(original) -> Ours:
    params, config = load_ours(original.folder)
    tokenizer = load_tokenizer(original.folder)
    prompt = build_prompt(tokenizer, PromptStyle())
    text = [*prompt.before, *prompt.after]
    waves = [_wave(n) for n in CLIPS]
    inputs = make_inputs(waves, [text] * len(CLIPS), [len(prompt.before)] * len(CLIPS))
    audio_BAD, logits_BLV = _forward(params, inputs, config)
    pad = tokenizer.special.audio_pad
    return Ours(
        mel_BTM=np.asarray(inputs.mel_BTM),
        audio_BAD=np.asarray(audio_BAD),
        logits_BLV=np.asarray(logits_BLV),
        ids=[_input_ids(prompt, audio_tokens(n // 160), pad) for n in CLIPS],
        tokens=dict(zip(GREEDY_CLIPS, _greedy(original.folder, GREEDY_CLIPS), strict=True)),
    )


def _input_ids(prompt: Prompt, tokens: int, pad: int) -> tuple[int, ...]:
    """A prompt as the reference takes it, with a placeholder for each audio token."""
    return (*prompt.before, *(pad,) * tokens, *prompt.after)


def _greedy(folder: Path, clips: list[int]) -> list[tuple[int, ...]]:
    recognizer = load_recognizer(str(folder), dtype="float32")
    waves = [_wave(n) for n in clips]
    return [r.tokens for r in transcribe(recognizer, waves, max_new_tokens=NEW_TOKENS)]


def _audio_error(original: Answer, ours: Ours, clip: int, stage: str) -> float:
    theirs = original.of(clip, stage)
    row = ours.audio_BAD[CLIPS.index(clip)]
    assert len(theirs) == audio_tokens(clip // 160)
    return relative(row[: len(theirs)], theirs)


def test_we_read_what_the_original_saved(original) -> None:
    content = read_config(original.folder)
    assert layout_of(content) == "original"
    assert "thinker.lm_head.weight" not in load_file(original.folder / "model.safetensors")
    params, _ = load_ours(original.folder)
    stored = sum(tensor.size for tensor in original.tensors.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == stored


@pytest.mark.parametrize("clip", CLIPS)
def test_features(original, ours, clip) -> None:
    theirs = original.of(clip, "features")
    assert len(theirs) == clip // 160
    found = ours.mel_BTM[CLIPS.index(clip), : len(theirs)]
    assert np.abs(found - theirs).max() <= 2e-5


@pytest.mark.parametrize("clip", UP_TO_8_S)
def test_encoder_up_to_one_window(original, ours, clip) -> None:
    """Up to 8 s the original's window mask allows everything."""
    assert np.array_equal(original.of(clip, "audio"), original.of(clip, "windowed"))
    assert _audio_error(original, ours, clip, "audio") <= 1e-5


@pytest.mark.parametrize("clip", OVER_8_S)
def test_encoder_beyond_one_window(original, ours, clip) -> None:
    """Trap 1: without flash attention the original forgets its windows; the model was trained
    with them, and so have we."""
    assert _audio_error(original, ours, clip, "windowed") <= 1e-5
    assert _audio_error(original, ours, clip, "audio") > 1e-3


@pytest.mark.parametrize("clip", UNDER_1_S)
def test_encoder_under_one_second_differs_by_choice(original, ours, clip) -> None:
    """The original shows its convolutions a short image; we fill the second with zeros, as
    transformers does (qwen3-asr.md, 2.5). The difference starts at 98 frames."""
    assert _audio_error(original, ours, clip, "audio") > 1e-3


@pytest.mark.parametrize("clip", UP_TO_8_S + OVER_8_S)
def test_prompt_and_logits(original, ours, clip) -> None:
    row = CLIPS.index(clip)
    assert ours.ids[row] == tuple(original.of(clip, "ids").tolist())
    theirs = original.of(clip, "logits")
    assert relative(ours.logits_BLV[row, : len(theirs)], theirs) <= 1e-4


@pytest.mark.parametrize("clip", GREEDY_CLIPS)
def test_greedy_ids(original, ours, clip) -> None:
    tokens = tuple(original.of(clip, "tokens").tolist())
    assert len(set(tokens)) > 4, "ids that hardly vary prove little"
    assert ours.tokens[clip] == tokens


def test_a_stored_head_must_be_the_embeddings(original, tmp_path) -> None:
    """Official files store the head; saved again, they do not."""
    (tmp_path / "config.json").write_bytes((original.folder / "config.json").read_bytes())
    head, weights = "thinker.lm_head.weight", tmp_path / "model.safetensors"
    tensors = load_file(original.folder / weights.name)
    tensors[head] = tensors["thinker.model.embed_tokens.weight"].copy()
    save_file(tensors, weights)
    params, _ = load_ours(tmp_path)
    expected, _ = load_ours(original.folder)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, params, expected))
    tensors[head][-1, -1] += 1e-6
    save_file(tensors, weights)
    with pytest.raises(UserError, match=head):
        load_ours(tmp_path)


# --- our exports, loaded by the original -----------------------------------------------------


@dataclass(frozen=True)
class Exports:
    """Folders that we wrote, what the original makes of each, and what it should have."""

    answers: dict[str, Answer]
    configs: dict[str, ModelConfig]
    tensors: dict[str, dict[str, np.ndarray]]
    encoded: dict[str, dict]


EXPORTS = ["from-transformers", "from-original", "round-trip", "bfloat16"]


@pytest.fixture(scope="session")
def exports(original, tmp_path_factory, run_reference) -> Exports:
    base = tmp_path_factory.mktemp("exports")
    folders = {name: base / name for name in EXPORTS}
    tiny, theirs = tiny_folder(), base / "theirs-in-transformers-layout"

    tiny_params, tiny_config = load_ours(tiny)
    write_model(tiny_params, tiny_config, tiny, folders["from-transformers"], "original")
    params, config = load_ours(original.folder)
    write_model(
        params, config, original.folder, folders["from-original"], "original", shard_bytes=200_000
    )
    write_model(params, config, original.folder, theirs, "transformers")
    write_model(*load_ours(theirs), theirs, folders["round-trip"], "original")
    write_model(
        params, config, original.folder, folders["bfloat16"], "original", dtype=ml_dtypes.bfloat16
    )
    rounded = {
        key: tensor.astype(ml_dtypes.bfloat16).astype(np.float32)
        for key, tensor in original.tensors.items()
    }
    drawn = {original_key(k): v for k, v in load_file(tiny / "model.safetensors").items()}
    tensors = dict(zip(EXPORTS, [drawn, original.tensors, original.tensors, rounded], strict=True))
    configs = dict(zip(EXPORTS, [tiny_config, config, config, config], strict=True))

    encode = _real_tokenizers(base) if REAL.is_dir() else []
    more = {"encode": encode, "texts": PLAIN + MISTRAL}
    report = run_reference(base / "job", _job(base, list(folders.values()), EXPORT_CLIPS, **more))
    answers = {name: _answer(base / "job", report, folder) for name, folder in folders.items()}
    return Exports(answers, configs, tensors, report["encode"])


def _real_tokenizers(base: Path) -> list[Path]:
    """The released tokenizer as it is, and as we write it from the transformers layout."""
    whole, exported = base / "real-transformers", base / "real-exported"
    whole.mkdir()
    exported.mkdir()
    write_transformers_tokenizer(REAL, whole)
    write_original_tokenizer(whole, exported)
    write_settings(exported, TINY, load_tokenizer(REAL), "original", "float32")
    return [REAL, exported]


@pytest.mark.parametrize("name", EXPORTS)
def test_the_original_loads_our_export_strictly(exports, name) -> None:
    answer = exports.answers[name]
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert answer.report[fault] == [], fault
    tensors = answer.tensors
    assert tensors.keys() == exports.tensors[name].keys()
    for key, tensor in exports.tensors[name].items():
        assert tensor.tobytes() == tensors[key].tobytes(), key
    assert load_ours(answer.folder)[1] == exports.configs[name]


def test_round_trip_files_are_bit_identical(original, exports) -> None:
    """original -> transformers -> original."""
    first = load_file(original.folder / "model.safetensors")
    last = load_file(exports.answers["round-trip"].folder / "model.safetensors")
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        assert (tensor.dtype, tensor.shape) == (last[key].dtype, last[key].shape), key
        assert tensor.tobytes() == last[key].tobytes(), key


@pytest.mark.parametrize("name", EXPORTS)
def test_the_exported_chat_template_makes_our_prompt(exports, name) -> None:
    answer = exports.answers[name]
    tokenizer = load_tokenizer(answer.folder)
    for i, (context, language) in enumerate(PROMPTS):
        style = PromptStyle(language, language_in_prompt=language is not None)
        prompt = build_prompt(tokenizer, style, context=context)
        tokens = audio_tokens(EXPORT_CLIPS[0] // 160)
        expected = _input_ids(prompt, tokens, tokenizer.special.audio_pad)
        assert tuple(answer.arrays[f"prompt/{i}"].tolist()) == expected, (context, language)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_export_gives_the_original_our_ids_and_text(exports, name) -> None:
    """Greedy ids with Hebrew forced; text by qwen-asr's own `transcribe` with English forced."""
    answer = exports.answers[name]
    theirs = [tuple(answer.of(n, "tokens").tolist()) for n in EXPORT_CLIPS]
    assert _greedy(answer.folder, EXPORT_CLIPS) == theirs
    waves = [_wave(n) for n in EXPORT_CLIPS]
    recognizer = load_recognizer(str(answer.folder), dtype="float32")
    style = PromptStyle("English")
    found = transcribe(recognizer, waves, style=style, max_new_tokens=NEW_TOKENS)
    texts = [_without_tags(text) for text in answer.report["texts"]]
    assert any(texts)
    assert [r.transcript.text for r in found] == texts


def _without_tags(text: str) -> str:
    """qwen-asr leaves tags in the text of a forced language; we drop them (text.parse_output)."""
    return " ".join(piece.strip() for piece in text.split("<asr_text>") if piece.strip())


# --- the released tokenizer ------------------------------------------------------------------


@pytest.mark.shared
def test_the_released_tokenizer(exports) -> None:
    """Equal ids except where trap 31 bites: config.json names transformers 4.57.6, so qwen-asr
    splits by Mistral's rule."""
    ours, theirs = load_tokenizer(REAL), exports.encoded[REAL.name]["texts"]
    assert [list(ours.encode(text)) for text in PLAIN] == theirs[: len(PLAIN)]
    pairs = zip(MISTRAL, theirs[len(PLAIN) :], strict=True)
    differ = {text for text, ids in pairs if list(ours.encode(text)) != ids}
    assert differ == set(MISTRAL)


@pytest.mark.shared
def test_the_exported_tokenizer_keeps_the_qwen2_rule(exports) -> None:
    ours, theirs = load_tokenizer(REAL), exports.encoded["real-exported"]["texts"]
    assert [list(ours.encode(text)) for text in PLAIN + MISTRAL] == theirs


@pytest.mark.shared
@pytest.mark.parametrize("name", [REAL.name, "real-exported"])
def test_the_released_prompt(exports, name) -> None:
    """The template as released and as exported, run by qwen-asr; one placeholder in it."""
    tokenizer = load_tokenizer(REAL)
    for (context, language), ids in zip(PROMPTS, exports.encoded[name]["prompts"], strict=True):
        style = PromptStyle(language, language_in_prompt=language is not None)
        prompt = build_prompt(tokenizer, style, context=context)
        assert list(_input_ids(prompt, 1, tokenizer.special.audio_pad)) == ids, context
