"""What an op does besides returning a value: write to memory, draw random numbers, act on the outside.

Known without torch, so that text IR can be rewritten where torch is not loaded. The tables are checked against torch's
own op schemas and tags in ``tests/passes/test_effects.py``.
"""

from __future__ import annotations

import sympy

from ..ir.graph import Graph, Node, Symbol
from ..ir.types import ScalarType, TensorType, TupleType, Type

#: ATen ops that draw random numbers whatever their arguments (torch's tag ``nondeterministic_seeded``).
RANDOM_OPS = frozenset(
    """_cudnn_init_dropout_state _cudnn_rnn _fused_dropout _standard_gamma alpha_dropout bernoulli cauchy dropout
    exponential feature_dropout feature_alpha_dropout geometric gru log_normal lstm _lstm_mps miopen_rnn multinomial
    native_dropout normal normal_functional poisson rand rand_like randint randint_like randn randn_like random randperm
    rnn_relu rnn_tanh rrelu rrelu_with_noise rrelu_with_noise_functional uniform binomial _sample_dirichlet
    _efficient_attention_forward _flash_attention_forward _flash_attention_forward_no_dropout_inplace
    _cudnn_attention_forward _triton_scaled_dot_attention _fill_mem_eff_dropout_mask
    _scaled_dot_product_attention_math_for_mps inductor_rand_eager_offset inductor_rand_eager_offsets
    inductor_seed inductor_seeds""".split()
)

#: Attention ops that draw random numbers only if this argument (position, name) is a probability above zero.
DROPOUT_ARGUMENT: dict[str, int] = {
    "_scaled_dot_product_flash_attention": 3,
    "_scaled_dot_product_flash_attention_for_cpu": 3,
    "_scaled_dot_product_fused_attention_overrideable": 4,
    "_scaled_dot_product_efficient_attention": 5,
    "_scaled_dot_product_cudnn_attention": 5,
    "_scaled_dot_product_attention_math": 4,
    "scaled_dot_product_attention": 4,
}

#: Overloads that write their result into arguments; so do ``out`` and all that end in ``_out``.
OUT_OVERLOADS = frozenset(
    """grad_input output values values_stable dim_min dim_max dim_values eigvals eigenvalues inverse result sign a L Q U
    X out_mode out_ out_rcond_tensor out_tol_tensor OutScalar_Self OutScalar_Other OutTensor""".split()
)

#: Ops that write to an argument although neither their name (``add_``) nor their overload (``out``) says so.
HIDDEN_WRITES = frozenset(
    """aten._cummax_helper.default aten._cummin_helper.default aten.fused_moving_avg_obs_fake_quant.default
    aten.record_stream.default aten.retain_grad.default aten.set_data.default prims.copy_to.default
    prims.resize.default aten._batch_norm_with_update.default aten._flash_attention_forward_no_dropout_inplace.default
    aten._fused_moving_avg_obs_fq_helper.default aten._native_batch_norm_legit.default aten.rrelu_with_noise.default
    aten.native_batch_norm.default aten.cudnn_batch_norm.default aten.miopen_batch_norm.default
    aten._cudnn_rnn.default""".split()
)

#: ATen ops whose result may share storage with their first argument.
VIEW_OPS = frozenset(
    """_autocast_to_full_precision _autocast_to_reduced_precision _conj _fw_primal _indices _make_dual
    _nested_get_values _nested_view_from_buffer _nested_view_from_jagged _neg_view _reshape_alias _sparse_broadcast_to
    _unpack_dual _unsafe_view _values adjoint alias as_strided broadcast_to
    ccol_indices chunk coalesce col_indices conj contiguous crow_indices detach diagonal dsplit expand expand_as flatten
    hsplit imag indices lift_fresh linalg_diagonal mH mT matrix_H moveaxis movedim narrow numpy_T permute pin_memory
    positive ravel real reshape reshape_as resolve_conj resolve_neg row_indices select slice slice_inverse split
    split_with_sizes squeeze swapaxes swapdims t tensor_split to transpose unbind unflatten unfold unsqueeze values view
    view_as view_as_complex view_as_real vsplit""".split()
)

#: The same for the ops of ``prims``.
VIEW_PRIMS = frozenset(
    "as_strided broadcast_in_dim collapse_view conj imag real split_dim squeeze transpose view_of view_of_dtype".split()
)

#: ATen ops that check or steer instead of computing: their result is not what they are for.
ACTING_OPS = frozenset(
    """_assert_async _functional_assert_async _assert_scalar _functional_assert_scalar _assert_tensor_metadata
    sym_constrain_range sym_constrain_range_for_size _functional_sym_constrain_range
    _functional_sym_constrain_range_for_size _print _linalg_check_errors record_stream""".split()
)

#: Higher-order ops that do nothing beyond what their subgraphs do.
TRANSPARENT_HIGHER_ORDER = frozenset(
    """cond while_loop scan associative_scan map_impl invoke_subgraph flex_attention flex_attention_backward
    wrap_with_autocast wrap_with_set_grad_enabled tag_activation_checkpoint""".split()
)

#: Namespaces whose functional ops are known to have no effect besides their result.
PURE_NAMESPACES = frozenset({"aten", "prims", "prim", "quantized_decomposed", "math", "_operator", "effcc"})

