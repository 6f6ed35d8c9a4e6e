// What the operators on a GPU share: plans that fit the device, maps and workspaces, and the cell between two sweeps.
#pragma once

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "arguments.h"
#include "gpu_device.h"

namespace dia::ops {
namespace {

using kernels::from_sample;
using kernels::join_of;
using kernels::of_samples;
using kernels::rows_from;
using kernels::Samples;

// Whether every sample of a map begins at sixteen bytes. An absent map does.
template <class T>
bool begins_packs(const Samples<const T>& map, int64_t samples) {
  return reinterpret_cast<uintptr_t>(map.data) % 16 == 0 && (samples <= 1 || map.stride % Pack<T>::size == 0);
}

// A map as the kernels take it: samples at any distance, each dense. Where a tensor is not, `tensor` is a copy.
template <class T>
struct GpuMap {
  Tensor tensor;
  Samples<const T> samples;

  // `packs`: whether each sample must begin a pack.
  GpuMap(const Tensor& t, const MapInfo& info, bool packs = false) : tensor(t) {
    if (!dense_samples(info)) {
      using torch::headeronly::MemoryFormat;
      const bool last = info.format == dia::MemoryFormat::channels_last;
      tensor = torch::stable::contiguous(t, !last          ? MemoryFormat::Contiguous
                                            : t.dim() == 4 ? MemoryFormat::ChannelsLast
                                                           : MemoryFormat::ChannelsLast3d);
    }
    samples = {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
    if (!packs || begins_packs(samples, info.shape.samples)) return;
    tensor = empty_strided(info.sizes, info.strides, t, dtype_code(t));
    torch::stable::copy_(tensor, t);
    samples = {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0)};
  }

 private:
  bool dense_samples(const MapInfo& info) const {
    const auto strides = row_strides(tensor.sizes().data(), tensor.strides().data(), static_cast<int>(tensor.dim()),
                                     info.channel_first, info.shape.interleaved);
    return strides && (info.shape.rows() <= 1 || strides->row == info.shape.row_length());
  }
};

template <class T>
struct OptionalGpuMap {
  std::optional<GpuMap<T>> map;
  Samples<const T> samples;

  OptionalGpuMap(const OptionalTensor& t, const MapInfo& info, bool packs = false) {
    if (!t) return;
    map.emplace(*t, info, packs);
    samples = map->samples;
  }
};

// A result shaped like x in the output format, or an empty one if it is not wanted.
template <class T>
struct GpuResult {
  Tensor tensor;
  Samples<T> samples;

  GpuResult(bool wanted, const Tensor& x, const MapInfo& info)
      : tensor(wanted ? empty_strided(info.sizes, info.strides, x, dtype_code(x))
                      : empty_strided({0}, {1}, x, dtype_code(x))) {
    if (wanted) samples = {static_cast<T*>(tensor.mutable_data_ptr()), info.shape.channels * info.shape.positions};
  }
  Samples<const T> read() const { return {samples.data, samples.stride}; }
};

// A mask as the kernels take it; an empty one is none.
template <class B = const uint8_t>
Samples<B> mask_samples(const OptionalTensor& mask, const MapInfo& info) {
  if (!mask || mask->numel() == 0) return {};
  return {static_cast<B*>(mask->mutable_data_ptr()), info.shape.channels * info.shape.positions / 8};
}

// The parameters as the kernels take them; `dense` keeps what had to be copied.
struct GpuWeights {
  std::vector<Tensor> kept;
  kernels::CellWeights weights{};

  explicit GpuWeights(const Parameters& w) {
    weights = {add(w.input_reduce_weight),  add(w.input_reduce_bias),    add(w.input_expand_weight),
               add(w.input_expand_bias),    add(w.hidden_reduce_weight), add(w.hidden_reduce_bias),
               add(w.hidden_expand_weight), add(w.hidden_expand_bias)};
  }
  explicit GpuWeights(const Weights& w) {
    weights.input_reduce = add(w.input_reduce), weights.input_expand = add(w.input_expand);
    weights.hidden_reduce = add(w.hidden_reduce), weights.hidden_expand = add(w.hidden_expand);
  }

