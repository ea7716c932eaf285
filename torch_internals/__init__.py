"""Every private torch name that the runtime and the backend use, in one place; tested on torch 2.11 to 2.13.

Nothing here decides anything: each function wraps one internal, so that a torch release that moves a name is mended in
this folder alone.
"""

from .code_cache import code_cache_path, code_key, load_region, remembered_toolchain
from .compiling import (
    collect_output_strides,
    compile_error_cause,
    compile_fx,
    compile_region,
    compile_writer,
    donated_inputs,
    donating,
    lowering_error_target,
    report_output_strides,
    saved_outputs,
)
from .cpp_kernels import (
    COMPILER_ERRORS,
    comment_cpp_calls,
    compile_cpp_module,
    divert_cpp_kernels,
    load_cpp_kernel,
    start_cpp_library,
)
from .fx_graphs import boxed, fake_mode_of, fake_result, has_bodies, is_invoke_subgraph, refresh_values
from .joint_graphs import (
    backward_only_nodes,
    copy_graph,
    first_look,
    is_primal,
    joint_partitioner,
    joint_pass,
    knapsack_partition,
    lazy_copy,
    minimum_cut_partition,
    prepare_joint,
    split_joint,
    stable_topological_sort,
)
from .observing import (
    CompilationRecord,
    compilations,
    debug_directory,
    graph_breaks,
    is_recompilation,
    memory_timeline,
    peak_and_mark,
    peak_growth,
    structured_trace,
)
from .scheduling import (
    KernelValue,
    fusions_within,
    inlined_random,
    kernel_order,
    marked,
    products_within,
    written_over_through_rows,
)
from .settings import (
    cache_directory,
    cudagraphs_wanted,
    graph_settings,
    inductor_settings,
    mode_options,
    region_settings,
    without_code_cache,
)
from .stored_values import ReadValue, values_stored
from .tensors import (
    compiled_entry,
    plain_tensors,
    record_offset,
    storage_key,
    storage_owners,
    tensor_owners,
    unhooked_step,
    weak_storage,
)

__all__ = [
    "COMPILER_ERRORS", "CompilationRecord", "KernelValue", "ReadValue", "backward_only_nodes", "boxed",
    "cache_directory", "code_cache_path", "code_key", "collect_output_strides", "comment_cpp_calls", "compilations",
    "compile_cpp_module", "compile_error_cause", "compile_fx", "compile_region", "compile_writer", "compiled_entry",
    "copy_graph", "cudagraphs_wanted", "debug_directory", "divert_cpp_kernels", "donated_inputs", "donating",
    "fake_mode_of", "fake_result", "first_look", "fusions_within", "graph_breaks", "graph_settings", "has_bodies",
    "inductor_settings", "inlined_random", "is_invoke_subgraph", "is_primal", "is_recompilation", "joint_partitioner",
    "joint_pass", "kernel_order", "knapsack_partition", "lazy_copy", "load_cpp_kernel", "load_region",
    "lowering_error_target",
    "marked", "memory_timeline", "minimum_cut_partition", "mode_options", "peak_and_mark", "peak_growth",
    "plain_tensors", "prepare_joint", "products_within", "record_offset", "refresh_values", "region_settings",
    "remembered_toolchain", "report_output_strides", "saved_outputs", "split_joint", "stable_topological_sort",
    "start_cpp_library", "storage_key", "storage_owners", "structured_trace", "tensor_owners", "unhooked_step",
    "values_stored", "weak_storage", "without_code_cache", "written_over_through_rows",
]  # fmt: skip
