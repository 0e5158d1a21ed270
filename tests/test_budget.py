"""A regression gate without a GPU: what the step at 1.7B asks for stays within a stored budget.

`python tests/test_budget.py` prints the figures; a change for the better is put into
tests/step_budget.json by hand, with the commit that brings it.
"""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from step_work import products

from hebasr_jax.bench import work
from hebasr_jax.data.pipeline import make_feed
from hebasr_jax.data.plan import plan_table
from hebasr_jax.data.quality import Quarantine
from hebasr_jax.model.asr import init_params
from hebasr_jax.model.encoder import Encoder
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import make_optimizer, split
from hebasr_jax.run_config import Config, Data, Optim, Stage
from hebasr_jax.sharding import make_mesh
from hebasr_jax.text import load_tokenizer
from hebasr_jax.throughput import work_of
from hebasr_jax.train_step import Step, init_state, train_step

BUDGET = json.loads(Path(__file__).with_name("step_budget.json").read_text())
MODEL, ROWS = work.model_of("1.7b"), 32


def test_no_constant_of_the_encoders_program_grows_with_the_audio() -> None:
    """The position rows did: 68 MB in the program of a clip of 20 minutes."""
    encoder = nnx.eval_shape(lambda: Encoder(MODEL.encoder, Compute(), nnx.Rngs(0)))
    definition, params = nnx.split(encoder)

    def program(seconds: int) -> str:
        mel_BTM = jax.ShapeDtypeStruct((1, 100 * seconds, MODEL.encoder.mel_bins), jnp.float32)
        stem = jax.jit(lambda params, mel_BTM: nnx.merge(definition, params).stem(mel_BTM))
        return stem.lower(params, mel_BTM).as_text()

    assert len(program(300)) < 1.1 * len(program(30))


@cache
def products_of(remat: str) -> dict[str, float]:
    """TFLOP of a full step on 32 clips of 30 s, by dtype and what the backward pass recomputes."""
    shapes = jax.eval_shape(lambda: split(init_params(MODEL, jax.random.key(0)), Stage()))
    optimizer = make_optimizer(Optim(), Stage(), shapes[0], 1000)
    state = jax.eval_shape(partial(init_state, optimizer=optimizer), *shapes)
    compute = Compute(jnp.bfloat16, "xla", remat)
    step = Step(MODEL, compute, work.AUGMENT, optimizer, make_mesh(1), audio_s=work.CLIP_S)
    traced = jax.make_jaxpr(partial(train_step, step=step))
    found = products(traced(state, work.full_batch(MODEL, ROWS), None).jaxpr)
    return {dtype: flops / 1e12 for dtype, flops in found.items()}


def programs(folder: Path) -> dict[str, float]:
    """Shapes that the mix is compiled for with 12 buckets, and the padding that is left."""
    clips = work.made_up_set(work.ivrit_mix(20_000, seed=0).tolist(), seed=0)
    work.write_model_files(work.model_of("tiny"), folder)
    config = Config(
        data=Data(batch_clips=None, batch_audio_s=960.0, buckets=12), augment=work.AUGMENT
    )
    quarantine = Quarantine(folder / "quarantine.jsonl", 0.0, len(clips.clips))
    feed = make_feed([clips], load_tokenizer(folder), config, quarantine)
    whole = plan_table(feed.table, feed.plan(0), config.data)["buckets"][-1]
    return {"buckets": len(feed.buckets), "decoder padding": whole["decoder_padding"]}


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_products_of_a_step_stay_within_their_budget(remat) -> None:
    assert products_of(remat) == pytest.approx(BUDGET["products TFLOP"][remat], rel=0.01)


def test_the_step_computes_little_beyond_what_is_useful() -> None:
    """With remat of all but products: attention and what padding adds, under a tenth."""
    batch = work.full_batch(MODEL, ROWS)
    useful = work_of(batch, work.CLIP_S, MODEL).flops / 1e12
    assert useful < products_of("dots")["bfloat16"] < 1.1 * useful


def test_the_mix_is_compiled_for_few_shapes_with_little_padding(tmp_path) -> None:
    found = programs(tmp_path)
    assert found["buckets"] <= BUDGET["mix"]["buckets"]
    assert found["decoder padding"] < BUDGET["mix"]["decoder padding"]


if __name__ == "__main__":
    import tempfile

    print(json.dumps({remat: products_of(remat) for remat in ("none", "dots", "full")}, indent=1))
    print(programs(Path(tempfile.mkdtemp())))
