"""Masks and random numbers of generated C++ kernels, a vector at a time.

What PyTorch's headers do with a vector's booleans in memory, and what Inductor generates for random numbers, goes lane
by lane: writing a dropout's mask takes a hundred times as long as the comparison that makes it. Here the same is done
for all lanes at once, with the same results to the bit. Where a compiler or another torch release refuses this text,
the kernels are compiled without it.
"""

from __future__ import annotations

import re

#: A loop over the lanes' random numbers, as Inductor writes it. Groups: type of the offsets, lanes, seed.
_DRAWS = re.compile(
    r"for\s*\(\s*(int32_t|int64_t) offset_idx = 0; offset_idx < (\d+); offset_idx\+\+\s*\)\s*"
    r"\{\s*result\[offset_idx\] = normalized_rand_cpu\((\w+), offset\[offset_idx\]\);\s*\}"
)

#: Stands after ``cpp_prefix.h`` and before every use.
LANES = """
#if INDUCTOR_USE_VECTOR_TYPES()
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace effcc_lanes {
// A mask's lane is set where any of its bits is.
template <typename T, int N>
inline void write(const at::vec::VectorizedN<T, N>& mask, bool* to, int count) {
    constexpr int size = at::vec::VectorizedN<T, N>::size();
    alignas(64) at::vec::int_same_size_t<T> lanes[size];
    alignas(64) uint8_t bytes[size];
    mask.store(lanes);
#pragma omp simd
    for (int i = 0; i < size; i++) bytes[i] = lanes[i] != 0;
    if (count == size) std::memcpy(to, bytes, size);
    else std::memcpy(to, bytes, count);
}

template <typename T, int N>
inline at::vec::VectorizedN<T, N> read(const bool* from, int count) {
    using Lane = at::vec::int_same_size_t<T>;
    constexpr int size = at::vec::VectorizedN<T, N>::size();
    alignas(64) uint8_t bytes[size] = {};
    alignas(64) Lane lanes[size];
    if (count == size) std::memcpy(bytes, from, size);
    else std::memcpy(bytes, from, count);
#pragma omp simd
    for (int i = 0; i < size; i++) lanes[i] = bytes[i] ? Lane(-1) : Lane(0);
    return at::vec::VectorizedN<T, N>::loadu(lanes);
}

#if defined(__AVX2__)
// The first word of Philox4x32-10 (Salmon et al., SC 2011) for four counters, in the low halves of 64 bits each.
inline __m256i philox(uint32_t seed, __m256i a) {
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
    __m256i b = _mm256_setzero_si256(), c = b, d = b;
    uint32_t k0 = seed, k1 = 0;
#pragma GCC unroll 10
    for (int round = 0; round < 10; round++) {
        const __m256i p0 = _mm256_mul_epu32(m0, a), p1 = _mm256_mul_epu32(m1, c);
        a = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(b, _mm256_set1_epi64x(k0)));
        c = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(d, _mm256_set1_epi64x(k1)));
        b = p1;
        d = p0;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return a;
}
#endif

// result[i] = normalized_rand_cpu(seed, offset[i])
template <int size, typename Offset>
inline void draw(uint32_t seed, const Offset* offset, float* result) {
    int done = 0;
#if defined(__AVX2__)
    if constexpr (sizeof(Offset) == 8) {
        const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6), bits = _mm256_set1_epi32(0x7FFFFFFF);
        for (; done + 8 <= size; done += 8) {
            const __m256i* from = reinterpret_cast<const __m256i*>(offset + done);
            const __m256i low = _mm256_permutevar8x32_epi32(philox(seed, _mm256_loadu_si256(from)), order);
            const __m256i high = _mm256_permutevar8x32_epi32(philox(seed, _mm256_loadu_si256(from + 1)), order);
            const __m256 whole = _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_blend_epi32(low, high, 0xF0), bits));
            _mm256_storeu_ps(result + done, _mm256_mul_ps(whole, _mm256_set1_ps(4.6566127342e-10f)));
        }
    }
#endif
    for (; done < size; done++) result[done] = normalized_rand_cpu(seed, offset[done]);
}
}  // namespace effcc_lanes

namespace at::vec {
inline namespace CPU_CAPABILITY {
#define EFFCC_MASK(T, N)                                                                           \\
    template <>                                                                                    \\
    inline void VecMask<T, N>::store(bool* to, int count) {                                        \\
        effcc_lanes::write<T, N>(mask_, to, count);                                                \\
    }                                                                                              \\
    template <>                                                                                    \\
    template <>                                                                                    \\
    inline VecMask<T, N> VecMask<T, N>::from<const bool>(const bool* from, int count) {            \\
        return effcc_lanes::read<T, N>(from, count);                                               \\
    }                                                                                              \\
    template <>                                                                                    \\
    template <>                                                                                    \\
    inline VecMask<T, N> VecMask<T, N>::from<bool>(bool* from, int count) {                        \\
        return effcc_lanes::read<T, N>(from, count);                                               \\
    }

EFFCC_MASK(float, 1)
EFFCC_MASK(float, 2)
EFFCC_MASK(int32_t, 1)
EFFCC_MASK(int32_t, 2)
EFFCC_MASK(int64_t, 2)
EFFCC_MASK(int64_t, 4)
EFFCC_MASK(double, 2)
#undef EFFCC_MASK
}  // namespace CPU_CAPABILITY
}  // namespace at::vec
#endif
"""


def with_vector_draws(source: str) -> str:
    """The source with its loops over random numbers in vectors."""
    return _DRAWS.sub(lambda loop: f"effcc_lanes::draw<{loop[2]}>({loop[3]}, offset, result);", source)
