"""The released 1.7B sizes with random weights on a real GPU. `pytest tests/test_gpu.py -s` prints
the numbers of docs/model.md."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from memory import peak_anonymous
from reference import make_inputs, noise, relative
from sizes import LARGE

from hebasr_jax.features import log_mel
from hebasr_jax.generate import generate
from hebasr_jax.loss import next_token_loss
from hebasr_jax.model.asr import Inputs, abstract_params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.weights import load_params, save_params

CLIPS, SECONDS, TEXT = 32, 30, 170  # 390 audio tokens, 20 of prompt, 150 of text

pytestmark = pytest.mark.gpu


def random_params(config, dtype=jnp.bfloat16):
    """Random weights that keep activations near 1; drawn on the device, leaf by leaf."""
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))

    @partial(jax.jit, static_argnames=("shape", "name"))
    def draw(key, shape, name):
        if name == "scale":
            return jnp.ones(shape, dtype)
        if name == "bias":
            return jnp.zeros(shape, dtype)
        fan_in = shape[-1] if name == "embedding" else int(np.prod(shape[-2:-1] or (1,)))
        return (jax.random.normal(key, shape) / np.sqrt(fan_in)).astype(dtype)

    keys = jax.random.split(jax.random.key(0), len(flat))
    leaves = [
        draw(key, leaf.shape, path[-1].key) for key, (path, leaf) in zip(keys, flat, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize(
    "lengths",
    [
        [380000, 53000, 8000, 160, 190000],  # 345 decoder positions
        [9000, 15000, 8000, 160, 16000],  # 13 tokens in the only encoder window
    ],
)
def test_kernels_agree_on_mixed_odd_lengths(lengths) -> None:
    """Loss, gradient and prefill of short and long rows at odd padded lengths, both kernels."""
    config = replace(
        LARGE,
        encoder=replace(LARGE.encoder, layers=2),
        decoder=replace(LARGE.decoder, layers=2, vocab_size=4096),
    )
    params = random_params(config, jnp.float32)
    texts = [33, 20, 9, 15, 12]
    inputs = make_inputs(
        [noise(n, n) for n in lengths], [list(range(9, 9 + n)) for n in texts], [4, 9, 0, 3, 12]
    )
    in_loss = (jnp.arange(33) < inputs.text_lengths_B[:, None]) & (jnp.arange(33) > 4)
    results = {}
    for kernel in ("cudnn", "xla"):
        compute = Compute(jnp.bfloat16, kernel, remat="dots")

        def loss(params, compute=compute):
            total, count = next_token_loss(bind(params, config, compute), inputs, in_loss)
            return total / count

        program = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        assert ("fmha" in program.as_text()) == (kernel == "cudnn")
        value, gradient = program(params)
        out = jax.jit(
            lambda p, compute=compute: generate(
                bind(p, config, compute), inputs, jnp.full(5, 8), end_ids=(), max_new_tokens=8
            )
        )(params)
        assert out.lengths_B.tolist() == [8] * 5
        results[kernel] = float(value), jax.tree.leaves(gradient)
    (first, g1), (second, g2) = results["cudnn"], results["xla"]
    norm = float(jnp.sqrt(sum(jnp.sum(g * g) for g in g2)))
    worst = max(float(jnp.linalg.norm(a - b)) for a, b in zip(g1, g2, strict=True)) / norm
    print(f"\nloss {first:.5f} and {second:.5f}; gradients within {worst:.1e} of the global norm")
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in g1)
    assert first == pytest.approx(second, rel=1e-2)
    assert worst <= 3e-2


def test_features_equal_float64_on_the_gpu() -> None:
    """An fp32 product on Hopper is TF32 by default, and a TF32 log-mel is 0.05 off."""
    from test_features import BORDERS, HARD, check_against_oracle, in_float64, oracle, ours

    worst = [0.0, 0.0]
    waves = [noise(n, n) for n in [*BORDERS, 480000, 479999]] + list(HARD.values())
    for wave, mel in zip(waves, ours(waves, 480000), strict=True):
        check_against_oracle(wave, mel)
        exact = in_float64(wave)
        worst = [
            max(worst[0], np.abs(mel - exact).max()),
            max(worst[1], np.abs(oracle(wave) - exact).max()),
        ]
    print(f"\nfeatures: ours {worst[0]:.2e}, reference {worst[1]:.2e} from float64 at most")


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[dict, Path]:
    """A written 1.7B checkpoint in bfloat16, and the weights read back from it."""
    folder = tmp_path_factory.mktemp("large")
    drawn = random_params(LARGE)
    start = time.perf_counter()
    with peak_anonymous() as writing:
        save_params(drawn, LARGE, "transformers", folder)
    written = time.perf_counter()
    with peak_anonymous() as reading:
        again = jax.block_until_ready(load_params(folder, LARGE, "transformers"))
    read = time.perf_counter()
    same = jax.jit(lambda a, b: jnp.stack([jnp.all(x == y) for x, y in zip(a, b, strict=True)]))
    assert np.all(same(jax.tree.leaves(drawn), jax.tree.leaves(again)))
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    print(f"\n1.7B, {size:.2f} GB: written in {written - start:.1f} s, ", end="")
    print(f"host memory +{writing[0] / 1e9:.2f} GB; ", end="")
    print(f"read to the device in {read - written:.1f} s, +{reading[0] / 1e9:.2f} GB")
    return again, folder


@partial(jax.jit, static_argnames="compute")
def forward(params, wave_BS, samples_B, text_BX, compute):
    """Features, encoder, decoder; hidden states at the text positions."""
    mel_BTM, frames_B = log_mel(wave_BS, samples_B, mel_bins=128)
    rows = wave_BS.shape[0]
    inputs = Inputs(mel_BTM, frames_B, text_BX, jnp.full(rows, TEXT), audio_at_B=jnp.full(rows, 9))
    return bind(params, LARGE, compute).hidden_before_text(inputs)


def test_a_batch_of_30_seconds_by_both_kernels(large) -> None:
    """cuDNN and XLA attention agree within bf16 rounding; the time of each is printed."""
    params, _ = large
    wave = jnp.asarray(np.stack([noise(SECONDS * 16000, row) for row in range(CLIPS)]))
    samples = jnp.full(CLIPS, SECONDS * 16000)
    text = jax.random.randint(jax.random.key(1), (CLIPS, TEXT), 0, 151000)
    outputs = {}
    for kernel in ("cudnn", "xla"):
        compute = Compute(jnp.bfloat16, kernel)
        start = time.perf_counter()
        program = forward.lower(params, wave, samples, text, compute=compute).compile()
        compiled = time.perf_counter() - start
        assert ("fmha" in program.as_text()) == (kernel == "cudnn")
        memory = program.memory_analysis()
        outputs[kernel] = program(params, wave, samples, text).block_until_ready()
        times = []
        for _ in range(10):
            start = time.perf_counter()
            program(params, wave, samples, text).block_until_ready()
            times.append(time.perf_counter() - start)
        step = float(np.median(times))
        print(
            f"\n{kernel}: {1e3 * step:.1f} ms a forward of {CLIPS} x {SECONDS} s "
            f"({CLIPS * SECONDS / step:.0f} audio-s/s, spread {1e3 * (max(times) - min(times)):.1f}"
            f" ms), compile {compiled:.0f} s, temporary {memory.temp_size_in_bytes / 1e9:.1f} GB"
        )
    exact = forward(params, wave[:4], samples[:4], text[:4], compute=Compute(jnp.float32))
    exact = np.asarray(exact, np.float32)[:, 1:]
    halves = {k: np.asarray(v, np.float32)[:, 1:] for k, v in outputs.items()}
    between = relative(halves["cudnn"], halves["xla"])
    to_exact = {k: relative(v[:4], exact) for k, v in halves.items()}
    print(f"cudnn to xla {between:.2e}; to float32 {to_exact}")
    assert between <= 3e-2
    assert to_exact["cudnn"] <= 1.5 * to_exact["xla"] <= 6e-2
