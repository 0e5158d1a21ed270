"""`python scripts/bench.py ...` is `hebasr bench ...`."""

import sys

from hebasr_jax.cli import main

if __name__ == "__main__":  # processes that make shards load this file
    sys.exit(main(["bench", *sys.argv[1:]]))
