"""A tiny model learns eight words from their sound, and is scored as `transcribe` hears it."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tone_runs import WORDS, make_workspace, read_rows, write_manifest, write_rows

from hebasr_jax.config_file import load_config
from hebasr_jax.data.clips import Clip, ClipSet
from hebasr_jax.data.pipeline import load_batch
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.data.sources import open_sources
from hebasr_jax.data.table import count_tokens
from hebasr_jax.distributed import place_rows
from hebasr_jax.errors import UserError
from hebasr_jax.hub import ModelFolder
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import join
from hebasr_jax.run_config import Augment, Source
from hebasr_jax.run_setup import compile_steps, load_state, set_up
from hebasr_jax.run_start import Start, check
from hebasr_jax.sharding import rows
from hebasr_jax.text import PromptStyle, Transcript
from hebasr_jax.transcribe import Recognizer, transcribe
from hebasr_jax.validate import DevSet, load_dev_sets, validate

LOUD = Augment(
    speed_factors=(0.5,), time_masks=9, mel_masks=9, noise_share=1.0, gain_share=1.0, band_share=1.0
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> SimpleNamespace:
    """50 steps on one batch of the eight words, as they are and with their sound taken away."""
    folder = make_workspace(tmp_path_factory.getbasetemp(), "validate")
    write_manifest(folder / "corpus" / "eight.jsonl", [[word] for word in WORDS], seed=1, spread=0)
    mixed = [list(pair) for pair in zip(WORDS, WORDS[3:] + WORDS[:3], strict=True)]
    singles = [[word] for word in WORDS]
    write_manifest(folder / "corpus" / "noisy.jsonl", singles * 2 + mixed, seed=2, noise=0.1)
    changes = {
        "model.path": folder / "tiny",
        "data.buckets": 1,
        "data.train.0.path": folder / "corpus" / "eight.jsonl",
        "data.dev.0.path": folder / "corpus" / "noisy.jsonl",
        "data.dev.0.name": "noisy",
        "optim.warmup_steps": 1,
        "train.steps": 60,
    }
    loaded = load_config(folder / "config.py", [f"{name}={new}" for name, new in changes.items()])
    config = replace(loaded.config, augment=Augment())
    setup = set_up(config, folder / "model", folder / "quarantine.jsonl")
    feed = setup.parts[0].feed
    batch = load_batch(feed, feed.plan(0), 0)
    (program,) = compile_steps(setup, setup.parts, lambda *_: None).values()
    mute = batch.replace(wave_BS=np.zeros_like(batch.wave_BS))
    (state, losses), (_, mute_losses) = (_overfit(setup, program, b) for b in (batch, mute))
    params = join(state.trained, state.frozen)
    return SimpleNamespace(
        folder=folder,
        setup=setup,
        params=params,
        losses=losses,
        mute_losses=mute_losses,
        targets=batch.in_loss_BX.sum(),
    )


def _overfit(setup, program, batch) -> tuple:
    placed = jax.tree.map(lambda x: place_rows(x, rows(setup.mesh)), batch)
    state, losses = load_state(setup), []
    for _ in range(50):
        state, metrics = program(state, placed, None)
        losses.append(float(metrics.loss))
    return state, losses


def _scores(learned, config=None, params=None, dtype=jnp.float32, sets=None, told=None):
    setup = learned.setup
    config = config or setup.config
    quarantine = Quarantine(learned.folder / (told or "bad.jsonl"), 0.2, 100)
    devs = load_dev_sets(sets or setup.dev_sets, setup.tokenizer, config, quarantine, 1)
    return validate(
        params or learned.params,
        devs,
        setup.model,
        setup.tokenizer,
        config,
        compute=Compute(dtype),
        mesh=setup.mesh,
    )


@pytest.fixture(scope="module")
def scores(learned) -> dict:
    """All texts of the noisy set, at the learned weights."""
    config = learned.setup.config
    return _scores(learned, replace(config, validation=replace(config.validation, samples=99)))


def test_one_batch_is_learned_from_its_sound(learned) -> None:
    """Bug 12 of the project before: a run that trains and learns nothing. Two targets a clip, the
    word and the end; without sound the word is one of eight, which is ln(8) / 2 = 1.04 nats."""
    assert learned.targets == 16
    assert learned.losses[0] > 5.5  # ln(351) = 5.86 for every token alike
    assert learned.losses[-1] < 0.2
    assert learned.mute_losses[-1] > 0.9


def test_hypotheses_are_those_of_transcribe(learned, scores) -> None:
    setup = learned.setup
    recognizer = Recognizer(
        learned.params, setup.model, setup.tokenizer, Compute(), ModelFolder(Path(), "", None)
    )
    (noisy,) = setup.dev_sets
    waves = [noisy.read(index) for index in range(len(noisy.clips))]
    style = PromptStyle("Hebrew", language_in_prompt=True)
    heard = transcribe(recognizer, waves, style=style)
    texts = {clip.id: r.transcript.text for clip, r in zip(noisy.clips, heard, strict=True)}
    found = {pair["id"]: pair["hypothesis"] for pair in scores["noisy"]["samples"]}
    assert found == texts
    assert len(set(texts.values())) >= 5


def test_it_says_the_words_it_hears(scores) -> None:
    noisy = scores["noisy"]
    assert noisy["clips"] == 24
    assert noisy["words"] == 32
    assert noisy["ci95"][0] <= noisy["wer"] <= noisy["ci95"][1]
    assert 0 < noisy["wer"] < 0.6


def test_validation_repeats_itself_and_never_augments(learned, scores) -> None:
    base = learned.setup.config
    config = replace(
        base,
        augment=LOUD,
        data=replace(base.data, join_share=1.0),
        text=replace(base.text, stamp_share=0.0, context_share=1.0),
        validation=replace(base.validation, samples=99),
    )
    assert _scores(learned, config) == scores


def test_bfloat16_gives_the_same_wer_within_noise(learned, scores) -> None:
    low, high = scores["noisy"]["ci95"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), learned.params)
    half = _scores(learned, params=params, dtype=jnp.bfloat16)["noisy"]
    assert low <= half["wer"] <= high
    assert abs(half["wer"] - scores["noisy"]["wer"]) <= 2 / 32  # words
    assert half["loss"] == pytest.approx(scores["noisy"]["loss"], rel=0.05)


def test_a_long_row_may_have_as_much_text_a_second_as_training(learned) -> None:
    setup, config = learned.setup, learned.setup.config
    clips = tuple(Clip(f"{s}", " ".join(WORDS * (s // 4)), float(s)) for s in (4, 40))
    long = ClipSet("long", clips, lambda i: np.zeros(16_000 * (4, 40)[i], np.int16), "")
    count = int(count_tokens(clips, setup.tokenizer, config.text, joined=False)[0][1])
    for most, left_out in ((count // 9, {}), (count // 11, 1)):
        data = replace(config.data, max_clip_s=4.0, max_text_tokens=most)
        quarantine = Quarantine(learned.folder / "long.jsonl", 0.2, 100)
        few = replace(config, data=data)
        (dev,) = load_dev_sets([long], setup.tokenizer, few, quarantine, 1)
        assert list(dev.left_out.values()) == ([left_out] if left_out else [])


def test_what_is_odd_of_the_data_is_told_when_a_run_starts(learned, tmp_path) -> None:
    said: list[str] = []
    loaded = load_config(learned.folder / "config.py")
    setup = replace(learned.setup, remarks=("warning: odd",))
    check(Start(loaded, tmp_path, setup, {}, said.append), accept_changes=False)
    assert said[0] == "warning: odd"


def test_a_bad_clip_is_put_on_record_and_not_scored(learned, scores) -> None:
    corpus = learned.folder / "corpus"
    broken = {"id": "broken", "audio": "broken.flac", "text": "שלום", "duration_s": 1.0}
    write_rows(corpus / "dented.jsonl", [broken, *read_rows(corpus / "noisy.jsonl")])
    sets = open_sources([Source("noisy", str(corpus / "dented.jsonl"))])
    found = _scores(learned, sets=sets, told="dented-bad.jsonl")["noisy"]
    assert (found["left_out"], scores["noisy"]["left_out"]) == (1, 0)
    changed = ("samples", "left_out")
    assert {k: v for k, v in found.items() if k not in changed} == {
        k: v for k, v in scores["noisy"].items() if k not in changed
    }
    (row,) = read_rows(learned.folder / "dented-bad.jsonl")
    assert (row["set"], row["id"]) == ("noisy", "broken")


def test_no_clip_stands_in_for_another(learned, monkeypatch) -> None:
    """As in training, where a clip is not as long as stated: here the text would be another's."""
    lengths = {"whole": 16_000, "short": 12_000, "on the edge": 16_000 + 3_200}
    waves = [np.full(samples, n, np.int16) for n, samples in enumerate(lengths.values(), 1)]
    clips = tuple(Clip(name, WORDS[0], 1.0) for name in lengths)

    def load() -> DevSet:
        quarantine = Quarantine(learned.folder / "short.jsonl", 1.0, 100)
        sets = [ClipSet("odd", clips, waves.__getitem__, "")]
        (dev,) = load_dev_sets(sets, learned.setup.tokenizer, learned.setup.config, quarantine, 1)
        return dev

    dev = load()
    scored = {clip.id for _, _, of_rows in dev.batches for clip in of_rows if clip is not None}
    assert scored == {"whole", "on the edge"}
    assert dev.left_out == {"cannot be read": 1}
    monkeypatch.setattr("hebasr_jax.validate.check_length", lambda *_: None)
    with pytest.raises(AssertionError, match="short"):
        load()


