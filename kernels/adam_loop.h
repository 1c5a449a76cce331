// The loop of every implementation, written once over a struct `Vector` of the including file:
//   Float, kWidth; load/store of float, bf16 and f16; set, add, sub, mul, div, sqrt; fence.
// Stores with kStream go to addresses that are a multiple of the bytes stored.
//
// No include guard, no includes and no std:: on purpose: this text is compiled once per instruction
// set, inside that file's target region and an unnamed namespace. A shared inline function compiled
// here could be the copy the linker keeps for everyone, and crash a CPU without the instructions.

// Bytes ahead of the loop that are asked for: the hardware prefetchers stop at page ends.
constexpr std::size_t kAhead = 1024;
// Elements that are updated together: whole cache lines of every array.
constexpr std::size_t kBlock = 32;
constexpr std::size_t kLine = 16;  // fp32 elements of a cache line

// [Note: streamed weights]
// New values that replace nothing the loop reads go past the caches: a plain store would read their lines
// from memory first, two bytes more an element for 16-bit weights and twelve for master and moments in new
// arrays. fence() makes them seen before the update is done. A processor has few buffers for such stores, and
// must give up one that is filled in part when others are needed. So the stores that fill a line follow one
// another: a block is computed, then leaves the registers array by array. Long blocks are slow, since nothing is
// read while they leave.

// The fp32 arrays of an update; elements of two such triples correspond.
template <typename Number>
struct State {
  Number *master, *exp_avg, *exp_avg_sq;
};

template <Dtype D>
inline Vector::Float load_as_float(const void* from, std::size_t i) {
  if constexpr (D == Dtype::f32) return Vector::load(static_cast<const float*>(from) + i);
  if constexpr (D == Dtype::bf16) return Vector::load_bf16(static_cast<const std::uint16_t*>(from) + i);
  if constexpr (D == Dtype::f16) return Vector::load_f16(static_cast<const std::uint16_t*>(from) + i);
}

template <Dtype Grad, Dtype Out, bool L2>
struct Loop {
  const Vector::Float unscale, grad_scale, decay, l2, blend, beta2, one_minus_beta2, bias2_sqrt, eps, step_size;
  const bool blend_from_grad;

  explicit Loop(const AdamFactors& f)
      : unscale(Vector::set(f.unscale)),
        grad_scale(Vector::set(f.grad_scale)),
        decay(Vector::set(f.decay)),
        l2(Vector::set(f.l2)),
        blend(Vector::set(f.blend)),
        beta2(Vector::set(f.beta2)),
        one_minus_beta2(Vector::set(f.one_minus_beta2)),
        bias2_sqrt(Vector::set(f.bias2_sqrt)),
        eps(Vector::set(f.eps)),
        step_size(Vector::set(f.step_size)),
        blend_from_grad(f.blend_from_grad) {}

  struct Values {
    Vector::Float master, exp_avg, exp_avg_sq;
  };

  // New values of elements [i, i + kWidth). Same operations in the same order as torch.optim's single-tensor
  // AdamW.
  Values step(const State<const float>& from, const void* grad, std::size_t i) const {
    using V = Vector;
    V::Float g = V::mul(V::mul(load_as_float<Grad>(grad, i), unscale), grad_scale);
    V::Float p = V::load(from.master + i);
    V::Float m = V::load(from.exp_avg + i);
    V::Float v = V::load(from.exp_avg_sq + i);
    if constexpr (L2) g = V::add(g, V::mul(l2, p));
    p = V::mul(p, decay);
    m = V::add(blend_from_grad ? g : m, V::mul(blend, V::sub(g, m)));
    v = V::add(V::mul(v, beta2), V::mul(V::mul(one_minus_beta2, g), g));
    const V::Float denom = V::add(V::div(V::sqrt(v), bias2_sqrt), eps);
    p = V::sub(p, V::div(V::mul(step_size, m), denom));
    return {p, m, v};
  }

  // New 16-bit weights from element i of `out` on, where there are some.
  template <bool kStream = false>
  static void round(void* out, std::size_t i, Vector::Float master) {
    auto* const out16 = static_cast<std::uint16_t*>(out);
    if constexpr (Out == Dtype::bf16) Vector::template store_bf16<kStream>(out16 + i, master);
    if constexpr (Out == Dtype::f16) Vector::template store_f16<kStream>(out16 + i, master);
  }

