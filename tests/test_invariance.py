"""Rung 5: batch, padding, order and bucket never change a result; attention sees what it may."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import load_ours, make_inputs, noise, relative, tiny_folder

from hebasr_jax.loss import next_token_loss
from hebasr_jax.model.asr import bind, text_positions
from hebasr_jax.model.attention import attend, attend_cache, pick_kernel
from hebasr_jax.model.layers import Compute

LENGTHS = [170000, 9000, 128000, 40000]
TEXTS = [list(range(10, 10 + n)) for n in (12, 25, 7, 16)]
AT = [3, 0, 7, 9]


@pytest.fixture(scope="module")
def ours():
    return load_ours(tiny_folder())


@jax.jit
def _hidden(params, inputs):
    return bind(params, load_ours(tiny_folder())[1], Compute()).hidden_before_text(inputs)


def test_batch_of_one_equals_padded_batch_in_any_order(ours) -> None:
    params, _ = ours
    waves = [noise(n, n) for n in LENGTHS]
    order = [2, 0, 3, 1]
    batch = make_inputs(
        [waves[i] for i in order], [TEXTS[i] for i in order], [AT[i] for i in order], pad=3
    )
    together = _hidden(params, batch)
    for row, i in enumerate(order):
        alone = _hidden(params, make_inputs([waves[i]], [TEXTS[i]], [AT[i]]))[0]
        assert relative(together[row, 1 : len(TEXTS[i])], np.asarray(alone[1:])) <= 1e-5


def test_what_pads_a_row_is_never_read(ours) -> None:
    """Other token ids and poison features behind every row leave the result bitwise alike."""
    params, _ = ours
    clean = make_inputs([noise(n, n) for n in LENGTHS], TEXTS, AT, pad=2)
    text_pad = jnp.arange(clean.text_BX.shape[1]) >= clean.text_lengths_B[:, None]
    dirty = clean.replace(text_BX=jnp.where(text_pad, 99, clean.text_BX))
    first, second = _hidden(params, clean), _hidden(params, dirty)
    for row, text in enumerate(TEXTS):
        np.testing.assert_array_equal(first[row, : len(text)], second[row, : len(text)])


def test_padding_changes_neither_loss_nor_gradient(ours) -> None:
    params, config = ours

    def loss(params, inputs, in_loss):
        total, count = next_token_loss(bind(params, config, Compute()), inputs, in_loss)
        return total / count

    step = jax.jit(jax.value_and_grad(loss))
    results = []
    for pad in (0, 2):
        inputs = make_inputs([noise(n, n) for n in LENGTHS[1:3]], TEXTS[1:3], AT[1:3], pad=pad)
        in_loss = np.zeros(inputs.text_BX.shape, bool)
        in_loss[0, 20:25] = in_loss[1, 3:7] = True
        results.append(step(params, inputs, jnp.asarray(in_loss)))
    (first, g1), (second, g2) = results
    assert float(first) == pytest.approx(float(second), rel=1e-6)
    norm = np.sqrt(sum(float(jnp.sum(g * g)) for g in jax.tree.leaves(g1)))
    for a, b in zip(jax.tree.leaves(g1), jax.tree.leaves(g2), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * max(float(jnp.linalg.norm(a)), 1e-3 * norm)


def test_no_position_sees_a_later_one(ours) -> None:
    """Causality by gradient, through audio and text."""
    params, config = ours
    inputs = make_inputs([noise(32000)], [TEXTS[0]], [3])
    asr = bind(params, config, Compute())
    x_BLD, lengths = asr.embed(inputs)
    probe = 20

    def one(x):
        return jnp.sum(jnp.sin(asr.decoder(x, lengths)[0][0, probe]))

    reach = np.abs(jax.jit(jax.grad(one))(x_BLD))[0].max(axis=-1)
    assert np.all(reach[: probe + 1] > 0)
    assert not np.any(reach[probe + 1 :])


def test_windows_do_not_see_one_another(ours) -> None:
    """Tokens of the second 8-second window do not depend on audio of the first, or after it."""
    params, config = ours
    encoder = bind(params, config, Compute()).encoder
    inputs = make_inputs([noise(16000 * 19)], [TEXTS[0]], [3])

    def one(mel):
        return jnp.sum(jnp.sin(encoder(mel, inputs.frames_B)[0, 104 + 50]))

    reach = np.abs(jax.jit(jax.grad(one))(inputs.mel_BTM))[0].max(axis=-1)
    assert not np.any(reach[:800])
    assert np.count_nonzero(reach[800:1600]) > 790
    assert not np.any(reach[1600:])


def test_text_positions_skip_the_audio(ours) -> None:
    inputs = make_inputs([noise(16000)], [TEXTS[0]], [3])
    assert np.asarray(text_positions(inputs))[0].tolist() == [0, 1, 2, *range(16, 25)]


def _naive(q, k, v, allowed_BLS):
    """Attention by its definition; query head n reads key head n // group."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.einsum("blnh,bsnh->bnls", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(allowed_BLS[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnls,bsnh->blnh", weights, v)


def _qkv(length: int, rows: int = 2):
    rng = np.random.default_rng(0)
    shapes = [(rows, length, 4, 8), (rows, length, 2, 8), (rows, length, 2, 8)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [37, 2500])
def test_attention_by_lengths(causal, length) -> None:
    """Equal to the definition; long rows, computed in blocks of queries, too."""
    q, k, v = _qkv(length, rows=2)
    lengths = np.array([length, length // 2])
    position = np.arange(length)
    allowed = np.broadcast_to(position < lengths[:, None, None], (2, length, length))
    if causal:
        allowed = allowed & (position[:, None] >= position)
    out = jax.jit(
        lambda *x: attend(*x, lengths_B=jnp.asarray(lengths), causal=causal, kernel="xla")
    )(q, k, v)
    expected = _naive(q, k, v, allowed)
    for row in range(2):
        n = lengths[row]
        np.testing.assert_allclose(out[row, :n], expected[row, :n], atol=2e-6)
    assert np.all(np.isfinite(out))


def test_cached_attention_reads_valid_slots_only() -> None:
    q, k, v = _qkv(20)
    valid = np.random.default_rng(1).random((2, 20)) < 0.5
    valid[:, 0] = True
    out = attend_cache(q[:, :1], k, v, jnp.asarray(valid))
    np.testing.assert_allclose(out, _naive(q[:, :1], k, v, valid[:, None]), atol=2e-6)


def test_a_kernel_that_cannot_be_had_is_an_error() -> None:
    assert pick_kernel("auto", jnp.bfloat16, "gpu") == "cudnn"
    assert pick_kernel("auto", jnp.float32, "gpu") == "xla"
    assert pick_kernel("auto", jnp.bfloat16, "cpu") == "xla"
    with pytest.raises(ValueError, match="cudnn"):
        pick_kernel("cudnn", jnp.bfloat16, "cpu")
    with pytest.raises(ValueError, match="cudnn"):
        pick_kernel("cudnn", jnp.float32, "gpu")
