"""Config files: what loads, what is refused and how, and the way to JSON and back."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hebasr_jax import run_config
from hebasr_jax.config_file import (
    RANGES,
    LoadedConfig,
    checked,
    config_of,
    differences,
    dump,
    flatten,
    load_config,
    range_of,
)
from hebasr_jax.errors import UserError
from hebasr_jax.field_types import typed
from hebasr_jax.run_config import Config, Data, Mix, Source, Stage

PACKAGE = Path(__file__).parents[1] / "hebasr_jax"
CONFIGS = ("run_config", "run_setup")
HEAD = "from dataclasses import replace\nfrom hebasr_jax.run_config import *\n"


def write(folder: Path, returned: str, *, name: str = "run.py", before: str = "") -> Path:
    """A config file whose get_config is on lines 4 and 5."""
    path = folder / "configs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{HEAD}{before}\ndef get_config():\n    return {returned}\n", encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(path, overrides)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def refusal_by_a_plain_process(path: Path) -> str:
    """What a user sees: here the test suite itself would check the types of dataclass fields."""
    code = (
        "import sys, pathlib\n"
        "from hebasr_jax.config_file import load_config\n"
        "from hebasr_jax.errors import UserError\n"
        "try: load_config(pathlib.Path(sys.argv[1]))\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert 1 <= len(done.stdout.splitlines()) <= 3, done.stderr
    return done.stdout


TWO_SETS = 'Config(data=Data(train=(Source("a", "a.jsonl"), Source("ב", "b", share=0.5))))'


def test_a_file_and_its_overrides_with_where_each_value_came_from(tmp_path) -> None:
    path = write(tmp_path, 'Config(name="שלום", train=Train(steps=7, log_steps=10))')
    loaded = load_config(path, ["stages.0.decoder.learning_rate=3e-5", "train.keep_last=1"])
    assert loaded.config.name == "שלום"
    assert loaded.config.stages[0].decoder.learning_rate == 3e-5
    assert set(loaded.origins) == set(flatten(loaded.config))
    others = {at: origin for at, origin in loaded.origins.items() if origin != "default"}
    assert others == {
        "name": str(path),
        "train.steps": str(path),
        "stages.0.decoder.learning_rate": "--set",
        "train.keep_last": "--set",
    }


def test_origins_of_sets(tmp_path) -> None:
    """A name has no default; columns have; a group's default is that of the whole, not its own."""
    path = write(
        tmp_path, TWO_SETS.replace("Config(", "Config(stages=(Stage(decoder=Group(0.0)),), ")
    )
    origins = load_config(path, ["data.train.1.columns.text=sentence"]).origins
    assert origins["data.train.0.name"] == str(path)
    assert origins["data.train.0.columns.text"] == "default"
    assert origins["data.train.1.columns.text"] == "--set"
    assert origins["data.dev"] == "default"
    assert origins["stages.0.decoder.learning_rate"] == str(path)
    assert origins["stages.0.encoder.learning_rate"] == "default"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=12", 12),
        ("stages.0.encoder.learning_rate=1", 1.0),
        ("stages.0.encoder.learning_rate=2e-5", 2e-5),
        ("model.path=a=b.c", "a=b.c"),
        ("model.revision=main", "main"),
        ("model.revision=None", None),
        ("train.steps=None", None),
        ("train.steps=3", 3),
        ("text.language_in_prompt=false", False),
        ("compute.remat=full", "full"),
        ("augment.speed_factors=0.9,1,1.1", (0.9, 1.0, 1.1)),
        ("augment.speed_factors=(1.0,)", (1.0,)),
        ("augment.noise_snr_db=-5,20", (-5.0, 20.0)),
        ("data.train.1.path=x", "x"),
        ("data.train.1.share=None", None),
        ("data.train=()", ()),
        ("data.dev=()", ()),
    ],
)
def test_values_are_read_by_the_type_of_their_field(tmp_path, override, expected) -> None:
    at = override.partition("=")[0]
    value = flatten(load_config(write(tmp_path, TWO_SETS), [override]).config)[at]
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_override_wins_and_pairs_are_judged_together(tmp_path) -> None:
    path = write(tmp_path, "Config()")
    both = ["data.batch_clips=None", "data.batch_audio_s=960", "seed=1", "seed=2"]
    config = load_config(path, both).config
    assert (config.data.batch_clips, config.data.batch_audio_s, config.seed) == (None, 960.0, 2)
    assert "exactly one" in refusal(path, "data.batch_audio_s=960")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed", ["--set seed sets nothing", "--set train.steps=10"]),
        (
            "stages.0.decoder.lerning_rate=1",
            ["did you mean stages.0.decoder.learning_rate?", "decay"],
        ),
        (
            "stage.0.decoder.learning_rate=1",
            ["did you mean stages.0.decoder.learning_rate?", "seed"],
        ),
        ("keep_last=1", ["did you mean train.keep_last?"]),
        (
            "stages.0.decoder=1",
            ["a group of fields", "set one: stages.0.decoder.learning_rate=..."],
        ),
        ("data.train=x", ["set one: data.train.0.name=..., or data.train=() for none"]),
        ("data.dev.0.path=x", ["data.dev is ()", "in the config file"]),
        ("data.train.2.path=x", ["no field data.train.2.path", "of data.train are 0, 1"]),
        ("seed.x=1", ["no field seed.x"]),
        ("seed=1.5", ["seed = '1.5'", "a whole number, such as 8"]),
        ("train.steps=ten", ["a whole number, such as 8 or None"]),
        ("optim.beta1=nan", ["a finite number, such as 2e-5"]),
        ("optim.beta1=1e999", ["a finite number"]),
        ("text.language_in_prompt=yes", ["True or False"]),
        ("compute.remat=some", ["one of none, dots, full"]),
        ("augment.noise_snr_db=3", ["2 numbers in a tuple, such as (0.9, 1.0)"]),
        ("augment.speed_factors=a,b", ["numbers in a tuple, such as (0.9, 1.0, 1.1)"]),
        ("data.dev=x", ["a tuple of Source(...)"]),
    ],
)
def test_what_cannot_be_set_says_what_can(tmp_path, override, parts) -> None:
    told = refusal(write(tmp_path, TWO_SETS), override)
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        ('Config(optim=Optim(clip_norm="1"))', ["optim.clip_norm = '1'", "a finite number"]),
        ("Config(optim=Optim(clip_norm=True))", ["optim.clip_norm = True"]),
        ("Config(text=Text(language_in_prompt=1))", ["text.language_in_prompt = 1"]),
        ("Config(seed=True)", ["seed = True", "whole number"]),
        ("Config(seed=1.0)", ["seed = 1.0", "whole number"]),
        ("Config(augment=Augment(speed_factors=[0.9, 1.0]))", ["augment.speed_factors = [0.9"]),
        ("Config(data=Data(train=[Source('a', 'b')]))", ["data.train", "a tuple"]),
        ("Config(data=Data(train=(Data(),)))", ["data.train.0", "it must be Source(...)"]),
        ("Config(optim=Train())", ["optim = Train(", "it must be Optim(...)"]),
        ("Config(compute=Computation(remat='no'))", ["one of none, dots, full"]),
        ("Config(name=None)", ["name = None", "text"]),
        ("Config(optim=Optim(beta1=float('nan')))", ["optim.beta1 = nan"]),
        ("5", ["get_config() returns 5", "must return a Config"]),
    ],
)
def test_a_file_with_a_value_of_a_wrong_type(tmp_path, returned, parts) -> None:
    told = refusal_by_a_plain_process(write(tmp_path, returned))
    assert all(part in told for part in parts), told


