// What the CPU kernels share: one vector type, accurate elementary functions on it, tiles of any
// memory layout and element type, and the distribution of work over torch's threads.
//
// Vectors are the GCC/Clang vector extension at the width of the instruction set compiled for, so
// that AVX-512, AVX2, NEON and plain SSE share every line. Nothing here includes torch: a kernel is
// a C function that takes pointers and strides, which builds in seconds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;
#elif defined(__AVX__)
#include <immintrin.h>
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define INLINE inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_divide(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }
INLINE int64_t round_up(int64_t n, int64_t unit) { return ceil_divide(n, unit) * unit; }

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
// The same without the promise of alignment, for memory that torch owns.
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
// b where either is NaN.
INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
INLINE vf minimum(vf a, vf b) { return a < b ? a : b; }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

// ---- elementary functions -----------------------------------------------------------------------

// p 2^n for integer-valued n within the exponents of float32 and p near 1.
INLINE vf scale_by_power(vf p, vf n) {
  return (vf)((vi)p + (__builtin_convertvector(n, vi) << 23));
}

INLINE vf round_to_integer(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 2^23: the sum has no bits left for a fraction
  return (x + magic) - magic;
}

INLINE vf clamp_exponent(vf x) { return minimum(splat(127.f), maximum(splat(-126.f), x)); }

#if defined(__AVX512F__)
// 2^(k/16): they fit one register, and what they leave of an exponent is so small that a cubic will do.
const vf kPowers = {1.f,         1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f,
                    1.29683955f, 1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f,
                    1.68179283f, 1.75625216f, 1.83400809f, 1.91520656f};
const float kSixteenths = 786432.f;  // 1.5 2^19: the last bit of a sum with it is worth 1/16

// 2^n for n = x rounded to sixteenths, given x + kSixteenths, whose last four bits are n's.
INLINE vf power_of_two(vf rounded, vf n) {
  const __m512 power = _mm512_permutexvar_ps((__m512i)rounded, (__m512)kPowers);
  return (vf)_mm512_scalef_ps(power, (__m512)n);
}
#endif

// 2^(a b) for finite a b, relative to 2e-7 and, with AVX-512, where the product is rounded, another
// 3e-8 |a b|: what is off by more has all but vanished. Exactly 1 at 0 and unbiased around it: a long
// sequence multiplies thousands of factors close to 1, whose common error would add up.
INLINE vf exp2_of_product(vf a, vf b) {
#if defined(__AVX512F__)
  vf x = a * b;
  // The multipliers are the bottleneck and the adders are free: keeps the compiler from contracting.
  asm("" : "+v"(x));
  const vf rounded = x + kSixteenths;
  const vf n = rounded - kSixteenths;
  const vf r = x - n;
  vf p = splat(5.5504109e-2f);
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  return (p * r + 1.f) * power_of_two(rounded, n);
#else
  const vf x = clamp_exponent(a * b);
  const vf n = round_to_integer(x);
  const vf r = x - n;
  vf p = splat(1.3264727e-3f);
  p = p * r + 9.6715128e-3f;
  p = p * r + 5.5507337e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  return scale_by_power(p * r + 1.f, n);
#endif
}

// e^x to float32 precision for x up to 88: the reduced argument keeps the bits that x log2(e) would
// lose. Below float32's smallest numbers 0, whatever x.
INLINE vf exponential(vf x) {
#if defined(__AVX512F__)
  x = maximum(splat(-110.f), x);
  const vf rounded = x * 1.44269504f + kSixteenths;
  const vf n = rounded - kSixteenths;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.6666667e-1f);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  return (p * r + 1.f) * power_of_two(rounded, n);
#else
  const vf n = round_to_integer(clamp_exponent(x * 1.44269504f));
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.38436443e-3f);
  p = p * r + 8.3741635e-3f;
  p = p * r + 4.1668003e-2f;
  p = p * r + 1.6666431e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.f;
  return x < -87.f ? vf{} : scale_by_power(p * r + 1.f, n);
#endif
}

// 1 / x to a few units in the last place, for x of ordinary size.
INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r * (2.f - x * r);
#else
  return 1.f / x;
#endif
}

INLINE vf sigmoid(vf x) {
  const vf e = exponential(-absolute(x));
  return (x < 0.f ? e : splat(1.f)) * reciprocal(1.f + e);
}

