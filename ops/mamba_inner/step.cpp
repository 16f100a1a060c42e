// The inner part of a causal mixer for one frame, on a CPU: convolution, projections, one step of
// the scan, gate. A unit of work is one item of the batch; nothing is summed across items.
//
// Letters as in arguments.py. Vectors run over channels, in the scan over its state.
#include "../simd.h"

struct Step {
  int64_t batch, dim, state, rank, taps;
  const float* xz;           // (batch, 2 dim): input, gate
  const float* conv_weight;  // (dim, taps), the last tap for this frame
  const float* conv_bias;    // (dim) or null
  const float* x_proj;       // (rank + 2 state, dim)
  const float* dt_proj;      // (dim, rank)
  const float* dt_bias;      // (dim)
  const float* A_log;        // (dim, state)
  const float* D;            // (dim)
  const float* conv_state;   // (batch, dim, taps - 1)
  const float* ssm_state;    // (batch, dim, state)
  float* y;                  // (batch, dim)
  float* next_conv_state;
  float* next_ssm_state;
  int64_t threads;
  ParallelFor parallel_for;
};

namespace {

// The parameters in vectors of channels (A in vectors of states), padded with zeros.
struct Parameters {
  explicit Parameters(const Step& step) {
    const int64_t blocks = ceil_divide(step.dim, W), parts = ceil_divide(step.state, W);
    taps.resize(step.taps * blocks);
    dt_proj.resize(step.rank * blocks);
    conv_bias.resize(blocks);
    dt_bias.resize(blocks);
    D.resize(blocks);
    A.resize(step.dim * parts);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * W, n = step.dim - first;
      for (int64_t j = 0; j < step.taps; ++j)
        taps[j * blocks + b] = load_some(step.conv_weight + first * step.taps + j, n, step.taps);
      for (int64_t r = 0; r < step.rank; ++r)
        dt_proj[r * blocks + b] = load_some(step.dt_proj + first * step.rank + r, n, step.rank);
      conv_bias[b] = step.conv_bias ? load_some(step.conv_bias + first, n) : vf{};
      dt_bias[b] = load_some(step.dt_bias + first, n);
      D[b] = load_some(step.D + first, n);
    }
    for (int64_t e = 0; e < step.dim; ++e)
      for (int64_t v = 0; v < parts; ++v)
        A[e * parts + v] =
            -exponential(load_some(step.A_log + e * step.state + v * W, step.state - v * W));
  }

  std::vector<vf> taps, dt_proj, conv_bias, dt_bias, D, A;
};

void convolve(const Step& step, const Parameters& parameters, int64_t item, vf* u) {
  const int64_t blocks = ceil_divide(step.dim, W), before = step.taps - 1;
  const float* x = step.xz + item * 2 * step.dim;
  const float* state = step.conv_state + item * step.dim * before;
  float* next = step.next_conv_state + item * step.dim * before;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * W, n = step.dim - first;
    vf s = parameters.conv_bias[b];
    for (int64_t j = 0; j < before; ++j)
      s += parameters.taps[j * blocks + b] * load_some(state + first * before + j, n, before);
    s += parameters.taps[before * blocks + b] * load_some(x + first, n);
    u[b] = s * sigmoid(s);
  }
  for (int64_t e = 0; e < step.dim && before > 0; ++e) {
    for (int64_t j = 0; j + 1 < before; ++j) next[e * before + j] = state[e * before + j + 1];
    next[e * before + before - 1] = x[e];
  }
}

// projected[r] = x_proj[r] . u for the step sizes, B and C; zeros up to a multiple of W.
void project(const Step& step, const vf* u, vf* projected) {
  const int64_t rows = step.rank + 2 * step.state;
  for (int64_t first = 0; first < rows; first += W) {
    vf sums[W] = {};
    for (int64_t i = 0; i < smaller(W, rows - first); ++i) {
      const float* row = step.x_proj + (first + i) * step.dim;
      for (int64_t e = 0; e < step.dim; e += W)
        sums[i] += load_some(row + e, step.dim - e) * u[e / W];
    }
    projected[first / W] = sum_each(sums);
  }
}

void scan(const Step& step, const Parameters& parameters, int64_t item, const vf* u_vectors,
          const float* projected, vf* dt_vectors, vf* B, vf* C) {
  const int64_t blocks = ceil_divide(step.dim, W), parts = ceil_divide(step.state, W);
  for (int64_t b = 0; b < blocks; ++b) {
    vf dt = parameters.dt_bias[b];
    for (int64_t r = 0; r < step.rank; ++r) dt += projected[r] * parameters.dt_proj[r * blocks + b];
    dt_vectors[b] = softplus(dt);
  }
  for (int64_t v = 0; v < parts; ++v) {
    B[v] = load_some(projected + step.rank + v * W, step.state - v * W);
    C[v] = load_some(projected + step.rank + step.state + v * W, step.state - v * W);
  }
  const float* dt = reinterpret_cast<const float*>(dt_vectors);
  const float* u = reinterpret_cast<const float*>(u_vectors);
  const float* z = step.xz + item * 2 * step.dim + step.dim;
  const float* state = step.ssm_state + item * step.dim * step.state;
  float* next = step.next_ssm_state + item * step.dim * step.state;
  float* y = step.y + item * step.dim;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * W, n = step.dim - first;
    vf outputs[W] = {};
    for (int64_t i = 0; i < smaller(W, n); ++i) {
      const int64_t e = first + i, at = e * step.state;
      for (int64_t v = 0; v < parts; ++v) {
        const int64_t left = step.state - v * W;
        const vf decay = exponential(parameters.A[e * parts + v] * dt[e]);
        const vf h = load_some(state + at + v * W, left) * decay + B[v] * (dt[e] * u[e]);
        store_some(next + at + v * W, h, left);
        outputs[i] += h * C[v];
      }
    }
    const vf gate = load_some(z + first, n);
    const vf out = sum_each(outputs) + parameters.D[b] * u_vectors[b];
    store_some(y + first, out * gate * sigmoid(gate), n);
  }
}

}  // namespace

EXPORT void mamba_inner_step(const Step* step) {
  const Parameters parameters(*step);
  const int64_t blocks = ceil_divide(step->dim, W), parts = ceil_divide(step->state, W);
  const int64_t projections = ceil_divide(step->rank + 2 * step->state, W);
  for_each_unit(step->parallel_for, step->threads, step->batch, [&](int64_t item) {
    Scratch& scratch = thread_scratch();
    scratch.release();
    vf* u = scratch.take(blocks);
    vf* dt = scratch.take(blocks);
    vf* projected = scratch.take(projections);
    vf* B = scratch.take(parts);
    vf* C = scratch.take(parts);
    convolve(*step, parameters, item, u);
    project(*step, u, projected);
    scan(*step, parameters, item, u, reinterpret_cast<const float*>(projected), dt, B, C);
  });
}
