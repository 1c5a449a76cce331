// Adam in 16-wide AVX-512 (the foundation instructions only).
#include "adam_impl.h"

#if defined(LOHAN_FX_X86_64)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers (its bug 105593)
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lohan_fx {
namespace {

// Outside the region below: it must run on a CPU without AVX-512.
bool supported() { return __builtin_cpu_supports("avx512f"); }

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

struct Vector {
  using Float = __m512;
  static constexpr std::size_t kWidth = 16;

  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* from) { return _mm512_loadu_ps(from); }
  template <bool kStream = false>
  static void store(float* to, Float x) {
    if constexpr (kStream)
      _mm512_stream_ps(to, x);
    else
      _mm512_storeu_ps(to, x);
  }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float sqrt(Float x) { return _mm512_sqrt_ps(x); }

  static __m256i load_256(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  template <bool kStream>
  static void store_256(void* to, __m256i x) {
    if constexpr (kStream)
      _mm256_stream_si256(static_cast<__m256i*>(to), x);
    else
      _mm256_storeu_si256(static_cast<__m256i*>(to), x);
  }
  static void fence() { _mm_sfence(); }

  static Float load_bf16(const std::uint16_t* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_256(from)), 16));
  }
  static Float load_f16(const std::uint16_t* from) { return _mm512_cvtph_ps(load_256(from)); }

  // Not vcvtneps2bf16: that flushes denormals.
  template <bool kStream = false>
  static void store_bf16(std::uint16_t* to, Float x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd);
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i wide = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
    store_256<kStream>(to, _mm512_cvtepi32_epi16(wide));
  }
  template <bool kStream = false>
  static void store_f16(std::uint16_t* to, Float x) {
    store_256<kStream>(to, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

#include "adam_loop.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace

const AdamImpl adam_avx512 = {"avx512", supported, run, run_accumulate};

}  // namespace lohan_fx
#endif
