"""What a measurement is told with: where it was taken, its clock, and two yardsticks."""

import datetime
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DATASHEET_TFLOPS = 989.0  # H100 SXM and H200, bfloat16 without sparsity (NVIDIA's data sheets)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")

Row = dict[str, Any]

_compiled: list[str] = []


def _listen(event: str, duration_secs: float, **details: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def programs_compiled() -> int:
    """How many programs JAX has compiled, or taken from its cache, since this module was loaded."""
    return len(_compiled)


def facts() -> Row:
    """Date, commit, device and versions: what a number must carry besides its command."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        **{name: found for name in _PACKAGES if (found := installed(name))},
    }


def commit() -> str:
    """The checkout's commit, "+" if files differ from it; "" outside of one."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def seconds_of(action: Callable[[], Any], repeats: int) -> list[float]:
    """How long each call took until its result was there."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(action())
        taken.append(time.perf_counter() - start)
    return taken


def spread(taken_s: Sequence[float]) -> Row:
    """Median and the middle half's ends, in ms."""
    low, median, high = np.percentile(np.asarray(taken_s) * 1e3, [25, 50, 75])
    return {"ms": float(median), "ms from": float(low), "ms to": float(high)}


def product_tflops(size: int, repeats: int = 100) -> float:
    """TFLOP/s of a product of two square bfloat16 matrices here and now."""
    # Random: of constants a product takes less power, and so less time.
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(product(a, a))
    start = time.perf_counter()
    jax.block_until_ready([product(a, a) for _ in range(repeats)][-1])
    return repeats * 2 * size**3 / (time.perf_counter() - start) / 1e12


def read_bytes_per_s(gigabytes: float = 2.0, repeats: int = 20) -> float:
    """Bytes a second that the device's memory gives when it is only read and summed up."""
    values = jnp.ones(int(gigabytes * 1e9) // 2, jnp.bfloat16)
    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    jax.block_until_ready(total(values))
    start = time.perf_counter()
    jax.block_until_ready([total(values) for _ in range(repeats)][-1])
    return repeats * values.nbytes / (time.perf_counter() - start)


def as_json(what: str, told: Row, rows: Sequence[Row]) -> str:
    """The measurement as one object; `audio_s_per_s` is ours in the last row that tells a speed."""
    speeds = [row["audio-s/s"] for row in rows if "audio-s/s" in row and "peer" not in row]
    headline = {"audio_s_per_s": speeds[-1]} if speeds else {}
    return json.dumps({"what": what, **headline, "facts": told, "rows": list(rows)}, indent=1)
