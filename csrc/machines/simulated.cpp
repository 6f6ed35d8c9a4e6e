// The GPU kernels on the simulated machine, for pytest. Not part of the library.
//
// Tensors come as (address, shape of their memory); what a kernel may touch and what it finds there is exactly what is
// said here, so a test can also lie and see the machine object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "../kernels/step_backward.h"
#include "../kernels/step_forward.h"
#include "../kernels/sweeps.h"
#include "../kernels/weight_gradients.h"
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
using Numbers = std::map<std::string, int64_t>;

// What a test gave, and the device that knows it.
class Arguments {
 public:
  Arguments(const Arrays& arrays, const Numbers& numbers) : arrays_(arrays), numbers_(numbers) {}

  int64_t number(const std::string& name) const {
    const auto found = numbers_.find(name);
    if (found == numbers_.end()) throw std::invalid_argument(name + ": a number is missing");
    return found->second;
  }
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
  kernels::Tile tile() const {
    return {static_cast<int>(number("tile_channels")), static_cast<int>(number("tile_positions"))};
  }
  kernels::CellWeights weights() {
    return {pointer<const float>("input_reduce_weight"),  pointer<const float>("input_reduce_bias"),
            pointer<const float>("input_expand_weight"),  pointer<const float>("input_expand_bias"),
            pointer<const float>("hidden_reduce_weight"), pointer<const float>("hidden_reduce_bias"),
            pointer<const float>("hidden_expand_weight"), pointer<const float>("hidden_expand_bias")};
  }
  kernels::ChannelAffine affine() {
    return {pointer<const float>("shift"), pointer<const float>("d"), pointer<const float>("scale"),
            pointer<const float>("bias")};
  }
  kernels::CellTables tables() {
    return {pointer<float>("p"), pointer<float>("zx"), pointer<float>("zh"), pointer<float>("gates")};
  }
  Grid grid() const {
    Grid grid;
    grid.teams = static_cast<int>(number("teams"));
    grid.ranks = static_cast<int>(number("ranks"));
    grid.threads = static_cast<int>(number("threads"));
    grid.shared_bytes = static_cast<size_t>(number("shared_bytes"));
    grid.seed = static_cast<uint64_t>(number("seed"));
    return grid;
  }

  Device device;

 private:
  const Arrays& arrays_;
  const Numbers& numbers_;
};

// What both directions of the step take.
template <class Args>
Args step_arguments(Arguments& of) {
  Args args{};
  args.size = of.size();
  args.bottleneck = static_cast<int>(of.number("bottleneck"));
  args.relu = of.number("relu") != 0, args.tanh_output = of.number("tanh_output") != 0;
  args.teams = {static_cast<int>(of.number("group")), static_cast<int>(of.number("quantum"))};
  args.weights = of.weights(), args.tables = of.tables();
  return args;
}

template <class T, bool kAffine>
auto forward_kernel(Arguments& of) {
  auto args = step_arguments<kernels::StepForward<T, kAffine>>(of);
  args.x = of.map<const T>("x"), args.shortcut = of.map<const T>("shortcut"), args.y = of.map<T>("y");
  args.h = of.pointer<const float>("h"), args.c = of.pointer<const float>("c");
  args.new_h = of.pointer<float>("new_h"), args.new_c = of.pointer<float>("new_c");
  if (kAffine) args.affine = of.affine(), args.off = of.pointer<float>("off");
  return [args](Thread& m) { kernels::step_forward(m, args); };
}

template <class T, bool kAffine>
auto backward_kernel(Arguments& of) {
  auto args = step_arguments<kernels::StepBackward<T, kAffine>>(of);
  args.dy = of.map<const T>("dy"), args.y = of.map<const T>("y"), args.x = of.map<const T>("x");
  args.dshortcut = of.map<T>("dshortcut"), args.dx = of.map<T>("dx");
  args.dh = of.pointer<const float>("dh"), args.dc = of.pointer<const float>("dc");
  args.c = of.pointer<const float>("c"), args.new_c = of.pointer<const float>("new_c");
  args.du = of.pointer<float>("du"), args.dzx = of.pointer<float>("dzx"), args.dzh = of.pointer<float>("dzh");
  args.partial = of.pointer<float>("partial");
  args.old_dh = of.pointer<float>("old_dh"), args.old_dc = of.pointer<float>("old_dc");
  if (kAffine) {
    args.affine = of.affine();
    args.sum = of.pointer<float>("sum"), args.product = of.pointer<float>("product");
    args.dp = of.pointer<float>("dp");
  }
  return [args](Thread& m) { kernels::step_backward(m, args); };
}

