// The selective scan and its gradient on a CPU.
//
// A vector holds W neighbouring channels. Time is worked through in tiles of kFrames frames, which
// are read once from memory of any layout into float32 scratch that stays in the cache; within a
// tile, four states of one block of channels at a time run over the frames with everything that
// recurs in registers. The forward pass leaves the state that enters each tile as a checkpoint, from
// which the backward pass recomputes one tile at a time.
//
// A unit of work is one batch item and some of the channels of one group. Sums over channels (dB, dC)
// and over the batch (dA, dD, ...) are left as one part per unit and added by the caller in a fixed
// order, so that the result does not depend on which thread did what.
#include "../simd.h"

namespace {
// Checkpoints at this distance are what a bidirectional mixer can afford to keep (below 8 times its
// input in all); at 64 a tile crowds the first-level cache.
constexpr int kFrames = 56;
// States that run together: independent recurrences hide each other's latency.
constexpr int kStates = 4;
// Of something long, all units scan so many tiles before one goes on: B, C and the tables of pages
// that the units share stay in the second-level cache.
constexpr int64_t kLongTiles = 32;
}  // namespace

// One direction of a scan. Members named d... are gradients. "padded" is rounded up to whole
// vectors: the states to kStates, the channels of each group to W.
struct Direction {
  Tensor u, delta, B, C;
  const float* A;              // (dim, state)
  const float* D;              // (dim) or null
  const float* delta_bias;     // (dim) or null
  const float* initial_state;  // (batch, dim, state) or null
  float* last_state;           // (batch, dim, state)
  float* checkpoints;          // (batch, tiles, padded state, padded dim) or null
  int64_t reverse;
  int64_t reset_every;  // 0: never
  Tensor du, ddelta, dB, dC;
  const float* dlast_state;  // (batch, dim, state) or null
  float* dinitial_state;     // (batch, dim, state) or null
  float* dA;                 // (batch, padded state, padded dim)
  float* dB_constant;        // the same, or null where B varies
  float* dC_constant;
  float* dD;           // (batch, padded dim)
  float* ddelta_bias;  // (batch, padded dim)
};

struct Scan {
  int64_t batch, dim, state, frames, groups;
  int64_t B_varies, C_varies, softplus;
  const int64_t* lengths;  // (batch) or null
  Tensor z, out, dout, dz;
  int64_t directions;  // with 2, out is the mean of both
  int64_t channels_per_unit;
  int64_t threads;
  ParallelFor parallel_for;
  Direction direction[2];
};

namespace {

// Frames of a tile without a reset between them, in scan order.
struct Segment {
  int first, rows;
  bool resets;  // the state is zero where it begins
};

struct Segments {
  Segment list[kFrames];
  int count = 0;
  int step;  // +1, or -1 where the scan runs against time

  Segments(int64_t reset_every, bool reverse, int64_t length, const Span& tile)
      : step(reverse ? -1 : 1) {
    for (int k = 0; k < tile.frames; ++k) {
      const int row = reverse ? tile.frames - 1 - k : k;
      const int64_t frame = tile.frame + row;
      const int64_t scanned_before = reverse ? length - 1 - frame : frame;
      const int64_t boundary = reverse ? frame + 1 : frame;
      const bool resets = reset_every && scanned_before && boundary % reset_every == 0;
      if (k == 0 || resets) list[count++] = {row, 0, resets};
      list[count - 1].rows++;
    }
  }
};

// B or C for the states that run together: a scalar per frame, or a vector that stays.
template <bool Varies>
struct Projection {
  const float* rows;
  INLINE vf at(int row, int j) const { return splat(rows[row * W + j]); }
};

template <>
struct Projection<false> {
  const vf* constant;
  INLINE vf at(int, int j) const { return constant[j]; }
};

// What one block of channels has for each frame of a tile.
struct Block {
  vf *dt, *x;    // step size, step size times input
  vf* y;             // output before the gate
  const vf* dy;      // its gradient
  vf *dx, *dlog;     // gradients of x, and of log2(decay) times A log2(e), summed over states
};

// Rows that are fetched while the states are computed: a row of one block is a line or two in a page
// of its own, which no hardware prefetcher foresees. They go to the second-level cache: rows that lie
// a power of two apart would fall on a few sets of the first.
struct Ahead {
  const char* rows[4];
  int64_t stride[4];  // bytes
  int count = 0;

