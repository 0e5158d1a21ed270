"""The step: equal to torch over ten updates, to itself however it is cut, and never half done."""

import functools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.mlir import ir
from reference import load_ours, load_torch, noise, tiny_folder, torch_inputs
from step_work import as_if_on_a_gpu

from hebasr_jax.data.clips import Batch
from hebasr_jax.model.attention import attend
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import make_optimizer, schedule, split
from hebasr_jax.paths import flat
from hebasr_jax.run_config import Augment, Group, Optim, Stage
from hebasr_jax.sharding import make_mesh
from hebasr_jax.train_step import (
    _OPTIONS,
    Step,
    compile_step,
    init_state,
    prepare_inputs,
    trace_step,
    train_step,
)
from hebasr_jax.weights import entries

OPTIM = Optim(weight_decay=0.1, warmup_steps=3)
ALL = Stage(
    **{name: Group(2e-3) for name in ("conv_stem", "encoder", "projector", "embedding")},
    decoder=Group(1e-3),
)
TOP = Stage(
    conv_stem=Group(0.0),
    encoder=Group(1e-3, trained_layers=1),
    projector=Group(1e-3),
    embedding=Group(0.0),
    decoder=Group(1e-3, trained_layers=2),
)
STEPS = 10


def make_batch(lengths: list[int], audio_s: int = 2, seed: int = 0) -> Batch:
    """Rows of noise with random texts of different length."""
    rng = np.random.default_rng(seed)
    rows, columns = len(lengths), 16
    wave_BS = np.zeros((rows, audio_s * 16000), np.int16)
    text_BX = np.zeros((rows, columns), np.int32)
    in_loss_BX = np.zeros((rows, columns), bool)
    text_lengths_B = rng.integers(7, columns + 1, rows).astype(np.int32)
    for row, samples in enumerate(lengths):
        wave_BS[row, :samples] = noise(samples, seed * 100 + row) * 20000
        if not samples:
            text_lengths_B[row] = 1
            continue
        text_BX[row, : text_lengths_B[row]] = rng.integers(0, 256, text_lengths_B[row])
        in_loss_BX[row, 6 : text_lengths_B[row]] = True
    return Batch(
        wave_BS=wave_BS,
        samples_B=np.asarray(lengths, np.int32),
        speed_B=np.ones(rows, np.float32),
        seed_B2=rng.integers(0, 2**32, (rows, 2), dtype=np.uint32),
        text_BX=text_BX,
        text_lengths_B=text_lengths_B,
        audio_at_B=np.full(rows, 4, np.int32),
        in_loss_BX=in_loss_BX,
    )


def make_step(stage: Stage = ALL, **changes) -> tuple[Step, object]:
    """A step on one device and the state it starts from."""
    step, state = _make_step(stage)
    return replace(step, **changes), state


@functools.cache
def _make_step(stage: Stage) -> tuple[Step, object]:
    params, config = load_ours(tiny_folder())
    trained, frozen = split(params, stage)
    optimizer = make_optimizer(OPTIM, stage, trained, STEPS)
    step = Step(config, Compute(), Augment(), optimizer, make_mesh(1), audio_s=2)
    return step, init_state(trained, frozen, optimizer)


@functools.cache
def program(step: Step):
    """Each step is compiled once for this file: that takes a quarter of a minute."""
    state = make_step()[1] if step.optimizer is make_step()[0].optimizer else make_step(TOP)[1]
    return jax.jit(partial(train_step, noise_NS=None, step=step)).lower(state, BATCHES[0]).compile()


def run(step: Step, state, batches: list[Batch]):
    """All the steps; the final state and each step's metrics."""
    metrics = []
    for batch in batches:
        state, told = program(step)(state, batch)
        metrics.append(told)
    return state, metrics


def equal(a, b) -> bool:
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def close(a, b, bound: float) -> None:
    """Each leaf within `bound` of the other, relative to its norm."""
    for (path, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - y)
        if not path.endswith("key/bias"):  # its gradient is zero in theory
            assert error <= bound * np.linalg.norm(y), (path, error / np.linalg.norm(y))


# The last two rows only fill the batch.
BATCHES = [make_batch([32000, 9000, 20011, 5000, 0, 0], seed=seed) for seed in range(STEPS)]


