"""The C++ that every generated kernel starts with: vector loads of any element type, functions, matrix products."""

INCLUDES = r"""
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
"""

#: Once for each element type computed in, ``scalar_t``, in a namespace of its own.
PRELUDE = r"""
using Vec = at::vec::Vectorized<scalar_t>;
constexpr int64_t VL = Vec::size();
constexpr scalar_t INF = std::numeric_limits<scalar_t>::infinity();
constexpr scalar_t NOT_A_NUMBER = std::numeric_limits<scalar_t>::quiet_NaN();

// While it lives, numbers too small to be normal count as 0 in this thread: computing with them takes a hundred times
// as long, and weights that far below the largest one change nothing.
class WithoutSubnormals {
#if defined(__SSE2__) && COMPUTES_F32
  const unsigned before = _mm_getcsr();
 public:
  WithoutSubnormals() { _mm_setcsr(before | 0x8040); }
  ~WithoutSubnormals() { _mm_setcsr(before); }
#endif
};

// first, first + 1, ... in the lanes; exact, since lanes are whole numbers.
inline Vec counting(scalar_t first) { return Vec(first) + Vec::arange(scalar_t(0), scalar_t(1)); }

// The next `count` elements of a thread's scratch, aligned to a cache line.
inline scalar_t* take(char*& at, int64_t count) {
  scalar_t* found = reinterpret_cast<scalar_t*>(at);
  at += (count * static_cast<int64_t>(sizeof(scalar_t)) + 63) / 64 * 64;
  return found;
}

template <bool full, typename T>
inline Vec load(const T* from, int64_t width) {
  if constexpr (std::is_same_v<T, scalar_t>) {
    return full ? Vec::loadu(from) : Vec::loadu(from, width);
  } else {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      if (full) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      }
    } else if constexpr (std::is_same_v<T, int64_t>) {
      if (full) {
        const __m256 low = _mm512_cvtepi64_ps(_mm512_loadu_si512(from));
        const __m256 high = _mm512_cvtepi64_ps(_mm512_loadu_si512(from + 8));
        return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
      }
    } else if constexpr (std::is_same_v<T, int32_t>) {
      if (full) return _mm512_cvtepi32_ps(_mm512_loadu_si512(from));
    } else if constexpr (sizeof(T) == 1 && !std::is_signed_v<T>) {  // bool, too
      if (full) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
      }
    }
#endif
    alignas(64) scalar_t lanes[VL];
    for (int64_t k = 0; k < VL; ++k) lanes[k] = full || k < width ? static_cast<scalar_t>(from[k]) : scalar_t(0);
    return Vec::loadu(lanes);
  }
}

// The same of a row of a tile, the next of which is so many elements on: the fourth from here is fetched meanwhile.
template <bool full, typename T>
inline Vec load_ahead(const T* from, int64_t next, int64_t width) {
  const char* ahead = reinterpret_cast<const char*>(from + 4 * next);
  for (size_t line = 0; line < VL * sizeof(T); line += 64) __builtin_prefetch(ahead + line);
  return load<full>(from, width);
}

template <bool full, typename T>
inline void store(T* to, Vec value, int64_t width) {
  if constexpr (std::is_same_v<T, scalar_t>) {
    if (full) value.store(to); else value.store(to, static_cast<int>(width));
  } else {
    alignas(64) scalar_t lanes[VL];
    value.store(lanes);
    for (int64_t k = 0; k < (full ? VL : width); ++k) to[k] = static_cast<T>(lanes[k]);
  }
}

template <bool full, typename T>
inline void scatter(T* to, int64_t stride, Vec value, int64_t width) {
  alignas(64) scalar_t lanes[VL];
  value.store(lanes);
  for (int64_t k = 0; k < (full ? VL : width); ++k) to[k * stride] = static_cast<T>(lanes[k]);
}

// One element at a time: strides other than 1, and indices that may lie outside.
template <bool full, typename F>
inline Vec lanes_of(int64_t width, F element) {
  alignas(64) scalar_t lanes[VL];
  for (int64_t k = 0; k < VL; ++k) lanes[k] = full || k < width ? static_cast<scalar_t>(element(k)) : scalar_t(0);
  return Vec::loadu(lanes);
}

// The least and the greatest of numbers in memory; minus infinity and infinity if one is no number.
template <typename T>
inline double lowest(const T* at, int64_t count, int64_t stride) {
  double found = std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < count; ++k) {
    const double x = static_cast<double>(at[k * stride]);
    if (!(x >= found)) found = x == x ? x : -std::numeric_limits<double>::infinity();
  }
  return found;
}

template <typename T>
inline double highest(const T* at, int64_t count, int64_t stride) {
  double found = -std::numeric_limits<double>::infinity();
  for (int64_t k = 0; k < count; ++k) {
    const double x = static_cast<double>(at[k * stride]);
    if (!(x <= found)) found = x == x ? x : std::numeric_limits<double>::infinity();
  }
  return found;
}

inline Vec choose(Vec condition, Vec yes, Vec no) { return Vec::blendv(no, yes, condition); }
inline Vec number(Vec condition) { return Vec::blendv(Vec(scalar_t(0)), Vec(scalar_t(1)), condition); }

inline Vec exponential(Vec x) {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
  // exp(x) = 2**n * exp(r), |r| <= log(2)/2; the polynomial's error is below 1e-8, the whole below 2 ulp. Results that
  // are no normal numbers are 0: computing with the others takes a hundred times as long.
  const __m512 low = _mm512_set1_ps(-87.0f), high = _mm512_set1_ps(100.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ);  // also for a NaN
  const __m512 a = _mm512_min_ps(high, _mm512_max_ps(low, x));  // the second operand is kept if it is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(a, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), a);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(normal, p, n);
#else
  return x.exp();
#endif
}

inline Vec hyperbolic_tangent(Vec x) {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
  // x * p(x^2) / q(x^2), Eigen's rational approximation for |x| <= 7.9988 (beyond, tanh rounds to 1), within 3 ulp.
  const __m512 bound = _mm512_set1_ps(7.99881172180175781f);
  const __m512 a = _mm512_min_ps(bound, _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), bound), x));
  const __m512 y = _mm512_mul_ps(a, a);
  __m512 p = _mm512_set1_ps(-2.76076847742355e-16f);
  p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(2.00018790482477e-13f));
  p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(-8.60467152213735e-11f));
  p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(5.12229709037114e-08f));
  p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(1.48572235717979e-05f));
  p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(6.37261928875436e-04f));
  p = _mm512_fmadd_ps(p, y, _mm512_set1_ps(4.89352455891786e-03f));
  __m512 q = _mm512_set1_ps(1.19825839466702e-06f);
  q = _mm512_fmadd_ps(q, y, _mm512_set1_ps(1.18534705686654e-04f));
  q = _mm512_fmadd_ps(q, y, _mm512_set1_ps(2.26843463243900e-03f));
  q = _mm512_fmadd_ps(q, y, _mm512_set1_ps(4.89352518554385e-03f));
  return _mm512_div_ps(_mm512_mul_ps(a, p), q);
#else
  return x.tanh();
#endif
}

inline Vec sigmoid(Vec x) { return Vec(scalar_t(1)) / (Vec(scalar_t(1)) + exponential(x.neg())); }

inline Vec reduced(Vec a, Vec b, std::integral_constant<int, 0>) { return a + b; }
inline Vec reduced(Vec a, Vec b, std::integral_constant<int, 1>) { return a * b; }
inline Vec reduced(Vec a, Vec b, std::integral_constant<int, 2>) { return at::vec::maximum(a, b); }
inline Vec reduced(Vec a, Vec b, std::integral_constant<int, 3>) { return at::vec::minimum(a, b); }
// a (op) b in the first `width` lanes, a in the others.
template <bool full, int op>
inline Vec accumulated(Vec a, Vec b, int64_t width) {
  const Vec both = reduced(a, b, std::integral_constant<int, op>{});
  return full ? both : Vec::set(a, both, width);
}
template <int op>
inline scalar_t across(Vec a) {
  return at::vec::vec_reduce_all<scalar_t>(
      [](Vec x, Vec y) { return reduced(x, y, std::integral_constant<int, op>{}); }, a);
}

// C[M,N] (+)= A[M,K] B[K,N], rows of neighbours: MR rows by NV vectors at a time in registers.
template <int MR, int NV>
inline void tile_product(int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const scalar_t* A,
                         const scalar_t* B, scalar_t* C, int64_t width) {
  Vec acc[MR][NV];
  const int64_t tail = width - (NV - 1) * VL;
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j)
      acc[i][j] = !add ? Vec(scalar_t(0))
                       : (j + 1 < NV || tail == VL ? Vec::loadu(C + i * ldc + j * VL)
                                                   : Vec::loadu(C + i * ldc + j * VL, tail));
  for (int64_t k = 0; k < K; ++k) {
    Vec b[NV];
    for (int j = 0; j < NV; ++j)
      b[j] = j + 1 < NV || tail == VL ? Vec::loadu(B + k * ldb + j * VL) : Vec::loadu(B + k * ldb + j * VL, tail);
    for (int i = 0; i < MR; ++i) {
      const Vec a(A[i * lda + k]);
      for (int j = 0; j < NV; ++j) acc[i][j] = at::vec::fmadd(a, b[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j)
      if (j + 1 < NV || tail == VL) acc[i][j].store(C + i * ldc + j * VL);
      else acc[i][j].store(C + i * ldc + j * VL, static_cast<int>(tail));
}

template <int NV>
inline void column_product(int64_t M, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add, const scalar_t* A,
                           const scalar_t* B, scalar_t* C, int64_t width) {
  int64_t i = 0;
  for (; i + 4 <= M; i += 4)
    tile_product<4, NV>(K, lda, ldb, ldc, add, A + i * lda, B, C + i * ldc, width);
  for (; i < M; ++i) tile_product<1, NV>(K, lda, ldb, ldc, add, A + i * lda, B, C + i * ldc, width);
}

inline void plain_product(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const scalar_t* A, const scalar_t* B, scalar_t* C) {
  for (int64_t j = 0; j < N; j += 4 * VL) {
    const int64_t width = std::min(4 * VL, N - j);
    switch ((width + VL - 1) / VL) {
      case 4: column_product<4>(M, K, lda, ldb, ldc, add, A, B + j, C + j, width); break;
      case 3: column_product<3>(M, K, lda, ldb, ldc, add, A, B + j, C + j, width); break;
      case 2: column_product<2>(M, K, lda, ldb, ldc, add, A, B + j, C + j, width); break;
      default: column_product<1>(M, K, lda, ldb, ldc, add, A, B + j, C + j, width);
    }
  }
}

inline void product(int64_t M, int64_t N, int64_t K, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                    const scalar_t* A, const scalar_t* B, scalar_t* C) {
  if (M == 0 || N == 0) return;
  if (K == 0) {
    if (!add)
      for (int64_t i = 0; i < M; ++i) std::fill(C + i * ldc, C + i * ldc + N, scalar_t(0));
    return;
  }
#if USE_BRGEMM && COMPUTES_F32 && defined(CPU_CAPABILITY_AVX512)
  // oneDNN has micro-kernels for float32 where there is AVX-512.
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, A, B, C);
#else
  plain_product(M, N, K, lda, ldb, ldc, add, A, B, C);
#endif
}

// to[j * ld_to + i] = from[i * ld_from + j]
template <typename T>
inline void transposed(int64_t rows, int64_t columns, const T* from, int64_t ld_from, scalar_t* to, int64_t ld_to) {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
  if constexpr (std::is_same_v<T, float>) {
    at::vec::transpose_mxn<float>(from, ld_from, to, ld_to, static_cast<int>(rows), static_cast<int>(columns));
  } else {
    alignas(64) float block[VL * VL];
    for (int64_t i = 0; i < rows; i += VL)
      for (int64_t j = 0; j < columns; j += VL) {
        const int64_t h = std::min(VL, rows - i), w = std::min(VL, columns - j);
        for (int64_t y = 0; y < h; ++y) {
          const T* row = from + (i + y) * ld_from + j;
          (w == VL ? load<true>(row, w) : load<false>(row, w)).store(block + y * VL);
        }
        at::vec::transpose_mxn<float>(block, VL, to + j * ld_to + i, ld_to, static_cast<int>(h), static_cast<int>(w));
      }
  }
#else
  constexpr int64_t B = 16;  // both sides are walked along cache lines
  for (int64_t i = 0; i < rows; i += B)
    for (int64_t j = 0; j < columns; j += B)
      for (int64_t y = j; y < std::min(j + B, columns); ++y)
        for (int64_t x = i; x < std::min(i + B, rows); ++x)
          to[y * ld_to + x] = static_cast<scalar_t>(from[x * ld_from + y]);
#endif
}
"""
