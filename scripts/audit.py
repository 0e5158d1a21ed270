"""`python scripts/audit.py ...` is `hebasr audit ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["audit", *sys.argv[1:]]))
