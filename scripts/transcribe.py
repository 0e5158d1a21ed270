"""`python scripts/transcribe.py ...` is `hebasr transcribe ...`."""

import sys

from hebasr_jax.cli import main

sys.exit(main(["transcribe", *sys.argv[1:]]))