  INLINE void fetch(int row) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(rows[i] + row * stride[i], 0, 2);
  }
};

// What the states that run together carry and share.
struct States {
  const vf* A;  // times log2(e)
  vf* h;
  vf *dh, *dA, *dB_constant, *dC_constant;
  vf *decay, *after;  // scratch: [frame][kStates]
  vf* dBC;            // sums over channels: [frame][dB of kStates, dC of kStates]
};

template <bool BV, bool CV>
void scan_states(const Segments& segments, const Block& block, Projection<BV> B, Projection<CV> C,
                 const States& states, const Ahead& ahead) {
  vf h[kStates], A[kStates];
  for (int j = 0; j < kStates; ++j) h[j] = states.h[j], A[j] = states.A[j];
  for (int s = 0; s < segments.count; ++s) {
    const Segment& segment = segments.list[s];
    if (segment.resets)
      for (int j = 0; j < kStates; ++j) h[j] = vf{};
    for (int k = 0, t = segment.first; k < segment.rows; ++k, t += segments.step) {
      ahead.fetch(t);
      const vf dt = block.dt[t], x = block.x[t];
      vf y = block.y[t];
      for (int j = 0; j < kStates; ++j) {
        h[j] = exp2_of_product(dt, A[j]) * h[j] + x * B.at(t, j);
        y += h[j] * C.at(t, j);
      }
      block.y[t] = y;
    }
  }
  for (int j = 0; j < kStates; ++j) states.h[j] = h[j];
}

// Adds to y, dx, dlog, dA and the sums over channels, and turns dh from the gradient of the state
// that leaves the tile into that of the state that enters it.
template <bool BV, bool CV>
void scan_states_backward(const Segments& segments, const Block& block, Projection<BV> B,
                          Projection<CV> C, const States& states) {
  vf g[kStates], A[kStates], dA[kStates], dB[kStates] = {}, dC[kStates] = {};
  for (int j = 0; j < kStates; ++j) g[j] = states.dh[j], A[j] = states.A[j], dA[j] = states.dA[j];
  for (int s = segments.count - 1; s >= 0; --s) {
    const Segment& segment = segments.list[s];
    vf entering[kStates], h[kStates];
    for (int j = 0; j < kStates; ++j) h[j] = entering[j] = segment.resets ? vf{} : states.h[j];
    for (int k = 0, t = segment.first; k < segment.rows; ++k, t += segments.step) {
      const vf dt = block.dt[t], x = block.x[t];
      vf y = block.y[t];
      for (int j = 0; j < kStates; ++j) {
        const vf a = exp2_of_product(dt, A[j]);
        h[j] = a * h[j] + x * B.at(t, j);
        y += h[j] * C.at(t, j);
        states.decay[t * kStates + j] = a;
        states.after[t * kStates + j] = h[j];
      }
      block.y[t] = y;
    }
    for (int k = segment.rows - 1; k >= 0; --k) {
      const int t = segment.first + k * segments.step;
      const vf dt = block.dt[t], x = block.x[t], dy = block.dy[t];
      vf dx = block.dx[t], dlog = block.dlog[t];
      const vf* before = k ? states.after + (t - segments.step) * kStates : entering;
      vf* dBC = states.dBC + t * 2 * kStates;
      for (int j = 0; j < kStates; ++j) {
        g[j] += C.at(t, j) * dy;
        (BV ? dBC[j] : dB[j]) += g[j] * x;
        (CV ? dBC[kStates + j] : dC[j]) += h[j] * dy;
        dx += g[j] * B.at(t, j);
        g[j] *= states.decay[t * kStates + j];
        h[j] = before[j];
        const vf w = g[j] * h[j];
        dlog += w * A[j];
        dA[j] += w * dt;
      }
      block.dx[t] = dx;
      block.dlog[t] = dlog;
    }
    if (segment.resets)
      for (int j = 0; j < kStates; ++j) g[j] = vf{};
  }
  for (int j = 0; j < kStates; ++j) {
    states.dh[j] = g[j];
    states.dA[j] = dA[j];
    if (!BV) states.dB_constant[j] += dB[j];
    if (!CV) states.dC_constant[j] += dC[j];
  }
}

