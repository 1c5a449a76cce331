// Adam and AdamW on the CPU: one pass over gradient, master weights and moments.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lohan_fx {

enum class Dtype : std::uint8_t { none = 0, f32 = 1, bf16 = 2, f16 = 3 };

// One step's scalars for one parameter group. torch.optim.AdamW's names and meaning:
// decoupled: p -= lr*weight_decay*p (AdamW); otherwise g += weight_decay*p (Adam with L2).
struct AdamStep {
  float lr = 1e-3f, beta1 = 0.9f, beta2 = 0.999f, eps = 1e-8f, weight_decay = 0.f;
  bool decoupled = true;
  std::int64_t step = 1;     // 1 for the first update
  float grad_scale = 1.f;    // every gradient is multiplied by this first
};

// Arrays of num_params elements; any alignment. `out16` (dtype out_dtype) receives the new weights
// rounded to nearest even; null when out_dtype is none. It may be the same memory as `grad`.
struct AdamArrays {
  float* master = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  const void* grad = nullptr;
  Dtype grad_dtype = Dtype::f32;
  void* out16 = nullptr;
  Dtype out_dtype = Dtype::none;
};

// Updates elements [begin, end) on the calling thread, with the implementation in use.
void adam_update(const AdamArrays& arrays, const AdamStep& step, std::size_t begin, std::size_t end);

}  // namespace lohan_fx