def test_ten_steps_equal_torch_adamw() -> None:
    """Losses, gradient norms, and in the end every parameter but the encoder's key biases."""
    step, state = make_step()
    config = step.model
    state, metrics = run(step, state, BATCHES)

    model = load_torch(tiny_folder())
    rates = {"encoder": 2e-3, "projector": 2e-3, "embedding": 2e-3, "decoder": 1e-3}
    by_path = {e.key: e.path for e in entries(config, "transformers")}
    groups = []
    for name, parameter in model.named_parameters():
        path = by_path[name]
        group = "embedding" if "embed" in path else path.split("/")[0]
        groups.append(
            {
                "params": [parameter],
                "peak": rates[group],
                "weight_decay": OPTIM.weight_decay if parameter.ndim > 1 else 0.0,
            }
        )
    adam = torch.optim.AdamW(groups, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.epsilon)
    for number, (batch, told) in enumerate(zip(BATCHES, metrics, strict=True)):
        for group in adam.param_groups:
            group["lr"] = group["peak"] * float(schedule(number, STEPS, OPTIM))
        loss = torch_loss(model, step, batch)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        adam.step()
        assert float(told.loss) == pytest.approx(loss.item(), rel=2e-5), number
        assert float(told.grad_norm) == pytest.approx(norm.item(), rel=2e-4), number
    theirs = dict(model.named_parameters())
    ours = flat(state.trained)
    for entry in entries(config, "transformers"):
        if entry.path == "encoder/layers/key/bias":
            continue
        mine = entry.to_theirs(ours[entry.path], config)
        other = theirs[entry.key].detach().numpy()
        assert np.linalg.norm(mine - other) <= 2e-3 * np.linalg.norm(other), entry.key


def torch_loss(model, step: Step, batch: Batch) -> torch.Tensor:
    """The batch's mean loss by the reference, row by row, from our features."""
    inputs = prepare_inputs(
        jax.tree.map(jnp.asarray, batch), None, augment=Augment(), audio_s=2, mel_bins=128
    )
    total = torch.zeros(())
    for row in np.flatnonzero(batch.samples_B):
        ids = torch_inputs(inputs, row, step.model.audio_token_id)
        labels = torch.tensor(batch.text_BX[row][batch.in_loss_BX[row]])
        logits = model(**ids).logits[0][-len(labels) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, labels.long(), reduction="sum")
    return total / int(batch.in_loss_BX.sum())


def test_however_a_batch_is_cut_the_update_is_the_same() -> None:
    """Micro-batches of rows with 1 and with 10 targets, and tiles of 7 of 32 positions:
    tokens are weighed, not micro-batches or tiles."""
    (step, state), batch = make_step(), BATCHES[0]
    batch = replace(batch, in_loss_BX=batch.in_loss_BX.copy())
    batch.in_loss_BX[0, 7:] = False
    whole, [told] = run(step, state, [batch])
    cut, [cut_told] = run(replace(step, micro_batches=3, loss_rows=7), state, [batch])
    assert float(cut_told.loss) == pytest.approx(float(told.loss), rel=1e-6)
    assert float(cut_told.grad_norm) == pytest.approx(float(told.grad_norm), rel=1e-5)
    close(cut.trained, whole.trained, 1e-4)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count() -> None:
    step, state = make_step()
    state, _ = run(step, state, BATCHES[:2])
    broken = replace_leaf(state, "decoder/norm/scale", jnp.nan)
    after, [told] = run(step, broken, BATCHES[2:3])
    assert bool(told.skipped)
    assert not np.isfinite(told.loss)
    assert int(after.step) == 3
    assert equal((after.trained, after.moments), (broken.trained, broken.moments))
    after, [told] = run(step, state, BATCHES[2:3])
    assert not bool(told.skipped)
    assert not equal(after.trained, state.trained)


def replace_leaf(state, path: str, value: float):
    tree = {**state.trained}
    node, *keys = tree, *path.split("/")
    for key in keys[:-1]:
        node[key] = {**node[key]}
        node = node[key]
    node[keys[-1]] = node[keys[-1]].at[0].set(value)
    return state.replace(trained=tree)


