"""The C++ of looking numbers up where an index says, and of adding them there."""

#: After ``PRELUDE``.
TABLES = r"""
inline scalar_t first_lane(Vec x) {
  alignas(64) scalar_t lanes[VL];
  x.store(lanes);
  return lanes[0];
}

// Which lanes are one of `count` whole numbers from `first` on.
inline Vec within(Vec index, int64_t first, int64_t count) {
  const Vec inside = (index >= Vec(scalar_t(first))) & (index < Vec(scalar_t(first + count)));
  return inside & (index == index.trunc());
}

// Where a number is among them: 0, 1, ...; -1 if it is none.
inline int64_t place_of(scalar_t index, int64_t first, int64_t count) {
  if (!(index >= scalar_t(first) && index < scalar_t(first + count))) return -1;
  const int64_t found = static_cast<int64_t>(index);
  return scalar_t(found) == index ? found - first : -1;
}

// As wide as the numbers: of places that float32 tells apart there are no more than 2**24.
using place_t = std::conditional_t<sizeof(scalar_t) == 4, int32_t, int64_t>;

#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
// The same for all lanes; which of them are not -1. What is no number of 32 bits becomes the least of them.
inline __mmask16 places_of(__m512 index, int64_t first, int64_t count, __m512i& places) {
  const __m512i whole = _mm512_cvttps_epi32(index);
  places = _mm512_sub_epi32(whole, _mm512_set1_epi32(static_cast<int>(first)));
  const __mmask16 inside = _mm512_cmplt_epu32_mask(places, _mm512_set1_epi32(static_cast<int>(count)));
  return _mm512_mask_cmp_ps_mask(inside, _mm512_cvtepi32_ps(whole), index, _CMP_EQ_OQ);
}
#endif

// The same in memory; whether none is -1.
inline bool places_of(Vec index, int64_t first, int64_t count, place_t* places) {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
  __m512i from_first;
  const __mmask16 inside = places_of(index, first, count, from_first);
  _mm512_store_si512(places, _mm512_mask_mov_epi32(_mm512_set1_epi32(-1), inside, from_first));
  return inside == 0xffff;
#else
  alignas(64) scalar_t lanes[VL];
  index.store(lanes);
  bool all = true;
  for (int64_t k = 0; k < VL; ++k) {
    places[k] = static_cast<place_t>(place_of(lanes[k], first, count));
    all = all && places[k] >= 0;
  }
  return all;
#endif
}

// In lane k the element that an index names, at[place * stride + k * along]; 0 if it names none.
template <bool full, typename T>
inline Vec looked_up(const T* at, int64_t stride, int64_t along, Vec index, int64_t first, int64_t count,
                     int64_t width) {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
  if constexpr (std::is_same_v<T, float>) {
    if (along == 0 && count * stride < std::numeric_limits<int32_t>::max()) {
      __m512i place;
      const __mmask16 inside = places_of(index, first, count, place);
      const __m512i offset = _mm512_mullo_epi32(place, _mm512_set1_epi32(static_cast<int>(stride)));
      return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, offset, at, 4);
    }
  }
#endif
  alignas(64) place_t places[VL];
  places_of(index, first, count, places);
  alignas(64) scalar_t lanes[VL];
  for (int64_t k = 0; k < VL; ++k) {
    const bool named = (full || k < width) && places[k] >= 0;
    lanes[k] = named ? static_cast<scalar_t>(at[int64_t(places[k]) * stride + k * along]) : scalar_t(0);
  }
  return Vec::loadu(lanes);
}

// Up to 32 numbers to look up, in registers.
class ShortTable {
#if defined(CPU_CAPABILITY_AVX512) && COMPUTES_F32
  __m512 low, high;
 public:
  template <typename T>
  ShortTable(const T* at, int64_t stride, int64_t count) {
    alignas(64) float all[32] = {};
    for (int64_t k = 0; k < count; ++k) all[k] = static_cast<float>(at[k * stride]);
    low = _mm512_load_ps(all);
    high = _mm512_load_ps(all + 16);
  }
  Vec at(Vec index, int64_t first, int64_t count) const {
    __m512i place;
    const __mmask16 inside = places_of(index, first, count, place);
    return _mm512_maskz_permutex2var_ps(inside, low, place, high);
  }
#else
  scalar_t all[32];
 public:
  template <typename T>
  ShortTable(const T* at, int64_t stride, int64_t count) {
    for (int64_t k = 0; k < count; ++k) all[k] = static_cast<scalar_t>(at[k * stride]);
  }
  Vec at(Vec index, int64_t first, int64_t count) const {
    return looked_up<true>(all, 1, 0, index, first, count, VL);
  }
#endif
};

// The same for one index in all lanes, and lanes that are neighbours in memory.
template <bool full, typename T>
inline Vec looked_up_row(const T* at, int64_t stride, Vec index, int64_t first, int64_t count, int64_t width) {
  const int64_t place = place_of(first_lane(index), first, count);
  return place < 0 ? Vec(scalar_t(0)) : load<full>(at + place * stride, width);
}

// The value of each lane added to the element that the lane's index names, if it names one.
template <bool full>
inline void add_each(scalar_t* at, int64_t stride, int64_t along, Vec index, int64_t first, int64_t count, Vec value,
                     int64_t width) {
  alignas(64) place_t places[VL];
  const bool all = places_of(index, first, count, places);
  alignas(64) scalar_t lanes[VL];
  value.store(lanes);
  if (full && all) {
    for (int64_t k = 0; k < VL; ++k) at[int64_t(places[k]) * stride + k * along] += lanes[k];
  } else {
    for (int64_t k = 0; k < (full ? VL : width); ++k)
      if (places[k] >= 0) at[int64_t(places[k]) * stride + k * along] += lanes[k];
  }
}

template <bool full>
inline void add_row(scalar_t* at, int64_t stride, Vec index, int64_t first, int64_t count, Vec value, int64_t width) {
  const int64_t place = place_of(first_lane(index), first, count);
  if (place >= 0) store<full>(at + place * stride, load<full>(at + place * stride, width) + value, width);
}

// The same into a table that has VL elements a place, one for each lane. Neighbours often have one place.
template <bool full>
inline void add_in_lanes(scalar_t* table, Vec index, int64_t first, int64_t count, Vec value, int64_t width) {
  const bool one = full && (index == Vec(first_lane(index))).zero_mask() == 0;
  if (one) return add_row<true>(table, VL, index, first, count, value, VL);
  add_each<full>(table, VL, 1, index, first, count, value, width);
}
"""
