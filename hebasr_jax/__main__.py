"""`python -m hebasr_jax` is the command `hebasr`."""

import sys

from hebasr_jax.cli import main

sys.exit(main())