// One batch item and some channels of one group.
class Unit {
 public:
  static int64_t num_tiles(int64_t frames) { return ceil_divide(frames, kFrames); }

  Unit(const Scan& scan, int64_t index) : scan_(scan), way_(nullptr) {
    const int64_t group_dim = scan.dim / scan.groups;
    const int64_t parts = ceil_divide(group_dim, scan.channels_per_unit);
    const int64_t first = index % parts * scan.channels_per_unit;
    at_.part = index % parts;
    at_.group = index / parts % scan.groups;
    at_.batch = index / parts / scan.groups;
    at_.channel = at_.group * group_dim + first;
    at_.channels = smaller(scan.channels_per_unit, group_dim - first);
    blocks_ = at_.blocks();
    states_ = int(round_up(scan.state, kStates));
    padded_channel_ = at_.group * round_up(group_dim, W) + first;
    padded_dim_ = scan.groups * round_up(group_dim, W);
    length_ = scan.lengths ? scan.lengths[at_.batch] : scan.frames;
    tile_ = size_t(blocks_) * kFrames;
    projection_tile_ = size_t(ceil_divide(states_, W)) * kFrames;
    block_states_ = size_t(blocks_) * states_;
  }

  void forward() {
    for (int64_t i = 0; i < scan_.directions; ++i) forward(i, 0, num_tiles(scan_.frames));
  }

  // The tiles from .. to of one direction, in scan order; a later call goes on from last_state.
  void forward(int64_t direction, int64_t from, int64_t to) {
    way_ = &scan_.direction[direction];
    take_common(thread_scratch());
    load_states(from ? way_->last_state : way_->initial_state, at_.batch, h_);
    const int64_t valid_to = smaller(to, num_tiles(length_));
    for (int64_t tile = from; tile < valid_to; ++tile) forward_tile(tile, direction > 0);
    store_states(h_, way_->last_state);
    if (to < num_tiles(scan_.frames)) return;
    // Nothing that a caller can look at is left uninitialised.
    std::fill(h_, h_ + block_states_, vf{});
    for (int64_t tile = num_tiles(length_); tile < to; ++tile) save_checkpoint(tile);
    if (direction + 1 == scan_.directions) zero_padding(scan_.out, at_, z_);
  }

  void backward() {
    for (int64_t i = 0; i < scan_.directions; ++i) {
      way_ = &scan_.direction[i];
      Scratch& scratch = thread_scratch();
      take_common(scratch);
      take_backward(scratch);
      load_states(way_->dlast_state, at_.batch, dh_);
      for (int64_t tile = num_tiles(length_) - 1; tile >= 0; --tile) backward_tile(tile, i > 0);
      store_states(dh_, way_->dinitial_state);
      store_state_parts(dA_, way_->dA);
      store_state_parts(dB_constant_, way_->dB_constant);
      store_state_parts(dC_constant_, way_->dC_constant);
      store_channel_parts(dD_, way_->dD);
      store_channel_parts(ddelta_bias_, way_->ddelta_bias);
      zero_padding(way_->du, at_, z_);
      zero_padding(way_->ddelta, at_, z_);
      zero_padding(way_->dB, projection_span(), B_);
      zero_padding(way_->dC, projection_span(), C_);
    }
    zero_padding(scan_.dz, at_, z_);
  }

