"""What the compiled programs multiply: in which precision, and how often.

float32 means float32: on Hopper a product of two float32 arrays is TF32 unless it asks not.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from reference import load_ours, make_inputs, noise, tiny_folder

from hebasr_jax.features import log_mel
from hebasr_jax.generate import generate
from hebasr_jax.loss import next_token_loss
from hebasr_jax.model.asr import bind
from hebasr_jax.model.layers import Compute

HIGHEST = jax.lax.Precision.HIGHEST


def products(jaxpr) -> Iterator:
    """Every matrix product and convolution of a program, in loops and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        yield from (e for inner in jaxprs_in_params(equation.params) for e in products(inner))


def _programs(dtype):
    params, config = load_ours(tiny_folder())
    inputs = make_inputs([noise(150000)], [list(range(20))], [4])
    bound = functools.partial(bind, config=config, compute=Compute(dtype))
    marked = jnp.ones(inputs.text_BX.shape, bool)
    budget = jnp.full(1, 4)
    return {
        "loss and gradient": jax.make_jaxpr(
            jax.grad(lambda p: next_token_loss(bound(p), inputs, marked)[0])
        )(params),
        "generation": jax.make_jaxpr(
            lambda p: generate(bound(p), inputs, budget, end_ids=(1,), max_new_tokens=4)
        )(params),
        "features": jax.make_jaxpr(lambda w: log_mel(w, jnp.full(1, 16000), mel_bins=128))(
            jnp.zeros((1, 16000))
        ),
    }


@pytest.mark.parametrize("name", ["loss and gradient", "generation", "features"])
def test_every_float32_product_asks_for_full_precision(name) -> None:
    found = list(products(_programs(jnp.float32)[name].jaxpr))
    assert found
    for equation in found:
        if equation.invars[0].aval.dtype == jnp.float32:
            assert equation.params["precision"] in (HIGHEST, (HIGHEST, HIGHEST)), equation


def _sums_rows(equation) -> bool:
    """A row of ones times a matrix, as `layers.add_bias` sums up."""
    shape = equation.invars[0].aval.shape
    return len(shape) == 2 and shape[0] == 1 and equation.params["precision"] == (HIGHEST, HIGHEST)


def test_bfloat16_products_run_in_bfloat16() -> None:
    """No product of the model is silently computed in float32; sums of biases' gradients are."""
    for name in ("loss and gradient", "generation"):
        kinds = {
            tuple(v.aval.dtype.name for v in equation.invars)
            for equation in products(_programs(jnp.bfloat16)[name].jaxpr)
            if not (name == "loss and gradient" and _sums_rows(equation))
        }
        print(name, kinds)
        assert ("bfloat16", "bfloat16") in kinds
        assert ("float32", "float32") not in kinds


def test_remat_recomputes_what_it_says() -> None:
    """Products in the gradient: none recomputed, those of attention alone, or all."""
    params, config = load_ours(tiny_folder())
    inputs = make_inputs([noise(20000)], [list(range(20))], [4])
    marked = jnp.ones(inputs.text_BX.shape, bool)

    def count(remat) -> int:
        def loss(params):
            return next_token_loss(bind(params, config, Compute(remat=remat)), inputs, marked)[0]

        return len(list(products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)))

    none, dots, full = (count(remat) for remat in ("none", "dots", "full"))
    assert dots == none + 2 + 2  # scores and weighted values, in each stack
    assert full >= dots + 5 + 6  # at least the weight products but each layer's last
