// Adam and AdamW on the CPU: one pass over gradient, master weights and moments.
//
// [Note: the same bits on every machine]
// Each element goes through the same IEEE operations (add, multiply, divide, square root; no fused
// multiply-add, no reciprocal estimates, no flushing of denormals) in the same order, whatever the
// instruction set, the number of threads or the place of the element in its array. So results are
// equal bit for bit; only which NaN a NaN is may differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lohan_fx {

class ThreadPool;

enum class Dtype : std::uint8_t { none = 0, f32 = 1, bf16 = 2, f16 = 3 };

// One step's scalars for one parameter group. torch.optim.AdamW's names and meaning:
// decoupled: p -= lr*weight_decay*p (AdamW); otherwise g += weight_decay*p (Adam with L2).
// Doubles, as in torch: 1 - 0.999 taken in float is off by 5e-5.
struct AdamStep {
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.;
  bool decoupled = true;
  std::int64_t step = 1;    // 1 for the first update
  double unscale = 1.;      // every gradient is multiplied by this first,
  double grad_scale = 1.;   // then by this: two roundings, as where loss scaling and clipping follow
};

// Arrays of num_params elements; any alignment. `out16` (dtype out_dtype) receives the new weights
// rounded to nearest even; null when out_dtype is none. It may be the same memory as a 16-bit `grad`.
// New fp32 values replace the old ones, or go to the three new_ arrays (all or none), which overlap no
// other: then the old ones are only read.
struct AdamArrays {
  float* master = nullptr;
  float* exp_avg = nullptr;
  float* exp_avg_sq = nullptr;
  const void* grad = nullptr;
  Dtype grad_dtype = Dtype::f32;
  void* out16 = nullptr;
  Dtype out_dtype = Dtype::none;
  float* new_master = nullptr;
  float* new_exp_avg = nullptr;
  float* new_exp_avg_sq = nullptr;

  bool in_place() const { return new_master == nullptr; }
};

// What the loops need of an AdamStep: bias corrections and the like, taken in double, then rounded.
struct AdamFactors {
  explicit AdamFactors(const AdamStep& step);

  float unscale;
  float grad_scale;
  float decay;            // the weight is multiplied by this first; 1 unless decoupled
  float l2;               // the gradient gains l2 * weight; 0 if decoupled
  float blend;            // m = base + blend * (g - m), where base is m,
  bool blend_from_grad;   // or g if beta1 < 0.5: from m, a small g would drown in m's rounding
  float beta2;
  float one_minus_beta2;
  float bias2_sqrt;
  float eps;
  float step_size;
};

// One instruction set's loop.
struct AdamImpl {
  const char* name;
  bool (*supported)();
  void (*run)(const AdamArrays& arrays, const AdamFactors& factors, std::size_t begin,
              std::size_t end);
  void (*accumulate)(float* sum, const void* grad, Dtype grad_dtype, bool set, std::size_t begin,
                     std::size_t end);
};

// The implementation in use: the best one this CPU has, or the one named in LOHAN_FX_ISA.
// Throws std::invalid_argument, listing what there is, if that name is unknown or not supported here.
const AdamImpl& active_adam();
const AdamImpl& find_adam(const std::string& name);
std::vector<std::string> available_isas();  // best first; always ends in "scalar"

// Updates elements [begin, end) on the calling thread.
void adam_update(const AdamArrays& arrays, const AdamFactors& factors, std::size_t begin,
                 std::size_t end, const AdamImpl& impl = active_adam());

// Elements per piece of work for one thread: about a megabyte and a half of traffic, so threads share
// evenly when some cores are busy elsewhere, and handing out a piece costs nothing beside doing it.
inline constexpr std::size_t kAdamPiece = std::size_t{1} << 16;

// Updates [0, num_params) on num_threads threads of the pool, the calling one included.
void adam_update(const AdamArrays& arrays, const AdamFactors& factors, std::size_t num_params,
                 ThreadPool& pool, unsigned num_threads, const AdamImpl& impl = active_adam());

// Adds elements [begin, end) of a gradient to fp32 sums, or sets the sums to them.
void accumulate(float* sum, const void* grad, Dtype grad_dtype, bool set, std::size_t begin,
                std::size_t end, const AdamImpl& impl = active_adam());

// How large the elements of an fp32 array are. `largest` is the greatest magnitude; NaN is greater than
// infinity, so it is finite exactly where all elements are.
struct Magnitude {
  double sum_squares = 0.;
  float largest = 0.f;

  void merge(const Magnitude& other);
};

// One piece, of at most kAdamPiece elements from `begin` on; merged in order, pieces give the same bits
// on every machine.
Magnitude measure_piece(const float* values, std::size_t begin, std::size_t end);
Magnitude measure(const float* values, std::size_t count);

}  // namespace lohan_fx