 private:
  void take_common(Scratch& scratch) {
    scratch.release();
    for (vf** p : {&u_, &dt_, &x_, &y_, &z_}) *p = scratch.take(tile_);
    for (vf** p : {&B_, &C_}) *p = scratch.take(projection_tile_);
    for (vf** p : {&A_, &h_, &B_constant_, &C_constant_}) *p = scratch.take(block_states_);
    for (vf** p : {&D_, &bias_}) *p = scratch.take(blocks_);
    for (int b = 0; b < blocks_; ++b) {
      D_[b] = load_channels(way_->D, 1, at_, b);
      bias_[b] = load_channels(way_->delta_bias, 1, at_, b);
    }
    load_states(way_->A, 0, A_);
    for (size_t i = 0; i < block_states_; ++i) A_[i] *= 1.44269504f;
    if (!scan_.B_varies) load_states(static_cast<float*>(way_->B.data), 0, B_constant_);
    if (!scan_.C_varies) load_states(static_cast<float*>(way_->C.data), 0, C_constant_);
  }

  void take_backward(Scratch& scratch) {
    for (vf** p : {&dy_, &dgate_, &dx_, &dlog_, &slope_}) *p = scratch.take(tile_);
    for (vf** p : {&dB_, &dC_}) *p = scratch.take(projection_tile_);
    dh_ = scratch.take(block_states_);
    for (vf** p : {&dA_, &dB_constant_, &dC_constant_}) *p = scratch.take_zeros(block_states_);
    for (vf** p : {&dD_, &ddelta_bias_}) *p = scratch.take_zeros(blocks_);
    for (vf** p : {&decay_, &after_}) *p = scratch.take(kStates * kFrames);
    // sum_channels takes W vectors at a time and may look beyond the last frame.
    dBC_ = scratch.take_zeros(2 * kStates * kFrames + W);
  }

  // Reads and writes memory directly where its rows allow it; then one block's scratch serves them
  // all and stays in the first-level cache, and the gate waits for the sum over both directions.
  void forward_tile(int64_t tile, bool add) {
    place(tile);
    save_checkpoint(tile);
    read_projections();
    read_without_rows(way_->u, u_);
    read_without_rows(way_->delta, dt_);
    read_without_rows(scan_.z, z_);
    const Segments segments(way_->reset_every, way_->reverse, length_, at_);
    const bool direct = has_rows(scan_.out, at_);
    const bool last = !direct || way_ == &scan_.direction[scan_.directions - 1];
    for (int b = 0; b < blocks_; ++b) {
      Block first = block(0);
      vf* y = first.y = block(direct ? 0 : b).y;
      prepare(b, block_rows(way_->u, at_, u_, b), block_rows(way_->delta, at_, dt_, b), first);
      for (int n = 0; n < states_; n += kStates)
        with_projections(b, n, [&](auto B, auto C) {
          scan_states(segments, first, B, C, states(b, n), ahead(tile, b, n / kStates));
        });
      const Rows z = block_rows(scan_.z, at_, z_, b), out = block_rows(scan_.out, at_, y_, b);
      for (int t = 0; direct && add && t < at_.frames; ++t) y[t] += out[t];
      for (int t = 0; scan_.z && last && t < at_.frames; ++t) y[t] *= z[t] * sigmoid(z[t]);
      const float factor = last ? share() : 1.0f;
      for (int t = 0; direct && t < at_.frames; ++t) out.set(t, y[t] * factor);
    }
    if (!direct) write_shared(scan_.out, y_, share(), add);
  }

