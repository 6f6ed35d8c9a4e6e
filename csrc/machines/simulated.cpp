// The GPU kernels on the simulated machine, for pytest. Not part of the library.
//
// Tensors come as (address, shape of their memory); what a kernel may touch and what it finds there is exactly what is
// said here, so a test can also lie and see the machine object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../kernels/run.h"
#include "simt.h"

namespace py = pybind11;

namespace dia::simt {
namespace {

// A tensor of the caller's: `rows` of `length` elements, `stride` apart. Of `before` elements at its begin and `after`
// at its end the machine is not told: a kernel that touches them is out of bounds.
struct Array {
  uintptr_t address = 0;
  int64_t rows = 0, length = 0, stride = 0;
  bool defined = true;
  int64_t before = 0, after = 0;
};

using Arrays = std::map<std::string, Array>;
using Numbers = std::map<std::string, double>;

// What a test gave, and the device that knows it.
class Arguments {
 public:
  Arguments(const Arrays& arrays, const Numbers& numbers) : arrays_(arrays), numbers_(numbers) {}

  int64_t number(const std::string& name) const {
    const auto found = numbers_.find(name);
    if (found == numbers_.end()) throw std::invalid_argument(name + ": a number is missing");
    return static_cast<int64_t>(found->second);
  }
  float real(const std::string& name) const { return static_cast<float>(numbers_.at(name)); }
  template <class T>
  T* pointer(const std::string& name) {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) return nullptr;
    const Array& array = found->second;
    T* data = reinterpret_cast<T*>(array.address);
    const int64_t count = array.rows > 0 ? (array.rows - 1) * array.stride + array.length : 0;
    device.tensor(name, data + array.before, count - array.before - array.after, array.defined);
    if (array.stride > array.length && array.before == 0 && array.after == 0)
      for (int64_t row = 0; row + 1 < array.rows; ++row)
        for (int64_t k = array.length; k < array.stride; ++k)
          device.last().cells[row * array.stride + k].allowed = false;
    return data;
  }
  template <class T>
  kernels::Samples<T> map(const std::string& name) {
    const auto found = arrays_.find(name);
    if (found == arrays_.end()) return {};
    return {pointer<T>(name), found->second.stride};
  }
  kernels::MapSize size() const {
    return {static_cast<int>(number("samples")), static_cast<int>(number("channels")),
            static_cast<int>(number("positions")), number("interleaved") != 0};
  }
  GpuTile tile() const {
    return {static_cast<int>(number("tile_channels")), static_cast<int>(number("tile_positions")),
            static_cast<int>(number("tile_lanes"))};
  }
  kernels::BottleneckParts parts() { return {pointer<float>("parts"), static_cast<int>(number("parts"))}; }
  kernels::ChannelAffine affine() {
    return {pointer<const float>("shift"), pointer<const float>("d"), pointer<const float>("scale"),
            pointer<const float>("bias")};
  }
  // What both directions of the cell take.
  template <class Cell>
  Cell cell() {
    Cell args{};
    args.samples = static_cast<int>(number("samples")), args.channels = static_cast<int>(number("channels"));
    args.bottleneck = static_cast<int>(number("bottleneck")), args.tanh_output = number("tanh_output") != 0;
    args.c = pointer<const float>("c");
    args.weights = {pointer<const float>("input_reduce_weight"),  pointer<const float>("input_reduce_bias"),
                    pointer<const float>("input_expand_weight"),  pointer<const float>("input_expand_bias"),
                    pointer<const float>("hidden_reduce_weight"), pointer<const float>("hidden_reduce_bias"),
                    pointer<const float>("hidden_expand_weight"), pointer<const float>("hidden_expand_bias")};
    args.tables = {pointer<float>("p"), pointer<float>("zx"), pointer<float>("zh"), pointer<float>("gates")};
    return args;
  }
  kernels::CellForward cell_forward() {
    auto args = cell<kernels::CellForward>();
    args.h = pointer<const float>("h");
    args.new_h = pointer<float>("new_h"), args.new_c = pointer<float>("new_c");
    return args;
  }
  kernels::CellBackward cell_backward() {
    auto args = cell<kernels::CellBackward>();
    args.dh = pointer<const float>("dh"), args.dc = pointer<const float>("dc");
    args.new_c = pointer<const float>("new_c");
    args.du = pointer<float>("du"), args.dzx = pointer<float>("dzx"), args.dzh = pointer<float>("dzh");
    args.old_dh = pointer<float>("old_dh"), args.old_dc = pointer<float>("old_dc");
    return args;
  }
  // Samples of a cluster; 0: no clusters.
  int together() const { return numbers_.count("together") > 0 ? static_cast<int>(number("together")) : 0; }
  Grid grid() const {
    Grid grid;
    grid.blocks = static_cast<int>(number("blocks"));
    grid.threads = static_cast<int>(number("threads"));
    grid.shared_bytes = static_cast<size_t>(number("shared_bytes"));
    grid.seed = static_cast<uint64_t>(number("seed"));
    grid.behind = true;
    if (together() > 0) grid.cluster = kClusterBlocks;
    return grid;
  }

