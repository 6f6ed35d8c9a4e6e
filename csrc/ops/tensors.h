// What every operator needs of torch: checks, allocation, views and products, on the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/layout.h"
#include "../cpu/kernels.h"

// Older headers, those of torch 2.11 say, have only a check that loses the error's message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace dia::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// --- checks ------------------------------------------------------------------------------------------

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "dia_kernels: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The sizes of t in a message. Written only when a check fails: making text takes longer than most checks.
struct SizesText {
  const Tensor& t;
};

inline SizesText sizes_text(const Tensor& t) { return {t}; }

inline std::ostream& operator<<(std::ostream& out, const SizesText& sizes) {
  out << '(';
  for (int64_t d = 0; d < sizes.t.dim(); ++d) out << (d ? ", " : "") << sizes.t.size(d);
  return out << ')';
}

// How many elements lie from the first of t to its last, both counted; 0 if it has none.
inline int64_t extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return 0;
    last += (t.size(d) - 1) * t.stride(d);
  }
  return last + 1;
}

// A storage may be given back while tensors still point to it: sharded training does that with parameters. Nothing in
// torch looks again whether a tensor lies within its storage.
inline void check_memory(const char* name, const Tensor& t) {
  const int64_t elements = extent(t);
  if (elements == 0) return;
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  check((t.storage_offset() + elements) * static_cast<int64_t>(t.element_size()) <= bytes, name,
        ": its storage was freed, or is too small for it");
}

inline void check_like(const char* name, const Tensor& t, ScalarType dtype, const Tensor& x) {
  check(t.scalar_type() == dtype, name, ": unexpected dtype for x of this dtype");
  check(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name, ": not on the device of x");
  check_memory(name, t);
}

// A table or parameter: exactly these sizes, this dtype, the device of x.
inline void check_table(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
                        const Tensor& x) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t d = 0;
  for (int64_t size : sizes) same = same && t.size(d++) == size;
  check(same, name, ": wrong sizes ", sizes_text(t));
  check_like(name, t, dtype, x);
}

// Another map: sizes, dtype and device of x.
inline void check_map(const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == x.size(d);
  check(same, name, ": expected sizes ", sizes_text(x), " like x, got ", sizes_text(t));
  check_like(name, t, x.scalar_type(), x);
}

// --- maps --------------------------------------------------------------------------------------------

// The shape of the map x, and the memory format of everything shaped like it.
struct MapInfo {
  MapShape shape;
  MemoryFormat format;
  bool channel_first;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // of a dense tensor in `format`
};

// Of samples, channels or bottleneck values: so that no size of a table overflows before it is compared.
constexpr int64_t kMostRows = int64_t{1} << 30;

inline MapInfo map_info(const Tensor& x, int64_t channel_dim) {
  check(channel_dim == 1 || channel_dim == -1, "channel_dim: expected 1 or -1, got ", channel_dim);
  const int dims = static_cast<int>(x.dim());
  check(dims >= 3 && dims <= 5, "x: expected 3 to 5 dimensions, got ", dims);
  check_memory("x", x);
  MapInfo info;
  info.channel_first = channel_dim == 1;
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  info.sizes.assign(sizes.data(), sizes.data() + dims);
  info.format = output_format(sizes.data(), strides.data(), dims, info.channel_first);
  const int channel = info.channel_first ? 1 : dims - 1;
  info.shape.samples = sizes[0];
  info.shape.channels = sizes[channel];
  check(info.shape.samples <= kMostRows && info.shape.channels <= kMostRows,
        "x: expected at most 2^30 samples and channels, got ", sizes_text(x));
  info.shape.positions = 1;
  for (int d = 1; d < dims; ++d)
    if (d != channel) info.shape.positions *= sizes[d];
  info.shape.interleaved = !info.channel_first || info.format == MemoryFormat::channels_last;

  info.strides.resize(dims);
  int64_t stride = 1;
  const auto place = [&](int d) {
    info.strides[d] = stride;
    stride *= info.sizes[d] > 1 ? info.sizes[d] : 1;
  };
  const bool last = info.format == MemoryFormat::channels_last;
  if (last) place(1);
  for (int d = dims - 1; d >= (last ? 2 : 0); --d) place(d);
  if (last) place(0);
  return info;
}