  void backward_tile(int64_t tile, bool add) {
    place(tile);
    load_checkpoint(tile);
    read_projections();
    read_tile(way_->u, at_, u_);
    read_tile(way_->delta, at_, dt_);
    if (scan_.z) read_tile(scan_.z, at_, z_);
    read_tile(scan_.dout, at_, dy_);
    if (scan_.z) {
      for (int v = 0; v < at_.vectors(); ++v) {
        const vf s = sigmoid(z_[v]);
        dgate_[v] = dy_[v] * s * (1.f + z_[v] * (1.f - s));
        dy_[v] *= z_[v] * s;
      }
    }
    for (int v = 0; v < at_.vectors(); ++v) {
      dy_[v] *= share();
      dx_[v] = dlog_[v] = vf{};
    }
    for (int b = 0; b < blocks_; ++b) {
      float* u = reinterpret_cast<float*>(u_ + b * at_.frames);
      float* delta = reinterpret_cast<float*>(dt_ + b * at_.frames);
      prepare(b, {u, W}, {delta, W}, block(b));
    }
    const Segments segments(way_->reset_every, way_->reverse, length_, at_);
    for (int n = 0; n < states_; n += kStates) {
      for (int v = 0; v < 2 * kStates * at_.frames; ++v) dBC_[v] = vf{};
      for (int b = 0; b < blocks_; ++b)
        with_projections(b, n, [&](auto B, auto C) {
          scan_states_backward(segments, block(b), B, C, states(b, n));
        });
      if (scan_.B_varies || scan_.C_varies) sum_channels(n);
    }
    if (scan_.z) {
      for (int v = 0; v < at_.vectors(); ++v) y_[v] *= dgate_[v];
      write_shared(scan_.dz, y_, share(), add);
    }
    write_input_gradients();
    if (scan_.B_varies) write_tile(way_->dB, projection_span(), dB_);
    if (scan_.C_varies) write_tile(way_->dC, projection_span(), dC_);
  }

  // Moves to the tile-th tile in scan order.
  void place(int64_t tile) { at_ = span_of(tile); }

  Span span_of(int64_t tile) const {
    const int64_t begin = tile * kFrames, end = smaller(begin + kFrames, length_);
    Span span = at_;
    span.frame = way_->reverse ? length_ - end : begin;
    span.frames = int(end - begin);
    return span;
  }

  // For one block of channels the inputs of the next tile, and where this tile's output goes; the
  // groups of states share them out.
  Ahead ahead(int64_t tile, int b, int group) const {
    const Tensor* tensors[] = {&way_->u, &way_->delta, &scan_.z, &scan_.out};
    Ahead ahead;
    for (int i = group; i < 4; i += states_ / kStates) {
      const Tensor& x = *tensors[i];
      const bool output = &x == &scan_.out;
      if (!x || x.channel != 1 || (!output && tile + 1 >= num_tiles(length_))) continue;
      Span span = span_of(output ? tile : tile + 1);
      span.channel += b * W;
      const int64_t size = x.type == kFloat32 ? 4 : 2;
      ahead.rows[ahead.count] = static_cast<const char*>(x.data) + offset(x, span) * size;
      ahead.stride[ahead.count++] = x.frame * size;
    }
    return ahead;
  }

  void read_without_rows(const Tensor& x, vf* tile) {
    if (x && !has_rows(x, at_)) read_tile(x, at_, tile);
  }

  void read_projections() {
    if (scan_.B_varies) read_tile(way_->B, projection_span(), B_);
    if (scan_.C_varies) read_tile(way_->C, projection_span(), C_);
  }

  // Step sizes with their slope, inputs of the states, and what the direct path puts out.
  void prepare(int b, const Rows& u_rows, const Rows& delta_rows, const Block& to) const {
    const vf D = D_[b], bias = bias_[b];
    for (int t = 0; t < at_.frames; ++t) {
      const vf raw = delta_rows[t] + bias, u = u_rows[t];
      const vf dt = scan_.softplus ? softplus(raw) : raw;
      if (slope_) slope_[b * at_.frames + t] = scan_.softplus ? sigmoid(raw) : splat(1.f);
      to.dt[t] = dt;
      to.x[t] = dt * u;
      to.y[t] = D * u;
    }
  }

