// How fast this machine multiplies and adds, and evaluates 2^x, when nothing else is in the way: the
// ceilings that benchmarks/bench_scan.py holds the scan against.
#include "../ops/simd.h"

namespace {
// Independent chains: enough to hide the latency of a fused multiply-add, few enough for registers.
constexpr int kChains = 12;

template <class Step>
float run(int64_t rounds, const Step& step) {
  vf x[kChains];
  for (int i = 0; i < kChains; ++i) x[i] = splat(1e-3f * float(i + 1));
  for (int64_t r = 0; r < rounds; ++r)
    for (int i = 0; i < kChains; ++i) x[i] = step(x[i]);
  float sum = 0, lanes[W];
  for (int i = 0; i < kChains; ++i) {
    store(lanes, x[i]);
    sum += lanes[0];
  }
  return sum;
}
}  // namespace

EXPORT int64_t elements_per_round() { return kChains * W; }

EXPORT void fused_multiply_adds(int64_t units, int64_t rounds, int64_t threads,
                                ParallelFor parallel_for, float* results) {
  const vf a = splat(0.999f), b = splat(1e-4f);
  for_each_unit(parallel_for, threads, units, [=](int64_t unit) {
    results[unit] = run(rounds, [=](vf x) { return x * a + b; });
  });
}

EXPORT void exponentials(int64_t units, int64_t rounds, int64_t threads, ParallelFor parallel_for,
                         float* results) {
  const vf a = splat(-0.7f);
  for_each_unit(parallel_for, threads, units, [=](int64_t unit) {
    results[unit] = run(rounds, [=](vf x) { return exp2_of_product(x, a); });
  });
}
