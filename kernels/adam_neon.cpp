// Adam in 4-wide NEON, which every 64-bit Arm has: no target region and no probe needed.
#include "adam_impl.h"

#if defined(LOHAN_FX_AARCH64)
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace lohan_fx {
namespace {

bool supported() { return true; }

struct Vector {
  using Float = float32x4_t;
  static constexpr std::size_t kWidth = 4;

  static Float set(float x) { return vdupq_n_f32(x); }
  static Float load(const float* from) { return vld1q_f32(from); }
  template <bool kStream = false>
  static void store(float* to, Float x) { vst1q_f32(to, x); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float sub(Float a, Float b) { return vsubq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float div(Float a, Float b) { return vdivq_f32(a, b); }
  static Float sqrt(Float x) { return vsqrtq_f32(x); }

  static Float load_bf16(const std::uint16_t* from) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(from)), 16));
  }
  static Float load_f16(const std::uint16_t* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
  }
  static void fence() {}
  template <bool kStream = false>
  static void store_bf16(std::uint16_t* to, Float x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t high = vshrq_n_u32(bits, 16);
    const uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t half = vaddq_u32(vdupq_n_u32(0x7fff), odd);
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, half), 16);
    const uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    const uint32x4_t not_nan = vceqq_f32(x, x);
    vst1_u16(to, vmovn_u32(vbslq_u32(not_nan, rounded, quiet)));
  }
  template <bool kStream = false>
  static void store_f16(std::uint16_t* to, Float x) {
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }
};

#include "adam_loop.h"

}  // namespace

const AdamImpl adam_neon = {"neon", supported, run, run_accumulate};

}  // namespace lohan_fx
#endif
