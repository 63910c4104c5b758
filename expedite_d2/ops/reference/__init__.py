"""The operators in plain PyTorch: what each means, and what runs where no kernel is built.

Kernels are tested against these functions in float64. One file per operator, and two that they
share.
"""

from expedite_d2.ops.reference.ms_deform_attn import (
    ms_deform_attn_backward_ref,
    ms_deform_attn_ref,
)
from expedite_d2.ops.reference.token_cluster import token_cluster_backward_ref, token_cluster_ref
from expedite_d2.ops.reference.token_match import token_match_ref
from expedite_d2.ops.reference.token_merge import token_merge_ref
from expedite_d2.ops.reference.token_pool import token_pool_ref
from expedite_d2.ops.reference.token_reconstruct import (
    token_reconstruct_backward_ref,
    token_reconstruct_ref,
)
from expedite_d2.ops.reference.token_reduce import token_reduce_ref
from expedite_d2.ops.reference.token_spread import token_spread_ref

__all__ = [
    "ms_deform_attn_backward_ref",
    "ms_deform_attn_ref",
    "token_cluster_backward_ref",
    "token_cluster_ref",
    "token_match_ref",
    "token_merge_ref",
    "token_pool_ref",
    "token_reconstruct_backward_ref",
    "token_reconstruct_ref",
    "token_reduce_ref",
    "token_spread_ref",
]
