"""The operators of token reduction, and the attention of the pixel decoder.

Each is a dispatcher operator ``torch.ops.expedite_d2.<name>`` whose default implementation is its
reference in :mod:`expedite_d2.ops.reference`, in plain PyTorch; the compiled extension adds CPU and
CUDA kernels.
"""

from expedite_d2 import _ext as _ext  # loads the kernels
from expedite_d2.ops._registration import decompositions
from expedite_d2.ops.ms_deform_attn import ms_deform_attn
from expedite_d2.ops.token_cluster import token_cluster
from expedite_d2.ops.token_match import token_match
from expedite_d2.ops.token_merge import Merged, token_merge
from expedite_d2.ops.token_pool import token_pool
from expedite_d2.ops.token_reconstruct import token_reconstruct
from expedite_d2.ops.token_reduce import Reduced, token_reduce
from expedite_d2.ops.token_spread import token_spread

__all__ = [
    "Merged",
    "Reduced",
    "decompositions",
    "ms_deform_attn",
    "token_cluster",
    "token_match",
    "token_merge",
    "token_pool",
    "token_reconstruct",
    "token_reduce",
    "token_spread",
]
