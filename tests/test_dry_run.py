"""Estimates against the formula's published result and the compiler; tables against their data."""

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from reference import SHARED, noise
from rich.cells import cell_len
from sizes import LARGE, SMALL

from hebasr_jax import dry_run, optim
from hebasr_jax.config import ModelConfig, model_config, read_config
from hebasr_jax.config_file import LoadedConfig, flatten, load_config
from hebasr_jax.data.clips import Batch
from hebasr_jax.dry_run import show
from hebasr_jax.errors import UserError
from hebasr_jax.flops import train_flops
from hebasr_jax.model.asr import Inputs, abstract_params, bind
from hebasr_jax.model.layers import Compute
from hebasr_jax.optim import RateRow
from hebasr_jax.rate_tables import layer_rows, rate_rows
from hebasr_jax.run_config import Augment, Computation, Config, Group, Optim, Stage
from hebasr_jax.sharding import make_mesh
from hebasr_jax.step_memory import Memory, Shape, compiled_bytes, memory_estimate
from hebasr_jax.tiny import write_tiny_model
from hebasr_jax.train_step import Step, cast, compile_step, init_state


def flops(model: ModelConfig, audio: list[int], text: list[int], targets: int) -> float:
    return train_flops(model, np.asarray(audio), np.asarray(text), targets)


@pytest.mark.shared
def test_a_clip_of_30_seconds_is_the_work_that_the_design_says() -> None:
    model = model_config(read_config(SHARED / "qwen3-asr-1.7b"))
    assert flops(model, [390], [170], 150) == pytest.approx(6.23e12, rel=0.01)


def test_flops_by_part() -> None:
    """Each part of the formula alone, worked out by hand for one size."""
    no_layers = dataclasses.replace(
        LARGE,
        encoder=dataclasses.replace(LARGE.encoder, layers=0),
        decoder=dataclasses.replace(LARGE.decoder, layers=0),
    )
    stem = 50 * 64 * 9 * 480 + 25 * 32 * 9 * 480**2 + 13 * 16 * 9 * 480**2 + 13 * 7680 * 1024
    projector = 13 * (1024 * 1024 + 1024 * 2048)
    assert flops(no_layers, [13], [5], 0) == pytest.approx(6 * (stem + projector), rel=1e-12)
    head = flops(LARGE, [13], [5], 3) - flops(LARGE, [13], [5], 0)
    assert head == 6 * 3 * 2048 * 151936
    one = dataclasses.replace(no_layers, decoder=dataclasses.replace(LARGE.decoder, layers=1))
    layer = flops(one, [13], [7], 0) - flops(no_layers, [13], [7], 0)
    weights = 2048 * (4096 + 2048 + 3 * 6144)
    assert layer == pytest.approx(6 * 20 * weights + 3 * 4 * 2048 * 20 * 21 / 2, rel=1e-12)


def test_flops_count_no_padding_and_attention_stays_in_its_window() -> None:
    both = flops(LARGE, [390, 0, 26], [170, 1, 9], 160)
    apart = flops(LARGE, [390], [170], 150) + flops(LARGE, [26], [9], 10)
    assert both == pytest.approx(apart, rel=1e-12)
    encoder_only = dataclasses.replace(LARGE, decoder=dataclasses.replace(LARGE.decoder, layers=0))
    assert flops(encoder_only, [208], [0], 0) == 2 * flops(encoder_only, [104], [0], 0)
    one = dataclasses.replace(encoder_only, encoder=dataclasses.replace(LARGE.encoder, layers=1))
    none = dataclasses.replace(encoder_only, encoder=dataclasses.replace(LARGE.encoder, layers=0))
    layer = flops(one, [130], [0], 0) - flops(none, [130], [0], 0)
    weights = 4 * 1024**2 + 2 * 1024 * 4096
    assert layer == pytest.approx(6 * 130 * weights + 3 * 4 * 1024 * (104**2 + 26**2), rel=1e-9)


# Layers and vocabulary that dominate a step, at sizes that compile in seconds.
MEDIUM = ModelConfig(
    encoder=dataclasses.replace(
        SMALL.encoder, conv_channels=16, layers=6, width=256, heads=4, mlp_width=1024
    ),
    decoder=dataclasses.replace(
        SMALL.decoder,
        layers=6,
        width=256,
        mlp_width=768,
        heads=4,
        kv_heads=2,
        head_dim=64,
        vocab_size=2000,
    ),
    audio_token_id=5,
)
WORDY = dataclasses.replace(MEDIUM, decoder=dataclasses.replace(MEDIUM.decoder, vocab_size=60000))
STEMMY = dataclasses.replace(MEDIUM, encoder=dataclasses.replace(MEDIUM.encoder, conv_channels=128))
FROZEN = Stage(conv_stem=Group(0.0), encoder=Group(0.0), projector=Group(0.0))
TOP = dataclasses.replace(FROZEN, embedding=Group(0.0), decoder=Group(1e-5, trained_layers=2))