def test_the_first_clips_are_taken_when_there_are_too_many(learned) -> None:
    setup, config = learned.setup, learned.setup.config
    few = replace(config, validation=replace(config.validation, max_clips=3))
    quarantine = Quarantine(learned.folder / "few.jsonl", 0.2, 100)
    (dev,) = load_dev_sets(setup.dev_sets, setup.tokenizer, few, quarantine, 1)
    found = [clip.id for _, _, clips in dev.batches for clip in clips if clip is not None]
    assert sorted(found) == [f"noisy-{n}" for n in range(3)]


def test_an_empty_hypothesis_is_all_deletions(learned, monkeypatch) -> None:
    """Bug 16: dropped rows made the WER look better."""
    monkeypatch.setattr(
        "hebasr_jax.transcribe.parse_output", lambda *_, **__: Transcript("Hebrew", "")
    )
    found = _scores(learned)["noisy"]
    assert (found["wer"], found["cer"]) == (1.0, 1.0)
    assert (found["deletions"], found["words"], found["empty"], found["clips"]) == (32, 32, 24, 24)


def test_a_signal_ends_it_between_batches(learned) -> None:
    setup, asked = learned.setup, []
    quarantine = Quarantine(learned.folder / "stop.jsonl", 0.2, 100)
    devs = load_dev_sets(setup.dev_sets, setup.tokenizer, setup.config, quarantine, 1)
    assert len(devs[0].batches) > 2

    def stopped() -> bool:
        asked.append(None)
        return len(asked) > 2

    compute = Compute()
    told = validate(
        learned.params,
        devs,
        setup.model,
        setup.tokenizer,
        setup.config,
        compute=compute,
        mesh=setup.mesh,
        stopped=stopped,
    )
    assert told is None
    assert len(asked) == 3


def test_a_dev_set_without_a_usable_clip_is_refused(learned) -> None:
    write_rows(
        learned.folder / "corpus" / "none.jsonl",
        [{"id": "x", "audio": "broken.flac", "text": "שלום", "duration_s": 1.0}],
    )
    sets = open_sources([Source("none", str(learned.folder / "corpus" / "none.jsonl"))])
    with pytest.raises(UserError, match="none has no clip"):
        _scores(learned, sets=sets, told="none-bad.jsonl")