// log(1 + e^x), relatively exact down to e^x where 1 + e^x rounds to 1:
// log(1 + e) = 2 artanh(e / (2 + e)), an odd series whose argument never exceeds 1/3.
INLINE vf softplus(vf x) {
  const vf e = exponential(-absolute(x));
  const vf s = e * reciprocal(2.f + e);
  const vf s2 = s * s;
  vf p = splat(1.40060046e-1f);
  p = p * s2 + 1.40009005e-1f;
  p = p * s2 + 2.00107637e-1f;
  p = p * s2 + 3.33332081e-1f;
  return maximum(x, vf{}) + (s + s) * (p * s2 + 1.f);
}

// ---- lanes --------------------------------------------------------------------------------------

template <int Half, int... I>
INLINE vf interleave(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (Half * W / 2 + I / 2 + (I % 2) * W)...);
#else
  return __builtin_shuffle(a, b, vi{(Half * W / 2 + I / 2 + (I % 2) * W)...});
#endif
}

// a and b alternately, first the lower halves of both, then the upper.
INLINE vf interleave_low(vf a, vf b) {
  return interleave<0>(a, b, std::make_integer_sequence<int, W>());
}
INLINE vf interleave_high(vf a, vf b) {
  return interleave<1>(a, b, std::make_integer_sequence<int, W>());
}

INLINE void transpose(vf m[W]) {
  for (int stage = 1; stage < W; stage *= 2) {
    vf out[W];
    for (int i = 0; i < W / 2; ++i) {
      out[2 * i] = interleave_low(m[i], m[i + W / 2]);
      out[2 * i + 1] = interleave_high(m[i], m[i + W / 2]);
    }
    for (int i = 0; i < W; ++i) m[i] = out[i];
  }
}

// Lane i is the sum of the lanes of m[i]; m is overwritten.
INLINE vf sum_each(vf m[W]) {
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i)
      m[i] = interleave_low(m[i], m[i + half]) + interleave_high(m[i], m[i + half]);
  return m[0];
}

// n of W elements that lie ``stride`` apart, zeros after them.
INLINE vf load_some(const float* p, int64_t n, int64_t stride = 1) {
  if (n >= W && stride == 1) return load(p);
  float lanes[W] = {};
  for (int64_t i = 0; i < smaller(n, W); ++i) lanes[i] = p[i * stride];
  return load(lanes);
}

INLINE void store_some(float* p, vf x, int64_t n) {
  if (n >= W) return store(p, x);
  float lanes[W];
  store(lanes, x);
  std::memcpy(p, lanes, n * sizeof(float));
}

// ---- element types ------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

INLINE float widen(float x) { return x; }
INLINE float widen(bfloat16 x) { return as_float(uint32_t(x.bits) << 16); }
// Written without branches, so that compilers vectorise it on machines without a half type.
INLINE float widen(float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  // A half read as float is 2^112 too small, subnormals included; infinities and NaN stay maximal.
  const uint32_t scaled = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return as_float(sign | scaled | special);
}

INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(float x, bfloat16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
INLINE void narrow(float x, float16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 aligns a subnormal half's last bit with float's and rounds it; otherwise the
  // exponent is rebiased and the 13 bits that go are rounded to even.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
  const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  out.bits = uint16_t(sign | half);
}

template <class T>
INLINE vf load_elements(const T* p) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = widen(p[i]);
  return load(lanes);
}
template <>
INLINE vf load_elements<float>(const float* p) {
  return load(p);
}
#if defined(__AVX512F__)
template <>
INLINE vf load_elements<float16>(const float16* p) {
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__F16C__)
template <>
INLINE vf load_elements<float16>(const float16* p) {
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#endif
template <class T>
INLINE void store_elements(T* p, vf x) {
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < W; ++i) narrow(lanes[i], p[i]);
}
template <>
INLINE void store_elements<float>(float* p, vf x) {
  store(p, x);
}

// The same as `widen` and `narrow` by whole vectors, which compilers do not find by themselves.
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vu16 __attribute__((vector_size(W * 2)));

template <>
INLINE vf load_elements<bfloat16>(const bfloat16* p) {
  vu16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}
