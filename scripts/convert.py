"""`python scripts/convert.py ...` is `hebasr convert ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["convert", *sys.argv[1:]]))