  // Updates kVectors vectors, from element i of each array in `from` to the same of those in `to`, which may be
  // the same. See [Note: streamed weights].
  template <std::size_t kVectors, bool kStreamState = false, bool kStreamOut = false>
  void update(const State<const float>& from, const State<float>& to, const void* grad, void* out,
              std::size_t i) const {
    constexpr std::size_t kWidth = Vector::kWidth;
    Values values[kVectors];
    for (std::size_t j = 0; j < kVectors; ++j) values[j] = step(from, grad, i + j * kWidth);
    for (std::size_t j = 0; j < kVectors; ++j)
      Vector::template store<kStreamState>(to.master + i + j * kWidth, values[j].master);
    for (std::size_t j = 0; j < kVectors; ++j)
      Vector::template store<kStreamState>(to.exp_avg + i + j * kWidth, values[j].exp_avg);
    for (std::size_t j = 0; j < kVectors; ++j)
      Vector::template store<kStreamState>(to.exp_avg_sq + i + j * kWidth, values[j].exp_avg_sq);
    for (std::size_t j = 0; j < kVectors; ++j) round<kStreamOut>(out, i + j * kWidth, values[j].master);
  }

  template <int kWrites>  // lines that are only read need not be owned
  static void ahead(const State<const float>& from, std::size_t i) {
    for (std::size_t j = i; j < i + kBlock; j += kLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(from.master + j) + kAhead, kWrites);
      __builtin_prefetch(reinterpret_cast<const char*>(from.exp_avg + j) + kAhead, kWrites);
      __builtin_prefetch(reinterpret_cast<const char*>(from.exp_avg_sq + j) + kAhead, kWrites);
    }
  }

  // What does not fill a vector goes through the same code, in a copy.
  void tail(const AdamArrays& a, const State<float>& to, std::size_t begin, std::size_t n) const {
    constexpr std::size_t kGradBytes = Grad == Dtype::f32 ? 4 : 2;
    float p[Vector::kWidth] = {}, m[Vector::kWidth] = {}, v[Vector::kWidth] = {};
    float g[Vector::kWidth] = {};  // room for any gradient dtype
    std::uint16_t out[Vector::kWidth] = {};
    __builtin_memcpy(p, a.master + begin, n * 4);
    __builtin_memcpy(m, a.exp_avg + begin, n * 4);
    __builtin_memcpy(v, a.exp_avg_sq + begin, n * 4);
    __builtin_memcpy(g, static_cast<const char*>(a.grad) + begin * kGradBytes, n * kGradBytes);
    update<1>({p, m, v}, {p, m, v}, g, out, 0);
    __builtin_memcpy(to.master + begin, p, n * 4);
    __builtin_memcpy(to.exp_avg + begin, m, n * 4);
    __builtin_memcpy(to.exp_avg_sq + begin, v, n * 4);
    if constexpr (Out != Dtype::none)
      __builtin_memcpy(static_cast<std::uint16_t*>(a.out16) + begin, out, n * 2);
  }

  // Do stores of whole vectors, from element `begin` on, go to multiples of their size?
  static bool aligned(const void* array, std::size_t element_bytes, std::size_t begin) {
    return (reinterpret_cast<std::uintptr_t>(array) + element_bytes * begin) %
               (element_bytes * Vector::kWidth) == 0;
  }

  static void run(const AdamArrays& a, const AdamFactors& factors, std::size_t begin,
                  std::size_t end) {
    // See [Note: streamed weights].
    const bool streams_out = Out != Dtype::none && a.out16 != a.grad && aligned(a.out16, 2, begin);
    if (a.in_place()) {
      const State<float> to{a.master, a.exp_avg, a.exp_avg_sq};
      if (streams_out)
        run_all<true, false, Out != Dtype::none>(a, to, factors, begin, end);
      else
        run_all<true, false, false>(a, to, factors, begin, end);
      return;
    }
    const State<float> to{a.new_master, a.new_exp_avg, a.new_exp_avg_sq};
    const bool streams_state = aligned(to.master, 4, begin) && aligned(to.exp_avg, 4, begin) &&
                               aligned(to.exp_avg_sq, 4, begin);
    if (streams_state && (Out == Dtype::none || streams_out))
      run_all<false, true, Out != Dtype::none>(a, to, factors, begin, end);
    else
      run_all<false, false, false>(a, to, factors, begin, end);
  }

  template <bool kInPlace, bool kStreamState, bool kStreamOut>
  static void run_all(const AdamArrays& a, const State<float>& to, const AdamFactors& factors,
                      std::size_t begin, std::size_t end) {
    const Loop loop(factors);
    const State<const float> from{a.master, a.exp_avg, a.exp_avg_sq};
    std::size_t i = begin;
    for (; i + kBlock <= end; i += kBlock) {
      ahead<kInPlace ? 1 : 0>(from, i);
      loop.template update<kBlock / Vector::kWidth, kStreamState, kStreamOut>(from, to, a.grad, a.out16, i);
    }
    for (; i + Vector::kWidth <= end; i += Vector::kWidth)
      loop.template update<1, kStreamState, kStreamOut>(from, to, a.grad, a.out16, i);
    if constexpr (kStreamState || kStreamOut) Vector::fence();
    if (i < end) loop.tail(a, to, i, end - i);
  }
};

