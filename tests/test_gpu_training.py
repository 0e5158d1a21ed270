"""The full training step at 1.7B sizes on a real GPU; its speed is `hebasr bench train`'s."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import LARGE
from test_gpu import random_params

from hebasr_jax.bench import work
from hebasr_jax.bench.train import Settings, against_plain_attention, fixed
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import make_optimizer, split
from hebasr_jax.run_config import Computation, Group, Optim, Stage
from hebasr_jax.sharding import make_mesh, rows, shardings
from hebasr_jax.train_step import Step, compile_step, init_state

pytestmark = pytest.mark.gpu

CUT = Stage(encoder=Group(3e-5, trained_layers=2), decoder=Group(3e-5, trained_layers=2))


@pytest.mark.parametrize("compute", [Computation(), Computation(remat="full")])
def test_a_step_learns_its_batch_within_its_memory(compute) -> None:
    row = fixed(Settings(LARGE, compute, rows=32, steps=20, mix_audio_s=960.0, buckets=1))
    assert np.isfinite([row["loss from"], row["loss to"]]).all()
    assert row["loss to"] < row["loss from"] - 1
    assert row["compiler GiB"] < 70


def test_cudnns_loss_is_that_of_plain_attention() -> None:
    settings = Settings(LARGE, Computation(), rows=4, steps=1, mix_audio_s=960.0, buckets=1)
    assert against_plain_attention(settings)["apart from xla"] < 1e-2


@pytest.mark.parametrize("stage", [Stage(), CUT], ids=["all", "cut"])
@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
def test_a_step_repeats_itself_bit_for_bit(unroll, stage) -> None:
    """Four layers at full width, on all GPUs: same state, same batch, same bits, or resume is not
    exact."""
    config = replace(
        LARGE,
        encoder=replace(LARGE.encoder, layers=4),
        decoder=replace(LARGE.decoder, layers=4),
    )
    optim = Optim(warmup_steps=1)
    trained, frozen = split(random_params(config, jnp.float32), stage)
    optimizer, mesh = make_optimizer(optim, stage, trained, 100), make_mesh()
    compute = Compute(jnp.bfloat16, "cudnn", "dots", unroll)
    step = Step(config, compute, work.AUGMENT, optimizer, mesh, audio_s=work.CLIP_S)
    batch = jax.device_put(work.full_batch(config, 8), rows(mesh))
    host = jax.device_get(init_state(trained, frozen, optimizer))
    program = compile_step(step, host, batch, None)
    ends = []
    for _ in range(3):
        state = jax.device_put(host, shardings(host, mesh))
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
