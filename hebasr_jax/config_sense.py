"""Values of a config that are sound one by one but not together. Light to import."""

import re

from hebasr_jax.errors import UserError
from hebasr_jax.run_config import Config, Optim

_LONGEST = 0.99  # a mean that moves by less in an update than bfloat16 can tell stands still


def check_sense(config: Config) -> None:
    """Refuses values that are sound one by one but not together."""
    data, augment = config.data, config.augment
    pairs = {
        "data.min_clip_s, data.max_clip_s": (data.min_clip_s, data.max_clip_s),
        "augment.noise_snr_db": augment.noise_snr_db,
        "augment.gain_db": augment.gain_db,
        "augment.band_hz": augment.band_hz,
    }
    for at, (low, high) in pairs.items():
        if low > high:
            raise UserError(f"{at} = {low}, {high}: the lower value comes first")
    if not augment.speed_factors:
        raise UserError("augment.speed_factors is empty", "", "give 1.0 for no change of speed")
    _check_moments(config.optim)
    _check_names(config)
    if not re.fullmatch(r"[^\W.][^/\\\0]*", config.name):
        raise UserError(f"name = {config.name!r} cannot name a run folder", "", "name = round2")


def _check_names(config: Config) -> None:
    """Refuses names of sets and stages that are none, are there twice, or are not there."""
    data = config.data
    names = {
        "data.train": [source.name for source in data.train],
        "data.dev": [source.name for source in data.dev],
        "data.test": [source.name for source in data.test],
        "stages": [stage.name for stage in config.stages],
    }
    for at, named in names.items():
        for name in named:  # they become names of folders and files
            if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
                raise UserError(f"{at}: {name!r} is no name", "it is empty, or has . first or a /")
        if len(set(named)) < len(named):
            raise UserError(f"{at}: two have one name", f"names are {', '.join(named)}")
    if not config.stages:
        raise UserError("stages is empty", "a run has at least one", "give Stage()")
    for stage in config.stages:
        sets = [part.set for part in stage.mix]
        if len(set(sets)) < len(sets) or not set(sets) <= set(names["data.train"]):
            raise UserError(
                f"stage {stage.name}: its mix is of {', '.join(sets)}",
                f"data.train has {', '.join(names['data.train']) or 'no set'}",
                "name each set once",
            )


def _check_moments(optim: Optim) -> None:
    """Refuses bfloat16 for a mean that it would let stand still."""
    for name in ("beta1", "beta2"):
        beta = getattr(optim, name)
        if optim.moments == "bfloat16" and beta > _LONGEST:
            raise UserError(
                f'optim.moments = "bfloat16" does not go with optim.{name} = {beta}',
                "bfloat16 tells differences of 0.4 to 0.8 %, so that such a mean stands still",
                f'set optim.{name} to {_LONGEST} or less, or optim.moments to "float32"',
            )
