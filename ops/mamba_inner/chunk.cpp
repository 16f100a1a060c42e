// The inner part of a mixer for a few frames, on a CPU: convolution, projections, scan, gate. One
// direction goes from a state through the frames; a second one, if there is one, through the same
// frames from the last to the first, from nothing. A unit of work is one item of the batch; nothing
// is summed across items.
//
// Letters as in arguments.py. Vectors run over channels, in the scan over its state.
#include "../simd.h"

struct Way {
  const float* conv_weight;  // (dim, taps), the last tap for the frame itself
  const float* conv_bias;    // (dim) or null
  const float* x_proj;       // (rank + 2 state, dim)
  const float* dt_proj;      // (dim, rank)
  const float* dt_bias;      // (dim)
  const float* A_log;        // (dim, state)
  const float* D;            // (dim)
};

struct Chunk {
  int64_t batch, frames, dim, state, rank, taps, directions;
  const float* xz;  // (batch, frames, 2 dim): input, gate
  Way ways[2];
  const float* conv_state;  // (batch, dim, taps - 1)
  const float* ssm_state;   // (batch, dim, state)
  float* y;                 // (batch, frames, dim)
  float* next_conv_state;
  float* next_ssm_state;
  int64_t threads;
  ParallelFor parallel_for;
};

namespace {

// The parameters in vectors of channels (A in vectors of states), padded with zeros.
struct Parameters {
  Parameters(const Chunk& chunk, const Way& way) {
    const int64_t blocks = ceil_divide(chunk.dim, W), parts = ceil_divide(chunk.state, W);
    taps.resize(chunk.taps * blocks);
    dt_proj.resize(chunk.rank * blocks);
    conv_bias.resize(blocks);
    dt_bias.resize(blocks);
    D.resize(blocks);
    A.resize(chunk.dim * parts);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * W, n = chunk.dim - first;
      for (int64_t j = 0; j < chunk.taps; ++j)
        taps[j * blocks + b] = load_some(way.conv_weight + first * chunk.taps + j, n, chunk.taps);
      for (int64_t r = 0; r < chunk.rank; ++r)
        dt_proj[r * blocks + b] = load_some(way.dt_proj + first * chunk.rank + r, n, chunk.rank);
      conv_bias[b] = way.conv_bias ? load_some(way.conv_bias + first, n) : vf{};
      dt_bias[b] = load_some(way.dt_bias + first, n);
      D[b] = load_some(way.D + first, n);
    }
    for (int64_t e = 0; e < chunk.dim; ++e)
      for (int64_t v = 0; v < parts; ++v)
        A[e * parts + v] =
            -exponential(load_some(way.A_log + e * chunk.state + v * W, chunk.state - v * W));
    const int64_t rows = chunk.rank + 2 * chunk.state;
    x_proj.resize(ceil_divide(rows, W) * chunk.dim);
    for (int64_t first = 0; first < rows; first += W)
      for (int64_t e = 0; e < chunk.dim; ++e)
        x_proj[first / W * chunk.dim + e] =
            load_some(way.x_proj + first * chunk.dim + e, rows - first, chunk.dim);
  }

  // x_proj in vectors of its outputs.
  std::vector<vf> taps, dt_proj, conv_bias, dt_bias, D, A, x_proj;
};

// What a unit computes in; u and projected for all frames.
struct Room {
  Room(const Chunk& chunk, Scratch& scratch) {
    const int64_t blocks = ceil_divide(chunk.dim, W), parts = ceil_divide(chunk.state, W);
    scratch.release();
    u = scratch.take(chunk.frames * blocks);
    projected = scratch.take(chunk.frames * ceil_divide(chunk.rank + 2 * chunk.state, W));
    dt = scratch.take(blocks);
    B = scratch.take(parts);
    C = scratch.take(parts);
    before = reinterpret_cast<float*>(scratch.take((chunk.taps - 1) * blocks));
    h = reinterpret_cast<float*>(scratch.take(ceil_divide(chunk.dim * chunk.state, W)));
    // Inputs of the convolution by age: those of frames, behind those before the first.
    inputs = reinterpret_cast<const float**>(
        scratch.take(ceil_divide((chunk.frames + chunk.taps - 1) * 2, W)));
  }

  vf *u, *dt, *projected, *B, *C;
  float *before, *h;
  const float** inputs;
};

void convolve(const Chunk& chunk, const Parameters& parameters, const float* const* inputs, vf* u) {
  const int64_t blocks = ceil_divide(chunk.dim, W);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * W, n = chunk.dim - first;
    vf s = parameters.conv_bias[b];
    for (int64_t j = 0; j < chunk.taps; ++j)
      s += parameters.taps[j * blocks + b] * load_some(inputs[j] + first, n);
    u[b] = s * sigmoid(s);
  }
}

// Step sizes, B and C of F frames from ``frame`` on; zeros up to a multiple of W.
template <int F>
void project(const Chunk& chunk, const Parameters& parameters, const Room& room, int64_t frame) {
  const int64_t blocks = ceil_divide(chunk.dim, W);
  const int64_t outputs = ceil_divide(chunk.rank + 2 * chunk.state, W);
  const float* u = reinterpret_cast<const float*>(room.u + frame * blocks);
  for (int64_t o = 0; o < outputs; ++o) {
    vf sums[F] = {};
    const vf* weights = parameters.x_proj.data() + o * chunk.dim;
    for (int64_t e = 0; e < chunk.dim; ++e)
      for (int f = 0; f < F; ++f) sums[f] += weights[e] * u[f * blocks * W + e];
    for (int f = 0; f < F; ++f) room.projected[(frame + f) * outputs + o] = sums[f];
  }
}

