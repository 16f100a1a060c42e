// A ConMamba layer for one chunk of streams, on a CPU: feed-forward, mixer, convolution module,
// feed-forward, each normalised first and added, and a closing norm. What calls of its parts would
// cost is saved, not arithmetic.
//
// Letters as in modules/Conmamba.py. Rows are frames; vectors run over their width. Units of work are
// blocks of outputs in products, items of the batch in mixer and convolution, rows elsewhere.
#include "../mamba_inner/chunk.cpp"
#include "../packed_linear/cpu.cpp"

#include <algorithm>
#include <cmath>

struct Norm {
  const float *weight, *bias;
  double eps;
};

struct Linear {
  const float *weight, *bias;  // packed; bias may be null
  int64_t outputs;
};

struct FeedForward {
  Norm norm;
  Linear inner, outer;
};

struct Layer {
  int64_t width, kernel, left, swish;  // left: frames before its own that the convolution sees
  FeedForward ffn1, ffn2;
  Norm mixer_norm;
  Linear in_proj, out_proj;
  Norm conv_norm;
  Linear pointwise;
  const float *depthwise, *depthwise_bias;  // (kernel, width), (width) or null
  Norm after_norm;
  Linear after;
  Norm last_norm;
};

struct Streams {
  const Layer* layer;
  float* x;          // (batch, frames, width), replaced by the output
  const float* seen; // (batch, left, width): inputs of the convolution before these frames
  float* next_seen;
  Chunk mixer;       // xz and y are set here
};

namespace {

// Error function to 1.5e-7: Abramowitz and Stegun, 7.1.26.
INLINE vf erf(vf x) {
  const vf size = maximum(x, -x), t = reciprocal(1.f + 0.3275911f * size);
  vf p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vf y = 1.f - p * t * exponential(-size * size);
  return x < 0.f ? -y : y;
}

INLINE vf activated(vf x, bool swish) {
  return swish ? x * sigmoid(x) : 0.5f * x * (1.f + erf(x * 0.70710678f));
}

void normalise(const Norm& norm, const float* x, float* y, int64_t width, int64_t activation) {
  vf sums{}, squares{};
  for (int64_t e = 0; e < width; e += W) sums += load_some(x + e, width - e);
  float mean = 0.f, variance = 0.f;
  for (int i = 0; i < W; ++i) mean += sums[i];
  mean /= width;
  for (int64_t e = 0; e < width; e += W) {
    vf d = load_some(x + e, width - e) - mean;
    for (int64_t i = width - e; i < W; ++i) d[i] = 0.f;
    squares += d * d;
  }
  for (int i = 0; i < W; ++i) variance += squares[i];
  const float scale = 1.f / std::sqrt(variance / width + float(norm.eps));
  for (int64_t e = 0; e < width; e += W) {
    const int64_t n = width - e;
    vf d = (load_some(x + e, n) - mean) * scale;
    d = d * load_some(norm.weight + e, n) + load_some(norm.bias + e, n);
    store_some(y + e, activation < 0 ? d : activated(d, activation), n);
  }
}

struct Work {
  explicit Work(const Streams& s)
      : s(s), rows(s.mixer.batch * s.mixer.frames), width(s.layer->width) {
    const int64_t xz = s.layer->in_proj.outputs;
    const int64_t inner = std::max(s.layer->ffn1.inner.outputs, s.layer->ffn2.inner.outputs);
    // Kept for the next layer: fresh pages for each would take a tenth of its time.
    static thread_local Scratch scratch;
    scratch.release();
    const auto take = [&](int64_t n) {
      return reinterpret_cast<float*>(scratch.take(ceil_divide(n, W)));
    };
    normed = take(rows * width);
    wide = take(rows * std::max({inner, xz, 2 * width}));
    added = take(rows * width);
    mixed = take(rows * xz / 2);
    seen = take((s.mixer.batch * s.layer->left + rows) * width);
  }

  template <class Body>
  void each(int64_t units, const Body& body) const {
    for_each_unit(s.mixer.parallel_for, s.mixer.threads, units, body);
  }