@pytest.mark.parametrize(
    ("returned", "parts"),
    [
        ("Config(trian=1)", [":5: Config has no field 'trian'", "did you mean train?"]),
        ("replace(Config(), sed=1)", [":5: ", "'sed'", "did you mean seed?"]),
        ("Config().optm", [":5: AttributeError", "did you mean optim?"]),
        ("1 / 0", [":5: ZeroDivisionError: division by zero"]),
        ("setattr(Config(), 'seed', 1)", [":5: Frozen", "dataclasses.replace"]),
        ("Config(data=Data(batch_audio_s=1.0))", [":5: data.batch_clips", "None"]),
        ("Config(", [":5: '(' was never closed"]),
    ],
)
def test_an_error_in_a_file_is_told_with_its_line(tmp_path, returned, parts) -> None:
    path = write(tmp_path, returned)
    told = refusal_by_a_plain_process(path)
    assert told.startswith(str(path)), told
    assert all(part in told for part in parts), told


def test_files_that_are_no_config(tmp_path) -> None:
    path = write(tmp_path, "Config()", name="round2.py")
    assert "did you mean round2.py?" in refusal(path.with_name("rond2.py"))
    (tmp_path / "run.yaml").write_text("name: run")
    assert "a Python file" in refusal(tmp_path / "run.yaml")
    path.write_text("x = 1\n")
    assert "no get_config()" in refusal(path)


