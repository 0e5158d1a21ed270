"""`python scripts/train.py ...` is `hebasr train ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
