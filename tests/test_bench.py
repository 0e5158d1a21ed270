"""The benchmark's work is what its documents say, and each of its commands runs on a tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from configs.round2_5 import get_config as round2_5
from hebasr_jax.bench import generate, work
from hebasr_jax.cli import main
from hebasr_jax.errors import UserError
from hebasr_jax.model.layers import Compute
from hebasr_jax.run_config import Optim
from hebasr_jax.text import PromptStyle, build_prompt, load_tokenizer
from hebasr_jax.throughput import work_of

TEN_THOUSAND = work.ivrit_mix(10_000, seed=0)


def test_the_mix_has_the_lengths_of_the_design() -> None:
    """70 % lognormal of mean 4.8 s, 30 % of mean 26 s; seeded."""
    assert np.array_equal(TEN_THOUSAND, work.ivrit_mix(10_000, seed=0))
    assert not np.array_equal(TEN_THOUSAND, work.ivrit_mix(10_000, seed=1))
    assert TEN_THOUSAND.min() >= 0.6
    assert TEN_THOUSAND.max() <= 30.0
    assert TEN_THOUSAND.mean() == pytest.approx(0.7 * 4.8 + 0.3 * 26.0, rel=0.02)


def test_the_fixed_work_is_that_of_the_design() -> None:
    """390 audio tokens, 170 positions of text, 6.23 TFLOP a clip in training."""
    model = work.model_of("1.7b")
    done = work_of(work.full_batch(model, 2), work.CLIP_S, model)
    assert done.positions == done.positions_computed == 2 * (390 + 170)
    assert done.flops / 2 == pytest.approx(6.23e12, rel=0.01)


def test_augmentation_is_round_two_and_a_half_with_all_shares_at_one() -> None:
    asked = round2_5().augment
    assert replace(asked, noise_share=1.0, band_share=1.0, noise_path=None) == work.AUGMENT


def test_made_up_clips_have_the_tokens_they_should(tmp_path) -> None:
    seconds_C = TEN_THOUSAND[:20]
    clips = work.made_up_set(seconds_C.tolist(), seed=0)
    work.write_model_files(work.model_of("tiny"), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    prompt = build_prompt(tokenizer, PromptStyle())
    assert len(prompt.before) + len(prompt.after) == 18  # as with the real tokenizer
    for n, clip in enumerate(clips.clips):
        assert len(tokenizer.encode(clip.text)) + 1 == work.target_tokens(float(seconds_C[n]))
        assert len(clips.read(n)) == round(clip.duration_s * 16_000)


def test_a_decoding_step_reads_its_weights_and_its_cache() -> None:
    """3.44 GB of weights and 112 KiB a position (jax-gpu-performance.md, 11.1)."""
    settings = generate.Settings(work.model_of("1.7b"), Compute("bfloat16"), (1,))
    assert generate.step_bytes(settings, 0) == pytest.approx(3.44e9, rel=0.01)
    each = generate.step_bytes(settings, 1) - generate.step_bytes(settings, 0)
    assert each == 112 * 1024 * (20 + 390 + 75)


@pytest.mark.parametrize(
    "words",
    [
        "train --rows 1 --steps 1 --work fixed --peer --dtype float32",
        "train --steps 1 --mix-audio-s 30 --buckets 1 --work mix --dtype float32",
        "generate --slots 2 --tokens 4 --minutes 1 --dtype float32",
        "features --rows 1 --steps 2",
        "data --audio-s 10000 --threads 2",
        "prepare --audio-s 600 --jobs 1",
    ],
)
def test_each_measurement_runs_and_prints_json(words, capsys, monkeypatch) -> None:
    monkeypatch.setattr("hebasr_jax.bench.prepare._DISTINCT", 20)  # MP3 is slow to write
    assert main(["bench", *words.split(), "--size", "tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["audio_s_per_s"] > 0
    assert found["facts"]["date"]
    assert found["facts"]["command"].startswith(f"hebasr bench {words.split()[0]} --size tiny")
    assert found["facts"]["jax"]
    assert all(np.isfinite(x) for row in found["rows"] for x in row.values() if x != str(x))


def test_the_optimiser_that_is_measured_is_the_one_asked_for(monkeypatch) -> None:
    seen: list[str] = []

    def note(optim: Optim, *rest: object) -> None:
        seen.append(optim.moments)
        raise UserError("that is enough")

    at = "hebasr_jax.bench.train"
    monkeypatch.setattr(f"{at}.against_plain_attention", lambda settings: {})
    monkeypatch.setattr(f"{at}.make_optimizer", note)
    monkeypatch.setattr(f"{at}.set_up", lambda config, *rest: note(config.optim))
    for part in ("fixed", "mix"):
        words = f"train --work {part} --moments bfloat16 --mix-audio-s 30 --steps 1 --size tiny"
        assert main(["bench", *words.split()]) == 1
    assert seen == ["bfloat16"] * 2


@pytest.mark.parametrize(
    "words",
    [
        "train --rows 0",
        "train --work slots",
        "train --join-share 3",
        "generate --tokens 2",
        "generate --devices 1",
        "data --unroll",
        "data --audio-s 5",
        "prepare --audio-s 5",
        "prepare --jobs 0",
        "data --jobs 1",
    ],
)
def test_flags_that_make_no_work_are_refused(words, capsys) -> None:
    assert main(["bench", *words.split(), "--size", "tiny"]) == 1
    assert "error:" in capsys.readouterr().err