#: Python operators that change their first operand. The others only compute (with sizes, mostly).
OPERATOR_WRITES = frozenset(
    """setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv
    ixor""".split()
)


def split_op(op: str) -> tuple[str, str, str]:
    """``aten.mm.default`` -> ``("aten", "mm", "default")``. Parts that are absent are empty."""
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    return namespace, name, overload


def is_random(node: Node) -> bool:
    """Whether the op draws from a random generator; two such ops are never the same value."""
    _, name, _ = split_op(node.op)
    name = name.removesuffix("_") if not name.startswith("__") else name
    position = DROPOUT_ARGUMENT.get(name)
    if position is None:
        return name in RANDOM_OPS
    probability = dict(node.kwargs).get("dropout_p", node.args[position] if position < len(node.args) else 0.0)
    return not (isinstance(probability, int | float) and probability == 0)


def writes_memory(node: Node, graph: Graph) -> bool:
    """Whether the op changes a tensor that existed before it."""
    namespace, name, overload = split_op(node.op)
    if node.name in graph.writes or node.op in HIDDEN_WRITES:
        return True
    if namespace == "_operator":
        return name in OPERATOR_WRITES
    in_place = (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name.endswith("__"))
    out = overload == "out" or overload.endswith("_out") or overload in OUT_OVERLOADS or "out" in dict(node.kwargs)
    return namespace not in ("higher_order", "") and (in_place or out)


def written_names(node: Node, graph: Graph) -> tuple[str, ...]:
    """The values whose storage the op writes. All its operands where it is not known which."""
    if not writes_memory(node, graph):
        return ()
    recorded = graph.writes.get(node.name, ())
    operands = tuple(dict.fromkeys(node.operands()))
    namespace, name, _ = split_op(node.op)
    if namespace == "aten" and name.endswith("_") and not name.startswith("_") and operands:
        return tuple(dict.fromkeys((operands[0], *recorded)))
    return recorded or operands


def is_view(node: Node) -> bool:
    """Whether the result may share storage with the first argument."""
    namespace, name, _ = split_op(node.op)
    return (namespace == "aten" and name in VIEW_OPS) or (namespace == "prims" and name in VIEW_PRIMS)


def has_effect(node: Node, graph: Graph) -> bool:
    """Whether the op must stay although nobody reads its result. True for ops that are not known."""
    if node.op == "input" or is_random(node) or writes_memory(node, graph):
        return True
    namespace, name, _ = split_op(node.op)
    if node.op in ("getitem", "constant"):
        return False
    if node.op == "call" or namespace == "higher_order":
        bodies = [graph.subgraphs.get(body.removeprefix("@")) for body in subgraph_symbols(node)]
        known = node.op == "call" or name in TRANSPARENT_HIGHER_ORDER
        return not known or any(body is None or graph_has_effect(body) for body in bodies)
    if namespace == "torch" and name.startswith("sym_"):
        return False
    return namespace not in PURE_NAMESPACES or name in ACTING_OPS


def graph_has_effect(graph: Graph) -> bool:
    """Whether running the graph does anything besides returning its outputs."""
    return any(node.op != "input" and has_effect(node, graph) for node in graph.nodes)


def subgraph_symbols(node: Node) -> tuple[str, ...]:
    """The ``@name`` symbols among the op's arguments."""
    values = (*node.args, *(value for _, value in node.kwargs))
    return tuple(value.text for value in values if isinstance(value, Symbol) and value.text.startswith("@"))


def size_symbols(type_: Type | None) -> frozenset[sympy.Symbol]:
    """The shape symbols that a type mentions."""
    if isinstance(type_, TensorType):
        sizes = (*type_.shape, *(type_.stride or ()))
    elif isinstance(type_, ScalarType):
        sizes = (type_.value,) if type_.value is not None else ()
    elif isinstance(type_, TupleType):
        return frozenset[sympy.Symbol]().union(*(size_symbols(item) for item in type_.items))
    else:
        return frozenset()
    found: set[sympy.Symbol] = set()
    for size in sizes:
        if isinstance(size, sympy.Expr):
            found.update(symbol for symbol in size.free_symbols if isinstance(symbol, sympy.Symbol))
    return frozenset(found)


class Storages:
    """Which values share storage, and which storages are written or handed out.

    A union-find over value names from the graph's alias facts and, for graphs that carry none, the view ops.
    """

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[str, str] = {}
        for alias in graph.aliases:
            self._join(alias.name, alias.base)
        for node in graph.nodes:
            first = next(node.operands(), None)
            if first is not None and (node.op == "getitem" or is_view(node)):
                self._join(node.name, first)
        for node in graph.nodes:
            written = written_names(node, graph)
            for name in written[:1] if split_op(node.op)[0] == "aten" else written:
                self._join(node.name, name)
        self.written = frozenset(self.root(name) for node in graph.nodes for name in written_names(node, graph))
        self.escaping = frozenset(self.root(name) for name in graph.output_names())
        self.inputs = frozenset(self.root(node.name) for node in graph.inputs)

    def root(self, name: str) -> str:
        """The name that stands for all values in one storage."""
        while (parent := self._parent.get(name, name)) != name:
            self._parent[name] = self._parent.get(parent, parent)
            name = parent
        return name

    def _join(self, name: str, base: str) -> None:
        left, right = self.root(name), self.root(base)
        if left != right:
            self._parent[left] = right
