"""The model in Flax NNX. Outside this package a model is a nested dict of arrays.

Both switches make modules plain pytrees, so that jit, grad, scan and checkpoint take them as
they are (styles: "tree mode"). They are set here because every module definition passes here.
"""

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