 private:
  const float* add(const Tensor& t) {
    kept.push_back(dense(t));
    return static_cast<const float*>(kept.back().const_data_ptr());
  }
};

// What DIA_KERNELS_PLANS names; any where it is not set.
inline GpuLayouts layouts_of_environment() {
  const char* name = std::getenv("DIA_KERNELS_PLANS");
  if (name == nullptr || *name == 0) return GpuLayouts::any;
  std::string known;
  for (int k = 0; const char* layout : kLayoutNames) {
    if (std::strcmp(name, layout) == 0) return static_cast<GpuLayouts>(k);
    known += (k++ > 0 ? ", " : "") + std::string(layout);
  }
  check(false, "DIA_KERNELS_PLANS: expected one of ", known, ", got ", name);
  return GpuLayouts::any;
}

// Which plans are taken, in this process.
inline std::atomic<GpuLayouts>& layouts() {
  static std::atomic<GpuLayouts> chosen{layouts_of_environment()};
  return chosen;
}

// One call of an operator: its device, the sizes, and what it allocates on the way.
class GpuCall {
 public:
  GpuCall(const Tensor& x, const MapInfo& info, int64_t bottleneck)
      : device_(x), x_(x), shape_(info.shape), bottleneck_(bottleneck), limits_(device_.gpu().limits()) {
    for (const int64_t size : {shape_.samples, shape_.channels, shape_.positions, bottleneck})
      check(size <= INT32_MAX / 8, "x: expected sizes of at most ", INT32_MAX / 8, ", got ", sizes_text(x));
  }

  int64_t samples() const { return shape_.samples; }
  int64_t channels() const { return shape_.channels; }
  int64_t positions() const { return shape_.positions; }
  int64_t bottleneck() const { return bottleneck_; }
  kernels::MapSize size(int64_t samples) const {
    return {static_cast<int>(samples), static_cast<int>(shape_.channels), static_cast<int>(shape_.positions),
            shape_.interleaved};
  }
  template <class Cell>
  Cell cell(bool tanh_output) const {
    Cell cell{};
    cell.samples = static_cast<int>(shape_.samples), cell.channels = static_cast<int>(shape_.channels);
    cell.bottleneck = static_cast<int>(bottleneck_), cell.tanh_output = tanh_output;
    return cell;
  }

  Tensor table(const std::vector<int64_t>& sizes) const { return empty_table<float>(x_, sizes); }
  // A table that lives as long as the call. Several come out of one allocation, with a gap between: asking torch's
  // allocator for each would take longer than a small step does on the device.
  float* scratch(int64_t count) {
    constexpr int64_t kBlock = 1 << 18, kGap = 64;
    const int64_t taken = rounded_up(count, 64) + kGap;
    if (taken > left_) {
      left_ = std::max(taken, kBlock);
      kept_.push_back(table({left_}));
      next_ = data_of<float>(kept_.back());
    }
    left_ -= taken;
    return std::exchange(next_, next_ + taken);
  }

  // The plan for a direction.
  GpuPlan plan(bool combined, bool masked, bool backward, GpuNorm norm, int element_bytes, bool aligned) {
    GpuProblem problem{};
    problem.samples = shape_.samples, problem.channels = shape_.channels, problem.positions = shape_.positions;
    problem.bottleneck = bottleneck_, problem.element_bytes = element_bytes, problem.interleaved = shape_.interleaved;
    problem.aligned = aligned, problem.combined = combined, problem.backward = backward, problem.norm = norm;
    problem.masked = masked;
    problem.tf32 = false;  // whether torch allows it cannot be asked from here
    return known_plan(problem);
  }

  void clear(float* table, int64_t count) { device_.gpu().clear(table, count * static_cast<int64_t>(sizeof(float))); }

  // A sweep over args.size.samples samples.
  template <class T>
  void launch_sweep(kernels::Reduce<T> args) {
    const GpuProblem problem = swept<T>(args.size, {args.x, args.dy, args.y, {args.g.data, args.g.stride}});
    args.tile = detail::reduce_tile_of(problem, limits_, args.dy.data == nullptr);
    const int64_t shared = reduce_shared_bytes(args.tile, args.size.interleaved, sizeof(T));
    // Tasks of an interleaved map are large. Of a planar map without dy blocks that stay were faster: 2 % of a forward
    // pass at 256x256x56², where those of its gradient lost 3 %.
    if (args.size.interleaved || args.dy.data != nullptr)
      launch_tasks(args, args.size.interleaved, shared);
    else
      launch_blocks(args, kernels::tasks_of(args.size, args.tile), kSweepResident, shared);
  }
  template <class T>
  void launch_sweep(kernels::Spread<T> args) {
    const Samples<const T> out{args.out.data, args.out.stride};
    args.tile = detail::spread_tile_of(swept<T>(args.size, {args.x, args.shortcut, args.dy, args.y, out}), limits_);
    launch_tasks(args, false, 0);
  }

