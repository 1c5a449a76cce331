// Adam without vector instructions of our own: the reference that every other implementation must
// equal, and the one for CPUs that have none of them.
#include <cstddef>
#include <cstdint>

#include "adam_impl.h"

namespace lohan_fx {
namespace {

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

float float_of(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

std::uint16_t to_bf16(float x) {
  const std::uint32_t bits = bits_of(x);
  if (x != x) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // quiet: it stays a NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float from_f16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN, made quiet
    const std::uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return float_of(sign | 0x7f800000u | quiet | ((magnitude & 0x3ffu) << 13));
  }
  if (magnitude < 0x400u) {  // zero or subnormal: a multiple of 2^-24, exact in float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_of(sign | bits_of(value));
  }
  return float_of(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

std::uint16_t to_f16(float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24, rounded
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  }
  return static_cast<std::uint16_t>(sign | half);
}

struct Vector {
  using Float = float;
  static constexpr std::size_t kWidth = 1;

  static Float set(float x) { return x; }
  static Float load(const float* from) { return *from; }
  template <bool kStream = false>
  static void store(float* to, Float x) { *to = x; }
  static Float add(Float a, Float b) { return a + b; }
  static Float sub(Float a, Float b) { return a - b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float div(Float a, Float b) { return a / b; }
  static Float sqrt(Float x) { return __builtin_sqrtf(x); }

  static Float load_bf16(const std::uint16_t* from) {
    return float_of(static_cast<std::uint32_t>(*from) << 16);
  }
  static Float load_f16(const std::uint16_t* from) { return from_f16(*from); }
  static void fence() {}
  template <bool kStream = false>
  static void store_bf16(std::uint16_t* to, Float x) { *to = to_bf16(x); }
  template <bool kStream = false>
  static void store_f16(std::uint16_t* to, Float x) { *to = to_f16(x); }
};

#include "adam_loop.h"

bool always() { return true; }

}  // namespace

const AdamImpl adam_scalar = {"scalar", always, run, run_accumulate};

}  // namespace lohan_fx
