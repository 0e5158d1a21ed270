"""`python scripts/average.py ...` is `hebasr average ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["average", *sys.argv[1:]]))