  // Overwrites dx, dlog and u.
  void write_input_gradients() {
    for (int b = 0; b < blocks_; ++b) {
      const vf D = D_[b];
      vf dD = dD_[b], dbias = ddelta_bias_[b];
      for (int v = b * at_.frames; v < (b + 1) * at_.frames; ++v) {
        dlog_[v] = (dx_[v] * u_[v] + dlog_[v] * 0.693147181f) * slope_[v];
        dx_[v] = dx_[v] * dt_[v] + D * dy_[v];
        dD += dy_[v] * u_[v];
        dbias += dlog_[v];
      }
      dD_[b] = dD;
      ddelta_bias_[b] = dbias;
    }
    write_tile(way_->du, at_, dx_);
    write_tile(way_->ddelta, at_, dlog_);
  }

  // Sums over the lanes of dBC into the states n .. n + kStates of the tiles dB and dC.
  void sum_channels(int n) {
    const int count = 2 * kStates * at_.frames;
    for (int base = 0; base < count; base += W) {
      float sums[W];
      store(sums, sum_each(dBC_ + base));
      for (int i = 0; i < W && base + i < count; i += kStates) {
        const int t = (base + i) / (2 * kStates);
        vf* tile = (base + i) % (2 * kStates) ? dC_ : dB_;
        float* row = reinterpret_cast<float*>(tile + n / W * at_.frames + t) + n % W;
        for (int j = 0; j < kStates; ++j) row[j] = sums[i + j];
      }
    }
  }

  // What one direction contributes to a tensor that both write.
  void write_shared(const Tensor& to, vf* tile, float factor, bool add) {
    for (int v = 0; factor != 1.f && v < at_.vectors(); ++v) tile[v] *= factor;
    if (add) {
      read_tile(to, at_, z_);
      for (int v = 0; v < at_.vectors(); ++v) tile[v] += z_[v];
    }
    write_tile(to, at_, tile);
  }

  float share() const { return scan_.directions == 2 ? 0.5f : 1.f; }

  template <class Body>
  void with_projections(int b, int n, const Body& body) const {
    const Projection<true> B{rows(B_, n)}, C{rows(C_, n)};
    const Projection<false> Bc{B_constant_ + b * states_ + n}, Cc{C_constant_ + b * states_ + n};
    if (scan_.B_varies)
      scan_.C_varies ? body(B, C) : body(B, Cc);
    else
      scan_.C_varies ? body(Bc, C) : body(Bc, Cc);
  }

  const float* rows(const vf* projection, int n) const {
    return reinterpret_cast<const float*>(projection + n / W * at_.frames) + n % W;
  }

  Block block(int b) const {
    const int v = b * at_.frames;
    return {dt_ + v, x_ + v, y_ + v, dy_ + v, dx_ + v, dlog_ + v};
  }

  States states(int b, int n) const {
    const int i = b * states_ + n;
    return {A_ + i,           h_ + i, dh_ + i, dA_ + i, dB_constant_ + i,
            dC_constant_ + i, decay_, after_,  dBC_};
  }

  Span projection_span() const {
    Span span = at_;
    span.channel = 0;
    span.channels = scan_.state;
    return span;
  }

  void zero_padding(const Tensor& x, const Span& at, vf* tile) const {
    if (x) write_zeros(x, at, length_, scan_.frames, kFrames, tile);
  }

  // (item, dim, state), zeros for null, to [block][state]; lanes and states that are not there
  // become 0, which keeps their state and every gradient 0.
  void load_states(const float* from, int64_t item, vf* to) const {
    for (int b = 0; b < blocks_; ++b)
      for (int n = 0; n < states_; ++n)
        to[b * states_ + n] =
            from && n < scan_.state
                ? load_channels(from + item * scan_.dim * scan_.state + n, scan_.state, at_, b)
                : vf{};
  }

