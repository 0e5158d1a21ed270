"""`python scripts/evaluate.py ...` is `hebasr evaluate ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
