"""Compiled programs on disk: the same work starts in seconds the next time."""

import os
from pathlib import Path

import jax

from hebasr_jax.run_config import Computation


def keep_programs(folder: str | None = None) -> None:
    """Keeps programs that took half a second or more to compile, and finds those kept before.

    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS names another time.

    Args:
      folder: None: that of JAX_COMPILATION_CACHE_DIR, or where runs keep theirs by default.
    """
    folder = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or Computation.cache_dir
    assert folder is not None
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    least_s = float(os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", 0.5))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_s)
