"""Layers with gradients of their own equal what JAX derives; attention reads what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import relative

from hebasr_jax.bench import work
from hebasr_jax.loss import _head_loss
from hebasr_jax.model.attention import attend_cache, attend_written
from hebasr_jax.model.layers import add_bias, gelu
from hebasr_jax.slots import Utterance, _shape
from hebasr_jax.text import Prompt


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_gelu_and_its_gradient_are_the_exact_ones() -> None:
    x = jnp.concatenate([draw(2000, scale=3.0), jnp.asarray([0.0, -30.0, 30.0, 1e-20])])
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    assert relative(gelu(x), exact(x)) < 1e-6
    ours, jaxs = (jax.grad(lambda x, f=f: jnp.sum(f(x)))(x) for f in (gelu, exact))
    assert relative(ours, jaxs) < 1e-6


def test_a_bias_of_many_positions_has_an_exact_gradient_in_bfloat16() -> None:
    """Summed up in bfloat16 a million ones would be 256; a row's sum, 257, cannot be told in it."""
    x = jnp.zeros((4000, 1, 257, 2), jnp.bfloat16)
    bias_C = jnp.zeros(2, jnp.bfloat16)
    grad_C = jax.grad(lambda b: jnp.sum(add_bias(x, b).astype(jnp.float32)))(bias_C)
    assert (grad_C == jnp.asarray(4000.0 * 257, jnp.bfloat16)).all()


@pytest.mark.parametrize("marked", [0, 1, 5])
def test_the_heads_gradient_is_jaxs(marked) -> None:
    hidden_RD, table_VD = draw(5, 8), draw(11, 8, seed=1)
    label_R, in_loss_R = jnp.arange(5), jnp.arange(5) < marked

    def plain(hidden_RD, table_VD):
        logits_RV = hidden_RD @ table_VD.T
        chosen_R = jax.nn.log_softmax(logits_RV)[jnp.arange(5), label_R]
        return -jnp.sum(jnp.where(in_loss_R, chosen_R, 0.0))

    ours = jax.value_and_grad(lambda *x: _head_loss(*x, label_R, in_loss_R), (0, 1))
    jaxs = jax.value_and_grad(plain, (0, 1))
    for a, b in zip(
        jax.tree.leaves(ours(hidden_RD, table_VD)),
        jax.tree.leaves(jaxs(hidden_RD, table_VD)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_reads_what_is_written_and_nothing_behind() -> None:
    q, k, v = draw(3, 1, 4, 8), draw(3, 10, 2, 8, seed=1), draw(3, 10, 2, 8, seed=2)
    written_B = jnp.asarray([1, 7, 10])
    out = attend_written(q, k, v, written_B, "xla")
    behind = (jnp.arange(10) >= written_B[:, None])[..., None, None]
    spoilt = attend_written(q, k + 100 * behind, jnp.where(behind, 1e9, v), written_B, "xla")
    np.testing.assert_array_equal(out, spoilt)
    for row, written in enumerate(written_B.tolist()):
        whole = jnp.ones((1, written), bool)
        alone = attend_cache(
            q[row : row + 1], k[row : row + 1, :written], v[row : row + 1, :written], whole
        )
        np.testing.assert_allclose(out[row], alone[0], atol=1e-6)


@pytest.mark.parametrize(
    ("clips", "batch_audio_s", "rows", "fill_rows"),
    [(3, 4096.0, 4, 4), (128, 4096.0, 128, 64), (2048, 16384.0, 512, 64), (2048, 512.0, 16, 2)],
)
def test_a_fill_takes_a_bounded_amount_of_audio(clips, batch_audio_s, rows, fill_rows) -> None:
    wave = np.zeros(work.CLIP_S * 16_000, np.int16)
    shape = _shape([Utterance(wave, Prompt((1,), (2,)), 150)] * clips, 32, 1, batch_audio_s)
    assert (shape.rows, shape.fill_rows) == (rows, fill_rows)
    assert shape.fill_rows * 32 <= 2048