def test_a_file_builds_on_its_neighbour_and_leaves_no_trace(tmp_path, monkeypatch) -> None:
    """Two folders of one name, as two checkouts have, do not see each other's files."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    modules, path_before = set(sys.modules), list(sys.path)
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        write(folder, f"Config(seed={seed})", name="base.py")
        before = "from configs.base import get_config as base"
        path = write(folder, "replace(base(), name='x')", before=before)
        assert load_config(path).config == Config(seed=seed, name="x")
        assert {file.name for file in path.parent.iterdir()} == {"base.py", "run.py"}
    assert sys.path == path_before
    assert not {name for name in set(sys.modules) - modules if name.startswith("configs")}
    of_this_repository = importlib.import_module("configs.round1")
    write(tmp_path, "Config(seed=3)", name="round1.py")
    assert load_config(tmp_path / "configs" / "round1.py").config == Config(seed=3)
    assert sys.modules["configs.round1"] is of_this_repository
    told = refusal(write(folder, "base()", before=before.replace("base import", "bse import")))
    assert ":3: ModuleNotFoundError: No module named 'configs.bse'" in told


def test_every_number_has_a_range_and_every_range_a_number() -> None:
    train, dev, test = ((Source(name, "b", share=0.5),) for name in "abc")
    sets, stage = Data(train=train, dev=dev, test=test), Stage(mix=(Mix("a", 0.5),))
    used = set()
    for at, hint in hints_of(Config(data=sets, stages=(stage,))).items():
        if {int, float} & {hint, *typing.get_args(hint)}:
            low, high = range_of(at)
            assert low < high
            used.add(next(row for row in RANGES if matches(row[0], at)))
    assert used == set(RANGES)


def matches(pattern: str, at: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(at, pattern)


def hints_of(node: object, prefix: str = "") -> dict[str, typing.Any]:
    """The annotated type of every value."""
    found: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(type(node)).items():
        value = getattr(node, name)
        if dataclasses.is_dataclass(value):
            found |= hints_of(value, f"{prefix}{name}.")
        elif value and dataclasses.is_dataclass(value[0] if isinstance(value, tuple) else None):
            found |= hints_of(value[0], f"{prefix}{name}.0.")
        else:
            found[prefix + name] = hint
    return found


@pytest.mark.parametrize(
    "override",
    [
        "text.stamp_share=1.01",
        "data.join_share=-0.1",
        "data.train.0.share=2",
        "data.buckets=0",
        "data.batch_clips=0",
        "augment.speed_factors=1.0,2.1",
        "augment.speed_factors=0.4,1.0",
        "augment.noise_snr_db=20,5",
        "augment.band_hz=300,9000",
        "augment.speed_factors=",
        "optim.beta2=1.0",
        "stages.0.decoder.layer_decay=0",
        "data.min_clip_s=31",
        "data.train.1.name=a",
        "data.train.1.name=../a",
        "data.train.1.name=",
        "name=../other",
        "name=a/b",
        "name=",
    ],
)
def test_values_that_make_no_sense(tmp_path, override) -> None:
    told = refusal(write(tmp_path, TWO_SETS), override)
    assert told.startswith(override.partition("=")[0].replace("train.1.name", "train")), told


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
def test_bfloat16_moments_need_means_that_they_can_tell(tmp_path, beta) -> None:
    path, slow = write(tmp_path, TWO_SETS), f"optim.{beta}=0.995"
    load_config(path, [slow])
    load_config(path, ["optim.moments=bfloat16"])
    told = refusal(path, "optim.moments=bfloat16", slow)
    assert f"does not go with optim.{beta} = 0.995" in told


WORDS = st.text(st.characters(codec="utf-8"), max_size=5)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="./\\\0"), max_size=5)
SETS = st.lists(
    st.tuples(NAMES, WORDS, st.none() | st.floats(0, 1), st.none() | WORDS), max_size=12
)
VALUES = {
    "seed": st.integers(0, 2**32 - 1),
    "augment.speed_factors": st.lists(st.floats(0.5, 2), min_size=1).map(tuple),
    "augment.noise_path": st.none() | WORDS,
    "stages.0.decoder.learning_rate": st.floats(0, 1),
    "stages.0.decoder.trained_layers": st.none() | st.integers(1, 50),
    "text.language_in_prompt": st.booleans(),
    "compute.remat": st.sampled_from(["none", "dots", "full"]),
}


@given(SETS, st.fixed_dictionaries(VALUES))
def test_a_dump_gives_the_config_back_exactly(sets, values) -> None:
    named = [Source(f"{name}{i}", *rest) for i, (name, *rest) in enumerate(sets)]
    values = flatten(Config(data=Data(train=tuple(named), dev=tuple(named[:1])))) | values
    config = config_of({at: {"value": value} for at, value in values.items()})
    assert flatten(config) == values
    assert config.data.train == tuple(named)
    loaded = LoadedConfig(config, dict.fromkeys(values, "default"))
    written = json.loads(json.dumps(dump(loaded), allow_nan=False))
    assert config_of(written) == config
    assert not differences(written, dump(loaded))


def test_differences_and_dumps_of_another_version(tmp_path) -> None:
    path = write(tmp_path, TWO_SETS)
    old = dump(load_config(path))
    new = dump(load_config(path, ["augment.speed_factors=0.9,1.1", "seed=3"]))
    assert differences(old, new) == {
        "seed": (0, 3),
        "augment.speed_factors": ([1.0], [0.9, 1.1]),
    }
    less = {at: entry for at, entry in old.items() if at != "train.keep_last"}
    assert differences(less, old) == {"train.keep_last": ("absent", 2)}
    with pytest.raises(UserError, match=r"no train\.keep_last"):
        config_of(less)
    with pytest.raises(UserError, match=r"no field train\.epoch"):
        config_of({**old, "train.epoch": {"value": 1, "origin": "default"}})


def test_whole_numbers_become_floats_and_nothing_else_changes() -> None:
    assert type(typed(1, float)) is float
    assert type(typed(1, float | None)) is float
    assert list(map(type, typed((1, 2), tuple[float, float]))) == [float, float]
    assert checked(Config()) == Config()


def test_reading_a_config_does_not_import_jax() -> None:
    code = "import sys, hebasr_jax.config_file as c; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "False", done.stderr


def test_every_field_is_read_somewhere() -> None:
    """A field that no module reads is a promise to the user that nobody keeps.

    It counts as read where a module that imports run_config or run_setup, and is not about
    configs, reads an attribute of that name, or where a group's name stands in optim's table.
    """
    from hebasr_jax.optim import GROUPS

    read = {group for _, group in GROUPS}
    about_configs = {PACKAGE / name for name in ("run_config.py", "config_file.py", "dry_run.py")}
    for path in set(PACKAGE.rglob("*.py")) - about_configs:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        if any(isinstance(n, ast.ImportFrom) and str(n.module).endswith(CONFIGS) for n in nodes):
            read |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    fields = {
        f"{cls.__name__}.{field.name}": field.name
        for cls in vars(run_config).values()
        if dataclasses.is_dataclass(cls)
        for field in dataclasses.fields(cls)
    }
    assert len(fields) > 80
    assert not [full for full, name in fields.items() if name not in read]