template <Dtype Grad, Dtype Out>
inline void run_decay(const AdamArrays& a, const AdamFactors& f, std::size_t begin, std::size_t end) {
  if (f.l2 != 0.f)
    Loop<Grad, Out, true>::run(a, f, begin, end);
  else
    Loop<Grad, Out, false>::run(a, f, begin, end);
}

template <Dtype Grad>
inline void run_out(const AdamArrays& a, const AdamFactors& f, std::size_t begin, std::size_t end) {
  switch (a.out_dtype) {
    case Dtype::bf16: return run_decay<Grad, Dtype::bf16>(a, f, begin, end);
    case Dtype::f16: return run_decay<Grad, Dtype::f16>(a, f, begin, end);
    default: return run_decay<Grad, Dtype::none>(a, f, begin, end);
  }
}

void run(const AdamArrays& a, const AdamFactors& f, std::size_t begin, std::size_t end) {
  switch (a.grad_dtype) {
    case Dtype::bf16: return run_out<Dtype::bf16>(a, f, begin, end);
    case Dtype::f16: return run_out<Dtype::f16>(a, f, begin, end);
    default: return run_out<Dtype::f32>(a, f, begin, end);
  }
}

template <Dtype Grad, bool Set>
inline void accumulate_loop(float* sum, const void* grad, std::size_t begin, std::size_t end) {
  using V = Vector;
  constexpr std::size_t kGradBytes = Grad == Dtype::f32 ? 4 : 2;
  std::size_t i = begin;
  for (; i + V::kWidth <= end; i += V::kWidth) {
    const V::Float g = load_as_float<Grad>(grad, i);
    V::store(sum + i, Set ? g : V::add(V::load(sum + i), g));
  }
  if (i == end) return;
  float s[V::kWidth] = {}, g[V::kWidth] = {};
  __builtin_memcpy(s, sum + i, (end - i) * 4);
  __builtin_memcpy(g, static_cast<const char*>(grad) + i * kGradBytes, (end - i) * kGradBytes);
  const V::Float last = load_as_float<Grad>(g, 0);
  V::store(s, Set ? last : V::add(V::load(s), last));
  __builtin_memcpy(sum + i, s, (end - i) * 4);
}

template <Dtype Grad>
inline void accumulate_as(float* sum, const void* grad, bool set, std::size_t begin, std::size_t end) {
  if (set)
    accumulate_loop<Grad, true>(sum, grad, begin, end);
  else
    accumulate_loop<Grad, false>(sum, grad, begin, end);
}

void run_accumulate(float* sum, const void* grad, Dtype grad_dtype, bool set, std::size_t begin,
                    std::size_t end) {
  switch (grad_dtype) {
    case Dtype::bf16: return accumulate_as<Dtype::bf16>(sum, grad, set, begin, end);
    case Dtype::f16: return accumulate_as<Dtype::f16>(sum, grad, set, begin, end);
    default: return accumulate_as<Dtype::f32>(sum, grad, set, begin, end);
  }
}