  template <class T>
  void launch_sweep(kernels::Extremes<T> args) {
    args.tile = detail::reduce_tile_of(swept<T>(args.size, {args.x}), limits_, true);
    const int64_t shared = extreme_shared_bytes(args.size.interleaved, sizeof(T));
    if (args.size.interleaved)
      launch_tasks(args, true, shared);
    else
      launch_blocks(args, kernels::tasks_of(args.size, args.tile), kSweepResident, shared);
  }

  // A step, or a gradient up to its second sweep, by clusters of `together` samples each.
  template <class T, bool kAffine>
  void launch_clusters(kernels::ClusterStep<T, kAffine> args, int64_t together) {
    const kernels::Spread<T>& spread = args.spread;
    const GpuProblem problem = of_clusters<T>(false, {spread.x, spread.shortcut, {spread.out.data, spread.out.stride}});
    args.reduce.tile = detail::cluster_tile_of(problem, together, true);
    args.spread.tile = detail::cluster_tile_of(problem, together, false);
    launch_clusters(args, problem, together);
  }
  template <class T, bool kAffine>
  void launch_clusters(kernels::ClusterGradient<T, kAffine> args, int64_t together) {
    const kernels::Reduce<T>& reduce = args.reduce;
    const GpuProblem problem = of_clusters<T>(true, {reduce.x, reduce.dy, reduce.y, {reduce.g.data, reduce.g.stride}});
    args.reduce.tile = detail::cluster_tile_of(problem, together, true);
    args.parts = scratch(kClusterBlocks * shape_.samples * 2 * bottleneck_);
    launch_clusters(args, problem, together);
  }

  // A kernel of `count` values of tables, one a thread.
  void launch_elements(const AnyKernel& kernel, int64_t count) {
    launch_blocks(kernel, detail::parts(count, kernels::kTableThreads), 8, 0);
  }
  // A kernel whose blocks have some channels each.
  void launch_channels(const AnyKernel& kernel) {
    launch_blocks(kernel, kernels::tasks_of_channels(static_cast<int>(shape_.channels)), 8,
                  kernels::norm_shared_bytes(kernels::kTableThreads));
  }
  // A kernel of `tiles` of the cell's products.
  void launch_tiles(const AnyKernel& kernel, int64_t tiles) {
    launch_blocks(kernel, tiles, 4, kernels::CellTiles::kBytes);
  }
  // Parts of both bottlenecks' sums of `inner` terms each, of `samples`, and memory for them: as many as
  // multiprocessors wait for, of at least 64 terms.
  kernels::BottleneckParts parts_of(int64_t samples, int64_t inner) {
    using Tiles = kernels::CellTiles;
    const int64_t tiles = 2 * detail::parts(samples, Tiles::kSamples) * detail::parts(bottleneck_, Tiles::kBottleneck);
    const int64_t count = std::clamp(4 * limits_.multiprocessors / std::max<int64_t>(tiles, 1), int64_t{1},
                                     inner <= kTermsInOnePart ? 1 : std::min<int64_t>(inner / 64, kernels::kMostParts));
    return {count > 1 ? scratch(count * samples * 2 * bottleneck_) : nullptr, static_cast<int>(count)};
  }
  void launch_weights(const std::vector<kernels::WeightGradient>& products,
                      const std::vector<kernels::StepTables>& steps) {
    if (!launch_weights<64>(products, steps, limits_.multiprocessors)) launch_weights<32>(products, steps, 0);
  }

  // out (rows, columns) = factor left right (+ out), all dense; `transposed`: the right one is (columns, inner).
  void product(float* out, const float* left, int64_t rows, int64_t inner, const float* right, int64_t columns,
               bool transposed, bool add = false, double factor = 1.0) {
    if (rows == 0) return;
    device_.product(view(out, rows, columns, columns, 1), view(left, rows, inner, inner, 1),
                    transposed ? view(right, inner, columns, 1, inner) : view(right, inner, columns, columns, 1), add,
                    factor);
  }