def run(remat: str = "full", stage: Stage | None = None, dtype: str = "float32", **more) -> Config:
    compute = Computation(dtype=dtype, remat=remat, **more)
    return Config(compute=compute, stages=(stage or Stage(),))


def compiled_step(model: ModelConfig, config: Config, shape: Shape, kernel: str = "xla") -> int:
    """The compiler's figure for a step on one device; nothing is run."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(model))
    [stage] = config.stages
    trained, frozen = optim.split(params, stage)
    optimizer = optim.make_optimizer(config.optim, stage, trained, 10)
    state = jax.eval_shape(lambda a, b: init_state(a, b, optimizer), trained, frozen)
    rows, text = shape.rows, shape.text_tokens
    sizes = {
        "wave_BS": ((rows, shape.audio_s * 16000), jnp.int16),
        "samples_B": ((rows,), jnp.int32),
        "speed_B": ((rows,), jnp.float32),
        "seed_B2": ((rows, 2), jnp.uint32),
        "text_BX": ((rows, text), jnp.int32),
        "text_lengths_B": ((rows,), jnp.int32),
        "audio_at_B": ((rows,), jnp.int32),
        "in_loss_BX": ((rows, text), jnp.bool_),
    }
    batch = Batch(**{name: jax.ShapeDtypeStruct(*size) for name, size in sizes.items()})
    step = Step(
        model=model,
        compute=Compute(jnp.dtype(config.compute.dtype), kernel, config.compute.remat),
        augment=Augment(),
        optimizer=optimizer,
        mesh=make_mesh(1),
        audio_s=shape.audio_s,
        loss_rows=config.compute.loss_rows,
    )
    return compiled_bytes(compile_step(step, state, batch, None).memory_analysis())


def estimated(model: ModelConfig, config: Config, shape: Shape, kernel: str = "xla") -> Memory:
    [stage] = config.stages
    rates = optim.rate_table(abstract_params(model), stage)
    return memory_estimate(model, config, stage, rates, shape, kernel=kernel)


def kept(model: ModelConfig, config: Config, rows: int) -> int:
    """Bytes that JAX keeps for the backward pass; XLA may still merge some."""
    compute = Compute(jnp.dtype(config.compute.dtype), "xla", config.compute.remat)
    trained, frozen = jax.eval_shape(
        lambda tree: [cast(part, compute.dtype) for part in optim.split(tree, config.stages[0])],
        abstract_params(model),
    )

    def hidden(trained, frozen):
        one, text = jnp.zeros(rows, jnp.int32), jnp.zeros((rows, 56), jnp.int32)
        inputs = Inputs(jnp.zeros((rows, 800, 128)), one, text, one, one)
        return bind(trained, model, compute, frozen).hidden_before_text(inputs)

    backward = jax.eval_shape(
        lambda first, second: jax.vjp(lambda tree: hidden(tree, second), first)[1], trained, frozen
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


DEEP = dataclasses.replace(
    MEDIUM,
    encoder=dataclasses.replace(MEDIUM.encoder, layers=24),
    decoder=dataclasses.replace(MEDIUM.decoder, layers=28),
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("remat", "stage", "bound"),
    [
        ("none", Stage(), 0.03),
        ("dots", Stage(), 0.01),
        ("full", Stage(), 0.04),
        ("dots", Stage(encoder=Group(0.0)), 0.01),
        ("dots", FROZEN, 0.01),
        ("full", TOP, 0.04),
    ],
    ids=["none", "dots", "full", "stem", "decoder", "top 2"],
)
def test_what_waits_for_the_backward_pass_is_what_jax_keeps(remat, stage, bound, dtype) -> None:
    config = run(remat, stage, dtype)
    jaxs = kept(DEEP, config, 3) - kept(DEEP, config, 2)  # weights do not count twice
    ours = estimated(DEEP, config, Shape(rows=1, audio_s=8, text_tokens=56))
    parts = ours.stem + ours.encoder + ours.decoder + ours.ends
    assert parts == pytest.approx(jaxs, rel=bound)


def test_memory_is_the_compilers() -> None:
    shape, config = Shape(rows=16, audio_s=8, text_tokens=56), run("dots")
    ratio = estimated(WORDY, config, shape).total / compiled_step(WORDY, config, shape)
    assert 1 / 1.25 < ratio < 1.25


# What XLA said of steps at 1.7B on GPUs (docs/expect.md): clips, text tokens, devices, stage, GiB.
ROUND2 = load_config(Path(__file__).parents[1] / "configs" / "round2.py").config.stages
MEASURED = [
    (32, 170, 1, Stage(), 65.5),
    (32, 170, 2, Stage(), 56.5),
    (32, 170, 4, Stage(), 49.0),
    (8, 170, 1, Stage(), 38.3),
    (8, 170, 4, Stage(), 22.8),
    (32, 192, 1, ROUND2[0], 43.2),
    (32, 192, 1, ROUND2[1], 45.7),
]


@pytest.mark.parametrize(("clips", "text", "devices", "stage", "gib"), MEASURED)
def test_memory_is_what_gpus_needed(clips, text, devices, stage, gib) -> None:
    rates = optim.rate_table(abstract_params(LARGE), stage)
    config, shape = run("dots", dtype="bfloat16"), Shape(clips, 30, text)
    told = memory_estimate(LARGE, config, stage, rates, shape, devices=devices, kernel="cudnn")
    assert 0.98 < told.total / 2**30 / gib < 1.12


@pytest.mark.gpu
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_memory_is_the_gpu_compilers_at_full_size(remat) -> None:
    shape, config = Shape(rows=32, audio_s=30, text_tokens=170), run(remat, dtype="bfloat16")
    estimate = estimated(LARGE, config, shape, "cudnn")
    compiled = compiled_step(LARGE, config, shape, "cudnn")
    print(f"estimate / compiler {estimate.total / compiled:.3f} of {compiled / 2**30:.1f} GiB")
    assert 1 / 1.2 < estimate.total / compiled < 1.2


def test_sharing_and_settings_change_the_parts_they_should() -> None:
    shape = Shape(rows=4, audio_s=10, text_tokens=60)
    rates = optim.rate_table(abstract_params(LARGE), stage := Stage())
    one, eight, layer = (
        memory_estimate(LARGE, run(dtype="bfloat16", **more), stage, rates, shape, devices=devices)
        for devices, more in ((1, {}), (8, {}), (8, {"gather": "layer"}))
    )
    assert one.weights == 8 * eight.weights == 2 * one.copy == 8 * layer.weights
    assert one.moments == 8 * eight.moments
    assert (eight.copy, layer.copy) == (one.copy, one.copy // 8)
    assert one.gradients == eight.gradients > layer.gradients
    tiled = memory_estimate(LARGE, run(loss_rows=60), stage, rates, shape)
    assert 4 * tiled.logits == one.logits
    halved = replace(run(dtype="bfloat16"), optim=Optim(moments="bfloat16"))
    assert 2 * memory_estimate(LARGE, halved, stage, rates, shape).moments == one.moments


RATES = [
    RateRow("encoder", 16, 1200, 0, 0.0, (0.0, 0.0)),
    RateRow("decoder", 20, 123456, 1000, 2e-5, (0.0, 0.0, 1e-5, 2e-5)),
    RateRow("embedding", 1, 7, 7, 1e-6),
]


def test_tables_of_rates() -> None:
    rows = rate_rows(RATES, {"decoder": 2e-5, "embedding": 1e-6})
    assert [row["peak rate"] for row in rows] == ["frozen", "2e-05", "1e-06"]
    assert [row["measured"] for row in rows] == ["0", "2e-05", "1e-06"]
    assert layer_rows(RATES) == [
        {"stack": "encoder", "layers": "0-1", "peak rate": "frozen"},
        {"stack": "decoder", "layers": "0-1", "peak rate": "frozen"},
        {"stack": "decoder", "layers": "2", "peak rate": "1e-05"},
        {"stack": "decoder", "layers": "3", "peak rate": "2e-05"},
    ]


def test_the_config_shows_what_was_set_first() -> None:
    config = Config(name="שלום", seed=3)
    origins = dict.fromkeys(flatten(config), "default") | {"name": "x.py", "seed": "--set"}
    rows = dry_run.config_rows(LoadedConfig(config, origins))
    assert rows[0] == {"set": "*", "field": "name", "value": '"שלום"', "from": "x.py"}
    assert [row["set"] for row in rows[:3]] == ["*", "*", ""]
    assert {row["field"] for row in rows} == set(flatten(config))


def test_memory_beside_the_compilers_figure() -> None:
    shape, memory = Shape(4, 10, 60), Memory(*[2**30] * 11)
    assert "error" not in dry_run.memory_row(shape, memory)
    row = dry_run.memory_row(shape, memory, 8 * 2**30)
    assert (row["bucket"], row["GiB"], row["error"]) == ("4 x 10 s + 60 tokens", "10.00", "+25 %")


def test_expected_time(tmp_path) -> None:
    assert dry_run.expected_time(tmp_path, 7200.0).startswith("unknown")
    (tmp_path / "bench.json").write_text('{"audio_s_per_s": 2.0}')
    assert dry_run.expected_time(tmp_path, 7200.0).startswith("1.0 hours at 2 audio-s/s")
    other = '{"what": "generate", "audio_s_per_s": 2.0}'
    for text in ("{", "[]", '{"audio_s_per_s": 0}', '{"audio_s_per_s": "fast"}', "{}", other):
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(UserError, match=r"bench\.json"):
            dry_run.expected_time(tmp_path, 7200.0)


def test_a_table_in_a_file_is_whole_and_aligned(capsys) -> None:
    """Nothing is folded, cut or read as markup, however long; Hebrew points take no column."""
    long = "x" * 300
    show(
        "Sets",
        [
            {"set": "שָׁלוֹם", "clips": 12345},
            {"set": f"[bold]:zap:{long}", "clips": 7},
            {"set": "b", "clips": None},
        ],
    )
    title, head, first, second, third = capsys.readouterr().out.splitlines()
    assert title == "Sets"
    assert head.split() == ["set", "clips"]
    assert first.split() == ["שָׁלוֹם", "12,345"]
    assert second.split() == [f"[bold]:zap:{long}", "7"]
    assert third.split() == ["b"]
    assert cell_len(first) == cell_len(second) == cell_len(head)


def test_a_table_on_a_terminal_fits_it(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    show("Sets", [{"set": "x" * 200, "clips": 12345}])
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert max(map(cell_len, out.splitlines())) <= 60
    assert out.count("x") == 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A tiny model, six clips and a config for them."""
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_model(folder / "model")
    lines = []
    for clip in range(6):
        soundfile.write(folder / f"{clip}.wav", noise(16000 * (1 + clip % 3), clip), 16000)
        lines.append(json.dumps({"audio": f"{clip}.wav", "text": "שלום", "id": str(clip)}))
    (folder / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "config.py").write_text(
        "from hebasr_jax.run_config import *\n"
        f"HERE = {str(folder)!r}\n"
        "def get_config():\n"
        "    sets = (Source('ספר', HERE + '/train.jsonl'),)\n"
        "    return Config(model=Model(HERE + '/model'), runs_dir=HERE + '/runs',"
        "        data=Data(train=sets, batch_clips=2, buckets=2), train=Train(steps=30),"
        "        compute=Computation(dtype='float32', devices=1, cache_dir=None))\n"
    )
    return folder


