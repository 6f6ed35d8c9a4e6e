// The step's GPU kernels on the simulated machine, under sanitizers: results by the formula in double precision,
// gradients by its differences. tests/test_gpu_kernels.py holds them to more shapes and types, and counts what they
// move.
#include <cmath>
#include <functional>
#include <random>

#include "check.h"
#include "kernels/run.h"
#include "machines/simt.h"

namespace {

using namespace dia;
using simt::Thread;
using Values = std::vector<double>;

constexpr int kSamples = 3, kChannels = 5, kPositions = 7, kBottleneck = 2;
constexpr int kTable = kSamples * kChannels, kMap = kTable * kPositions;
enum Input { kX, kShortcut, kH, kC, kW1, kB1, kW2, kB2, kV1, kA1, kV2, kA2, kInputs };
constexpr int kSizes[] = {kMap,
                          kMap,
                          kTable,
                          kTable,
                          kBottleneck * kChannels,
                          kBottleneck,
                          4 * kChannels * kBottleneck,
                          4 * kChannels,
                          kBottleneck * kChannels,
                          kBottleneck,
                          4 * kChannels * kBottleneck,
                          4 * kChannels};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Results {
  Values y, h, c;
};

// The step by its formula (arXiv:1905.10671, section 3), planar.
Results step(const std::vector<Values>& in) {
  Results out{Values(kMap), Values(kTable), Values(kTable)};
  for (int n = 0; n < kSamples; ++n) {
    Values u(4 * kChannels);
    const auto path = [&](const std::function<double(int)>& value, Input w, Input b, Input expand, Input bias) {
      for (int row = 0; row < kBottleneck; ++row) {
        double z = in[b][row];
        for (int c = 0; c < kChannels; ++c) z += in[w][row * kChannels + c] * value(c);
        for (int k = 0; k < 4 * kChannels; ++k) u[k] += in[expand][k * kBottleneck + row] * std::max(z, 0.0);
      }
      for (int k = 0; k < 4 * kChannels; ++k) u[k] += in[bias][k];
    };
    const auto mean = [&](int c) {
      double sum = 0;
      for (int k = 0; k < kPositions; ++k) sum += in[kX][(n * kChannels + c) * kPositions + k];
      return sum / kPositions;
    };
    path(mean, kW1, kB1, kW2, kB2);
    path([&](int c) { return in[kH][n * kChannels + c]; }, kV1, kA1, kV2, kA2);
    for (int c = 0; c < kChannels; ++c) {
      const int at = n * kChannels + c;
      out.c[at] = sigmoid(u[kChannels + c]) * in[kC][at] + sigmoid(u[c]) * std::tanh(u[2 * kChannels + c]);
      out.h[at] = sigmoid(u[3 * kChannels + c]) * sigmoid(out.c[at]);
      for (int k = 0; k < kPositions; ++k) {
        const int element = at * kPositions + k;
        out.y[element] = std::max(in[kX][element] * out.h[at] + in[kShortcut][element], 0.0);
      }
    }
  }
  return out;
}

// Random inputs; shortcuts of +-4, so that no y is near the ReLU's kink.
std::vector<Values> draw(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<Values> in(kInputs);
  for (int k = 0; k < kInputs; ++k) {
    in[k].resize(kSizes[k]);
    for (double& value : in[k]) value = static_cast<float>(normal(random));
  }
  for (double& value : in[kShortcut]) value = value > 0 ? 4 : -4;
  return in;
}

// Float copies of tensors, known to a device.
struct Memory {
  simt::Device device;
  std::vector<std::unique_ptr<std::vector<float>>> kept;