 private:
  // `large`: see detail::sweep_blocks.
  template <class Sweep>
  void launch_tasks(const Sweep& args, bool large, int64_t shared_bytes) {
    const int64_t tasks = kernels::tasks_of(args.size, args.tile);
    if (tasks == 0) return;
    device_.gpu().launch(args, static_cast<int>(detail::sweep_blocks(tasks, large, limits_)), shared_bytes);
  }
  void launch_blocks(const AnyKernel& kernel, int64_t tasks, int resident, int64_t shared_bytes) {
    if (tasks == 0) return;
    const int64_t most = static_cast<int64_t>(limits_.multiprocessors) * resident;
    device_.gpu().launch(kernel, static_cast<int>(std::min(tasks, most)), shared_bytes);
  }
  // A problem of this call, for clusters.
  template <class T>
  GpuProblem of_clusters(bool backward, std::initializer_list<Samples<const T>> maps) const {
    GpuProblem problem = swept<T>(size(shape_.samples), maps);
    problem.bottleneck = bottleneck_, problem.backward = backward;
    return problem;
  }
  template <class Args>
  void launch_clusters(Args& args, const GpuProblem& problem, int64_t together) {
    if (shape_.samples == 0) return;
    args.together = static_cast<int>(together);
    device_.gpu().launch(args, static_cast<int>(detail::parts(shape_.samples, together) * kClusterBlocks),
                         detail::cluster_shared_bytes(problem, together));
  }
  // Whether there were at least so many tiles.
  template <int kTile>
  bool launch_weights(const std::vector<kernels::WeightGradient>& products,
                      const std::vector<kernels::StepTables>& steps, int64_t least) {
    kernels::WeightGradients<kTile> args{};
    args.samples = static_cast<int>(shape_.samples);
    int64_t tiles = 0;
    for (const kernels::WeightGradient& product : products) {
      args.products[args.count++] = product;
      tiles += args.tiles_of(product);
    }
    if (tiles < least) return false;
    for (size_t first = 0; first < steps.size(); first += static_cast<size_t>(args.steps)) {
      args.add = first > 0;
      args.steps = static_cast<int>(std::min<size_t>(steps.size() - first, kernels::kMostSteps));
      std::copy_n(steps.begin() + static_cast<int64_t>(first), args.steps, args.of);
      launch_blocks(args, tiles, 4, args.kSharedBytes);
    }
    return true;
  }
  // What a sweep's tile depends on. A planar row may begin anywhere in its packs.
  template <class T>
  static GpuProblem swept(const kernels::MapSize& size, std::initializer_list<Samples<const T>> maps) {
    GpuProblem problem{};
    problem.samples = size.samples, problem.channels = size.channels, problem.positions = size.positions;
    problem.element_bytes = sizeof(T), problem.interleaved = size.interleaved;
    problem.aligned = (size.interleaved ? size.channels : size.positions) % Pack<T>::size == 0;
    for (const Samples<const T>& map : maps)
      problem.aligned = problem.aligned && (!size.interleaved || begins_packs(map, size.samples));
    return problem;
  }
  Tensor view(const float* data, int64_t rows, int64_t columns, int64_t row, int64_t column) const {
    int32_t type, index;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x_.get(), &type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x_.get(), &index));
    const int64_t sizes[] = {rows, columns}, strides[] = {row, column};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<float*>(data), 2, sizes, strides, 0,
                                                                     aoti_torch_dtype_float32(), type, index, &handle));
    return Tensor(handle);
  }
  // Plans are made once for each problem and device.
  GpuPlan known_plan(const GpuProblem& p) {
    static std::mutex mutex;
    static std::map<std::array<int64_t, 18>, GpuPlan> known;
    const std::array<int64_t, 18> key{x_.get_device_index(),
                                      p.samples,
                                      p.channels,
                                      p.positions,
                                      p.bottleneck,
                                      p.element_bytes,
                                      p.interleaved,
                                      p.aligned,
                                      p.combined,
                                      p.masked,
                                      p.backward,
                                      p.tf32,
                                      static_cast<int64_t>(p.norm),
                                      limits_.multiprocessors,
                                      limits_.l2_bytes,
                                      static_cast<int64_t>(limits_.flops),
                                      limits_.clusters,
                                      static_cast<int64_t>(layouts().load())};
    {
      const std::lock_guard lock(mutex);
      const auto found = known.find(key);
      if (found != known.end()) return found->second;
    }
    const GpuPlan plan = plan_step(p, limits_, layouts().load());
    const std::lock_guard lock(mutex);
    return known[key] = plan;
  }

  GpuDevice device_;
  Tensor x_;
  MapShape shape_;
  int64_t bottleneck_;
  GpuLimits limits_;
  std::vector<Tensor> kept_;
  float* next_ = nullptr;  // of the last of them, and how many floats are left there
  int64_t left_ = 0;
};

