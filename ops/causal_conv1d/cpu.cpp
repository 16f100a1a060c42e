// The causal depthwise convolution and its gradient on a CPU.
//
// A vector holds W neighbouring channels; time is worked through in tiles that are read once from
// memory of any layout. A unit of work is one batch item and some of its channels. Positions count
// frames in scan order.
#include "../simd.h"

// Members named d... are gradients; padded dim is dim rounded up to W.
struct Convolution {
  int64_t batch, dim, frames, width;
  int64_t silu, reverse;
  int64_t reset_every;     // 0: never
  const int64_t* lengths;  // (batch) or null
  const float* weight;     // (dim, width), the last tap for the current frame
  const float* bias;       // (dim) or null
  Tensor x, y;
  const float* initial_state;  // (batch, dim, width - 1) or null
  float* state;                // the same shape
  Tensor dy, dx;
  const float* dstate;    // (batch, dim, width - 1) or null
  float* dinitial_state;  // the same shape, or null
  float* dweight;         // (batch, width, padded dim): summed over the batch by the caller
  float* dbias;           // (batch, padded dim)
  int64_t channels_per_unit;
  int64_t threads;
  ParallelFor parallel_for;
};

namespace {

constexpr int kFrames = 64;

class Unit {
 public:
  Unit(const Convolution& conv, int64_t index)
      : conv_(conv), width_(int(conv.width)), before_(width_ - 1) {
    const int64_t parts = ceil_divide(conv.dim, conv.channels_per_unit);
    at_.part = at_.group = 0;
    at_.batch = index / parts;
    at_.channel = index % parts * conv.channels_per_unit;
    at_.channels = smaller(conv.channels_per_unit, conv.dim - at_.channel);
    blocks_ = at_.blocks();
    length_ = conv.lengths ? conv.lengths[at_.batch] : conv.frames;
    for (int64_t end = 0; end < length_; end = block_end(end)) last_begin_ = end;

    Scratch& scratch = thread_scratch();
    scratch.release();
    const size_t rows = before_ + kFrames;
    rows_ = scratch.take(blocks_ * rows);
    x_ = scratch.take(rows);
    weight_ = scratch.take(blocks_ * width_);
    bias_ = scratch.take(blocks_);
    initial_ = scratch.take(blocks_ * before_);
    out_ = scratch.take(blocks_ * kFrames);
    ds_ = scratch.take(rows + before_);
    // Gradients: before the activation at the first frames of the tile scanned next, of the state
    // that is returned and of the initial one, and of the parameters.
    next_ds_ = scratch.take(blocks_ * before_);
    dstate_ = scratch.take(blocks_ * before_);
    dinitial_ = scratch.take_zeros(blocks_ * before_);
    dweight_ = scratch.take_zeros(blocks_ * width_);
    dbias_ = scratch.take_zeros(blocks_);
    for (int b = 0; b < blocks_; ++b) {
      for (int j = 0; j < width_; ++j)
        weight_[b * width_ + j] = load_channels(conv.weight + j, width_, at_, b);
      bias_[b] = load_channels(conv.bias, 1, at_, b);
    }
    load_state(conv.initial_state, initial_);
  }

  template <int Width>
  void forward() {
    for (int64_t begin = 0, end; begin < length_; begin = end) {
      end = block_end(begin);
      for (int64_t first = begin; first < end; first += kFrames) {
        const int frames = int(smaller(kFrames, end - first));
        read(begin, first, frames);
        for (int b = 0; b < blocks_; ++b) {
          gather(begin, first, frames, b);
          for (int k = 0; k < frames; ++k) {
            const vf s = before_activation<Width>(b, k);
            out_[b * frames + row(k, frames)] = conv_.silu ? s * sigmoid(s) : s;
          }
        }
        place(first, frames);
        write_tile(conv_.y, at_, out_);
      }
    }
    write_state();
    write_zeros(conv_.y, at_, length_, conv_.frames, kFrames, out_);
  }

  template <int Width>
  void backward() {
    load_state(conv_.dstate, dstate_);
    for (int64_t begin = 0, end; begin < length_; begin = end) {
      end = block_end(begin);
      std::fill(next_ds_, next_ds_ + blocks_ * before_, vf{});
      for (int64_t i = ceil_divide(end - begin, kFrames) - 1; i >= 0; --i) {
        const int64_t first = begin + i * kFrames;
        backward_tile<Width>(begin, first, int(smaller(kFrames, end - first)));
      }
    }
    // What the input is too short to fill of the returned state came from the initial one.
    for (int i = 0; last_begin_ == 0 && i + length_ < before_; ++i)
      for (int b = 0; b < blocks_; ++b)
        dinitial_[b * before_ + i + length_] += dstate_[b * before_ + i];
    write_parameter_gradients();
    write_zeros(conv_.dx, at_, length_, conv_.frames, kFrames, out_);
  }