  float* add(const std::string& name, const Values& values, bool defined = true) {
    kept.push_back(std::make_unique<std::vector<float>>(values.begin(), values.end()));
    return device.tensor(name, kept.back()->data(), static_cast<int64_t>(values.size()), defined);
  }
  float* result(const std::string& name, int size) { return add(name, Values(size), false); }
};

void check_near(const float* found, const Values& expected, const char* what) {
  for (size_t k = 0; k < expected.size(); ++k) {
    if (std::abs(found[k] - expected[k]) <= 1e-5 * (1 + std::abs(expected[k]))) continue;
    CHECK(false);
    std::cerr << "  " << what << "[" << k << "] is " << found[k] << ", expected " << expected[k] << "\n";
    return;
  }
}

void step_and_its_gradients(int parts_of_sums, int blocks_of) {
  const std::vector<Values> in = draw(parts_of_sums);
  const Results true_results = step(in);
  const simt::Grid blocks{.blocks = 2, .threads = 64, .shared_bytes = 16 << 10};
  const simt::Grid tiles{.blocks = blocks_of,
                         .threads = kernels::kTableThreads,
                         .shared_bytes = static_cast<size_t>(kernels::CellTiles::kBytes)};
  const kernels::MapSize size{kSamples, kChannels, kPositions, false};
  const int64_t stride = kChannels * kPositions;

  Memory memory;
  std::vector<float*> at(kInputs);
  for (int k = 0; k < kInputs; ++k) at[k] = memory.add("input " + std::to_string(k), in[k]);
  kernels::CellForward cell{};
  cell.samples = kSamples, cell.channels = kChannels, cell.bottleneck = kBottleneck;
  cell.h = at[kH], cell.c = at[kC];
  cell.weights = {at[kW1], at[kB1], at[kW2], at[kB2], at[kV1], at[kA1], at[kV2], at[kA2]};
  // Of a step: p, zx, zh in one; and of its gradient du, dzx, dzh.
  constexpr int kZx = kTable, kZh = kZx + kSamples * kBottleneck, kTables = kZh + kSamples * kBottleneck;
  constexpr int kDzx = 4 * kTable, kDzh = kDzx + kSamples * kBottleneck, kFactors = kDzh + kSamples * kBottleneck;
  float *const tables = memory.result("tables", kTables), *const factors = memory.result("factors", kFactors);
  cell.tables = {tables, tables + kZx, tables + kZh, memory.result("gates", 4 * kTable)};
  cell.new_h = memory.result("new_h", kTable), cell.new_c = memory.result("new_c", kTable);
  kernels::Reduce<float> reduce{};
  reduce.size = size, reduce.tile = {2, kPositions, 4}, reduce.x = {at[kX], stride};
  reduce.means.p = cell.tables.p;
  kernels::Spread<float> spread{};
  spread.size = size, spread.tile = {2, kPositions, 4}, spread.relu = true;
  spread.x = reduce.x, spread.shortcut = {at[kShortcut], stride}, spread.out = {memory.result("y", kMap), stride};
  spread.scale = cell.new_h;
  const kernels::BottleneckParts parts{memory.result("forward parts", 2 * parts_of_sums * kSamples * kBottleneck),
                                       parts_of_sums};
  memory.device.launch(blocks, [&](Thread& m) { kernels::run(m, reduce); });
  const kernels::JoinParts join = kernels::join_of(cell, parts);
  const kernels::BottleneckSums bottlenecks{cell, join};
  memory.device.launch(tiles, [&](Thread& m) { kernels::bottleneck_sums(m, bottlenecks); });
  if (parts.count > 1) memory.device.launch(blocks, [&](Thread& m) { kernels::join_parts(m, join); });
  const kernels::CellStates<false> states{cell, {}, nullptr, nullptr};
  memory.device.launch(tiles, [&](Thread& m) { kernels::cell_states(m, states); });
  memory.device.launch(blocks, [&](Thread& m) { kernels::run(m, spread); });
  const auto check_forward = [&] {
    check_near(spread.out.data, true_results.y, "y");
    check_near(cell.new_h, true_results.h, "h");
    check_near(cell.new_c, true_results.c, "c");
  };
  check_forward();
  const kernels::ClusterStep<float, false> whole{parts_of_sums, reduce, spread, states};
  const int clusters = (kSamples + parts_of_sums - 1) / parts_of_sums;
  memory.device.launch(
      {.blocks = clusters * kClusterBlocks, .threads = 64, .cluster = kClusterBlocks, .shared_bytes = 32 << 10},
      [&](Thread& m) { kernels::run(m, whole); });
  check_forward();

  const std::vector<Values> other = draw(100);
  const Values &dy = other[kX], &dh = other[kH], &dc = other[kC];
  kernels::Reduce<float> sums{};
  sums.size = size, sums.tile = {1, 4, 4};
  sums.dy = {memory.add("dy", dy), stride}, sums.y = {spread.out.data, stride}, sums.x = reduce.x;
  sums.g = {memory.result("dshortcut", kMap), stride}, sums.product = memory.result("product", kTable);
  kernels::CellBackward back{};
  back.samples = kSamples, back.channels = kChannels, back.bottleneck = kBottleneck;
  back.dh = memory.add("dh", dh), back.dc = memory.add("dc", dc);
  back.c = at[kC], back.new_c = cell.new_c;
  back.weights = cell.weights, back.tables = cell.tables;
  back.du = factors, back.dzx = factors + kDzx, back.dzh = factors + kDzh;
  back.old_dh = memory.result("old_dh", kTable), back.old_dc = memory.result("old_dc", kTable);
  kernels::SplitGateGradients<false> gates{};
  gates.cell = back, gates.product = sums.product, gates.factor = memory.result("factor", kTable);
  const kernels::JoinParts joined =
      kernels::join_of(back, {memory.result("parts", 2 * parts_of_sums * kSamples * kBottleneck), parts_of_sums});
  const kernels::BottleneckGradientSums products{back, joined};
  const kernels::CellGradients of_cell{back, {nullptr, memory.result("offset", kTable)}, nullptr, kPositions};
  kernels::Spread<float> last{};
  last.size = size, last.tile = {1, 4, 4}, last.dy = {sums.g.data, stride};
  last.out = {memory.result("dx", kMap), stride};
  last.scale = gates.factor, last.offset = of_cell.means.offset;
  memory.device.launch(blocks, [&](Thread& m) { kernels::run(m, sums); });
  memory.device.launch(blocks, [&](Thread& m) { kernels::split_gate_gradients(m, gates); });
  memory.device.launch(tiles, [&](Thread& m) { kernels::bottleneck_gradient_sums(m, products); });
  if (parts.count > 1) memory.device.launch(blocks, [&](Thread& m) { kernels::join_parts(m, joined); });
  memory.device.launch(tiles, [&](Thread& m) { kernels::cell_gradients(m, of_cell); });
  memory.device.launch(blocks, [&](Thread& m) { kernels::run(m, last); });

  kernels::WeightGradients<32> weights{};
  weights.samples = kSamples, weights.steps = 1, weights.of[0] = {factors, tables, at[kH]};
  std::vector<float*> gradients(kInputs);
  gradients[kX] = last.out.data, gradients[kShortcut] = sums.g.data;
  gradients[kH] = back.old_dh, gradients[kC] = back.old_dc;
  for (int k = kW1; k < kInputs; ++k) gradients[k] = memory.result("gradient " + std::to_string(k), kSizes[k]);
  const auto add = [&](int64_t left, int rows, int64_t right, int columns, Input out) {
    weights.products[weights.count++] = {left, right, gradients[out], rows, columns};
  };
  add(kDzx, kBottleneck, 0, kChannels, kW1);
  add(kDzx, kBottleneck, 0, 0, kB1);
  add(0, 4 * kChannels, kZx, kBottleneck, kW2);
  add(0, 4 * kChannels, 0, 0, kB2);
  add(kDzh, kBottleneck, kernels::WeightGradient::kState, kChannels, kV1);
  add(kDzh, kBottleneck, 0, 0, kA1);
  add(0, 4 * kChannels, kZh, kBottleneck, kV2);
  add(0, 4 * kChannels, 0, 0, kA2);
  memory.device.launch({.blocks = 2, .threads = kernels::kTableThreads, .shared_bytes = weights.kSharedBytes},
                       [&](Thread& m) { kernels::weight_gradients(m, weights); });

  const auto loss = [&](const std::vector<Values>& inputs) {
    const Results results = step(inputs);
    double sum = 0;
    for (int k = 0; k < kMap; ++k) sum += results.y[k] * dy[k];
    for (int k = 0; k < kTable; ++k) sum += results.h[k] * dh[k] + results.c[k] * dc[k];
    return sum;
  };
  for (int which = 0; which < kInputs; ++which) {
    Values expected(kSizes[which]);
    for (int k = 0; k < kSizes[which]; ++k) {
      std::vector<Values> moved = in;
      moved[which][k] = in[which][k] + 1e-5;
      const double above = loss(moved);
      moved[which][k] = in[which][k] - 1e-5;
      expected[k] = (above - loss(moved)) / 2e-5;
    }
    check_near(gradients[which], expected, ("gradient of input " + std::to_string(which)).c_str());
  }
}

void sweeps_of_a_tiled_map() {
  const std::vector<Values> in = draw(7);
  const kernels::MapSize size{kSamples, kChannels, kPositions, false};
  const int64_t stride = kChannels * kPositions;
  Memory memory;
  const float* x = memory.add("x", in[kX]);
  kernels::Reduce<float> reduce{};
  reduce.size = size, reduce.tile = {1, 4, 4};
  reduce.x = {x, stride};
  reduce.sum = memory.result("sum", kTable);
  const simt::Grid grid{.blocks = 2, .threads = 64, .shared_bytes = 16 << 10};
  memory.device.launch(grid, [&](Thread& m) { kernels::run(m, reduce); });
  Values sum(kTable), scaled(kMap);
  for (int k = 0; k < kMap; ++k) {
    sum[k / kPositions] += in[kX][k];
    scaled[k] = in[kX][k] * in[kH][k / kPositions] + in[kC][k / kPositions];
  }
  check_near(reduce.sum, sum, "sum");
  kernels::Spread<float> spread{};
  spread.size = size, spread.tile = {1, 4, 4};
  spread.x = {x, stride}, spread.out = {memory.result("out", kMap), stride};
  spread.scale = memory.add("scale", in[kH]), spread.offset = memory.add("offset", in[kC]);
  memory.device.launch(grid, [&](Thread& m) { kernels::run(m, spread); });
  check_near(spread.out.data, scaled, "out");
}

// Batch statistics and what the norm's gradient needs, against their formulas (norm.h).
void tables_of_a_norm() {
  const std::vector<Values> in = draw(9);
  constexpr double kEps = 1e-3, kCount = static_cast<double>(kSamples) * kPositions;
  Memory memory;
  kernels::Reduce<float> reduce{};
  reduce.size = {kSamples, kChannels, kPositions, false}, reduce.tile = {1, 3, 4};
  reduce.x = {memory.add("z", in[kX]), kChannels * kPositions};
  reduce.first = memory.result("first", kTable), reduce.sum = memory.result("sum", kTable);
  reduce.product = memory.result("squares", kTable), reduce.rest = memory.result("rest", kTable);
  const simt::Grid grid{.blocks = 2, .threads = 64, .shared_bytes = 16 << 10};
  memory.device.launch(grid, [&](Thread& m) { kernels::run(m, reduce); });
  kernels::BatchStatistics of{};
  of.samples = kSamples, of.channels = kChannels, of.positions = kPositions, of.eps = kEps;
  of.moments = {reduce.first, reduce.sum, reduce.rest, reduce.product};
  of.off = memory.result("means", kTable), of.p = memory.result("p", kTable);
  const Values &gamma = in[kB2], &beta = in[kA2];
  of.gamma = memory.add("gamma", gamma), of.beta = memory.add("beta", beta);
  for (float** table : {&of.shift, &of.d, &of.scale, &of.bias, &of.rstd, &of.mean, &of.var})
    *table = memory.result("statistics", kChannels);
  memory.device.launch(grid, [&](Thread& m) { kernels::batch_statistics(m, of); });
  Values mean(kChannels), var(kChannels), scale(kChannels);
  const auto channel = [](int element) { return element / kPositions % kChannels; };
  for (int k = 0; k < kMap; ++k) mean[channel(k)] += in[kX][k] / kCount;
  for (int k = 0; k < kMap; ++k) var[channel(k)] += std::pow(in[kX][k] - mean[channel(k)], 2) / kCount;
  for (int c = 0; c < kChannels; ++c) scale[c] = gamma[c] / std::sqrt(var[c] + kEps);
  check_near(of.mean, mean, "mean");
  check_near(of.var, var, "var");
  check_near(of.scale, scale, "scale");
  Values off(kTable), p(kTable);
  for (int k = 0; k < kMap; ++k) off[k / kPositions] += (in[kX][k] - mean[channel(k)]) / kPositions;
  for (int k = 0; k < kTable; ++k) p[k] = off[k] * scale[k % kChannels] + beta[k % kChannels];
  check_near(of.off, off, "off");
  check_near(of.p, p, "p");

  // dz = g factor + (z - shift) slope + offset, with factor = scale h': against the formula of DESIGN, section 11.
  const Values &g = in[kShortcut], &h = in[kH], &dp = in[kC];
  Values sum(kTable), product(kTable), dgamma(kChannels), dbeta(kChannels), dz(kMap), found(kMap);
  for (int k = 0; k < kMap; ++k)
    sum[k / kPositions] += g[k], product[k / kPositions] += g[k] * (in[kX][k] - mean[channel(k)]);
  kernels::NormGradients gradients{kSamples, kChannels, kPositions, true};
  gradients.sum = memory.add("sum of g", sum), gradients.product = memory.add("product", product);
  gradients.dp = memory.add("dp", dp), gradients.off = memory.add("off", off), gradients.new_h = memory.add("h", h);
  gradients.d = of.d, gradients.gamma = of.gamma, gradients.rstd = of.rstd;
  gradients.dgamma = memory.result("dgamma", kChannels), gradients.dbeta = memory.result("dbeta", kChannels);
  gradients.offset = memory.result("offset", kTable), gradients.slope = memory.result("slope", kChannels);
  gradients.factor = memory.result("factor", kTable);
  memory.device.launch(grid, [&](Thread& m) { kernels::norm_gradients(m, gradients); });
  for (int k = 0; k < kTable; ++k) {
    const int c = k % kChannels;
    const double rstd = 1 / std::sqrt(var[c] + kEps);
    dgamma[c] += (h[k] * product[k] + dp[k] * off[k]) * rstd, dbeta[c] += h[k] * sum[k] + dp[k];
  }
  for (int k = 0; k < kMap; ++k) {
    const int c = channel(k), at = k / kPositions;
    const double rstd = 1 / std::sqrt(var[c] + kEps), zn = (in[kX][k] - mean[c]) * rstd;
    dz[k] = scale[c] * (h[at] * g[k] + dp[at] / kPositions - (dbeta[c] + zn * dgamma[c]) / kCount);
    found[k] = g[k] * gradients.factor[at] + (in[kX][k] - of.shift[c]) * gradients.slope[c] + gradients.offset[at];
  }
  check_near(gradients.dgamma, dgamma, "dgamma");
  check_near(gradients.dbeta, dbeta, "dbeta");
  std::vector<float> narrow(found.begin(), found.end());
  check_near(narrow.data(), dz, "dz");

  // With statistics that were given there is no way through them.
  gradients.batch = false, gradients.slope = nullptr;
  memory.device.launch(grid, [&](Thread& m) { kernels::norm_gradients(m, gradients); });
  Values apart(kTable);
  for (int k = 0; k < kTable; ++k) apart[k] = scale[k % kChannels] * dp[k] / kPositions;
  check_near(gradients.offset, apart, "offset of given statistics");

  // A scale from elsewhere: what the last sweep forward applies, and the gradient from the first one's sums.
  kernels::NormFactors factors{kSamples, kChannels, gradients.new_h, of.d, of.rstd, of.gamma, of.beta};
  factors.factor = memory.result("factor", kTable), factors.added = memory.result("added", kTable);
  memory.device.launch(grid, [&](Thread& m) { kernels::norm_factors(m, factors); });
  Values about_shift(kTable), dscale(kTable), y(kMap);
  for (int k = 0; k < kMap; ++k) {
    const int c = channel(k), at = k / kPositions;
    y[k] = ((in[kX][k] - mean[c]) * scale[c] + beta[c]) * h[at];
    found[k] = (in[kX][k] - of.shift[c]) * factors.factor[at] + factors.added[at];
    about_shift[at] += g[k] * (in[kX][k] - of.shift[c]);
    dscale[at] += g[k] * ((in[kX][k] - mean[c]) * scale[c] + beta[c]);
  }
  narrow.assign(found.begin(), found.end());
  check_near(narrow.data(), y, "y");
  kernels::ScaleGradients scales{kSamples, kChannels, gradients.new_h, gradients.sum, of.d, of.rstd, of.gamma, of.beta};
  scales.h_again = memory.result("h again", kTable);
  scales.product = memory.add("product about the shift", about_shift), scales.dscale = memory.result("dscale", kTable);
  memory.device.launch(grid, [&](Thread& m) { kernels::scale_gradients(m, scales); });
  check_near(scales.dscale, dscale, "dscale");
  check_near(scales.product, product, "product about the mean");
  check_near(scales.h_again, h, "h again");

  // The same where the sums are those of several processes.
  Values of_beta(dbeta), of_gamma(dgamma);
  for (int c = 0; c < kChannels; ++c) of_beta[c] /= kCount, of_gamma[c] /= kCount;
  kernels::SharedNormGradients shared{kSamples, kChannels, kPositions};
  shared.new_h = gradients.new_h, shared.dp = gradients.dp;
  shared.d = of.d, shared.rstd = of.rstd, shared.gamma = of.gamma;
  shared.of_beta = memory.add("shares of beta", of_beta), shared.of_gamma = memory.add("shares of gamma", of_gamma);
  shared.factor = memory.result("factor", kTable), shared.offset = memory.result("shared offset", kTable);
  shared.slope = memory.result("shared slope", kChannels);
  memory.device.launch(grid, [&](Thread& m) { kernels::shared_norm_gradients(m, shared); });
  for (int k = 0; k < kMap; ++k) {
    const int c = channel(k), at = k / kPositions;
    narrow[k] =
        static_cast<float>(g[k] * shared.factor[at] + (in[kX][k] - of.shift[c]) * shared.slope[c] + shared.offset[at]);
  }
  check_near(narrow.data(), dz, "dz of several processes");
}

}  // namespace

int main() {
  step_and_its_gradients(1, 1);
  step_and_its_gradients(2, 1);
  step_and_its_gradients(3, 2);
  sweeps_of_a_tiled_map();
  tables_of_a_norm();
  return dia::test::failures == 0 ? 0 : 1;
}
