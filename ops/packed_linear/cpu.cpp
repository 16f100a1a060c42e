// y = x weight^T + bias for few rows of x, with weights arranged in blocks of BLOCK outputs: for each
// input the weights of all outputs of the block lie next to each other. A tile of ROWS rows and a
// block of outputs stays in registers while the inputs go by. A unit of work is a block.
#include "../simd.h"

struct Call {
  int64_t rows, inputs, outputs;
  const float* x;       // (rows, inputs)
  const float* weight;  // (outputs, inputs) to be packed, or packed
  const float* bias;    // (outputs) or null
  float* y;             // (rows, outputs), or the packed weights
  int64_t threads;
  ParallelFor parallel_for;
};

namespace {

constexpr int VECTORS = 2;
constexpr int BLOCK = VECTORS * W;
// As many sums as leave registers for a block's weights and an input: of 32, or of 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 10;
#else
constexpr int ROWS = 5;
#endif

// R rows of x times the V * W outputs that start with the output ``first``. ``ahead`` are weights to
// be fetched meanwhile, null for none.
template <int R, int V>
INLINE void tile(const Call& call, const float* packed, const float* ahead, int64_t row,
                 int64_t first) {
  const int64_t n = call.outputs - first;
  vf sum[R][V];
  for (int v = 0; v < V; ++v) {
    const vf bias = call.bias && n > v * W ? load_some(call.bias + first + v * W, n - v * W) : vf{};
    for (int r = 0; r < R; ++r) sum[r][v] = bias;
  }
  const float* x = call.x + row * call.inputs;
  const int64_t step = ahead ? W : 0;
  if (!ahead) ahead = packed;
  for (int64_t k = 0; k < call.inputs; ++k, ahead += step) {
    __builtin_prefetch(ahead, 0, 2);
    vf weight[V];
    for (int v = 0; v < V; ++v) weight[v] = load(packed + k * BLOCK + v * W);
    for (int r = 0; r < R; ++r) {
      const vf input = splat(x[r * call.inputs + k]);
      for (int v = 0; v < V; ++v) sum[r][v] += input * weight[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      if (n > v * W)
        store_some(call.y + (row + r) * call.outputs + first + v * W, sum[r][v], n - v * W);
}

template <int R>
void rows_of_block(const Call& call, const float* packed, const float* ahead, int64_t row,
                   int64_t first) {
  if (call.outputs - first > W)
    tile<R, VECTORS>(call, packed, ahead, row, first);
  else
    tile<R, 1>(call, packed, ahead, row, first);
}

template <int R>
void rest_of_rows(const Call& call, const float* packed, const float* ahead, int64_t row,
                  int64_t first) {
  if constexpr (R > 0) {
    if (call.rows - row == R) return rows_of_block<R>(call, packed, ahead, row, first);
    rest_of_rows<R - 1>(call, packed, ahead, row, first);
  }
}

}  // namespace

EXPORT int64_t packed_outputs(int64_t outputs) { return round_up(outputs, BLOCK); }

EXPORT void pack_weights(const Call* call) {
  for_each_unit(
      call->parallel_for, call->threads, ceil_divide(call->outputs, BLOCK), [&](int64_t block) {
        const int64_t first = block * BLOCK, n = smaller(BLOCK, call->outputs - first);
        const float* weight = call->weight + first * call->inputs;
        float* packed = call->y + first * call->inputs;
        for (int64_t k = 0; k < call->inputs; ++k)
          for (int64_t i = 0; i < BLOCK; ++i)
            packed[k * BLOCK + i] = i < n ? weight[i * call->inputs + k] : 0.0f;
      });
}

EXPORT void packed_linear(const Call* call) {
  const int64_t blocks = ceil_divide(call->outputs, BLOCK), block_size = call->inputs * BLOCK;
  for_each_unit(call->parallel_for, call->threads, blocks, [&](int64_t block) {
    const int64_t first = block * BLOCK;
    const float* packed = call->weight + block * block_size;
    // The first tiles of rows fetch the weights of what is probably this thread's next block: they
    // come from further away than a processor looks ahead by itself.
    const bool has_next = block + call->threads < blocks;
    const float* next = packed + call->threads * block_size;
    const auto ahead = [&](int64_t row) {
      const int64_t part = row / ROWS;
      return has_next && part < VECTORS ? next + part * call->inputs * W : nullptr;
    };
    int64_t row = 0;
    for (; row + ROWS <= call->rows; row += ROWS)
      rows_of_block<ROWS>(*call, packed, ahead(row), row, first);
    rest_of_rows<ROWS - 1>(*call, packed, ahead(row), row, first);
  });
}