  Device device;

 private:
  const Arrays& arrays_;
  const Numbers& numbers_;
};

// Launches one after another, counted together.
class Launches {
 public:
  Launches(Device& device, const Grid& grid) : device_(device), grid_(grid) { launch_before().be_unknown(); }

  template <class Args>
  void add(const Args& args) {
    const Report one = device_.launch(grid_, [args](Thread& m) { kernels::run_behind(m, args); });
    for (const auto& [name, counts] : one.tensors) {
      Counts& all = report.tensors[name];
      all.bytes_read += counts.bytes_read, all.bytes_written += counts.bytes_written;
      all.sectors_read += counts.sectors_read, all.sectors_written += counts.sectors_written;
    }
    for (const auto& [site, count] : one.barriers) report.barriers[site] += count;
    for (int k = 0; k < kScopes; ++k) report.passed[k] = std::max(report.passed[k], one.passed[k]);
    report.shared_bytes = std::max(report.shared_bytes, one.shared_bytes);
  }

  Report report;

 private:
  Device& device_;
  Grid grid_;
};

// A step of all samples: what csrc/ops launches where the cell is made by tiles, or by clusters.
template <class T, bool kAffine>
void forward_step(Arguments& of, Launches& launches) {
  const kernels::CellForward cell = of.cell_forward();
  const kernels::BottleneckParts parts = of.parts();
  kernels::Reduce<T> reduce{};
  kernels::Spread<T> spread{};
  reduce.size = spread.size = of.size(), reduce.tile = spread.tile = of.tile();
  reduce.x = spread.x = of.map<const T>("x"), reduce.means.p = cell.tables.p;
  spread.shortcut = of.map<const T>("shortcut"), spread.out = of.map<T>("y");
  spread.relu = of.number("relu") != 0, spread.scale = cell.new_h;
  kernels::CellStates<kAffine> states{};
  states.cell = cell;
  if (kAffine) {
    states.affine = reduce.means.affine = of.affine(), reduce.means.off = of.pointer<float>("off");
    reduce.shift = spread.shift = states.affine.shift;
    spread.scale = states.factor = of.pointer<float>("factor");
    spread.offset = states.added = of.pointer<float>("added");
  }
  if (const int together = of.together(); together > 0) {
    return launches.add(kernels::ClusterStep<T, kAffine>{together, reduce, spread, states});
  }
  const kernels::JoinParts join = kernels::join_of(cell, parts);
  launches.add(reduce), launches.add(kernels::BottleneckSums{cell, join});
  if (parts.count > 1) launches.add(join);
  launches.add(states), launches.add(spread);
}

template <class T, bool kAffine>
void backward_step(Arguments& of, Launches& launches) {
  const kernels::CellBackward cell = of.cell_backward();
  const kernels::BottleneckParts parts = of.parts();
  kernels::Reduce<T> reduce{};
  kernels::Spread<T> spread{};
  reduce.size = spread.size = of.size(), reduce.tile = spread.tile = of.tile();
  reduce.dy = spread.dy = of.map<const T>("dy"), reduce.y = spread.y = of.map<const T>("y");
  reduce.x = of.map<const T>("x"), reduce.g = of.map<T>("dshortcut"), spread.out = of.map<T>("dx");
  if (reduce.g.data != nullptr) spread.dy = {reduce.g.data, reduce.g.stride}, spread.y = {};
  kernels::SplitGateGradients<kAffine> gates{};
  gates.cell = cell;
  gates.product = reduce.product = of.pointer<float>("product");
  kernels::CellGradients gradients{};
  gradients.cell = cell;
  gradients.positions = reduce.size.positions;
  spread.scale = gates.factor = of.pointer<float>("factor");
  spread.offset = gradients.means.offset = of.pointer<float>("offset");
  if (kAffine) {
    // Of a norm whose rstd is the scale, without gamma.
    const kernels::ChannelAffine affine = of.affine();
    reduce.shift = affine.shift, gradients.scale = of.pointer<float>("scale again");
    gates.norm = {
        affine.d, affine.scale, nullptr, affine.bias, of.pointer<float>("scale again"), of.pointer<float>("h again")};
    gates.sum = reduce.sum = of.pointer<float>("sum"), gradients.means.dp = of.pointer<float>("dp");
  }
  if (const int together = of.together(); together > 0) {
    launches.add(kernels::ClusterGradient<T, kAffine>{together, reduce, gates, parts.data, gradients.means});
  } else {
    const kernels::JoinParts join = kernels::join_of(cell, parts);
    launches.add(reduce), launches.add(gates), launches.add(kernels::BottleneckGradientSums{cell, join});
    if (parts.count > 1) launches.add(join);
    launches.add(gradients);
  }
  if (spread.out.data != nullptr) launches.add(spread);
}

template <class T>
void reduce(Arguments& of, Launches& launches) {
  kernels::Reduce<T> args{};
  args.size = of.size(), args.tile = of.tile();
  args.x = of.map<const T>("x"), args.dy = of.map<const T>("dy"), args.y = of.map<const T>("y"),
  args.g = of.map<T>("g"), args.mask = of.map<const uint8_t>("mask");
  args.shift = of.pointer<const float>("shift"), args.first = of.pointer<float>("first"),
  args.rest = of.pointer<float>("rest");
  args.sum = of.pointer<float>("sum"), args.product = of.pointer<float>("product");
  launches.add(args);
}

template <class T>
void spread(Arguments& of, Launches& launches) {
  kernels::Spread<T> args{};
  args.size = of.size(), args.tile = of.tile(), args.relu = of.number("relu") != 0;
  args.dy = of.map<const T>("dy"), args.y = of.map<const T>("y");
  args.x = of.map<const T>("x"), args.shortcut = of.map<const T>("shortcut"), args.out = of.map<T>("out");
  args.mask = of.map<const uint8_t>("mask"), args.passed = of.map<uint8_t>("passed");
  args.scale = of.pointer<const float>("scale"), args.offset = of.pointer<const float>("offset");
  args.shift = of.pointer<const float>("shift"), args.slope = of.pointer<const float>("slope");
  launches.add(args);
}

template <int kTile>
void weight_gradients(Arguments& of, Launches& launches) {
  kernels::WeightGradients<kTile> args{};
  args.samples = static_cast<int>(of.number("samples")), args.steps = static_cast<int>(of.number("steps"));
  // The tables of each step: where they begin among its factors, and among its tables, is the same in all.
  int64_t dzx = 0, dzh = 0, zx = 0, zh = 0;
  for (int step = 0; step < args.steps; ++step) {
    const auto pointer = [&](const char* name) { return of.pointer<const float>(name + std::to_string(step)); };
    const float *factors = pointer("du"), *tables = pointer("p");
    dzx = pointer("dzx") - factors, dzh = pointer("dzh") - factors;
    zx = pointer("zx") - tables, zh = pointer("zh") - tables;
    args.of[step] = {factors, tables, pointer("h")};
  }
  const int channels = static_cast<int>(of.number("channels")), bottleneck = static_cast<int>(of.number("bottleneck"));
  const auto add = [&](int64_t left, int rows, int64_t right, int columns, const char* out) {
    args.products[args.count++] = {left, right, of.pointer<float>(out), rows, columns};
  };
  add(dzx, bottleneck, 0, channels, "d_input_reduce_weight");
  add(dzx, bottleneck, 0, 0, "d_input_reduce_bias");
  add(0, 4 * channels, zx, bottleneck, "d_input_expand_weight");
  add(0, 4 * channels, 0, 0, "d_input_expand_bias");
  add(dzh, bottleneck, kernels::WeightGradient::kState, channels, "d_hidden_reduce_weight");
  add(dzh, bottleneck, 0, 0, "d_hidden_reduce_bias");
  add(0, 4 * channels, zh, bottleneck, "d_hidden_expand_weight");
  add(0, 4 * channels, 0, 0, "d_hidden_expand_bias");
  launches.add(args);
}

void batch_statistics(Arguments& of, Launches& launches) {
  const kernels::MapSize size = of.size();
  const kernels::BatchStatistics args{size.samples,
                                      size.channels,
                                      size.positions,
                                      of.real("eps"),
                                      of.pointer<float>("first"),
                                      of.pointer<float>("sum"),
                                      of.pointer<float>("rest"),
                                      of.pointer<float>("squares"),
                                      of.pointer<const float>("gamma"),
                                      of.pointer<const float>("beta"),
                                      of.pointer<float>("off"),
                                      of.pointer<float>("p"),
                                      of.pointer<double>("variance"),
                                      of.pointer<float>("shift"),
                                      of.pointer<float>("d"),
                                      of.pointer<float>("scale"),
                                      of.pointer<float>("bias"),
                                      of.pointer<float>("rstd"),
                                      of.pointer<float>("mean"),
                                      of.pointer<float>("var")};
  launches.add(args);
}

void norm_gradients(Arguments& of, Launches& launches) {
  const kernels::MapSize size = of.size();
  const kernels::NormGradients args{size.samples,
                                    size.channels,
                                    size.positions,
                                    of.pointer<float>("slope") != nullptr,
                                    of.pointer<const float>("sum"),
                                    of.pointer<const float>("product"),
                                    of.pointer<const float>("dp"),
                                    of.pointer<const float>("off"),
                                    of.pointer<const float>("new_h"),
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    nullptr,
                                    of.pointer<const float>("d"),
                                    of.pointer<const float>("rstd"),
                                    of.pointer<const float>("gamma"),
                                    of.pointer<float>("d_scale"),
                                    of.pointer<float>("d_bias"),
                                    of.pointer<float>("factor"),
                                    of.pointer<float>("offset"),
                                    of.pointer<float>("slope")};
  launches.add(args);
}

// A barrier by its place in the source, as in a report.
using Place = std::tuple<std::string, uint32_t, uint32_t>;

py::dict launch(const std::string& kernel, const std::string& dtype, const Arrays& arrays, const Numbers& numbers,
                const std::optional<Place>& without) {
  Arguments arguments(arrays, numbers);
  Grid grid = arguments.grid();
  Site left_out;
  if (without) {
    left_out = {std::get<0>(*without), std::get<1>(*without), std::get<2>(*without)};
    grid.without = &left_out;
  }
  Launches launches(arguments.device, grid);
  const auto of_type = [&]<class T>(T) {
    const bool affine = numbers.count("affine") > 0 && numbers.at("affine") != 0;
    if (kernel == "step_forward")
      affine ? forward_step<T, true>(arguments, launches) : forward_step<T, false>(arguments, launches);
    else if (kernel == "step_backward")
      affine ? backward_step<T, true>(arguments, launches) : backward_step<T, false>(arguments, launches);
    else if (kernel == "batch_statistics")
      batch_statistics(arguments, launches);
    else if (kernel == "norm_gradients")
      norm_gradients(arguments, launches);
    else if (kernel == "reduce")
      reduce<T>(arguments, launches);
    else if (kernel == "spread")
      spread<T>(arguments, launches);
    else if (kernel == "weight_gradients 32")
      weight_gradients<32>(arguments, launches);
    else if (kernel == "weight_gradients 64")
      weight_gradients<64>(arguments, launches);
    else
      throw std::invalid_argument("kernel: no " + kernel);
  };
  if (dtype == "float32")
    of_type(float());
  else if (dtype == "bfloat16")
    of_type(BFloat16());
  else if (dtype == "float16")
    of_type(Float16());
  else
    throw std::invalid_argument("dtype: no kernels for " + dtype);
  const Report& report = launches.report;
  py::dict tensors, barriers;
  for (const auto& [name, counts] : report.tensors)
    tensors[py::str(name)] =
        py::make_tuple(counts.bytes_read, counts.bytes_written, counts.sectors_read, counts.sectors_written);
  for (const auto& [site, count] : report.barriers)
    barriers[py::make_tuple(std::string(site.file), site.line, site.column)] = count;
  py::dict result;
  result["tensors"] = tensors;
  result["barriers"] = barriers;
  result["passed"] = report.passed;
  result["shared_bytes"] = report.shared_bytes;
  return result;
}

}  // namespace
}  // namespace dia::simt

PYBIND11_MODULE(dia_simulated, module) {
  using dia::simt::Array;
  py::class_<Array>(module, "Array")
      .def(py::init([](uintptr_t address, int64_t rows, int64_t length, int64_t stride, bool defined, int64_t before,
                       int64_t after) { return Array{address, rows, length, stride, defined, before, after}; }));
  py::register_exception<dia::simt::LaunchError>(module, "LaunchError", PyExc_RuntimeError);
  module.def("launch", &dia::simt::launch, py::arg("kernel"), py::arg("dtype"), py::arg("arrays"), py::arg("numbers"),
             py::arg("without") = std::nullopt);
}