template <>
INLINE void store_elements<bfloat16>(bfloat16* p, vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vu quiet_nan = (bits >> 16) | 0x40u;
  const vu result = (bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded;
  const vu16 narrowed = __builtin_convertvector(result, vu16);
  std::memcpy(p, &narrowed, sizeof narrowed);
}
#if defined(__AVX512F__)
template <>
INLINE void store_elements<float16>(float16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
template <>
INLINE void store_elements<float16>(float16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// ---- tensors and tiles --------------------------------------------------------------------------

enum ElementType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A tensor of (part, batch, group, channel, frame): strides in elements, 0 for axes it lacks. The
// parts of a gradient are partial sums.
struct Tensor {
  void* data;
  int64_t part, batch, group, channel, frame;
  int64_t type;

  explicit operator bool() const { return data != nullptr; }
};

// Frames of one block of channels in float32, wherever they lie.
struct Rows {
  float* first;
  int64_t stride;
  INLINE vf operator[](int frame) const { return load(first + frame * stride); }
  INLINE void set(int frame, vf x) const { store(first + frame * stride, x); }
};

// A tile holds `frames` consecutive frames of some channels in float32 as [block][frame][W], W
// channels to a block, zeros in the lanes after the last channel. Frames ascend in it whatever the
// direction of a scan.
struct Span {
  int64_t part, batch, group, channel, channels, frame;
  int frames;

  int blocks() const { return int(ceil_divide(channels, W)); }
  int vectors() const { return blocks() * frames; }
};

INLINE int64_t offset(const Tensor& x, const Span& at) {
  return at.part * x.part + at.batch * x.batch + at.group * x.group + at.channel * x.channel +
         at.frame * x.frame;
}

template <class T>
T* address(const Tensor& x, const Span& at) {
  return static_cast<T*>(x.data) + offset(x, at);
}

// Whether the blocks of a tile lie in memory as they do in the tile, apart from the distance of rows.
INLINE bool has_rows(const Tensor& x, const Span& at) {
  return x && x.type == kFloat32 && x.channel == 1 && at.channels % W == 0;
}

// One block's rows in memory where it has them, in the tile otherwise.
INLINE Rows block_rows(const Tensor& x, const Span& at, vf* tile, int block) {
  if (has_rows(x, at)) return {address<float>(x, at) + block * W, x.frame};
  return {reinterpret_cast<float*>(tile + block * at.frames), W};
}

// Rows that are fetched before they are needed: frames lie too far apart in memory for the
// processor to see a pattern.
constexpr int kAhead = 16;

// Whole rows at a time where channels are neighbours.
template <class T>
void read_tile_as(const Tensor& x, const Span& at, vf* tile) {
  const T* base = address<T>(x, at);
  const int whole = x.channel == 1 ? int(at.channels / W) : 0;
  for (int block = 0; block < whole; ++block) {
    const T* row = base + block * W;
    vf* out = tile + block * at.frames;
    for (int frame = 0; frame < at.frames; ++frame, row += x.frame) {
      __builtin_prefetch(row + kAhead * x.frame);
      out[frame] = load_elements(row);
    }
  }
  for (int block = whole; block < at.blocks(); ++block) {
    const int lanes = int(smaller(at.channels - block * W, W));
    const T* first = base + block * W * x.channel;
    vf* out = tile + block * at.frames;
    int frame = 0;
    if (x.channel == 0 && lanes == W) {  // the gradient of a sum is an expanded scalar
      for (; frame < at.frames; ++frame) out[frame] = splat(widen(first[frame * x.frame]));
    } else if (lanes == W && x.frame == 1) {
      for (; frame + W <= at.frames; frame += W) {
        for (int i = 0; i < W; ++i) out[frame + i] = load_elements(first + i * x.channel + frame);
        transpose(out + frame);
      }
    }
    for (; frame < at.frames; ++frame) {
      float row[W] = {};
      for (int i = 0; i < lanes; ++i) row[i] = widen(first[i * x.channel + frame * x.frame]);
      out[frame] = load(row);
    }
  }
}

// The tile is scratch afterwards.
template <class T>
void write_tile_as(const Tensor& x, const Span& at, vf* tile) {
  T* base = address<T>(x, at);
  const int whole = x.channel == 1 ? int(at.channels / W) : 0;
  for (int block = 0; block < whole; ++block) {
    T* row = base + block * W;
    const vf* in = tile + block * at.frames;
    for (int frame = 0; frame < at.frames; ++frame, row += x.frame) {
      __builtin_prefetch(row + kAhead * x.frame, 1);
      store_elements(row, in[frame]);
    }
  }
  for (int block = whole; block < at.blocks(); ++block) {
    const int lanes = int(smaller(at.channels - block * W, W));
    T* first = base + block * W * x.channel;
    vf* in = tile + block * at.frames;
    int frame = 0;
    if (lanes == W && x.frame == 1) {
      for (; frame + W <= at.frames; frame += W) {
        transpose(in + frame);
        for (int i = 0; i < W; ++i) store_elements(first + i * x.channel + frame, in[frame + i]);
      }
    }
    for (; frame < at.frames; ++frame) {
      float row[W];
      store(row, in[frame]);
      for (int i = 0; i < lanes; ++i) narrow(row[i], first[i * x.channel + frame * x.frame]);
    }
  }
}

inline void read_tile(const Tensor& x, const Span& at, vf* tile) {
  switch (x.type) {
    case kFloat32: return read_tile_as<float>(x, at, tile);
    case kBFloat16: return read_tile_as<bfloat16>(x, at, tile);
    default: return read_tile_as<float16>(x, at, tile);
  }
}

inline void write_tile(const Tensor& x, const Span& at, vf* tile) {
  switch (x.type) {
    case kFloat32: return write_tile_as<float>(x, at, tile);
    case kBFloat16: return write_tile_as<bfloat16>(x, at, tile);
    default: return write_tile_as<float16>(x, at, tile);
  }
}

// Zeros in the frames begin .. end of `at`'s channels; `tile` is scratch for `most` frames.
inline void write_zeros(const Tensor& x, Span at, int64_t begin, int64_t end, int most, vf* tile) {
  for (at.frame = begin; at.frame < end; at.frame += most) {
    at.frames = int(smaller(end - at.frame, most));
    for (int i = 0; i < at.vectors(); ++i) tile[i] = vf{};
    write_tile(x, at, tile);
  }
}

// One value per channel of a block, `stride` apart in memory: zeros in the lanes without a channel,
// and where there is no memory.
INLINE vf load_channels(const float* from, int64_t stride, const Span& at, int block) {
  float lanes[W] = {};
  for (int i = 0; from && i < W && block * W + i < at.channels; ++i)
    lanes[i] = from[(at.channel + block * W + i) * stride];
  return load(lanes);
}

INLINE void store_channels(float* to, int64_t stride, const Span& at, int block, vf x) {
  float lanes[W];
  store(lanes, x);
  for (int i = 0; i < W && block * W + i < at.channels; ++i)
    to[(at.channel + block * W + i) * stride] = lanes[i];
}

// ---- threads ------------------------------------------------------------------------------------

// torch_parallel_for of torch's stable C interface, handed in by address so that a kernel links to
// no library: it runs on torch's own threads, as many as torch.set_num_threads says.
typedef int32_t (*ParallelFor)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);

// body(unit) for every unit. Threads take the next unit when they are free; what a unit computes
// does not depend on who runs it, so results stay the same.
template <class Body>
void for_each_unit(ParallelFor parallel_for, int64_t threads, int64_t units, const Body& body) {
  struct Job {
    const Body& body;
    int64_t units;
    std::atomic<int64_t> next;

    void run() {
      for (int64_t unit; (unit = next.fetch_add(1)) < units;) body(unit);
    }
  } job{body, units, {0}};
  if (threads == 1 || units == 1) return job.run();
  parallel_for(
      0, smaller(threads, units), 1,
      [](int64_t, int64_t, void* context) { static_cast<Job*>(context)->run(); }, &job);
}

// Scratch of a thread, kept for its next unit: fresh pages on every call would cost more than the
// work on a short sequence. The n-th take after a release gets the same memory each time.
class Scratch {
 public:
  void release() { taken_ = 0; }

  vf* take(size_t vectors) {
    if (taken_ == buffers_.size()) buffers_.emplace_back();
    // Buffers of equal size would fall on the same cache sets; each starts some lines further.
    const size_t offset = 5 * (taken_ % 13) * (64 / sizeof(vf));
    Buffer& buffer = buffers_[taken_++];
    if (buffer.capacity < vectors + offset) {
      buffer.capacity = vectors + offset;
      const size_t bytes = (buffer.capacity * sizeof(vf) + 63) / 64 * 64;
      buffer.memory.reset(static_cast<vf*>(std::aligned_alloc(64, bytes)));
    }
    return buffer.memory.get() + offset;
  }

  vf* take_zeros(size_t vectors) {
    vf* memory = take(vectors);
    for (size_t i = 0; i < vectors; ++i) memory[i] = vf{};
    return memory;
  }

 private:
  struct Free {
    void operator()(vf* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::unique_ptr<vf, Free> memory;
    size_t capacity = 0;
  };
  std::vector<Buffer> buffers_;
  size_t taken_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}