def test_only_the_top_layers_are_trained() -> None:
    """Frozen parts stay bitwise, have no moments and cost nothing backwards; the forward pass and
    the gradients of the rest are the whole model's."""
    step, state = make_step(TOP)
    after, metrics = run(step, state, BATCHES[:3])
    assert equal(after.frozen, state.frozen)
    for path, leaf in flat(after.trained).items():
        before = flat(state.trained)[path]
        for n in range(leaf.shape[0] if "/layers/" in path else 0):
            assert not np.array_equal(leaf[n], before[n]), (path, n)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.moments) if leaf.dtype == np.float32)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(state.trained))
    whole_step, whole_state = make_step()
    whole, [told] = run(whole_step, whole_state, BATCHES[:1])
    assert float(metrics[0].loss) == pytest.approx(float(told.loss), rel=1e-6)
    cut, _ = run(step, state, BATCHES[:1])
    for name in ("up/kernel", "query_norm/scale", "attention_norm/scale"):
        path = ("decoder", "layers", *name.split("/"))
        # Adam's first moments after one step are the clipped gradients.
        mine = moment(cut, path) * max(1.0, float(metrics[0].grad_norm))
        theirs = moment(whole, path)[-2:] * max(1.0, float(told.grad_norm))
        np.testing.assert_allclose(mine, theirs, rtol=3e-4, atol=1e-8)
    flops = [program(s).cost_analysis()["flops"] for s in (step, whole_step)]
    assert flops[0] < 0.8 * flops[1], flops


def moment(state, path: tuple[str, ...]):
    """Adam's first moment of one parameter."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.moments):
        text = jax.tree_util.keystr(keys)
        if ".mu" in text and text.endswith("".join(f"['{key}']" for key in path)):
            return np.asarray(leaf)
    raise KeyError(path)


def test_the_state_gives_its_memory_to_the_new_state() -> None:
    step, state = make_step()
    text = trace_step(step, state, BATCHES[0], None).lower().as_text()
    assert text.count("tf.aliasing_output") == len(jax.tree.leaves(state))


def test_bfloat16_steps_follow_float32_ones() -> None:
    """Masters stay float32; the loss follows within bf16 noise."""
    step, state = make_step()
    half = replace(step, compute=Compute(dtype=jnp.bfloat16))
    _, metrics = run(step, state, BATCHES)
    coarse, coarse_metrics = run(half, state, BATCHES)
    assert {leaf.dtype for leaf in jax.tree.leaves(coarse.trained)} == {jnp.dtype("float32")}
    for a, b in zip(metrics, coarse_metrics, strict=True):
        assert float(b.loss) == pytest.approx(float(a.loss), rel=3e-2)


@pytest.fixture
def for_a_gpu():
    """Two layers of cuDNN attention and their gradients, lowered as where there is a GPU."""

    def twice(x: jax.Array) -> jax.Array:
        lengths = jnp.full(len(x), 60, jnp.int32)
        for _ in range(2):
            x = attend(x, x, x, lengths_B=lengths, causal=True, kernel="cudnn")
        return x.astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    with as_if_on_a_gpu():
        return jax.jit(jax.grad(twice)).trace(x).lower(lowering_platforms=("cuda",))


def test_a_program_is_compiled_with_all_backward_attentions_marked(monkeypatch, for_a_gpu) -> None:
    """And with the option of its platform, on a GPU: of deterministic operations only."""
    assert _OPTIONS == {"gpu": {"xla_gpu_exclude_nondeterministic_ops": True}}
    monkeypatch.setattr("hebasr_jax.train_step._OPTIONS", {"cpu": {"flag": True}})
    module = for_a_gpu.compiler_ir()
    lowered = SimpleNamespace(compiler_ir=lambda: module, compile=lambda x: (x, str(module)))
    traced = SimpleNamespace(lower=lambda: lowered)
    monkeypatch.setattr("hebasr_jax.train_step.trace_step", lambda *parts: traced)
    step, state = make_step()
    options, text = compile_step(step, state, BATCHES[0], None)
    assert options == {"flag": True}
    calls = [line for line in text.splitlines() if "@__cudnn$fmhaSoftmax" in line]
    backward = [line for line in calls if "@__cudnn$fmhaSoftmaxBackward(" in line]
    assert (len(calls), len(backward)) == (4, 2)
    assert backward == [line for line in calls if "force_deterministic\\22: true" in line]


def test_a_program_is_compiled_as_it_was_edited() -> None:
    """JAX promises no more of `compiler_ir` than that it is there to be looked at."""
    lowered = jax.jit(lambda x: x < 0).lower(jnp.float32(1))

    def turn(op: ir.Operation) -> ir.WalkResult:
        if op.name == "stablehlo.compare":
            greater = ir.Attribute.parse("#stablehlo<comparison_direction GT>")
            op.attributes["comparison_direction"] = greater
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir()
    with module.context:
        module.operation.walk(turn)
    assert lowered.compile()(jnp.float32(1))
