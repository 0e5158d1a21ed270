"""How tests compile on CPUs: fast rather than well, and each program once for all processes."""

from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).parent / ".programs"
FLAGS = (  # most of a test's time is XLA's, and most of that for speed that nobody needs here
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
)
if version("jaxlib").startswith("0.10."):  # later versions end at a flag that they do not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(FOLDER),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # JAX writes in place: who was killed then leaves half a program, which is compiled again.
    "PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry",
}


def environment(devices: int) -> dict[str, str]:
    """For a process with so many simulated devices.

    NPROC is how many cores XLA believes in: with fewer threads than devices, jaxlib 0.11 waits for
    ever where devices add up.
    """
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    return {"XLA_FLAGS": flags} | ({"NPROC": str(4 * devices)} if devices > 1 else {})
