"""What kind of work each ATen op is: the table that fusion, costs and the planner share.

Kinds: ``structural`` (input, constant, getitem, call: no work of its own), ``view`` (shares storage, free),
``creation`` (writes only), ``pointwise``, ``reduction`` (including norms and softmax), ``index`` (gather and scatter),
``sort``, ``gemm``, ``convolution``, ``attention``, ``cascade`` (a fused one), ``collective`` and ``opaque`` (an op of
another library: nothing is known). An ATen op that is in no table counts as pointwise.
"""

from __future__ import annotations

import functools

STRUCTURAL = frozenset({"input", "constant", "getitem", "call"})


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


VIEWS = _aten(
    "view reshape _unsafe_view _reshape_alias permute transpose t numpy_T mT adjoint expand expand_as slice select "
    "squeeze unsqueeze unsafe_split unsafe_chunk split split_with_sizes unsafe_split_with_sizes chunk tensor_split "
    "unbind narrow alias detach as_strided diagonal unfold view_as view_as_real view_as_complex real imag lift_fresh "
    "movedim swapaxes swapdims flatten unflatten _conj _neg_view"
) | frozenset({"prims.view_of", "prims.broadcast_in_dim", "prims.transpose", "prims.as_strided", "prims.collapse_view"})

CREATION = _aten(
    "full zeros ones empty arange scalar_tensor eye linspace logspace full_like zeros_like ones_like empty_like "
    "empty_strided empty_permuted new_empty new_zeros new_ones new_full new_empty_strided tril_indices triu_indices "
    "rand randn randint randperm rand_like randn_like randint_like"
) | frozenset({"prims.iota", "prims.inductor_seeds", "prims.inductor_seed", "prims.inductor_random", "prims.empty"})

#: Allocates without writing.
UNWRITTEN = _aten("empty empty_like empty_strided empty_permuted new_empty new_empty_strided")

GEMM = _aten(
    "mm bmm addmm baddbmm addbmm linear matmul dot vdot mv addmv addr ger outer _scaled_mm _int_mm _grouped_mm "
    "_scaled_grouped_mm einsum _addmm_activation inner"
) | frozenset({"mkldnn._linear_pointwise", "mkl._mkl_linear"})

CONVOLUTION = _aten(
    "convolution _convolution convolution_backward conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d convolution_overrideable mkldnn_convolution cudnn_convolution miopen_convolution "
    "_slow_conv2d_forward"
) | frozenset({"mkldnn._convolution_pointwise", "mkldnn._convolution_transpose_pointwise"})

ATTENTION_FORWARD = _aten(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
    "_flash_attention_forward _efficient_attention_forward _cudnn_attention_forward"
)
ATTENTION_BACKWARD = _aten(
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_flash_attention_for_cpu_backward "
    "_scaled_dot_product_efficient_attention_backward _scaled_dot_product_cudnn_attention_backward "
    "_scaled_dot_product_fused_attention_overrideable_backward "
    "_flash_attention_backward _efficient_attention_backward _cudnn_attention_backward"
)
ATTENTION = ATTENTION_FORWARD | ATTENTION_BACKWARD

NORM = _aten(
    "native_layer_norm native_layer_norm_backward layer_norm native_batch_norm native_batch_norm_backward "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _native_batch_norm_legit_functional "
    "cudnn_batch_norm cudnn_batch_norm_backward batch_norm_backward _batch_norm_with_update "
    "native_group_norm native_group_norm_backward rms_norm _fused_rms_norm _fused_rms_norm_backward"
)
SOFTMAX = _aten(
    "_softmax _log_softmax softmax log_softmax _softmax_backward_data _log_softmax_backward_data _safe_softmax "
    "logsumexp"
)
REDUCTION = (
    _aten(
        "sum mean amax amin max min argmax argmin prod any all var var_mean std std_mean norm linalg_vector_norm "
        "nansum cumsum cumprod cummax cummin logcumsumexp aminmax median count_nonzero nll_loss_forward "
        "nll_loss2d_forward mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
        "avg_pool1d avg_pool2d avg_pool3d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward "
        "_adaptive_avg_pool3d max_pool2d_with_indices max_pool2d_with_indices_backward "
        "_low_memory_max_pool_with_offsets"
    )
    | frozenset({"prims.sum", "prims.amax", "prims.amin", "prims.prod", "prims.var", "prims.xor_sum"})
    | NORM
    | SOFTMAX
)

GATHER = _aten("embedding gather index index_select take take_along_dim _embedding_bag _unsafe_index masked_select")
SCATTER = _aten(
    "scatter scatter_add scatter_reduce index_put _unsafe_index_put index_add index_copy index_fill "
    "embedding_dense_backward masked_scatter slice_scatter select_scatter diagonal_scatter as_strided_scatter "
    "slice_backward select_backward index_put_ index_add_ index_copy_ scatter_ scatter_add_ "
    "_unsafe_masked_index_put_accumulate"
)
SORT = _aten("sort argsort topk kthvalue unique _unique2 unique_dim searchsorted bucketize histc bincount")

#: Output sizes depend on data: nothing after them has a known size, and no compiler fuses them.
DATA_DEPENDENT = _aten("nonzero masked_select unique _unique2 unique_dim unique_consecutive item _local_scalar_dense")

_TABLE: dict[str, str] = {
    **dict.fromkeys(VIEWS, "view"),
    **dict.fromkeys(CREATION, "creation"),
    **dict.fromkeys(GEMM, "gemm"),
    **dict.fromkeys(CONVOLUTION, "convolution"),
    **dict.fromkeys(ATTENTION, "attention"),
    "effcc.cascade": "cascade",
    **dict.fromkeys(REDUCTION, "reduction"),
    **dict.fromkeys(GATHER | SCATTER, "index"),
    **dict.fromkeys(SORT, "sort"),
}

#: Kinds that a generated kernel may contain together; the others run as one kernel of a library each.
FUSABLE = frozenset({"pointwise", "reduction", "creation", "index"})


@functools.cache
def packet(op: str) -> str:
    """``aten.mm.default`` -> ``aten.mm``; structural ops as they are."""
    parts = op.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else op


@functools.cache
def kind_of(op: str) -> str:
    """The kind of work of a full overload name; see the module's docstring for the kinds."""
    if op in STRUCTURAL:
        return "structural"
    base = packet(op)
    if base in _TABLE:
        return _TABLE[base]
    namespace = base.partition(".")[0]
    if "c10d" in namespace:
        return "collective"
    if namespace in ("aten", "prims", "_quantized", "quantized_decomposed"):
        return "pointwise"
    return "opaque"
