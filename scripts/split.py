"""`python scripts/split.py ...` is `hebasr split ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["split", *sys.argv[1:]]))
