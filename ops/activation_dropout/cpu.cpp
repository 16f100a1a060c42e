// Activation and dropout in one pass, and their gradient in another.
#include "../simd.h"

struct Call {
  const void* x;
  const void* dy;  // null in the forward
  void* out;
  int64_t elements;
  int64_t type;
  int64_t activation;
  int64_t seed;
  int64_t dropped;  // of 2^32 values of the hash
  double scale;
  int64_t threads;
  ParallelFor parallel_for;
};

namespace {

constexpr int64_t kUnit = 1 << 13;

enum Activation : int64_t { kNone = 0, kGelu = 1, kSilu = 2 };

// Every bit of the input changes every bit of the output with a probability near one half
// (C. Wellons' search for 32-bit hashes, "lowbias32").
INLINE vu mix(vu h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

// The standard normal distribution function at x, and e^(-x^2 / 2) on the way to it.
// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: 7.5e-8 absolute.
INLINE vf normal_distribution(vf x, vf& gauss) {
  // Further out both are 0 in float32, and the square would overflow.
  gauss = exponential(maximum(x * x * -0.5f, splat(-100.f)));
  const vf t = 1.f / (1.f + 0.231641888f * absolute(x));
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf tail = 0.5f * p * t * gauss;
  return x > 0.f ? 1.f - tail : tail;
}

// sigmoid for every x: beyond the limits it is 0 or 1 in float32.
INLINE vf logistic(vf x) { return sigmoid(maximum(minimum(x, splat(110.f)), splat(-110.f))); }

template <int Kind>
INLINE vf activate(vf x) {
  if (Kind == kNone) return x;
  if (Kind == kSilu) return x * logistic(x);
  vf gauss;
  return x * normal_distribution(x, gauss);
}

template <int Kind>
INLINE vf derivative(vf x) {
  if (Kind == kNone) return splat(1.f);
  if (Kind == kSilu) {
    const vf s = logistic(x);
    return s + x * s * (1.f - s);
  }
  vf gauss;
  const vf distribution = normal_distribution(x, gauss);
  return distribution + x * gauss * 0.398942280f;
}

class Dropout {
 public:
  explicit Dropout(const Call& call)
      : low_(uint32_t(call.seed)),
        high_(uint32_t(uint64_t(call.seed) >> 32)),
        dropped_(uint32_t(call.dropped)),
        scale_(float(call.scale)),
        active_(call.dropped != 0) {
    for (int i = 0; i < W; ++i) lanes_[i] = uint32_t(i);
  }

  // Elements first .. first + W of the tensor.
  INLINE vf operator()(vf y, int64_t first) const {
    if (!active_) return y;
    const vu place = lanes_ + uint32_t(first) + low_;
    const vu hash = mix(mix(place) ^ (high_ + uint32_t(uint64_t(first) >> 32)));
    return hash < dropped_ ? vf{} : y * scale_;
  }

 private:
  vu lanes_;
  uint32_t low_, high_, dropped_;
  float scale_;
  bool active_;
};

template <class T, int Kind>
void run_unit(const Call& call, int64_t begin, int64_t end) {
  const Dropout dropout(call);
  const T* x = static_cast<const T*>(call.x);
  const T* dy = static_cast<const T*>(call.dy);
  T* out = static_cast<T*>(call.out);
  const auto result = [&](const T* x, const T* dy, int64_t first) {
    const vf in = load_elements(x);
    return dy ? dropout(load_elements(dy) * derivative<Kind>(in), first)
              : dropout(activate<Kind>(in), first);
  };
  int64_t i = begin;
  for (; i + W <= end; i += W) store_elements(out + i, result(x + i, dy ? dy + i : nullptr, i));
  if (i == end) return;
  // The lanes after the last element read and write memory of this function.
  T last_x[W] = {}, last_dy[W] = {}, last_out[W];
  const size_t bytes = size_t(end - i) * sizeof(T);
  std::memcpy(last_x, x + i, bytes);
  if (dy) std::memcpy(last_dy, dy + i, bytes);
  store_elements(last_out, result(last_x, dy ? last_dy : nullptr, i));
  std::memcpy(out + i, last_out, bytes);
}

template <class T>
void run_as(const Call& call) {
  const int64_t units = ceil_divide(call.elements, kUnit);
  for_each_unit(call.parallel_for, call.threads, units, [&](int64_t unit) {
    const int64_t begin = unit * kUnit, end = smaller(begin + kUnit, call.elements);
    switch (call.activation) {
      case kNone: return run_unit<T, kNone>(call, begin, end);
      case kGelu: return run_unit<T, kGelu>(call, begin, end);
      default: return run_unit<T, kSilu>(call, begin, end);
    }
  });
}

}  // namespace

EXPORT void activation_dropout(const Call* call) {
  switch (call->type) {
    case kFloat32: return run_as<float>(*call);
    case kBFloat16: return run_as<bfloat16>(*call);
    default: return run_as<float16>(*call);
  }
}
