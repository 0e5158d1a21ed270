"""What may change between two starts of a run."""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hebasr_jax.errors import UserError
from hebasr_jax.run_folder import read_json, was_trained

MAY_CHANGE = (
    r"name|runs_dir",
    r"train\.(keep_last|keep_best|log_steps|checkpoint_steps|max_skipped_steps)",
    r"data\.(threads|prefetch_batches|max_bad_share|max_synthetic_share)",
    r"validation\.(every_steps|batch_audio_s|samples|bootstrap)",
    r"(average|export|tracking)\..*",  # what follows the last step, and copies of the log
    r"data\.test.*",
    r"data\.(train|dev)\..*\.(licence|hub)",  # told in the model card
    r"compute\.(cache_dir|devices|cut_over|attention|remat|unroll|loss_rows|gather)",  # rounding
    r"data\.micro_audio_s",  # rounding too
)
"""Config values that a resumed run may change: none of them says what a step learns or what a
validation is over. Epochs and steps are not among them, since the rate schedule hangs on them."""

_SHOWN = 3  # differences named in a message


def changes_since(
    folder: Path,
    config: Mapping[str, Mapping[str, Any]],
    fixed: Mapping[str, Any] | None,
    *,
    at_defaults: Collection[str] = (),
    accept_changes: bool = False,
) -> list[str]:
    """Every difference to the last start of a run, as `name: old -> new`; worth a line each.

    Until a first checkpoint is there, anything may change. A setting that the version of the last
    start did not have is no change where it is at its default; a fact of its kind is none at all.

    Args:
      config: {"optim.beta1": {"value": 0.9, "origin": "default"}, ...}
      fixed: JSON of what else must stay the same: fingerprints of the data sets, sha256 of the
        tokenizer, sizes of the model. None: not known yet, and not compared.
      at_defaults: names of config values that are at their defaults.

    Raises:
      UserError: a value outside `MAY_CHANGE` differs and `accept_changes` is False.
    """
    if not was_trained(folder):
        return []
    old, then = read_json(folder / "config.json"), read_json(folder / "env.json").get("fixed", {})
    if fixed is not None and then:
        fixed = {name: value for name, value in fixed.items() if name in then}
    known = {n: entry for n, entry in config.items() if n in old or n not in at_defaults}
    new, fixed = json.loads(json.dumps([known, fixed]))  # tuples as lists, as they are read back
    values = differences(_values(old), _values(new))
    facts = {} if fixed is None else differences(leaves(then), leaves(fixed))
    others = list(facts.values())
    refused = [line for name, line in values.items() if not free_to_change(name)] + others
    if refused and not accept_changes:
        raise _changed(folder, refused)
    return [*values.values(), *others]


def free_to_change(name: str) -> bool:
    """Whether a resumed run may change this config value."""
    return re.fullmatch("|".join(MAY_CHANGE), name) is not None


def _changed(folder: Path, lines: list[str]) -> UserError:
    more = f"; {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return UserError(
        f"{folder} was trained with other settings",
        "; ".join(lines[:_SHOWN]) + more,
        "undo that, set another name, or train on regardless with --accept-changes",
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """`name: old -> new` for each name whose value differs, by name."""
    lines = {}
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or old[name] != new[name]:
            before, after = (
                _short(side[name]) if name in side else "nothing" for side in (old, new)
            )
            lines[name] = f"{name}: {before} -> {after}"
    return lines


def _values(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in config.items()}


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested JSON objects by dotted names."""
    if not isinstance(tree, dict):
        return {name: tree}
    pairs = [leaves(value, f"{name}.{key}" if name else key) for key, value in tree.items()]
    return {path: leaf for pair in pairs for path, leaf in pair.items()}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"
