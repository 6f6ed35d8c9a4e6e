// The operators of a GPU on the simulated one, for tensors of the CPU: what csrc/ops does for a card runs in every
// test. Not part of the library; Python defines the operators as backend "simulated" before it loads this.
#include <cxxabi.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <typeinfo>

#include "../machines/simt.h"
#include "gpu_operators.h"

namespace dia::simulated {
namespace {

// What the simulated GPU is like: small, and quick to launch on, so that small problems have several chunks.
GpuLimits limits{"simulated", 90, 4, 128 << 10, 64 << 10, 90e9, 170e9, 2e12, 9e12, 1e-10, 2};
// Of a block, where the kernel lets the launch choose: fewer than on a card, as a fiber is slow.
int most_threads = 64;
uint64_t schedule = 0;  // of the next launch: each has its own
std::string launches;   // a line each

// What a test lies about: a kernel's table is shorter by so many elements at its begin and end; or a barrier is left
// out.
struct Lie {
  std::string kernel, table;
  int64_t before = 0, after = 0;
  std::string file;
  simt::Site barrier;
} lie;
std::map<std::string, std::map<simt::Site, int64_t>> barriers_passed;
std::map<std::string, std::set<std::string>> tables_taken;

template <class Args>
std::string name_of() {
  int status = 0;
  char* name = abi::__cxa_demangle(typeid(Args).name(), nullptr, nullptr, &status);
  std::string text = status == 0 ? name : "?";
  std::free(name);
  text.erase(0, std::string("dia::kernels::").size());
  return text;
}

// Tells the machine what memory a kernel may touch: each table once, though it may have several roles.
class Memory {
 public:
  Memory(simt::Device& device, const std::string& kernel) : device_(device), kernel_(kernel) {}

  template <class T>
  void table(const char* name, T* data, int64_t count) {
    if (data == nullptr || std::find(known_.begin(), known_.end(), data) != known_.end()) return;
    known_.push_back(data);
    tables_taken[kernel_].insert(name);
    const bool lied = kernel_ == lie.kernel && lie.table == name;
    device_.tensor(name, data + (lied ? lie.before : 0), lied ? count - lie.before - lie.after : count, true);
  }
  template <class T>
  void map(const char* name, const kernels::Samples<T>& map, const kernels::MapSize& size) {
    const int64_t length = static_cast<int64_t>(size.channels) * size.positions;
    if (size.samples > 0) table(name, map.data, (size.samples - 1) * map.stride + length);
  }
  template <class B>
  void mask(const char* name, const kernels::Samples<B>& of, const kernels::MapSize& size) {
    table(name, of.data, size.samples * of.stride);
  }
  void affine(const kernels::ChannelAffine& of, int64_t c) {
    table("shift", of.shift, c), table("d", of.d, c), table("scale", of.scale, c), table("bias", of.bias, c);
  }
  void weights(const kernels::CellWeights& w, int64_t c, int64_t m) {
    table("input_reduce_weight", w.input_reduce, m * c), table("input_reduce_bias", w.input_reduce_bias, m);
    table("input_expand_weight", w.input_expand, 4 * c * m), table("input_expand_bias", w.input_expand_bias, 4 * c);
    table("hidden_reduce_weight", w.hidden_reduce, m * c), table("hidden_reduce_bias", w.hidden_reduce_bias, m);
    table("hidden_expand_weight", w.hidden_expand, 4 * c * m), table("hidden_expand_bias", w.hidden_expand_bias, 4 * c);
  }
  void tables(const kernels::CellTables& t, int64_t n, int64_t c, int64_t m) {
    table("p", t.p, n * c), table("zx", t.zx, n * m), table("zh", t.zh, n * m), table("gates", t.gates, n * 4 * c);
  }
  void cell(const kernels::CellForward& of) {
    const int64_t n = of.samples, c = of.channels, m = of.bottleneck;
    table("h", of.h, n * c), table("c", of.c, n * c), table("new_h", of.new_h, n * c), table("new_c", of.new_c, n * c);
    weights(of.weights, c, m), tables(of.tables, n, c, m);
  }
  void cell(const kernels::CellBackward& of) {
    const int64_t n = of.samples, c = of.channels, m = of.bottleneck;
    table("dh", of.dh, n * c), table("dc", of.dc, n * c), table("c", of.c, n * c), table("new_c", of.new_c, n * c);
    weights(of.weights, c, m), tables(of.tables, n, c, m);
    table("du", of.du, n * 4 * c), table("dzx", of.dzx, n * m), table("dzh", of.dzh, n * m);
    table("old_dh", of.old_dh, n * c), table("old_dc", of.old_dc, n * c);
  }