template <class T>
auto reduce_kernel(Arguments& of) {
  kernels::Reduce<T> args{};
  args.size = of.size(), args.tile = of.tile();
  args.x = of.map<const T>("x"), args.dy = of.map<const T>("dy"), args.y = of.map<const T>("y"),
  args.g = of.map<T>("g");
  args.shift = of.pointer<const float>("shift");
  args.sum = of.pointer<float>("sum"), args.product = of.pointer<float>("product");
  return [args](Thread& m) { kernels::reduce(m, args); };
}

template <class T>
auto spread_kernel(Arguments& of) {
  kernels::Spread<T> args{};
  args.size = of.size(), args.tile = of.tile(), args.relu = of.number("relu") != 0;
  args.dy = of.map<const T>("dy"), args.y = of.map<const T>("y");
  args.x = of.map<const T>("x"), args.shortcut = of.map<const T>("shortcut"), args.out = of.map<T>("out");
  args.scale = of.pointer<const float>("scale"), args.offset = of.pointer<const float>("offset");
  args.shift = of.pointer<const float>("shift"), args.slope = of.pointer<const float>("slope");
  return [args](Thread& m) { kernels::spread(m, args); };
}

auto weights_kernel(Arguments& of) {
  kernels::WeightGradients args{};
  args.samples = static_cast<int>(of.number("samples"));
  const int channels = static_cast<int>(of.number("channels")), bottleneck = static_cast<int>(of.number("bottleneck"));
  const auto add = [&](const float* left, int rows, const float* right, int columns, const char* out) {
    float* to = of.pointer<float>(out);
    if (to != nullptr) args.products[args.count++] = {left, right, to, rows, columns};
  };
  const float *du = of.pointer<const float>("du"), *dzx = of.pointer<const float>("dzx"),
              *dzh = of.pointer<const float>("dzh");
  add(dzx, bottleneck, of.pointer<const float>("p"), channels, "d_input_reduce_weight");
  add(dzx, bottleneck, nullptr, 1, "d_input_reduce_bias");
  add(du, 4 * channels, of.pointer<const float>("zx"), bottleneck, "d_input_expand_weight");
  add(du, 4 * channels, nullptr, 1, "d_input_expand_bias");
  add(dzh, bottleneck, of.pointer<const float>("h"), channels, "d_hidden_reduce_weight");
  add(dzh, bottleneck, nullptr, 1, "d_hidden_reduce_bias");
  add(du, 4 * channels, of.pointer<const float>("zh"), bottleneck, "d_hidden_expand_weight");
  add(du, 4 * channels, nullptr, 1, "d_hidden_expand_bias");
  return [args](Thread& m) { kernels::weight_gradients<128>(m, args); };
}

auto affine_kernel(Arguments& of) {
  const kernels::AffineGradients args{static_cast<int>(of.number("samples")),
                                      static_cast<int>(of.number("channels")),
                                      of.pointer<const float>("sum"),
                                      of.pointer<const float>("product"),
                                      of.pointer<const float>("dp"),
                                      of.pointer<const float>("off"),
                                      of.pointer<const float>("new_h"),
                                      of.pointer<float>("d_scale"),
                                      of.pointer<float>("d_bias")};
  return [args](Thread& m) { kernels::affine_gradients(m, args); };
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
  const auto run = [&](auto body) { return arguments.device.launch(grid, body); };
  const auto of_type = [&]<class T>(T) {
    if (kernel == "step_forward") return run(forward_kernel<T, false>(arguments));
    if (kernel == "step_backward") return run(backward_kernel<T, false>(arguments));
    if (kernel == "affine_step_forward") return run(forward_kernel<T, true>(arguments));
    if (kernel == "affine_step_backward") return run(backward_kernel<T, true>(arguments));
    if (kernel == "affine_gradients") return run(affine_kernel(arguments));
    if (kernel == "reduce") return run(reduce_kernel<T>(arguments));
    if (kernel == "spread") return run(spread_kernel<T>(arguments));
    if (kernel == "weight_gradients") return run(weights_kernel(arguments));
    throw std::invalid_argument("kernel: no " + kernel);
  };
  Report report;
  if (dtype == "float32")
    report = of_type(float());
  else if (dtype == "bfloat16")
    report = of_type(BFloat16());
  else if (dtype == "float16")
    report = of_type(Float16());
  else
    throw std::invalid_argument("dtype: no kernels for " + dtype);
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
