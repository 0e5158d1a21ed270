"""Config files: loading, `--set`, where each value came from, and the way to JSON and back.

Inside this module a config is a flat dict such as `{"data.train.0.name": "fleurs"}`: overriding,
comparing and writing are plain dict operations, and one function builds and checks the dataclasses.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hebasr_jax import run_config
from hebasr_jax.config_sense import check_sense
from hebasr_jax.errors import UserError
from hebasr_jax.field_types import element, parse, typed, words
from hebasr_jax.run_config import Config

DEFAULT, SET = "default", "--set"

# Lowest and highest value of every number; * stands for one or more names of a path.
RANGES: tuple[tuple[str, float, float], ...] = (
    ("seed", 0, 2**32 - 1),
    ("text.*_share", 0, 1),
    ("data.*.share", 0, 1),
    ("data.*.min_quality", 0, 1),
    ("data.min_clip_s", 0, 1200),
    ("data.max_clip_s", 0.1, 1200),
    ("data.max_text_tokens", 1, math.inf),
    ("data.buckets", 1, 64),
    ("data.batch_clips", 1, math.inf),
    ("data.batch_audio_s", 1, math.inf),
    ("data.micro_audio_s", 1, math.inf),
    ("data.join_share", 0, 1),
    ("data.join_gap_s", 0, 10),
    ("data.max_repeats", 0.01, math.inf),
    ("data.temperature", 1, math.inf),
    ("data.max_*_share", 0, 1),
    ("data.threads", 1, 1024),
    ("data.prefetch_batches", 1, 1024),
    ("augment.speed_factors", 0.5, 2),
    ("augment.*_masks", 0, 100),
    ("augment.time_mask_frames", 0, math.inf),
    ("augment.mel_mask_bins", 0, 128),
    ("augment.*_share", 0, 1),
    ("augment.*_db", -100, 100),
    ("augment.band_hz", 1, 8000),
    ("compute.*", 1, math.inf),
    ("stages.*.learning_rate", 0, 1),
    ("stages.*.trained_layers", 1, math.inf),
    ("stages.*.layer_decay", 0.01, 1),
    ("stages.*.share", 0, 1),
    ("stages.*.epochs", 1, math.inf),
    ("stages.*.steps", 1, math.inf),
    ("optim.beta?", 0, 0.999999),
    ("optim.epsilon", 1e-30, 1),
    ("optim.weight_decay", 0, 10),
    ("optim.clip_norm", 1e-9, math.inf),
    ("optim.warmup_steps", 0, math.inf),
    ("optim.final_rate", 0, 1),
    ("train.keep_best", 0, math.inf),
    ("train.keep_last", 1, math.inf),
    ("train.*steps", 1, math.inf),
    ("validation.every_steps", 0, math.inf),
    ("validation.max_clips", 1, math.inf),
    ("validation.batch_audio_s", 1, math.inf),
    ("validation.samples", 0, math.inf),
    ("validation.bootstrap", 1, math.inf),
    ("average.best", 1, math.inf),
)


@dataclass(frozen=True)
class LoadedConfig:
    """A config, and for the path of each value "default", the config file or "--set"."""

    config: Config
    origins: dict[str, str]


@dataclass(frozen=True)
class _Leaf:
    value: Any
    default: Any


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """The config that a file's `get_config()` returns, with single values overridden.

    Args:
      path: a Python file. Its folder's name is importable while it runs, so that a file in
        configs/ may begin with `from configs.base import get_config as base`.
      overrides: `a.b=c`, later ones winning; c is read as the field's type asks, and elements of
        tuples of dataclasses are counted from 0: `data.train.0.path=x`; `data.dev=()` has none.

    Raises:
      UserError: the file fails, or a value is unknown, of a wrong type, out of range or not finite.
    """
    leaves = dict(_leaves(_run(path), Config()))
    values = {at: leaf.value for at, leaf in leaves.items()}
    origins = {
        at: DEFAULT if leaf.value == leaf.default else str(path) for at, leaf in leaves.items()
    }
    for override in overrides:
        at, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override} sets nothing", do="write --set train.steps=10")
        if text == "()" and _is_filled(at, values):
            for below in [name for name in values if name.startswith(f"{at}.")]:
                del values[below], origins[below]
        elif at not in values:
            raise _unknown(at, values)
        try:
            values[at], origins[at] = parse(text, _hint(at)), SET
        except (TypeError, ValueError):
            raise _mistyped(at, text, _hint(at)) from None
    return LoadedConfig(_build(values), origins)


def checked(config: Config) -> Config:
    """The config, if its types, ranges and combinations hold; whole numbers become floats."""
    return _build(flatten(config))


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its path. An empty tuple of dataclasses is one value, `()`."""
    return {at: leaf.value for at, leaf in _leaves(config, Config())}