  // What each kernel takes.
  template <class T>
  void of(const kernels::Reduce<T>& a) {
    const int64_t nc = static_cast<int64_t>(a.size.samples) * a.size.channels;
    map("x", a.x, a.size), map("dy", a.dy, a.size), map("y", a.y, a.size), map("g", a.g, a.size);
    mask("mask", a.mask, a.size);
    table("shift", a.shift, a.size.channels), table("first", a.first, nc), table("rest", a.rest, nc);
    table("sum", a.sum, nc), table("product", a.product, nc);
    means(a.means, a.size.samples, a.size.channels);
  }
  void means(const kernels::Means& of, int64_t n, int64_t c) {
    table("p", of.p, n * c), table("off", of.off, n * c);
    table("d", of.affine.d, c), table("scale", of.affine.scale, c), table("bias", of.affine.bias, c);
  }
  template <class T>
  void of(const kernels::Spread<T>& a) {
    const int64_t c = a.size.channels, nc = a.size.samples * c;
    map("dy", a.dy, a.size), map("y", a.y, a.size), map("x", a.x, a.size), map("shortcut", a.shortcut, a.size);
    map("out", a.out, a.size), mask("mask", a.mask, a.size), mask("passed", a.passed, a.size);
    table("scale", a.scale, nc), table("offset", a.offset, nc), table("shift", a.shift, c);
    table("slope", a.slope, a.slope_of_samples ? nc : c);
  }
  template <class T>
  void of(const kernels::Extremes<T>& a) {
    const int64_t c = a.size.channels, nc = a.size.samples * c;
    map("x", a.x, a.size);
    table("gamma", a.gamma, c), table("shift", a.shift, c), table("d", a.d, c), table("rstd", a.rstd, c);
    table("extreme", a.extreme, nc), table("where", a.where, nc);
  }
  template <class T>
  void of(const kernels::SpreadExtremeGradient<T>& a) {
    const int64_t c = a.size.channels, nc = a.size.samples * c;
    map("dy", a.dy, a.size), map("x", a.x, a.size), map("out", a.out, a.size);
    table("scale", a.scale, nc), table("offset", a.offset, nc), table("shift", a.shift, c), table("rstd", a.rstd, c);
    table("slope", a.slope, a.slope_of_samples ? nc : c);
    table("dextreme", a.dextreme, nc), table("where", a.where, nc);
  }
  void parts(const kernels::BottleneckParts& parts, int64_t samples, int64_t bottleneck) {
    table("parts", parts.data, parts.count * samples * 2 * bottleneck);
  }
  void reduce_weights(const kernels::CellWeights& w, int64_t c, int64_t m) {
    table("input_reduce_weight", w.input_reduce, m * c), table("hidden_reduce_weight", w.hidden_reduce, m * c);
  }
  void expand_weights(const kernels::CellWeights& w, int64_t c, int64_t m) {
    table("input_expand_weight", w.input_expand, 4 * c * m), table("hidden_expand_weight", w.hidden_expand, 4 * c * m);
  }
  void of(const kernels::BottleneckSums& a) {
    const int64_t n = a.cell.samples, c = a.cell.channels, m = a.cell.bottleneck;
    of(a.join), reduce_weights(a.cell.weights, c, m);
    table("h", a.cell.h, n * c), table("p", a.cell.tables.p, n * c);
  }
  void of(const kernels::JoinParts& a) {
    const int64_t n = a.samples, m = a.bottleneck;
    parts(a.parts, n, m);
    table("input bias", a.input.bias, m), table("hidden bias", a.hidden.bias, m);
    table("input z", a.input.z, n * m), table("hidden z", a.hidden.z, n * m);
    table("input", a.input.out, n * m), table("hidden", a.hidden.out, n * m);
  }
  template <bool kAffine>
  void of(const kernels::CellStates<kAffine>& a) {
    const int64_t n = a.cell.samples, c = a.cell.channels, m = a.cell.bottleneck;
    table("zx", a.cell.tables.zx, n * m), table("zh", a.cell.tables.zh, n * m), expand_weights(a.cell.weights, c, m);
    table("input_expand_bias", a.cell.weights.input_expand_bias, 4 * c);
    table("hidden_expand_bias", a.cell.weights.hidden_expand_bias, 4 * c);
    table("c", a.cell.c, n * c), table("new_h", a.cell.new_h, n * c), table("new_c", a.cell.new_c, n * c);
    table("gates", a.cell.tables.gates, n * 4 * c), table("d", a.affine.d, c), table("scale", a.affine.scale, c);
    table("bias", a.affine.bias, c), table("factor", a.factor, n * c), table("added", a.added, n * c);
  }
  void of(const kernels::BottleneckGradientSums& a) {
    const int64_t n = a.cell.samples, c = a.cell.channels, m = a.cell.bottleneck;
    of(a.join), expand_weights(a.cell.weights, c, m), table("du", a.cell.du, n * 4 * c);
  }
  void of(const kernels::CellGradients& a) {
    const int64_t n = a.cell.samples, c = a.cell.channels, m = a.cell.bottleneck;
    table("dzx", a.cell.dzx, n * m), table("dzh", a.cell.dzh, n * m), reduce_weights(a.cell.weights, c, m);
    table("old_dh", a.cell.old_dh, n * c), table("dp", a.means.dp, n * c), table("offset", a.means.offset, n * c);
    table("scale", a.scale, c);
  }
  void of(const kernels::Rectify& a) {
    table("values", a.values, a.count), table("bias", a.bias, a.width), table("z", a.z, a.count);
  }
  template <bool kAffine>
  void of(const kernels::SplitGates<kAffine>& a) {
    cell(a.cell), affine(a.affine, a.cell.channels), table("products", a.products, 4 * area(a.cell));
    table("factor", a.factor, area(a.cell)), table("added", a.added, area(a.cell));
  }
  template <bool kAffine>
  void of(const kernels::SplitGateGradients<kAffine>& a) {
    const int64_t c = a.cell.channels;
    cell(a.cell);
    table("sum", a.sum, area(a.cell)), table("product", a.product, area(a.cell));
    table("d", a.norm.d, c), table("rstd", a.norm.rstd, c), table("gamma", a.norm.gamma, c);
    table("beta", a.norm.beta, c), table("scale", a.norm.scale, c), table("new_h", a.norm.new_h, area(a.cell));
    table("factor", a.factor, area(a.cell));
  }
  template <class T, bool kAffine>
  void of(const kernels::ClusterStep<T, kAffine>& a) {
    of(a.reduce), of(a.spread), cell(a.states.cell);
    affine(a.states.affine, a.states.cell.channels);
    table("factor", a.states.factor, area(a.states.cell)), table("added", a.states.added, area(a.states.cell));
  }
  template <class T, bool kAffine>
  void of(const kernels::ClusterGradient<T, kAffine>& a) {
    const kernels::CellBackward& of_cell = a.gates.cell;
    of(a.reduce), of(a.gates);
    parts({a.parts, kClusterBlocks}, of_cell.samples, of_cell.bottleneck);
    table("dp", a.means.dp, area(of_cell)), table("offset", a.means.offset, area(of_cell));
  }
  template <int kTile>
  void of(const kernels::WeightGradients<kTile>& a) {
    for (int k = 0; k < a.count; ++k) {
      const kernels::WeightGradient& p = a.products[k];
      for (int step = 0; step < a.steps; ++step) {
        table("left", p.left_of(a.of[step]), static_cast<int64_t>(a.samples) * p.rows);
        if (p.columns > 0) table("right", p.right_of(a.of[step]), static_cast<int64_t>(a.samples) * p.columns);
      }
      table("gradient", p.out, static_cast<int64_t>(p.rows) * std::max(p.columns, 1));
    }
  }
  void moments(const kernels::SampleMoments& of, int64_t nc) {
    table("first", of.first, nc), table("rest", of.rest, nc), table("squares", of.squares, nc),
        table("sum", of.sum, nc);
  }
  void of(const kernels::BatchStatistics& a) {
    const int64_t c = a.channels, nc = a.samples * c;
    moments(a.moments, nc), table("variance", a.variance, nc);
    table("gamma", a.gamma, c), table("beta", a.beta, c), table("shift", a.shift, c), table("d", a.d, c);
    table("scale", a.scale, c), table("bias", a.bias, c), table("rstd", a.rstd, c);
    table("mean", a.mean, c), table("var", a.var, c), table("off", a.off, nc), table("p", a.p, nc);
    table("running_mean", a.tracked.running_mean, c), table("running_var", a.tracked.running_var, c);
    table("batches", a.tracked.batches, 1);
  }
  void of(const kernels::ChannelStatistics& a) {
    moments(a.moments, static_cast<int64_t>(a.samples) * a.channels);
    table("mean", a.mean, a.channels), table("var", a.var, a.channels);
    table("means", a.means, static_cast<int64_t>(a.samples) * a.channels);
  }
  void of(const kernels::SharedNormGradients& a) {
    const int64_t c = a.channels, nc = a.samples * c;
    table("new_h", a.new_h, nc), table("dp", a.dp, nc), table("d", a.d, c), table("rstd", a.rstd, c);
    table("gamma", a.gamma, c), table("of_beta", a.of_beta, c), table("of_gamma", a.of_gamma, c);
    table("factor", a.factor, nc), table("offset", a.offset, nc), table("slope", a.slope, c);
  }
  void of(const kernels::NormFactors& a) {
    const int64_t c = a.channels, nc = a.samples * c;
    table("h", a.h, nc), table("d", a.d, c), table("rstd", a.rstd, c), table("gamma", a.gamma, c);
    table("beta", a.beta, c), table("factor", a.factor, nc), table("added", a.added, nc);
  }
  void of(const kernels::ScaleGradients& a) {
    const int64_t c = a.channels, nc = a.samples * c;
    table("d", a.d, c), table("rstd", a.rstd, c), table("gamma", a.gamma, c), table("beta", a.beta, c);
    table("h", a.h, nc), table("sum", a.sum, nc), table("product", a.product, nc), table("dscale", a.dscale, nc);
    table("h again", a.h_again, nc);
  }
  void of(const kernels::GivenStatistics& a) {
    const int64_t c = a.channels;
    table("wide mean", a.wide_mean, c), table("wide var", a.wide_var, c);
    table("mean", a.mean, c), table("var", a.var, c), table("gamma", a.gamma, c), table("beta", a.beta, c);
    table("shift", a.shift, c), table("d", a.d, c), table("scale", a.scale, c), table("bias", a.bias, c);
    table("rstd", a.rstd, c);
    const int64_t nc = static_cast<int64_t>(a.samples) * a.channels;
    table("means", a.means, nc), table("off", a.off, nc), table("p", a.p, nc), table("variance", a.variance, nc);
    if (a.moments.first != nullptr) moments(a.moments, nc);
  }
  void of(const kernels::MeanGradients& a) {
    table("dp", a.dp, a.count), table("scale", a.scale, a.channels), table("offset", a.offset, a.count);
  }
  void of(const kernels::NormGradients& a) {
    const int64_t c = a.channels, nc = a.samples * c;
    table("sum", a.sum, nc), table("product", a.product, nc), table("dp", a.dp, nc), table("off", a.off, nc);
    table("new_h", a.new_h, nc), table("d", a.d, c), table("gamma", a.gamma, c), table("rstd", a.rstd, c);
    table("factor", a.factor, nc), table("offset", a.offset, nc);
    table("slope", a.slope, a.dvariance != nullptr ? nc : c);
    table("dvariance", a.dvariance, nc), table("variance", a.variance, nc);
    table("dextreme", a.dextreme, nc), table("extreme", a.extreme, nc);
    table("dgamma", a.dgamma, c), table("dbeta", a.dbeta, c);
  }

