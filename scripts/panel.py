"""`python scripts/panel.py ...` is `hebasr panel ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["panel", *sys.argv[1:]]))
