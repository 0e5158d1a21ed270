"""What a step asks of a device, read off its program: products by precision, and collectives."""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
from jax.extend import core


@contextlib.contextmanager
def as_if_on_a_gpu() -> Iterator[None]:
    """JAX asks for cuDNN and its card before it lowers cuDNN's attention, also where none is."""
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    with (
        mock.patch(f"{cudnn}.check_cudnn_version", return_value=91900),
        mock.patch(f"{cudnn}.check_compute_capability", return_value=True),
    ):
        yield


def products(jaxpr: Any, times: int = 1) -> Counter:
    """FLOPs of dot products and convolutions by the dtype that they are computed in.

    A product of a bfloat16 and a float32 array is one in float32. Bodies of scans count as often as
    they run; the recomputation of `jax.checkpoint` counts, as it is a part of the program.
    """
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        name, repeats = equation.primitive.name, times
        if name in ("dot_general", "conv_general_dilated"):
            wide = any(v.aval.dtype.itemsize > 2 for v in equation.invars)
            found["float32" if wide else "bfloat16"] += times * _flops(equation)
        elif name == "scan":
            repeats = times * equation.params["length"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                found += products(getattr(inner, "jaxpr", inner), repeats)
    return found


def collectives(text: str) -> dict[str, int]:
    """How many of each kind stand in a compiled program."""
    kinds = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
    return {kind: len(re.findall(rf"\b{kind}(?:-start)?\(", text)) for kind in kinds}


def _flops(equation: Any) -> float:
    out, (left, right, *_) = equation.outvars[0].aval, equation.invars
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * out.size * math.prod(left.aval.shape[axis] for axis in contracted)
    spec = equation.params["dimension_numbers"].rhs_spec
    return 2.0 * out.size * right.aval.size / right.aval.shape[spec[0]]


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)