 private:
  template <class Cell>
  static int64_t area(const Cell& cell) {
    return static_cast<int64_t>(cell.samples) * cell.channels;
  }

  simt::Device& device_;
  std::string kernel_;
  std::vector<const void*> known_;
};

// A sweep's tile was chosen for all threads of a card's block: those that share a row, or take its channels, must be
// there.
template <class Sweep>
int least_threads(const Sweep& args, int all) {
  const int needed = args.size.interleaved ? std::min(args.tile.channels, all) : args.tile.lanes;
  return static_cast<int>(rounded_up(needed, 32));
}

class SimulatedGpu final : public Gpu {
 public:
  GpuLimits limits() override { return simulated::limits; }

  void launch(const AnyKernel& any, int blocks, int64_t shared_bytes) override {
    std::visit(
        [&]<class Args>(const Args& args) {
          launches += name_of<Args>() + " " + std::to_string(blocks) + " " + std::to_string(shared_bytes) + "\n";
          simt::Device device;
          Memory(device, name_of<Args>()).of(args);
          simt::Grid grid;
          grid.blocks = blocks, grid.threads = kernels::kThreadsOf<Args>, grid.seed = schedule++;
          if (!kernels::kHasTiles<Args>) grid.threads = std::min(grid.threads, most_threads);
          constexpr int kAll = kernels::kThreadsOf<Args>;
          if constexpr (kernels::kIsSweep<Args>) grid.threads = std::max(grid.threads, least_threads(args, kAll));
          if constexpr (kernels::kHasClusters<Args>) {
            grid.cluster = kClusterBlocks;
            grid.threads = std::max(grid.threads, least_threads(args.reduce, kAll));
            if constexpr (requires { args.spread; })
              grid.threads = std::max(grid.threads, least_threads(args.spread, kAll));
          }
          grid.shared_bytes = static_cast<size_t>(shared_bytes);
          grid.behind = true;
          if (lie.barrier.line != 0 && name_of<Args>() == lie.kernel) grid.without = &lie.barrier;
          const auto report = device.launch(grid, [args](simt::Thread& m) { kernels::run_behind(m, args); });
          for (const auto& [site, count] : report.barriers) barriers_passed[name_of<Args>()][site] += count;
        },
        any);
  }
  void clear(void* data, int64_t bytes) override {
    launches += "clear " + std::to_string(bytes) + "\n";
    simt::launch_before().be_unknown();
    std::memset(data, 0, static_cast<size_t>(bytes));
  }
};

}  // namespace
}  // namespace dia::simulated

