"""Loop nests read from generated C++: counted by hand, and as Inductor writes them."""

from __future__ import annotations

import pytest
import torch
from effcc import torch_internals
from effcc.cost_model.devices import Figure
from effcc.cost_model.generated_loops import issued_seconds, loops_of, nests
from torch._inductor import config

KERNEL = """
extern "C"  void  kernel(const float* in_ptr0, const bool* in_ptr1, float* out_ptr0, float* out_ptr1)
{
    {
        for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(100L); x0+=static_cast<int64_t>(1L))
        {
            for(int64_t x1=static_cast<int64_t>(0L); x1<static_cast<int64_t>(40L); x1+=static_cast<int64_t>(16L))
            {
                {
                    if(C10_LIKELY(x1 >= static_cast<int64_t>(0L) && x1 < static_cast<int64_t>(32L)))
                    {
                        auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + static_cast<int64_t>(x1 + 40L*x0), 16);
                        auto tmp1 = static_cast<float>(2.0);
                        auto tmp2 = at::vec::Vectorized<float>(tmp1);
                        auto tmp3 = tmp0 * tmp2;
                        auto tmp4 = tmp3.exp();
                        tmp4.store(out_ptr0 + static_cast<int64_t>(x1 + 40L*x0));
                    }
                    if(C10_UNLIKELY(x1 >= static_cast<int64_t>(32L) && x1 < static_cast<int64_t>(40L)))
                    {
                        for (int64_t x1_tail = static_cast<int64_t>(32L);x1_tail < static_cast<int64_t>(40L); x1_tail++)
                        {
                            auto tmp0 = in_ptr0[static_cast<int64_t>(x1_tail + 40L*x0)];
                            auto tmp1 = float(tmp0 * tmp0);
                            out_ptr0[static_cast<int64_t>(x1_tail + 40L*x0)] = tmp1;
                        }
                    }
                }
            }
        }
    }
    {
        for(int64_t x0=static_cast<int64_t>(0L); x0<static_cast<int64_t>(64L); x0+=static_cast<int64_t>(16L))
        {
            {
                if(C10_LIKELY(x0 >= static_cast<int64_t>(0L) && x0 < static_cast<int64_t>(64L)))
                {
                    auto tmp0 = at::vec::VecMask<float,1>::from(in_ptr1 + static_cast<int64_t>(x0), 16);
                    auto tmp1 = tmp0.template cast<float,1>();
                    tmp1.store(out_ptr1 + static_cast<int64_t>(x0));
                }
            }
        }
    }
}
"""


def test_nests_are_counted_by_hand() -> None:
    first, second = nests(KERNEL)
    # 100 rows: 2 vectors of 4 statements, and 3 on the last 8 elements, which the compiler takes together.
    assert (first.vectors, first.scalars) == (100 * 2 * 4, 100 * 3)
    assert first.calls == {"exp": 100 * 2 * 16}
    assert first.bytes == 2 * 4 * 100 * 40, "each place once, read and written"
    assert (second.vectors, second.scalars) == (4 * 3, 0)
    assert second.calls == {"mask_read": 64}
    assert second.bytes == 64 + 4 * 64, "a boolean is a byte"


def test_statements_and_calls_take_what_was_measured() -> None:
    added = {name: Figure(value=value, source="test") for name, value in (("statement", 1e-9), ("exp", 2e-9))}
    first, second = nests(KERNEL)
    assert issued_seconds(first, added) == pytest.approx((800 + 300) * 1e-9 + 3200 * 2e-9)
    assert issued_seconds(second, added) == pytest.approx(12e-9), "what was not measured adds nothing"


def source_of(function: object, *inputs: torch.Tensor) -> str:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    with torch.no_grad():
        _, sources = run_and_get_code(torch.compile(function), *inputs)
    return str(sources[0])


@torch_internals.without_code_cache()
def test_what_inductor_writes_is_understood() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x) * 3.0

    (kernel,) = loops_of(source_of(step, torch.rand(64, 48))).values()
    (nest,) = kernel
    assert nest.bytes == 2 * 4 * 64 * 48
    assert nest.calls["exp"] == 64 * 48
    lanes = 64 * 48 / nest.vectors * 4  # load, exp, product, store
    assert lanes in (4, 8, 16)


@torch_internals.without_code_cache()
def test_steps_from_line_to_line_are_told_from_others() -> None:
    """A matrix is read along its columns, and along its rows, once for each vector of the result."""
    x, matrix = torch.randn(6, 40, 16), torch.randn(40, 24)[:, :6]
    found = []
    for each in (matrix.t(), matrix.t().contiguous()):
        kernels = loops_of(source_of(lambda x, y: x * y[:, :, None], x, each)).values()
        found.append(sum(nest.strides for kernel in kernels for nest in kernel))
    assert found == [6 * 40, 0]


@torch_internals.without_code_cache()
def test_sums_into_places_that_data_choose_go_element_by_element() -> None:
    def step(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.zeros(8, 48).index_put((rows,), x, accumulate=True)

    with config.patch({"cpp.threads": 2}):  # one thread alone just adds
        source = source_of(step, torch.rand(64, 48), torch.randint(0, 8, (64,)))
    nests_of_all = [nest for kernel in loops_of(source).values() for nest in kernel]
    assert sum(nest.calls.get("atomic_add", 0) for nest in nests_of_all) == 64 * 48
