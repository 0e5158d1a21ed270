"""Flags of a command of which each of its modes reads only some. Light to import."""

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import Any

from hebasr_jax.errors import UserError


def given(command: Any) -> dict[str, Any]:
    """Flags of a command, a dataclass, that are not at their defaults."""
    found = {}
    for flag in fields(command):
        made = flag.default_factory
        usual = flag.default if made is MISSING else made()
        if (value := getattr(command, flag.name)) != usual:
            found[flag.name] = value
    return found


def refuse_unread(command: Any, read: Collection[str], mode: str) -> None:
    """Raises a UserError for a flag that is given and that this mode does not read."""
    for name in given(command):
        if name not in read:
            raise UserError(f"--{name.replace('_', '-')} is not for {mode}", do="leave it out")