// A frame of the scan, whose state goes from h to next: y = (y + output, gated) * share.
void scan(const Chunk& chunk, const Parameters& parameters, const Room& room, int64_t frame,
          const float* h_before, float* h_after, const float* z, float* y, bool adds, float share) {
  const int64_t blocks = ceil_divide(chunk.dim, W), parts = ceil_divide(chunk.state, W);
  const int64_t outputs = ceil_divide(chunk.rank + 2 * chunk.state, W);
  const vf* u_vectors = room.u + frame * blocks;
  const float* projected = reinterpret_cast<const float*>(room.projected + frame * outputs);
  for (int64_t b = 0; b < blocks; ++b) {
    vf dt = parameters.dt_bias[b];
    for (int64_t r = 0; r < chunk.rank; ++r)
      dt += projected[r] * parameters.dt_proj[r * blocks + b];
    room.dt[b] = softplus(dt);
  }
  for (int64_t v = 0; v < parts; ++v) {
    room.B[v] = load_some(projected + chunk.rank + v * W, chunk.state - v * W);
    room.C[v] = load_some(projected + chunk.rank + chunk.state + v * W, chunk.state - v * W);
  }
  const float* dt = reinterpret_cast<const float*>(room.dt);
  const float* u = reinterpret_cast<const float*>(u_vectors);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * W, n = chunk.dim - first;
    vf products[W] = {};
    if (chunk.state == W && n >= W) {
      // The usual size, in registers alone.
      const vf B = room.B[0], C = room.C[0], input = room.dt[b] * u_vectors[b];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const int64_t at = (first + i) * W;
        const vf decay = exponential(parameters.A[first + i] * dt[first + i]);
        const vf h = load(h_before + at) * decay + B * input[i];
        store(h_after + at, h);
        products[i] = h * C;
      }
    } else {
      for (int64_t i = 0; i < smaller(W, n); ++i) {
        const int64_t e = first + i, at = e * chunk.state;
        for (int64_t v = 0; v < parts; ++v) {
          const int64_t left = chunk.state - v * W;
          const vf decay = exponential(parameters.A[e * parts + v] * dt[e]);
          const vf h = load_some(h_before + at + v * W, left) * decay + room.B[v] * (dt[e] * u[e]);
          store_some(h_after + at + v * W, h, left);
          products[i] += h * room.C[v];
        }
      }
    }
    const vf gate = load_some(z + first, n);
    const vf out = (sum_each(products) + parameters.D[b] * u_vectors[b]) * gate * sigmoid(gate) * share;
    store_some(y + first, adds ? out + load_some(y + first, n) : out, n);
  }
}

// One direction over all frames of an item; the second one, which adds, starts from nothing.
void run(const Chunk& chunk, const Parameters& parameters, const Room& room, int64_t item,
         bool second) {
  const int64_t dim = chunk.dim, frames = chunk.frames, before = chunk.taps - 1;
  const int64_t row = round_up(dim, W), blocks = row / W;
  const float* xz = chunk.xz + item * frames * 2 * dim;
  const float* state = chunk.conv_state + item * dim * before;
  const auto place = [&](int64_t t) { return second ? frames - 1 - t : t; };
  for (int64_t j = 0; j < before; ++j) {
    for (int64_t e = 0; e < dim; ++e)
      room.before[j * row + e] = second ? 0.0f : state[e * before + j];
    room.inputs[j] = room.before + j * row;
  }
  for (int64_t t = 0; t < frames; ++t) room.inputs[before + t] = xz + place(t) * 2 * dim;
  for (int64_t t = 0; t < frames; ++t)
    convolve(chunk, parameters, room.inputs + t, room.u + t * blocks);
  int64_t t = 0;
  for (; t + 8 <= frames; t += 8) project<8>(chunk, parameters, room, t);
  for (; t + 4 <= frames; t += 4) project<4>(chunk, parameters, room, t);
  for (; t < frames; ++t) project<1>(chunk, parameters, room, t);
  const float* h = chunk.ssm_state + item * dim * chunk.state;
  float* next = chunk.next_ssm_state + item * dim * chunk.state;
  if (second) {
    for (int64_t i = 0; i < dim * chunk.state; ++i) room.h[i] = 0.0f;
    h = next = room.h;
  }
  for (t = 0; t < frames; ++t) {
    const float* z = xz + place(t) * 2 * dim + dim;
    float* y = chunk.y + (item * frames + place(t)) * dim;
    scan(chunk, parameters, room, t, h, next, z, y, second, 1.0f / chunk.directions);
    h = next;
  }
  if (second) return;
  float* next_conv = chunk.next_conv_state + item * dim * before;
  for (int64_t j = 0; j < before; ++j)
    for (int64_t e = 0; e < dim; ++e) next_conv[e * before + j] = room.inputs[frames + j][e];
}

}  // namespace

EXPORT void mamba_inner_chunk(const Chunk* chunk) {
  std::vector<Parameters> parameters;
  for (int64_t i = 0; i < chunk->directions; ++i) parameters.emplace_back(*chunk, chunk->ways[i]);
  for_each_unit(chunk->parallel_for, chunk->threads, chunk->batch, [&](int64_t item) {
    const Room room(*chunk, thread_scratch());
    for (int64_t i = 0; i < chunk->directions; ++i)
      run(*chunk, parameters[i], room, item, i == 1);
  });
}