// Asks for huge pages in a fresh, large allocation (does nothing where the system has none).
void advise_huge_pages(void* data, int64_t bytes);

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, const Tensor& like,
                            int32_t dtype) {
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A dense tensor shaped like x, in the output format.
inline Tensor empty_map(const Tensor& x, const MapInfo& info) {
  Tensor map = empty_strided(info.sizes, info.strides, x, dtype_code(x));
  advise_huge_pages(map.mutable_data_ptr(), map.numel() * static_cast<int64_t>(map.element_size()));
  return map;
}

// The map where it is wanted, else an empty tensor.
inline Tensor map_if(bool wanted, const Tensor& like, const MapInfo& info) {
  return wanted ? empty_map(like, info) : empty_strided({0}, {1}, like, dtype_code(like));
}

// A map as a kernel reads it. Where the kernel cannot walk the tensor as it is, `tensor` is a copy.
template <class T>
struct MapReader {
  Tensor tensor;
  cpu::Map<const T> map;

  MapReader(const Tensor& t, const MapInfo& info) : tensor(t) {
    auto strides = walk(info);
    if (!strides) {
      using torch::headeronly::MemoryFormat;
      const bool last = info.format == dia::MemoryFormat::channels_last;
      tensor = torch::stable::contiguous(t, !last          ? MemoryFormat::Contiguous
                                            : t.dim() == 4 ? MemoryFormat::ChannelsLast
                                                           : MemoryFormat::ChannelsLast3d);
      strides = walk(info);
    }
    map = {static_cast<const T*>(tensor.const_data_ptr()), *strides};
  }

 private:
  std::optional<RowStrides> walk(const MapInfo& info) const {
    return row_strides(tensor.sizes().data(), tensor.strides().data(), static_cast<int>(tensor.dim()),
                       info.channel_first, info.shape.interleaved);
  }
};

// An optional map: an absent one has no data.
template <class T>
struct OptionalMapReader {
  std::optional<MapReader<T>> reader;
  cpu::Map<const T> map;

  OptionalMapReader(const OptionalTensor& t, const MapInfo& info) {
    if (!t) return;
    reader.emplace(*t, info);
    map = reader->map;
  }
};

template <class T>
cpu::Map<T> map_writer(const Tensor& t, const MapInfo& info) {
  const auto strides = row_strides(t.sizes().data(), t.strides().data(), static_cast<int>(t.dim()), info.channel_first,
                                   info.shape.interleaved);
  return {static_cast<T*>(t.mutable_data_ptr()), *strides};
}

// --- the mask of a ReLU: a bit for each value of its result, in the order of the result's memory ---

// Whether there may be one of a map: every row begins a byte.
inline bool has_whole_bytes(const MapInfo& info) { return info.shape.row_length() % 8 == 0; }

inline int64_t mask_bytes(const MapInfo& info) {
  return info.shape.samples * info.shape.channels * info.shape.positions / 8;
}

// An uninitialised mask, or an empty one if it is not wanted.
inline Tensor empty_mask(bool wanted, const Tensor& x, const MapInfo& info) {
  check(!wanted || has_whole_bytes(info), "keep_mask: expected rows of a multiple of eight values, got ",
        info.shape.row_length());
  return empty_strided({wanted ? mask_bytes(info) : 0}, {1}, x, aoti_torch_dtype_uint8());
}

// What tells a gradient what the ReLU let through: its result y or, of bytes, the mask of that.
struct ReluResult {
  OptionalTensor y, mask;

  ReluResult() = default;
  explicit ReluResult(const OptionalTensor& given) {
    const bool bits = given && given->scalar_type() == ScalarType::Byte;
    if (bits)
      mask = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
    else
      y = given;
  }
};

inline void check_relu_result(const OptionalTensor& given, const Tensor& x, const MapInfo& info) {
  if (!given) return;
  if (given->scalar_type() != ScalarType::Byte) return check_map("y", *given, x);
  check(has_whole_bytes(info), "y: a mask, of rows that are no multiple of eight values but ", info.shape.row_length());
  check(given->dim() == 1 && given->size(0) == mask_bytes(info), "y: a mask, expected sizes (", mask_bytes(info),
        "), got ", sizes_text(*given));
  check_like("y", *given, ScalarType::Byte, x);
}

// --- tables and products -------------------------------------------------------------------------------

template <class A>
int32_t dtype_code_of() {
  return std::is_same_v<A, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

template <class A>
Tensor empty_table(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return empty_strided(sizes, strides, like, dtype_code_of<A>());
}

// Positions, (N, C).
inline Tensor empty_places(bool wanted, const Tensor& like, int64_t n, int64_t c) {
  return wanted ? empty_strided({n, c}, {std::max<int64_t>(c, 1), 1}, like, aoti_torch_dtype_int64())
                : empty_strided({0}, {1}, like, aoti_torch_dtype_int64());
}

// The tokens of a norm before a pooling (operators.py): their shape is all there is of them. Empty if not wanted.
struct NormTokens {
  Tensor of_g, of_handed;
};
template <class A>
NormTokens norm_tokens(bool wanted, const Tensor& z, const MapInfo& info) {
  if (!wanted) return {empty_strided({0}, {1}, z, dtype_code(z)), empty_table<A>(z, {0})};
  const std::vector<int64_t> handed{3, info.shape.samples, info.shape.channels};
  return {empty_strided(info.sizes, std::vector<int64_t>(info.sizes.size()), z, dtype_code(z)),
          empty_strided(handed, std::vector<int64_t>(handed.size()), z, dtype_code_of<A>())};
}

template <class A>
A* data_of(const Tensor& t) {
  return static_cast<A*>(t.mutable_data_ptr());
}

template <class A>
const A* data_of(const OptionalTensor& t) {
  return t ? static_cast<const A*>(t->const_data_ptr()) : nullptr;
}

// A matrix somewhere in memory, at any strides.
template <class A>
struct Matrix {
  const A* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride;

  static Matrix dense(const A* data, int64_t rows, int64_t columns) { return {data, rows, columns, columns, 1}; }
  static Matrix of(const Tensor& t) {
    return {static_cast<const A*>(t.const_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
};

template <class A>
Tensor view(const Matrix<A>& m) {
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row_stride, m.column_stride};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<A*>(m.data), 2, sizes, strides, 0, dtype_code_of<A>(), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = factor * left * right (+ out), by the BLAS that torch holds. Called below the dispatcher, so
// that autocast does not see it.
template <class A>
void product(A* out, const Matrix<A>& left, const Matrix<A>& right, bool add = false, double factor = 1.0) {
  const Tensor result = view(Matrix<A>::dense(out, left.rows, right.columns));
  const Tensor l = view(left), r = view(right);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(result.get(), result.get(), l.get(), r.get(), add ? 1.0 : 0.0, factor));
}

}  // namespace dia::ops
