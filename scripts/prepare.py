"""`python scripts/prepare.py ...` is `hebasr prepare ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["prepare", *sys.argv[1:]]))