// The device's limits from now on, and the most threads of a block.
extern "C" __attribute__((visibility("default"))) void dia_simulated_limits(int multiprocessors, int64_t l2_bytes,
                                                                            double flops, int threads) {
  using dia::simulated::limits;
  limits.multiprocessors = multiprocessors, limits.l2_bytes = l2_bytes, limits.flops = flops;
  dia::simulated::most_threads = threads, dia::simulated::schedule = 0;
}

// What has been launched since the last call, a line each: kernel, blocks, bytes of shared memory.
extern "C" __attribute__((visibility("default"))) const char* dia_simulated_launches() {
  static std::string text;
  text = std::move(dia::simulated::launches);
  dia::simulated::launches.clear();
  return text.c_str();
}

// A lie from now on (see Lie); an empty kernel: none. `file` null: no barrier is left out.
extern "C" __attribute__((visibility("default"))) void dia_simulated_lie(const char* kernel, const char* table,
                                                                         int64_t before, int64_t after,
                                                                         const char* file, uint32_t line,
                                                                         uint32_t column) {
  using dia::simulated::lie;
  lie = {kernel, table, before, after, file != nullptr ? file : "", {}};
  if (file != nullptr) lie.barrier = {lie.file, line, column};
}

// What has been seen of every kernel since the last call: "kernel|table <name>" and "kernel|barrier <file> <line>
// <column>", a line each.
extern "C" __attribute__((visibility("default"))) const char* dia_simulated_seen() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, names] : dia::simulated::tables_taken)
    for (const std::string& name : names) text += kernel + "|table " + name + "\n";
  for (const auto& [kernel, sites] : dia::simulated::barriers_passed)
    for (const auto& [site, count] : sites)
      text += kernel + "|barrier " + std::string(site.file) + " " + std::to_string(site.line) + " " +
              std::to_string(site.column) + "\n";
  dia::simulated::tables_taken.clear(), dia::simulated::barriers_passed.clear();
  return text.c_str();
}

namespace dia::ops {

struct GpuDevice::State {
  simulated::SimulatedGpu gpu;
};

// Whatever came before the operator on its stream: its first kernel waits for it before it touches anything.
GpuDevice::GpuDevice(const Tensor&) : state_(new State) { simt::launch_before().be_unknown(); }
GpuDevice::~GpuDevice() = default;
Gpu& GpuDevice::gpu() { return state_->gpu; }

void GpuDevice::product(const Tensor& out, const Tensor& left, const Tensor& right, bool add, double factor) {
  simulated::launches += "product\n";
  simt::launch_before().be_unknown();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), left.get(), right.get(), add ? 1.0 : 0.0, factor));
}

}  // namespace dia::ops

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CPU, m) { DIA_REGISTER_GPU_OPERATORS(m, "_simulated"); }