  template <class Body>
  void each_row(const Body& body) const {
    each(ceil_divide(rows, 8), [&](int64_t unit) {
      for (int64_t r = unit * 8; r < smaller(rows, unit * 8 + 8); ++r) body(r);
    });
  }

  void normalise_rows(const Norm& norm, const float* x, float* y, int64_t activation = -1) const {
    each_row([&](int64_t r) { normalise(norm, x + r * width, y + r * width, width, activation); });
  }

  void multiply(const Linear& linear, const float* x, int64_t inputs, float* y) const {
    const Call call{rows, inputs,           linear.outputs,   x, linear.weight, linear.bias,
                    y,    s.mixer.threads, s.mixer.parallel_for};
    packed_linear(&call);
  }

  void add(float share) const {
    each_row([&](int64_t r) {
      for (int64_t e = r * width; e < (r + 1) * width; ++e) s.x[e] += share * added[e];
    });
  }

  void feed_forward(const FeedForward& ffn) const {
    const int64_t inner = ffn.inner.outputs;
    normalise_rows(ffn.norm, s.x, normed);
    multiply(ffn.inner, normed, width, wide);
    each_row([&](int64_t r) {
      for (int64_t e = 0; e < inner; e += W) {
        float* at = wide + r * inner + e;
        store_some(at, activated(load_some(at, inner - e), s.layer->swish), inner - e);
      }
    });
    multiply(ffn.outer, wide, inner, added);
    add(0.5f);
  }

  void mix() const {
    const Layer& layer = *s.layer;
    normalise_rows(layer.mixer_norm, s.x, normed);
    multiply(layer.in_proj, normed, width, wide);
    Chunk chunk = s.mixer;
    chunk.xz = wide;
    chunk.y = mixed;
    mamba_inner_chunk(&chunk);
    multiply(layer.out_proj, mixed, layer.in_proj.outputs / 2, added);
    add(1.f);
  }

  void convolve() const {
    const Layer& layer = *s.layer;
    normalise_rows(layer.conv_norm, s.x, normed);
    multiply(layer.pointwise, normed, width, wide);
    each(s.mixer.batch, [&](int64_t item) { convolve_item(item); });
    normalise_rows(layer.after_norm, normed, normed, layer.swish);
    multiply(layer.after, normed, width, added);
    add(1.f);
  }

  void convolve_item(int64_t item) const {
    const Layer& layer = *s.layer;
    const int64_t frames = s.mixer.frames, left = layer.left, total = left + frames;
    float* inputs = seen + item * total * width;
    std::copy_n(s.seen + item * left * width, left * width, inputs);
    for (int64_t t = 0; t < frames; ++t) {
      const float* pair = wide + (item * frames + t) * 2 * width;
      float* input = inputs + (left + t) * width;
      for (int64_t e = 0; e < width; e += W) {
        const int64_t n = width - e;
        store_some(input + e, load_some(pair + e, n) * sigmoid(load_some(pair + width + e, n)), n);
      }
    }
    for (int64_t t = 0; t < frames; ++t)
      for (int64_t e = 0; e < width; e += W) {
        const int64_t n = width - e;
        vf sum = layer.depthwise_bias ? load_some(layer.depthwise_bias + e, n) : vf{};
        for (int64_t j = 0; j < smaller(layer.kernel, total - t); ++j)
          sum += load_some(layer.depthwise + j * width + e, n) *
                 load_some(inputs + (t + j) * width + e, n);
        store_some(normed + (item * frames + t) * width + e, sum, n);
      }
    std::copy_n(inputs + s.mixer.kept * width, left * width, s.next_seen + item * left * width);
  }

  const Streams& s;
  int64_t rows, width;
  float *normed, *wide, *added, *mixed, *seen;
};

}  // namespace

EXPORT void conmamba_layer(const Streams* streams) {
  const Work work(*streams);
  work.feed_forward(streams->layer->ffn1);
  work.mix();
  work.convolve();
  work.feed_forward(streams->layer->ffn2);
  work.normalise_rows(streams->layer->last_norm, streams->x, streams->x);
}
