// Adam in 8-wide AVX2, with F16C for half precision.
#include "adam_impl.h"

#if defined(LOHAN_FX_X86_64)
#include <cpuid.h>
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace lohan_fx {
namespace {

// Outside the region below: it must run on a CPU without AVX2.
bool supported() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kF16c = 1u << 29;
  return (ecx & kF16c) != 0 && __builtin_cpu_supports("avx2");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

struct Vector {
  using Float = __m256;
  static constexpr std::size_t kWidth = 8;

  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* from) { return _mm256_loadu_ps(from); }
  template <bool kStream = false>
  static void store(float* to, Float x) {
    if constexpr (kStream)
      _mm256_stream_ps(to, x);
    else
      _mm256_storeu_ps(to, x);
  }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float sqrt(Float x) { return _mm256_sqrt_ps(x); }

  static __m128i load_128(const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  }
  template <bool kStream>
  static void store_128(void* to, __m128i x) {
    if constexpr (kStream)
      _mm_stream_si128(static_cast<__m128i*>(to), x);
    else
      _mm_storeu_si128(static_cast<__m128i*>(to), x);
  }
  static void fence() { _mm_sfence(); }

  static Float load_bf16(const std::uint16_t* from) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(from)), 16));
  }
  static Float load_f16(const std::uint16_t* from) { return _mm256_cvtph_ps(load_128(from)); }

  template <bool kStream = false>
  static void store_bf16(std::uint16_t* to, Float x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd);
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, is_nan);
    store_128<kStream>(to, _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
  template <bool kStream = false>
  static void store_f16(std::uint16_t* to, Float x) {
    store_128<kStream>(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

#include "adam_loop.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

}  // namespace

const AdamImpl adam_avx2 = {"avx2", supported, run, run_accumulate};

}  // namespace lohan_fx
#endif