// Whether every run of these maps begins at sixteen bytes, in every sample; absent ones do not matter.
template <class T>
bool aligned_maps(const MapInfo& info, std::initializer_list<Samples<const T>> maps) {
  const int64_t pack = 16 / static_cast<int64_t>(sizeof(T));
  bool aligned = !info.shape.interleaved || info.shape.channels % pack == 0;
  for (const Samples<const T>& map : maps) aligned = aligned && begins_packs(map, info.shape.samples);
  return aligned;
}

// --- the cell between two sweeps -----------------------------------------------------------------------

// From the means of cell.samples samples: tables and state, and what the second sweep applies.
template <bool kAffine>
void run_cell(GpuCall& call, const GpuPlan& plan, const kernels::CellForward& cell,
              const kernels::ChannelAffine& affine, float* factor, float* added) {
  const int64_t n = cell.samples, c = cell.channels, m = cell.bottleneck;
  if (plan.cell == GpuCell::tiles) {
    const kernels::BottleneckParts parts = call.parts_of(n, c);
    const kernels::JoinParts join = join_of(cell, parts);
    const bool both = cell.h != nullptr;
    call.launch_tiles(kernels::BottleneckSums{cell, join},
                      parts.count * parts.tiles(cell.samples, cell.bottleneck, both));
    if (parts.count > 1) call.launch_elements(join, 2 * n * m);
    call.launch_tiles(kernels::CellStates<kAffine>{cell, affine, factor, added},
                      detail::parts(n, kernels::CellTiles::kSamples) * detail::parts(c, kernels::CellTiles::kChannels));
    return;
  }
  call.product(cell.tables.zx, cell.tables.p, n, c, cell.weights.input_reduce, m, true);
  call.launch_elements(
      kernels::Rectify{n * m, cell.tables.zx, cell.weights.input_reduce_bias, nullptr, cell.bottleneck, false}, n * m);
  if (cell.h != nullptr) call.product(cell.tables.zh, cell.h, n, c, cell.weights.hidden_reduce, m, true);
  call.launch_elements(kernels::Rectify{n * m, cell.tables.zh, cell.weights.hidden_reduce_bias, nullptr,
                                        cell.bottleneck, cell.h == nullptr},
                       n * m);
  float* products = call.scratch(n * 4 * c);
  call.product(products, cell.tables.zx, n, m, cell.weights.input_expand, 4 * c, true);
  call.product(products, cell.tables.zh, n, m, cell.weights.hidden_expand, 4 * c, true, true);
  call.launch_elements(kernels::SplitGates<kAffine>{cell, products, affine, factor, added}, n * c);
}