  void store_states(const vf* from, float* to) const {
    if (to) to += at_.batch * scan_.dim * scan_.state;
    for (int b = 0; to && b < blocks_; ++b)
      for (int n = 0; n < scan_.state; ++n)
        store_channels(to + n, scan_.state, at_, b, from[b * states_ + n]);
  }

  float* checkpoint(int64_t tile, int n) const {
    const int64_t row = (at_.batch * num_tiles(scan_.frames) + tile) * states_ + n;
    return way_->checkpoints + row * padded_dim_ + padded_channel_;
  }

  void save_checkpoint(int64_t tile) const {
    for (int n = 0; way_->checkpoints && n < states_; ++n)
      for (int b = 0; b < blocks_; ++b) store(checkpoint(tile, n) + b * W, h_[b * states_ + n]);
  }

  void load_checkpoint(int64_t tile) {
    for (int n = 0; n < states_; ++n)
      for (int b = 0; b < blocks_; ++b) h_[b * states_ + n] = load(checkpoint(tile, n) + b * W);
  }

  void store_state_parts(const vf* from, float* to) const {
    for (int n = 0; to && n < states_; ++n)
      for (int b = 0; b < blocks_; ++b)
        store(to + (at_.batch * states_ + n) * padded_dim_ + padded_channel_ + b * W,
              from[b * states_ + n]);
  }

  void store_channel_parts(const vf* from, float* to) const {
    for (int b = 0; to && b < blocks_; ++b)
      store(to + at_.batch * padded_dim_ + padded_channel_ + b * W, from[b]);
  }

  const Scan& scan_;
  const Direction* way_;
  Span at_;
  int blocks_, states_;
  int64_t padded_channel_, padded_dim_, length_;
  size_t tile_, projection_tile_, block_states_;
  // Tiles of channels, tiles of states, [block][state], [block].
  vf *u_, *dt_, *x_, *y_, *z_;
  vf *dy_ = nullptr, *dgate_ = nullptr, *dx_ = nullptr, *dlog_ = nullptr, *slope_ = nullptr;
  vf *B_, *C_, *dB_ = nullptr, *dC_ = nullptr;
  vf *A_, *h_, *B_constant_, *C_constant_, *D_, *bias_;
  vf *dh_ = nullptr, *dA_ = nullptr, *dB_constant_ = nullptr, *dC_constant_ = nullptr;
  vf *dD_ = nullptr, *ddelta_bias_ = nullptr;
  vf *decay_ = nullptr, *after_ = nullptr, *dBC_ = nullptr;
};

int64_t num_units(const Scan& scan) {
  return scan.batch * scan.groups * ceil_divide(scan.dim / scan.groups, scan.channels_per_unit);
}

}  // namespace

// Frames between two checkpoints, and the widths that paddings round up to.
EXPORT void selective_scan_layout(int64_t* frames, int64_t* channels, int64_t* states) {
  *frames = kFrames;
  *channels = W;
  *states = kStates;
}

EXPORT void selective_scan_forward(const Scan* scan) {
  const int64_t tiles = Unit::num_tiles(scan->frames);
  const auto run = [=](const auto& body) {
    for_each_unit(scan->parallel_for, scan->threads, num_units(*scan), body);
  };
  if (tiles <= 2 * kLongTiles) return run([=](int64_t unit) { Unit(*scan, unit).forward(); });
  for (int64_t direction = 0; direction < scan->directions; ++direction)
    for (int64_t from = 0; from < tiles; from += kLongTiles)
      run([=](int64_t unit) {
        Unit(*scan, unit).forward(direction, from, smaller(from + kLongTiles, tiles));
      });
}

EXPORT void selective_scan_backward(const Scan* scan) {
  for_each_unit(scan->parallel_for, scan->threads, num_units(*scan),
                [=](int64_t unit) { Unit(*scan, unit).backward(); });
}
