// Dropout, and its gradient, which is the same of what comes back.
#include "../simd.h"

struct Call {
  const void* x;
  void* y;
  int64_t elements;
  int64_t type;
  int64_t seed;
  int64_t dropped;  // of 2^32 values of the hash
  double scale;
  int64_t threads;
  ParallelFor parallel_for;
};

namespace {

constexpr int64_t kUnit = 1 << 13;

// Every bit of the input changes every bit of the output with a probability near one half
// (C. Wellons' search for 32-bit hashes, "lowbias32").
INLINE vu mix(vu h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  return h ^ (h >> 16);
}

class Dropout {
 public:
  explicit Dropout(const Call& call)
      : low_(uint32_t(call.seed)),
        high_(uint32_t(uint64_t(call.seed) >> 32)),
        dropped_(uint32_t(call.dropped)),
        scale_(float(call.scale)) {
    for (int i = 0; i < W; ++i) lanes_[i] = uint32_t(i);
  }

  // Elements first .. first + W of the tensor.
  INLINE vf operator()(vf x, int64_t first) const {
    const vu place = lanes_ + uint32_t(first) + low_;
    const vu hash = mix(mix(place) ^ (high_ + uint32_t(uint64_t(first) >> 32)));
    return hash < dropped_ ? vf{} : x * scale_;
  }

 private:
  vu lanes_;
  uint32_t low_, high_, dropped_;
  float scale_;
};

template <class T>
void run_unit(const Call& call, int64_t begin, int64_t end) {
  const Dropout dropout(call);
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.y);
  int64_t i = begin;
  for (; i + W <= end; i += W) store_elements(y + i, dropout(load_elements(x + i), i));
  // The lanes after the last element read and write memory of this function.
  T last[W] = {};
  const size_t bytes = size_t(end - i) * sizeof(T);
  std::memcpy(last, x + i, bytes);
  store_elements(last, dropout(load_elements(last), i));
  std::memcpy(y + i, last, bytes);
}

template <class T>
void run_as(const Call& call) {
  const int64_t units = ceil_divide(call.elements, kUnit);
  for_each_unit(call.parallel_for, call.threads, units, [&](int64_t unit) {
    run_unit<T>(call, unit * kUnit, smaller((unit + 1) * kUnit, call.elements));
  });
}

}  // namespace

EXPORT void dropout(const Call* call) {
  switch (call->type) {
    case kFloat32: return run_as<float>(*call);
    case kBFloat16: return run_as<bfloat16>(*call);
    default: return run_as<float16>(*call);
  }
}
