// The inner part of a mixer for a few frames, on a CPU: convolution, projections, scan, gate. One
// direction goes from a state through the frames; a second one, if there is one, through the same
// frames from the last to the first, from nothing. A unit of work is one item of the batch; nothing
// is summed across items.
//
// Letters as in arguments.py. Vectors run over channels.
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
  // The next states are those after ``kept`` frames.
  int64_t batch, frames, kept, dim, state, rank, taps, directions;
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

// State of a block of channels, (channel, state) in memory and here a vector of channels for each
// state. ``h`` is scratch after a store.
void load_state(const float* from, int64_t channels, int64_t states, vf* h) {
  if (channels < W || states % W) {
    for (int64_t s = 0; s < states; ++s) h[s] = load_some(from + s, channels, states);
    return;
  }
  for (int64_t first = 0; first < states; first += W) {
    for (int i = 0; i < W; ++i) h[first + i] = load(from + i * states + first);
    transpose(h + first);
  }
}

void store_state(float* to, int64_t channels, int64_t states, vf* h) {
  if (channels < W || states % W) {
    for (int64_t s = 0; s < states; ++s)
      for (int64_t i = 0; i < smaller(channels, W); ++i) to[i * states + s] = h[s][i];
    return;
  }
  for (int64_t first = 0; first < states; first += W) {
    transpose(h + first);
    for (int i = 0; i < W; ++i) store(to + i * states + first, h[first + i]);
  }
}

// The parameters in vectors of channels, padded with zeros; A for exponentials to base 2.
struct Parameters {
  Parameters(const Chunk& chunk, const Way& way) {
    const int64_t blocks = ceil_divide(chunk.dim, W);
    taps.resize(chunk.taps * blocks);
    dt_proj.resize(chunk.rank * blocks);
    conv_bias.resize(blocks);
    dt_bias.resize(blocks);
    D.resize(blocks);
    A.resize(chunk.state * blocks);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * W, n = chunk.dim - first;
      for (int64_t j = 0; j < chunk.taps; ++j)
        taps[j * blocks + b] = load_some(way.conv_weight + first * chunk.taps + j, n, chunk.taps);
      for (int64_t r = 0; r < chunk.rank; ++r)
        dt_proj[r * blocks + b] = load_some(way.dt_proj + first * chunk.rank + r, n, chunk.rank);
      conv_bias[b] = way.conv_bias ? load_some(way.conv_bias + first, n) : vf{};
      dt_bias[b] = load_some(way.dt_bias + first, n);
      D[b] = load_some(way.D + first, n);
      vf* A_b = A.data() + b * chunk.state;
      load_state(way.A_log + first * chunk.state, n, chunk.state, A_b);
      for (int64_t s = 0; s < chunk.state; ++s) A_b[s] = exponential(A_b[s]) * -1.44269504f;
    }
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
    const int64_t blocks = ceil_divide(chunk.dim, W);
    scratch.release();
    u = scratch.take(chunk.frames * blocks);
    projected = scratch.take(chunk.frames * ceil_divide(chunk.rank + 2 * chunk.state, W));
    before = reinterpret_cast<float*>(scratch.take((chunk.taps - 1) * blocks));
    h = scratch.take(chunk.state);
    kept = scratch.take(chunk.state);
    // Inputs of the convolution by age: those of frames, behind those before the first.
    inputs = reinterpret_cast<const float**>(
        scratch.take(ceil_divide((chunk.frames + chunk.taps - 1) * 2, W)));
  }

  vf *u, *projected, *h, *kept;
  float* before;
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

// The scan of a block of channels over all frames, backwards from nothing if it is the second
// direction, whose output is added. With N, the usual size, the state stays in registers.
template <int N>
void scan(const Chunk& chunk, const Parameters& parameters, const Room& room, int64_t item, int64_t b,
          bool second) {
  const int64_t blocks = ceil_divide(chunk.dim, W), first = b * W, n = chunk.dim - first;
  const int64_t outputs = ceil_divide(chunk.rank + 2 * chunk.state, W), states = N ? N : chunk.state;
  const float share = 1.0f / chunk.directions;
  const vf* A = parameters.A.data() + b * states;
  const int64_t state = (item * chunk.dim + first) * states;
  vf registers[N ? N : 1];
  vf* h = N ? registers : room.h;
  for (int64_t s = 0; s < states; ++s) h[s] = vf{};
  if (!second) load_state(chunk.ssm_state + state, n, states, h);
  for (int64_t t = 0; t < chunk.frames; ++t) {
    const float* projected = reinterpret_cast<const float*>(room.projected + t * outputs);
    const float *B = projected + chunk.rank, *C = B + states;
    const vf u = room.u[t * blocks + b];
    vf dt = parameters.dt_bias[b];
    for (int64_t r = 0; r < chunk.rank; ++r) dt += projected[r] * parameters.dt_proj[r * blocks + b];
    dt = softplus(dt);
    const vf input = dt * u;
    // Several sums, none of which waits for the one before.
    vf sums[4] = {parameters.D[b] * u};
#pragma GCC unroll 16
    for (int64_t s = 0; s < states; ++s) {
      h[s] = h[s] * exp2_of_product(A[s], dt) + input * B[s];
      sums[s % 4] += h[s] * C[s];
    }
    const int64_t at = item * chunk.frames + (second ? chunk.frames - 1 - t : t);
    const vf gate = load_some(chunk.xz + (2 * at + 1) * chunk.dim + first, n);
    const vf out = (sums[0] + sums[1] + (sums[2] + sums[3])) * gate * sigmoid(gate) * share;
    float* y = chunk.y + at * chunk.dim + first;
    store_some(y, second ? out + load_some(y, n) : out, n);
    if (!second && t + 1 == chunk.kept) {
      std::copy_n(h, states, room.kept);
      store_state(chunk.next_ssm_state + state, n, states, room.kept);
    }
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
  for (int64_t b = 0; b < blocks; ++b)
    if (chunk.state == 16)
      scan<16>(chunk, parameters, room, item, b, second);
    else
      scan<0>(chunk, parameters, room, item, b, second);
  if (second) return;
  float* next_conv = chunk.next_conv_state + item * dim * before;
  for (int64_t j = 0; j < before; ++j)
    for (int64_t e = 0; e < dim; ++e) next_conv[e * before + j] = room.inputs[chunk.kept + j][e];
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
