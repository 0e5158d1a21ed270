"""`python scripts/prepare.py ...` is `hebasr prepare ...`."""

import sys

from hebasr_jax.cli import main

if __name__ == "__main__":  # processes that make shards load this file
    sys.exit(main(["prepare", *sys.argv[1:]]))
