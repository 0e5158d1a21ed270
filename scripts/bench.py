"""`python scripts/bench.py ...` is `hebasr bench ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
