"""The full training step at 1.7B sizes on a real GPU. `pytest tests/test_gpu_training.py -s` prints
the numbers of docs/performance.md."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import noise
from sizes import LARGE
from test_gpu import random_params

from hebasr_jax.data.clips import Batch
from hebasr_jax.dry_run import Shape, compiled_bytes, memory_estimate
from hebasr_jax.flops import train_flops
from hebasr_jax.model.encoder import audio_tokens
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import make_optimizer, rate_table, split
from hebasr_jax.run_config import Augment, Computation, Config, Optim, Stage
from hebasr_jax.sharding import make_mesh
from hebasr_jax.train_step import Step, compile_step, init_state

CLIPS, SECONDS, TEXT, PROMPT = 32, 30, 170, 20

pytestmark = pytest.mark.gpu


def batch_of(clips: int = CLIPS, seconds: int = SECONDS) -> Batch:
    """Full rows: 30 s of noise, 20 tokens of prompt and 150 of text."""
    rng = np.random.default_rng(0)
    samples = seconds * 16000
    in_loss_BX = np.zeros((clips, TEXT), bool)
    in_loss_BX[:, PROMPT:] = True
    return Batch(
        wave_BS=np.stack([noise(samples, row) * 20000 for row in range(clips)]).astype(np.int16),
        samples_B=np.full(clips, samples, np.int32),
        speed_B=np.ones(clips, np.float32),
        seed_B2=rng.integers(0, 2**32, (clips, 2), dtype=np.uint32),
        text_BX=rng.integers(0, 151000, (clips, TEXT)).astype(np.int32),
        text_lengths_B=np.full(clips, TEXT, np.int32),
        audio_at_B=np.full(clips, 9, np.int32),
        in_loss_BX=in_loss_BX,
    )


AUGMENT = Augment(
    speed_factors=(0.9, 1.0, 1.1),
    time_masks=2,
    mel_masks=2,
    noise_share=0.5,
    band_share=0.3,
    gain_share=0.5,
)


@pytest.mark.parametrize(
    ("name", "augment", "remat"),
    [("plain", Augment(), "dots"), ("augmented", AUGMENT, "dots"), ("remat full", AUGMENT, "full")],
)
def test_a_step_of_32_clips_of_30_seconds(name, augment, remat) -> None:
    """Finite, learns its batch, repeats itself bit for bit; time and memory are printed."""
    optim = Optim(warmup_steps=1)
    config = Config(optim=optim, compute=Computation(remat=remat))
    trained, frozen = split(random_params(LARGE, jnp.float32), Stage())
    optimizer = make_optimizer(optim, Stage(), trained, 100)
    compute = Compute(jnp.bfloat16, "cudnn", remat)
    step = Step(LARGE, compute, augment, optimizer, make_mesh(1), audio_s=SECONDS)
    state = jax.jit(lambda t, f: init_state(t, f, optimizer), donate_argnums=(0, 1))(
        trained, frozen
    )
    batch = jax.device_put(batch_of())
    start = time.perf_counter()
    program = compile_step(step, state, batch, None)
    compiled_s = time.perf_counter() - start
    losses, times = [], []
    for _ in range(12):
        start = time.perf_counter()
        state, told = program(state, batch, None)
        losses.append(float(told.loss))
        times.append(time.perf_counter() - start)
    step_s = float(np.median(times[2:]))
    tokens = np.full(CLIPS, audio_tokens(SECONDS * 100))
    flops = train_flops(LARGE, tokens, np.full(CLIPS, TEXT), CLIPS * (TEXT - PROMPT))
    figure = compiled_bytes(program.memory_analysis())
    guess = memory_estimate(
        LARGE,
        config,
        rate_table(random_shapes(), optim),
        Shape(CLIPS, SECONDS, TEXT),
        kernel="cudnn",
    ).total
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    print(
        f"\n{name}, remat {remat}: {1e3 * step_s:.1f} ms, "
        f"{CLIPS * SECONDS / step_s:.0f} audio-s/s, "
        f"{flops / step_s / 1e12:.0f} useful TFLOP/s ({100 * flops / step_s / 989e12:.1f} % of "
        f"989), compiled in {compiled_s:.0f} s; compiler {figure / 2**30:.1f} GiB, formula "
        f"{guess / 2**30:.1f} GiB, peak of the process {peak / 2**30:.1f} GiB; "
        f"losses {losses[0]:.4f} to {losses[-1]:.4f}"
    )
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 1
    assert 0.7 < guess / figure < 1.4


def random_shapes():
    from hebasr_jax.model.asr import abstract_params

    return abstract_params(LARGE)


def test_a_step_repeats_itself_bit_for_bit() -> None:
    """Four layers at full width: same state, same batch, same bits, or resume is not exact."""
    config = replace(
        LARGE,
        encoder=replace(LARGE.encoder, layers=4),
        decoder=replace(LARGE.decoder, layers=4),
    )
    optim = Optim(warmup_steps=1)
    trained, frozen = split(random_params(config, jnp.float32), Stage())
    optimizer = make_optimizer(optim, Stage(), trained, 100)
    compute = Compute(jnp.bfloat16, "cudnn", "dots")
    step = Step(config, compute, AUGMENT, optimizer, make_mesh(1), audio_s=10)
    batch = jax.device_put(batch_of(16, 10))
    host = jax.device_get(init_state(trained, frozen, optimizer))
    program = compile_step(step, host, batch, None)
    ends = []
    for _ in range(3):
        state = jax.device_put(host)
        for _ in range(3):
            state, told = program(state, batch, None)
        ends.append((float(told.loss), jax.device_get(state.trained)))
    for loss, weights in ends[1:]:
        differ = [
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(ends[0][1]), strict=True)
        ]
        print(f"\nloss {loss} and {ends[0][0]}; {sum(differ)} of {len(differ)} leaves differ")
    assert not any(differ)
    assert {loss for loss, _ in ends} == {ends[0][0]}