def at_defaults(config: Config) -> set[str]:
    """Paths of the values that are as they would be if nobody had set them."""
    return {at for at, leaf in _leaves(config, Config()) if leaf.value == leaf.default}


def dump(loaded: LoadedConfig) -> dict[str, dict[str, Any]]:
    """`{path: {"value": ..., "origin": ...}}` for JSON; `config_of` is the way back."""
    return {
        at: {
            "value": list(value) if isinstance(value, tuple) else value,
            "origin": loaded.origins[at],
        }
        for at, value in flatten(loaded.config).items()
    }


def config_of(dumped: Mapping[str, Mapping[str, Any]]) -> Config:
    """The config that was dumped, exactly. One of another version's fields is refused."""
    return _build(
        {
            at: tuple(value) if isinstance(value := entry["value"], list) else value
            for at, entry in dumped.items()
        }
    )


def differences(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ between two dumps, with both values; "absent" where there is none.

    Works on the dumps themselves, so that one of another version can be compared too.
    """

    def value(side: Mapping[str, Mapping[str, Any]], at: str) -> Any:
        return side[at]["value"] if at in side else "absent"

    pairs = {at: (value(old, at), value(new, at)) for at in dict.fromkeys([*old, *new])}
    return {at: pair for at, pair in pairs.items() if pair[0] != pair[1]}


def _run(path: Path) -> Config:
    """Imports the file and calls its get_config; what fails in it is told with file and line."""
    if not path.is_file() or path.suffix != ".py":
        why = "a config is a Python file" if path.exists() else "there is no such file"
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], 1)
        raise UserError(f"no config at {path}", why, f"did you mean {near[0]}?" if near else "")
    folder = path.resolve().parent
    spec = importlib.util.spec_from_file_location(f"{folder.name}.{path.stem}", path.resolve())
    assert spec and spec.loader  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    others, path_before, writes = _put_aside(folder.name), [*sys.path], sys.dont_write_bytecode
    # Compiled files are told apart by size and whole seconds: a quick edit could be missed.
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder.parent))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError("it has no get_config()", "", "define get_config() -> Config")
        config = module.get_config()
    except Exception as error:
        raise UserError(*_told(error, path, folder)) from error
    finally:
        sys.path[:], sys.dont_write_bytecode = path_before, writes
        _put_aside(folder.name)
        sys.modules.update(others)
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returns {config!r:.80}", "it must return a Config")
    return config


def _put_aside(folder: str) -> dict[str, Any]:
    """Takes modules of folders (no packages) of this name out: another's files may be named so."""
    if getattr(sys.modules.get(folder), "__file__", None):
        return {}
    return {n: sys.modules.pop(n) for n in [*sys.modules] if n.partition(".")[0] == folder}


def _told(error: Exception, path: Path, folder: Path) -> tuple[str, str, str]:
    """What, why and what to do of an error in a config file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {error.msg}", "", ""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).parent == folder]
    where = f"{inside[-1].filename}:{inside[-1].lineno}" if inside else str(path)
    if isinstance(error, UserError):
        what, *more = str(error).splitlines()
        why, do = (*more, "", "")[:2]
        return f"{where}: {what}", why, do
    told = f"{where}: {type(error).__name__}: {error}"
    unknown = re.match(
        r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error)
    )
    if unknown and dataclasses.is_dataclass(cls := getattr(run_config, unknown[1], None)):
        return f"{where}: {unknown[1]} has no field {unknown[2]!r}", *_nearest(unknown[2], cls)
    if isinstance(error, AttributeError) and dataclasses.is_dataclass(error.obj):
        return told, *_nearest(str(error.name), error.obj)
    if isinstance(error, dataclasses.FrozenInstanceError):
        return told, "configs cannot be changed", "make a changed copy with dataclasses.replace"
    return told, "", ""


def _nearest(name: str, owner: Any) -> tuple[str, str]:
    """Why and what to do about a field that `owner` does not have."""
    names = [field.name for field in dataclasses.fields(owner)]
    near = difflib.get_close_matches(name, names, 1)
    return f"its fields are {', '.join(names)}", f"did you mean {near[0]}?" if near else ""


def _leaves(node: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, _Leaf]]:
    """Values below a dataclass, with their paths and defaults.

    `default` is what the parent's default holds here: `Optim().decoder` is no default `Group()`.
    """
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        hint, at, value = hints[field.name], prefix + field.name, getattr(node, field.name)
        below = getattr(default, field.name, _default(field))
        if dataclasses.is_dataclass(hint):
            _check_type(value, hint, at)
            yield from _leaves(value, below, f"{at}.")
        elif (kind := element(hint)) is None:
            yield at, _Leaf(value, below)
        else:
            if not isinstance(value, tuple):
                raise _mistyped(at, value, hint)
            if not value:
                yield at, _Leaf(value, below)
            for index, item in enumerate(value):
                _check_type(item, kind, f"{at}.{index}")
                yield from _leaves(item, None, f"{at}.{index}.")


def _hint(at: str) -> Any:
    """The type of a field of the config, by its path."""
    hint: Any = Config
    for name in at.split("."):
        hint = element(hint) if name.isdecimal() else typing.get_type_hints(hint)[name]
    return hint


def _default(field: dataclasses.Field) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _build(values: Mapping[str, Any]) -> Config:
    """The config with exactly these values; inverse of `flatten`."""
    left = dict(values)
    config = _build_dataclass(Config, left, "")
    if left:
        raise _unknown(next(iter(left)), values)
    check_sense(config)
    return config


def _build_dataclass(cls: Any, left: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(**{name: _build_field(hints[name], left, prefix + name) for name in names})


def _build_field(hint: Any, left: dict[str, Any], at: str) -> Any:
    """The value of one field; takes what it uses out of `left`."""
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, left, f"{at}.")
    if (kind := element(hint)) is not None and at not in left:
        indices = {path[len(at) + 1 :].split(".")[0] for path in left if path.startswith(f"{at}.")}
        places = (f"{at}.{index}." for index in range(len(indices)))
        return tuple(_build_dataclass(kind, left, place) for place in places)
    if at not in left:
        raise UserError(f"the config has no {at}", "it was written by another version")
    value = left.pop(at)
    try:
        value = typed(value, hint)
    except TypeError:
        raise _mistyped(at, value, hint) from None
    _check_range(value, at)
    return value


def _check_type(value: Any, expected: Any, at: str) -> None:
    if type(value) is not expected:
        raise _mistyped(at, value, expected)


def range_of(at: str) -> tuple[float, float]:
    """Lowest and highest value of a number by the first row of RANGES that matches its path."""
    return next((float(low), float(high)) for row, low, high in RANGES if fnmatchcase(at, row))


def _check_range(value: Any, at: str) -> None:
    """Refuses a number, or a tuple with one, outside its row of RANGES."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high = range_of(at)
        if not low <= number <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise UserError(f"{at} = {value} is out of range", f"it must be {bounds}")


def _unknown(at: str, values: Mapping[str, Any]) -> UserError:
    """The error about a path that is no value's, with the nearest one and the fields there."""
    parts = at.split(".")
    depth = max(n for n in range(len(parts) + 1) if not n or _below(parts[:n], values))
    names = _below(parts[:depth], values)
    here = ".".join(parts[:depth])
    fields = f"fields {f'of {here} ' if here else ''}are {', '.join(names)}"
    if depth == len(parts):
        first = next(path for path in values if path.startswith(f"{at}."))
        empty = f", or {at}=() for none" if _is_filled(at, values) else ""
        return UserError(f"{at} is a group of fields", fields, f"set one: {first}=...{empty}")
    if (held := ".".join(parts[: depth + 1])) in values:
        do = "give its elements in the config file" if values[held] == () else ""
        return UserError(f"the config has no field {at}", f"{held} is {values[held]!r:.80}", do)
    near = difflib.get_close_matches(parts[depth], names, 1)
    likely = [".".join([*parts[:depth], name, *parts[depth + 1 :]]) for name in near]
    likely += [path for path in values if path.split(".")[-1] == parts[-1]]
    do = f"did you mean {likely[0]}?" if likely else ""
    return UserError(f"the config has no field {at}", fields, do)


def _is_filled(at: str, values: Mapping[str, Any]) -> bool:
    """Whether a path is that of a tuple of dataclasses with an element."""
    return bool(_below([*at.split("."), "0"], values))


def _below(parts: list[str], values: Mapping[str, Any]) -> list[str]:
    """Names one level below a path."""
    paths = [path.split(".") for path in values]
    return list(
        dict.fromkeys(
            path[len(parts)]
            for path in paths
            if len(path) > len(parts) and path[: len(parts)] == parts
        )
    )


def _mistyped(at: str, value: Any, hint: Any) -> UserError:
    return UserError(f"{at} = {value!r:.80} is of a wrong type", f"it must be {words(hint)}")