 private:
  template <int Width>
  void backward_tile(int64_t begin, int64_t first, int frames) {
    read(begin, first, frames);
    place(first, frames);
    read_tile(conv_.dy, at_, out_);
    for (int b = 0; b < blocks_; ++b) {
      gather(begin, first, frames, b);
      // ds_[before_ + k] belongs to frame k of the tile; before it zeros, after it the next tile.
      vf* ds = ds_ + before_;
      vf* out = out_ + b * frames;
      vf sum = dbias_[b];
      for (int i = 0; i < before_; ++i) {
        ds_[i] = vf{};
        ds[frames + i] = next_ds_[b * before_ + i];
      }
      for (int k = 0; k < frames; ++k) {
        ds[k] = out[row(k, frames)];
        if (conv_.silu) {
          const vf s = before_activation<Width>(b, k), gate = sigmoid(s);
          ds[k] *= gate * (1.f + s * (1.f - gate));
        }
        sum += ds[k];
      }
      dbias_[b] = sum;
      for (int i = 0; i < before_; ++i) next_ds_[b * before_ + i] = ds[i];
      for (int j = 0; j < taps<Width>(); ++j) {
        vf total = dweight_[b * width_ + j];
        for (int k = 0; k < frames; ++k) total += ds[k] * x_[k + j];
        dweight_[b * width_ + j] = total;
      }
      for (int k = 0; k < frames; ++k) {
        const int64_t from_end = length_ - (first + k);
        vf dx = input_gradient<Width>(b, k);
        if (from_end <= before_ && first + k >= last_begin_)
          dx += dstate_[b * before_ + before_ - from_end];
        out[row(k, frames)] = dx;
      }
      if (first == 0)
        for (int i = 0; i < before_; ++i)
          dinitial_[b * before_ + i] += input_gradient<Width>(b, i - before_);
    }
    place(first, frames);
    write_tile(conv_.dx, at_, out_);
  }

  template <int Width>
  int taps() const {
    return Width ? Width : width_;
  }

  template <int Width>
  INLINE vf before_activation(int b, int k) const {
    vf sum = bias_[b];
    for (int j = 0; j < taps<Width>(); ++j) sum += weight_[b * width_ + j] * x_[k + j];
    return sum;
  }

  // Gradient of the input at frame k of the tile; before the first one k is negative.
  template <int Width>
  INLINE vf input_gradient(int b, int k) const {
    vf sum{};
    for (int j = 0; j < taps<Width>(); ++j)
      sum += weight_[b * width_ + j] * ds_[before_ + k + before_ - j];
    return sum;
  }

  // End of the block between resets that begins at a position.
  int64_t block_end(int64_t begin) const {
    const int64_t every = conv_.reset_every;
    if (!every) return length_;
    if (conv_.reverse) return length_ - (length_ - 1 - begin) / every * every;
    return smaller((begin / every + 1) * every, length_);
  }

  // Points at_ at a range of positions.
  void place(int64_t first, int frames) {
    at_.frame = conv_.reverse ? length_ - first - frames : first;
    at_.frames = frames;
  }

  // Where the k-th of n positions stands among their frames.
  int row(int k, int n) const { return conv_.reverse ? n - 1 - k : k; }

  // Reads a tile of the block that begins at `begin`, and what precedes it in the block.
  void read(int64_t begin, int64_t first, int frames) {
    halo_ = int(smaller(before_, first - begin));
    place(first - halo_, halo_ + frames);
    read_tile(conv_.x, at_, rows_);
  }

  // x_ becomes the width - 1 inputs before the tile and those of the tile, in scan order.
  void gather(int64_t begin, int64_t first, int frames, int b) {
    const int n = halo_ + frames;
    for (int i = 0; i < before_ - halo_; ++i)
      x_[i] = begin == 0 ? initial_[b * before_ + first + i] : vf{};
    for (int k = 0; k < n; ++k) x_[before_ - halo_ + k] = rows_[b * n + row(k, n)];
  }

  void load_state(const float* from, vf* to) const {
    for (int b = 0; b < blocks_; ++b)
      for (int i = 0; i < before_; ++i)
        to[b * before_ + i] =
            from ? load_channels(from + at_.batch * conv_.dim * before_ + i, before_, at_, b)
                 : vf{};
  }

  void write_state() {
    read(last_begin_, length_, 0);
    for (int b = 0; b < blocks_; ++b) {
      gather(last_begin_, length_, 0, b);
      for (int i = 0; i < before_; ++i)
        store_channels(conv_.state + at_.batch * conv_.dim * before_ + i, before_, at_, b, x_[i]);
    }
  }

  void write_parameter_gradients() const {
    const int64_t padded = round_up(conv_.dim, W);
    for (int b = 0; b < blocks_; ++b) {
      const int64_t channel = at_.channel + b * W;
      for (int j = 0; j < width_; ++j)
        store(conv_.dweight + (at_.batch * width_ + j) * padded + channel, dweight_[b * width_ + j]);
      if (conv_.dbias) store(conv_.dbias + at_.batch * padded + channel, dbias_[b]);
      for (int i = 0; conv_.dinitial_state && i < before_; ++i)
        store_channels(conv_.dinitial_state + at_.batch * conv_.dim * before_ + i, before_, at_, b,
                       dinitial_[b * before_ + i]);
    }
  }

  const Convolution& conv_;
  int width_, before_, blocks_, halo_ = 0;
  int64_t length_, last_begin_ = 0;
  Span at_;
  // Tiles; [position] of one block; [block][tap], [block] and [block][position before the start].
  vf *rows_, *out_;
  vf *x_, *ds_;
  vf *weight_, *bias_, *initial_, *next_ds_, *dstate_, *dinitial_, *dweight_, *dbias_;
};

template <class Body>
void for_each(const Convolution& conv, const Body& body) {
  const int64_t units = conv.batch * ceil_divide(conv.dim, conv.channels_per_unit);
  for_each_unit(conv.parallel_for, conv.threads, units, [&](int64_t index) {
    Unit unit(conv, index);
    body(unit);
  });
}

}  // namespace

// Channels of a vector.
EXPORT int64_t causal_conv1d_channels() { return W; }

EXPORT void causal_conv1d_forward(const Convolution* conv) {
  for_each(*conv, [=](Unit& unit) {
    conv->width == 4 ? unit.forward<4>() : unit.forward<0>();
  });
}

EXPORT void causal_conv1d_backward(const Convolution* conv) {
  for_each(*conv, [=](Unit& unit) {
    conv->width == 4 ? unit.backward<4>() : unit.backward<0>();
  });
}