// From the sums of the map's gradient: that of the pre-activations and bottlenecks, of the old state, and of the means.
template <bool kAffine>
void run_cell_gradient(GpuCall& call, const GpuPlan& plan, const kernels::SplitGateGradients<kAffine>& gates,
                       const kernels::MeanGradient& means) {
  const kernels::CellBackward& cell = gates.cell;
  const int64_t n = cell.samples, c = cell.channels, m = cell.bottleneck;
  call.launch_elements(gates, n * c);
  if (plan.cell == GpuCell::tiles) {
    const kernels::BottleneckParts parts = call.parts_of(n, 4 * c);
    const kernels::JoinParts join = join_of(cell, parts);
    call.launch_tiles(kernels::BottleneckGradientSums{cell, join},
                      parts.count * parts.tiles(cell.samples, cell.bottleneck, true));
    if (parts.count > 1) call.launch_elements(join, 2 * n * m);
    const float* scale = kAffine && means.offset != nullptr ? gates.norm.scale : nullptr;
    const kernels::CellGradients gradients{cell, means, scale, static_cast<int>(call.positions())};
    call.launch_tiles(gradients, gradients.tasks());
    return;
  }
  const auto down = [&](float* dz, const float* expand, const float* z) {
    call.product(dz, cell.du, n, 4 * c, expand, m, false);
    call.launch_elements(kernels::Rectify{n * m, dz, nullptr, z, cell.bottleneck, false}, n * m);
  };
  down(cell.dzx, cell.weights.input_expand, cell.tables.zx);
  down(cell.dzh, cell.weights.hidden_expand, cell.tables.zh);
  if (cell.old_dh != nullptr) call.product(cell.old_dh, cell.dzh, n, m, cell.weights.hidden_reduce, c, false);
  const double share = call.positions() == 0 ? 1.0 : 1.0 / static_cast<double>(call.positions());
  const auto gradient = [&](float* to, double factor_of) {
    if (to != nullptr) call.product(to, cell.dzx, n, m, cell.weights.input_reduce, c, false, false, factor_of);
  };
  gradient(means.dp, 1.0);
  if (!kAffine) return gradient(means.offset, share);
  if (means.offset != nullptr)
    call.launch_elements(kernels::MeanGradients{n * c, cell.channels, static_cast<int>(call.positions()), means.dp,
                                                gates.norm.scale, means.offset},
                         n * c);
}

// --- gradients of the parameters ---------------------------------------------------------------------------

// The flat gradient of the parameters, to `to`, from what steps left: all of them with a state, or none.
inline void launch_parameter_gradients(GpuCall& call, const std::vector<kernels::StepTables>& steps, float* to) {
  const int64_t n = call.samples();
  const int c = static_cast<int>(call.channels()), m = static_cast<int>(call.bottleneck());
  const FlatParameters at(c, m);
  // Where each table begins, in every step: among its factors, and among its tables.
  const Factors<const float> factors(steps.front().factors, n, c, m);
  const Tables<const float> tables(steps.front().tables, n, c, m);
  const int64_t du = 0, dzx = factors.dzx - factors.du, dzh = factors.dzh - factors.du;
  const int64_t p = 0, zx = tables.zx - tables.p, zh = tables.zh - tables.p;
  std::vector<kernels::WeightGradient> products{
      {dzx, p, to + at.input_reduce_weight, m, c},     {dzx, 0, to + at.input_reduce_bias, m, 0},
      {du, zx, to + at.input_expand_weight, 4 * c, m}, {du, 0, to + at.input_expand_bias, 4 * c, 0},
      {dzh, 0, to + at.hidden_reduce_bias, m, 0},      {du, zh, to + at.hidden_expand_weight, 4 * c, m},
      {du, 0, to + at.hidden_expand_bias, 4 * c, 0},
  };
  // With no state the old h is 0, and so is the gradient of what multiplies it.
  if (steps.front().h != nullptr)
    products.push_back({dzh, kernels::WeightGradient::kState, to + at.hidden_reduce_weight, m, c});
  else
    call.clear(to + at.hidden_reduce_weight, call.bottleneck() * call.channels());
  call.launch_weights(products, steps);
}

// Gradients of the parameters as they are asked for: flat, or their factors, which the cell's gradient makes.
struct ParameterGradients {
  bool wanted;  // flat
  OptionalTensor h;
  Tensor result;

  ParameterGradients(GpuCall& call, const OptionalTensor& old_h, WantedParameters as)
      : wanted(as.flat()),
        h(wanted ? dense(old_h) : std::nullopt),
        result(call.table({wanted         ? FlatParameters(call.channels(), call.bottleneck()).count
                           : as.factors() ? Factors<float>::count(call.samples(), call.channels(), call.bottleneck())
                                          : int64_t{0}})) {}

  // Where the cell's gradient puts the factors.
  float* factors(GpuCall& call) const {
    if (!wanted && result.numel() > 0) return data_of<float>(result);
    return call.scratch(Factors<float>::count(call.samples(), call.channels(), call.bottleneck()));
  }

  // The flat one, from what the cell's gradient left, of all samples.
  void launch(GpuCall& call, const kernels::CellBackward& cell) const {
    if (wanted) launch_parameter_gradients(call, {{cell.du, cell.tables.p, data_of<float>(h)}}, data_of<float>(result));
  }
};

}  // namespace
}  // namespace dia::ops
