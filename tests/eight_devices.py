"""Run in a process with 8 simulated CPU devices: the step and decoding on a mesh of 1 and of 8.

Prints one JSON object; tests/test_sharding.py reads it.
"""

import json
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from reference import noise, tiny_folder
from step_work import as_if_on_a_gpu, collectives
from test_train_step import ALL, make_batch, make_step

from hebasr_jax.distributed import place_rows, place_whole
from hebasr_jax.generate import Slots, decode, empty_slots
from hebasr_jax.model.asr import Params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.paths import flat
from hebasr_jax.run_config import Group
from hebasr_jax.sharding import (
    COPIES,
    CUT,
    ROWS,
    bytes_per_device,
    make_mesh,
    replicated,
    rows,
    shardings,
)
from hebasr_jax.slots import Utterance, decode_all
from hebasr_jax.text import Prompt
from hebasr_jax.train_step import compile_step, mark_attention, trace_step
from hebasr_jax.transcribe import load_recognizer

BATCHES = [make_batch([32000, 9000, 20011, 5000] * 4, seed=seed) for seed in range(3)]


def run(devices: int, cut_over: int | None = None, **changes) -> dict:
    """Three steps on so many devices."""
    mesh = make_mesh(devices, cut_over)
    stage = replace(ALL, decoder=Group(1e-3, trained_layers=2))
    step, state = make_step(stage, mesh=mesh, **changes)
    state = jax.tree.map(lambda x, s: place_whole(np.asarray(x), s), state, shardings(state, mesh))
    batches = [jax.tree.map(lambda x: place_rows(x, rows(mesh)), batch) for batch in BATCHES]
    compiled = compile_step(step, state, batches[0], None)
    held = bytes_per_device(state)
    losses, norms = [], []
    for batch in batches:
        state, told = compiled(state, batch, None)
        losses.append(float(told.loss))
        norms.append(float(told.grad_norm))
    return {
        "losses": losses,
        "norms": norms,
        "bytes": held,
        "weights": {path: np.asarray(leaf) for path, leaf in flat(state.trained).items()},
        "cut": sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state)),
        "text": compiled.as_text(),
    }


def gathered() -> dict[str, int]:
    """Values of the weights that a bfloat16 step wants whole, by type; XLA on a CPU widens them."""
    mesh = make_mesh(8)
    step, state = make_step(ALL, mesh=mesh, compute=Compute(jnp.bfloat16))
    text = trace_step(step, state, BATCHES[0], None).lower().as_text()
    weights = text[: text.index("stablehlo.while")]  # the scan over micro-batches comes behind
    found: dict[str, int] = {}
    wanted = r"sharding_constraint %\w+ <@mesh, \[[{}, ]*\]> : tensor<([\dx]+)x(\w+)>"
    for sizes, kind in re.findall(wanted, weights):
        found[kind] = found.get(kind, 0) + math.prod(map(int, sizes.split("x")))
    return found


def attentions(unroll: bool) -> dict[str, int]:
    """cuDNN's attentions in a step with a cut stack as it is handed to XLA for eight GPUs."""
    stage = replace(ALL, decoder=Group(1e-3, trained_layers=2))
    compute = Compute(jnp.bfloat16, "cudnn", "dots", unroll)
    step, state = make_step(stage, mesh=make_mesh(8), compute=compute)
    with as_if_on_a_gpu():
        traced = trace_step(step, state, BATCHES[0], None)
        module = traced.lower(lowering_platforms=("cuda",)).compiler_ir()
    mark_attention(module)
    text = str(module)
    return {
        "forward": text.count("@__cudnn$fmhaSoftmax("),
        "backward": text.count("@__cudnn$fmhaSoftmaxBackward("),
        "marked": text.count("force_deterministic"),
        "left to XLA": text.count("CustomSPMDPartitioning"),
    }


def heard(devices: int) -> list:
    """40 clips through two slots on each device: rows are refilled on all of them."""
    recognizer = replace(load_recognizer(str(tiny_folder())), mesh=make_mesh(devices))
    utterances = [
        Utterance(noise(16_000 + 400 * n, n), Prompt((9, 8, 7), (6, 5)), 1 + n % 13, n % 2 * 0.9, n)
        for n in range(40)
    ]
    found = decode_all(
        jax.device_put(recognizer.params, replicated(recognizer.mesh)),
        utterances,
        config=recognizer.config,
        compute=recognizer.compute,
        mesh=recognizer.mesh,
        end_ids=(),
        batch_audio_s=8.0,
    )
    return [row.tokens for row in found]


def taken_together() -> list[int]:
    """Tokens of two rows on each of two devices when at most one of a device's still runs."""
    recognizer = load_recognizer(str(tiny_folder()))
    config, compute = recognizer.config, recognizer.compute
    slots = replace(
        empty_slots(config.decoder, rows=4, prompt=8, budget=40, dtype=compute.dtype),
        prompt_R=jnp.ones(4, jnp.int32),
        budget_R=jnp.array([3, 40, 20, 40]),
        running_R=jnp.ones(4, bool),
    )

    def until_one_runs(params: Params, slots: Slots) -> Slots:
        asr, leave = bind(params, config, compute), jnp.array(1)
        return decode(asr, slots, leave, end_ids=(), sample=False, together=(COPIES, CUT))

    on_two = jax.shard_map(
        until_one_runs,
        mesh=make_mesh(2),
        in_specs=(PartitionSpec(), ROWS),
        out_specs=ROWS,
        check_vma=False,
    )
    params, slots = jax.device_get((recognizer.params, slots))
    return jax.jit(on_two)(params, slots).length_R.tolist()


def main() -> None:
    assert jax.device_count() == 8
    single = run(1)
    found = {"single": {key: single[key] for key in ("losses", "norms", "bytes")}}
    for name, changes in {
        "step": {},
        "layer": {"gather": "layer", "micro_batches": 2},
        "copies": {"cut_over": 2, "micro_batches": 2},
    }.items():
        many = run(8, **changes)
        errors = {
            path: float(np.linalg.norm(leaf - single["weights"][path]) / np.linalg.norm(leaf))
            for path, leaf in many["weights"].items()
            if not path.endswith("key/bias")  # its gradient is zero in theory, noise in practice
        }
        found[name] = {key: many[key] for key in ("losses", "norms", "bytes", "cut")}
        found[name]["worst"] = max(errors.values())
        found[name]["collectives"] = collectives(many["text"])
    found["gathered"] = gathered()
    found["attentions"] = [attentions(unroll) for unroll in (False, True)]
    found["taken together"] = taken_together()
    found["heard"] = [heard(devices) for devices in (1, 8)]
    print(json.dumps(found))


main()