def test_a_dry_run_tells_all_and_leaves_nothing(corpus, capsys) -> None:
    before = sorted(corpus.rglob("*"))
    dry_run.dry_run(load_config(corpus / "config.py", ["stages.0.encoder.learning_rate=0"]))
    assert sorted(corpus.rglob("*")) == before
    out = capsys.readouterr().out
    config, _, rest = out.partition("\nLearning rates\n")
    assert re.search(r"\* +data\.batch_clips +2 +.*config\.py", config)
    assert re.search(r"\* +stages\.0\.encoder\.learning_rate +0\.0 +--set", config)
    assert re.search(r"\n +stages\.0\.decoder\.learning_rate +2e-05 +default", config)
    rates, _, rest = rest.partition("\nPlan of the first epoch, by bucket")
    assert re.search(r"\nencoder .* 0 +frozen", rates)
    assert re.search(r"\ndecoder +0-2 +2e-05", rates)
    plan, _, rest = rest.partition("\nPlan of the first epoch, by set\n")
    assert all(name in plan for name in ("encoder_padding", "decoder_padding", "steps", "hours"))
    assert re.search(r"\nספר +6 +6", "\n" + rest)
    assert "Memory of a step on each device, GiB" in rest
    assert "30 steps" in rest.splitlines()[-1]
    assert "time: unknown" in rest.splitlines()[-1]


def test_a_dry_run_tells_of_lists_and_of_dev_clips_in_training(corpus, tmp_path, capsys) -> None:
    here, listed = corpus / "train.jsonl", tmp_path / "list.jsonl"
    listed.write_text('{"id": "0"}\n{"id": "of another set"}\n')
    sets = f"train=sets, dev=(Source('dev', {str(here)!r}),), test=sets,"
    config = tmp_path / "config.py"
    config.write_text((corpus / "config.py").read_text().replace("train=sets,", sets))
    lists = [f"data.{part}.0.without=({listed},)" for part in ("train", "test")]
    dry_run.dry_run(load_config(config, lists))
    out = capsys.readouterr().out
    assert f"ספר: 1 of 2 ids of {listed} are not in the set" in out
    assert "warning: dev: of its 6 clips some are trained on: 5 in ספר" in out
    assert "warning: ספר: of its 5 clips some are trained on: 5 in ספר" in out
