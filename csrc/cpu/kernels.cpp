// The CPU kernels, compiled once per instruction set (DIA_ISA names it and the namespace).
//
// Idea: every function streams rows. A planar row is one channel of one sample, so a reduction ends
// in one number; an interleaved row is one position, so a reduction adds whole rows into a small
// table of channels that stays in the first-level cache. Each map is read or written exactly once per
// sweep; the second read of a map is served by the cache (core/plan.h sizes the chunks).
//
// rows.h holds the walks over rows; the order of additions depends on the shape only, so results are the
// same bits on every run.
//
// docs/kernels.md tells the bytes moved, the floor and what was tried.
#include "kernels.h"

#include "extremes.h"
#include "rows.h"
#include "tail.h"
#include "vector.h"

namespace dia::cpu::DIA_ISA {
namespace {

// Adds a row of values to one sum for each channel.
template <class T>
inline auto adding(const T* x) {
  return [x](int64_t c, auto* sums) { *sums += values_at<std::remove_pointer_t<decltype(sums)>>(x + c); };
}

template <class T>
void pool(const Pool<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  A* p = k.p + sample * k.shape.channels;
  if (!k.shape.interleaved) {
    // Divided, not multiplied by a reciprocal: as torch does, and right for 0 / 0.
    const A positions = static_cast<A>(k.shape.positions);
    for (int64_t c = begin; c < end; ++c) {
      const T* x = row_of(k.x, sample, c);
      double total[1] = {};
      sum_row<A, 1>(
          k.shape.positions, total, [&](int64_t i, Vector<A>* sum) { *sum += load(x + i); },
          [&](int64_t i, double* sum) { *sum += widen(x[i]); });
      p[c] = static_cast<A>(total[0]) / positions;
    }
    return;
  }
  sum_columns<A, 1>(
      k.shape.positions, begin, end,
      [&](int64_t row, int64_t first) { return adding(row_of(k.x, sample, row, first)); },
      [&](int64_t c, const double* total) { p[c] = static_cast<A>(*total) / static_cast<A>(k.shape.positions); });
}

// --- rescale ---------------------------------------------------------------------------------------

template <class T, bool has_shortcut, bool with_relu>
inline void rescale_row(const T* x, const T* shortcut, T* y, const Compute<T>* scales, Compute<T> scale,
                        int64_t length) {
  using A = Compute<T>;
  // One scale for a planar row, a table of them for an interleaved one.
  const auto body = [&](auto scale_at, auto scalar_scale_at) {
    for_row<A>(
        0, length,
        [&](int64_t k) {
          Vector<A> v = load(x + k) * scale_at(k);
          if constexpr (has_shortcut) v += load(shortcut + k);
          if constexpr (with_relu) v = relu<A>(v);
          store(v, y + k);
        },
        [&](int64_t k) {
          A v = widen(x[k]) * scalar_scale_at(k);
          if constexpr (has_shortcut) v += widen(shortcut[k]);
          if constexpr (with_relu) v = relu<A>(v);
          narrow(v, y + k);
        });
  };
  if (scales != nullptr)
    body([&](int64_t k) { return load(scales + k); }, [&](int64_t k) { return scales[k]; });
  else
    body([v = splat(scale)](int64_t) { return v; }, [scale](int64_t) { return scale; });
}

template <class T, bool has_shortcut, bool with_relu>
inline void rescale_rows(const Rescale<T>& k, int64_t sample, int64_t begin, int64_t end) {
  const Compute<T>* scale = k.scale + sample * k.shape.channels;
  const bool interleaved = k.shape.interleaved;
  for (int64_t row = begin; row < end; ++row)
    rescale_row<T, has_shortcut, with_relu>(
        row_of(k.x, sample, row), has_shortcut ? row_of(k.shortcut, sample, row) : nullptr, row_of(k.y, sample, row),
        interleaved ? scale : nullptr, interleaved ? Compute<T>(0) : scale[row], k.shape.row_length());
}

template <class T>
void rescale(const Rescale<T>& k, int64_t sample, int64_t begin, int64_t end) {
  if (k.shortcut.data != nullptr)
    k.relu ? rescale_rows<T, true, true>(k, sample, begin, end) : rescale_rows<T, true, false>(k, sample, begin, end);
  else
    k.relu ? rescale_rows<T, false, true>(k, sample, begin, end) : rescale_rows<T, false, false>(k, sample, begin, end);
}

// --- first sweep of the gradient -------------------------------------------------------------------

template <class T, bool with_relu, bool write>
inline void reduce_channels(const ReduceGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const bool interleaved = k.shape.interleaved;
  if (k.dscale == nullptr) {
    // Only g is wanted: rows are then cut at the channels if interleaved.
    const int64_t rows = interleaved ? k.shape.positions : end;
    for (int64_t row = interleaved ? 0 : begin; row < rows; ++row) {
      const T *dy = row_of(k.dy, sample, row), *y = row_of(k.y, sample, row);
      T* g = row_of(k.g, sample, row);
      for_row<A>(
          interleaved ? begin : 0, interleaved ? end : k.shape.positions,
          [&](int64_t i) { gradient_vector<T, with_relu, write>(dy, y, g, i); },
          [&](int64_t i) { gradient_scalar<T, with_relu, write>(dy, y, g, i); });
    }
    return;
  }
  A* dscale = k.dscale + sample * k.shape.channels;
  if (!interleaved) {
    for (int64_t c = begin; c < end; ++c) {
      const T *dy = row_of(k.dy, sample, c), *y = row_of(k.y, sample, c), *x = row_of(k.x, sample, c);
      T* g = row_of(k.g, sample, c);
      double total[1] = {};
      sum_row<A, 1>(
          k.shape.positions, total,
          [&](int64_t i, Vector<A>* sum) { *sum += load(x + i) * gradient_vector<T, with_relu, write>(dy, y, g, i); },
          [&](int64_t i, double* sum) { *sum += widen(x[i]) * gradient_scalar<T, with_relu, write>(dy, y, g, i); });
      dscale[c] = static_cast<A>(total[0]);
    }
    return;
  }
  sum_columns<A, 1>(
      k.shape.positions, begin, end,
      [&](int64_t row, int64_t first) {
        const T *dy = row_of(k.dy, sample, row, first), *y = row_of(k.y, sample, row, first);
        const T* x = row_of(k.x, sample, row, first);
        T* g = row_of(k.g, sample, row, first);
        return [=](int64_t c, auto* sums) {
          using V = std::remove_pointer_t<decltype(sums)>;
          *sums += values_at<V>(x + c) * gradient_at<V, T, with_relu, write>(dy, y, g, c);
        };
      },
      [&](int64_t c, const double* total) { dscale[c] = static_cast<A>(*total); });
}

template <class T>
void reduce_gradient(const ReduceGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  const bool write = k.g.data != nullptr;
  if (k.y.data != nullptr)
    write ? reduce_channels<T, true, true>(k, sample, begin, end)
          : reduce_channels<T, true, false>(k, sample, begin, end);
  else
    write ? reduce_channels<T, false, true>(k, sample, begin, end)
          : reduce_channels<T, false, false>(k, sample, begin, end);
}

// --- second sweep of the gradient ------------------------------------------------------------------

template <class T, bool with_relu>
inline void spread_row(const T* dy, const T* y, T* dx, const Compute<T>* scale, const Compute<T>* offset,
                       bool interleaved, int64_t length) {
  using A = Compute<T>;
  const auto body = [&](auto scale_at, auto offset_at, auto scalar_scale_at, auto scalar_offset_at) {
    for_row<A>(
        0, length,
        [&](int64_t k) {
          store(gradient_vector<T, with_relu, false>(dy, y, nullptr, k) * scale_at(k) + offset_at(k), dx + k);
        },
        [&](int64_t k) {
          narrow(gradient_scalar<T, with_relu, false>(dy, y, nullptr, k) * scalar_scale_at(k) + scalar_offset_at(k),
                 dx + k);
        });
  };
  const auto zero = [](int64_t) { return A(0); };
  const auto zeros = [](int64_t) { return Vector<A>{}; };
  const auto entry = [](const A* table) { return [table](int64_t k) { return table[k]; }; };
  const auto entries = [](const A* table) { return [table](int64_t k) { return load(table + k); }; };
  const auto constant = [](A value) { return [value](int64_t) { return value; }; };
  const auto constants = [](A value) { return [v = splat(value)](int64_t) { return v; }; };
  if (interleaved)
    offset != nullptr ? body(entries(scale), entries(offset), entry(scale), entry(offset))
                      : body(entries(scale), zeros, entry(scale), zero);
  else
    offset != nullptr ? body(constants(*scale), constants(*offset), constant(*scale), constant(*offset))
                      : body(constants(*scale), zeros, constant(*scale), zero);
}

// dx where nothing came in for y: the mean's share alone.
template <class T>
inline void fill_row(T* dx, const Compute<T>* offset, bool interleaved, int64_t length) {
  using A = Compute<T>;
  if (interleaved)
    for_row<A>(
        0, length, [&](int64_t k) { store(load(offset + k), dx + k); }, [&](int64_t k) { narrow(offset[k], dx + k); });
  else
    for_row<A>(
        0, length, [&](int64_t k) { store(splat(*offset), dx + k); }, [&](int64_t k) { narrow(*offset, dx + k); });
}

template <class T>
void spread_gradient(const SpreadGradient<T>& k, int64_t sample, int64_t begin, int64_t end) {
  using A = Compute<T>;
  const bool interleaved = k.shape.interleaved;
  const int64_t length = k.shape.row_length(), base = sample * k.shape.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t entry = base + (interleaved ? 0 : row);
    const A* offset = k.offset != nullptr ? k.offset + entry : nullptr;
    T* dx = row_of(k.dx, sample, row);
    if (k.dy.data == nullptr)
      fill_row<T>(dx, offset, interleaved, length);
    else if (k.y.data != nullptr)
      spread_row<T, true>(row_of(k.dy, sample, row), row_of(k.y, sample, row), dx, k.scale + entry, offset, interleaved,
                          length);
    else
      spread_row<T, false>(row_of(k.dy, sample, row), nullptr, dx, k.scale + entry, offset, interleaved, length);
  }
}

// --- cell ------------------------------------------------------------------------------------------

// Access to `count` lanes at a channel of a table; null tables read as zero and swallow writes.
template <class A, bool whole>
struct Access {
  int64_t count;
  Vector<A> read(const A* from) const {
    if (from == nullptr) return Vector<A>{};
    if constexpr (whole) return load(from);
    return load_part(from, count);
  }
  void write(Vector<A> value, A* to) const {
    if (to == nullptr) return;
    if constexpr (whole)
      store<A>(value, to);
    else
      store_part<A>(value, to, count);
  }
};

template <class A>
inline A* at(A* table, int64_t offset) {
  return table == nullptr ? nullptr : table + offset;
}

// Calls `body(access, channel)` for every vector of a row of channels.
template <class A, class Body>
inline void for_channels(int64_t channels, Body body) {
  constexpr int64_t lanes = Lanes<A>::count;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) body(Access<A, true>{lanes}, c);
  if (c < channels) body(Access<A, false>{channels - c}, c);
}

template <class A, Output output>
inline void cell_forward(const CellForward<A>& k, int64_t begin, int64_t end) {
  using Maths = Cell<VectorMaths<A>, output>;
  const int64_t width = k.channels;
  for (int64_t n = begin; n < end; ++n) {
    A* u = k.gates + n * 4 * width;
    for_channels<A>(width, [&](auto lanes, int64_t c) {
      const auto biased = [&](int gate) {
        return lanes.read(u + gate * width + c) + lanes.read(k.bias + gate * width + c);
      };
      const auto gates = Maths::activate({biased(0), biased(1), biased(2), biased(3)});
      const auto new_c = Maths::next_c(gates, lanes.read(at(k.c, n * width + c)));
      lanes.write(gates.i, u + c);
      lanes.write(gates.f, u + width + c);
      lanes.write(gates.g, u + 2 * width + c);
      lanes.write(gates.o, u + 3 * width + c);
      lanes.write(new_c, k.new_c + n * width + c);
      lanes.write(Maths::next_h(gates, new_c), k.new_h + n * width + c);
    });
  }
}

template <class A, Output output>
inline void cell_backward(const CellBackward<A>& k, int64_t begin, int64_t end) {
  using Maths = Cell<VectorMaths<A>, output>;
  const int64_t width = k.channels;
  for (int64_t n = begin; n < end; ++n) {
    const A* gates_row = k.gates + n * 4 * width;
    A* du = k.du + n * 4 * width;
    for_channels<A>(width, [&](auto lanes, int64_t c) {
      const int64_t place = n * width + c;
      const Gates<Vector<A>> gates = {lanes.read(gates_row + c), lanes.read(gates_row + width + c),
                                      lanes.read(gates_row + 2 * width + c), lanes.read(gates_row + 3 * width + c)};
      const Vector<A> s = Maths::squash(lanes.read(k.new_c + place));
      const Vector<A> dh = lanes.read(at(k.dscale, place)) + lanes.read(at(k.dh, place));
      const auto gradient = Maths::backward(gates, lanes.read(at(k.c, place)), s, dh, lanes.read(at(k.dc, place)));
      lanes.write(gradient.u.i, du + c);
      lanes.write(gradient.u.f, du + width + c);
      lanes.write(gradient.u.g, du + 2 * width + c);
      lanes.write(gradient.u.o, du + 3 * width + c);
      lanes.write(gradient.c, at(k.old_dc, place));
      lanes.write(gates.o * s, k.h + place);
    });
  }
}

template <class A>
void cell_forward_any(const CellForward<A>& k, int64_t begin, int64_t end) {
  k.output == Output::sigmoid ? cell_forward<A, Output::sigmoid>(k, begin, end)
                              : cell_forward<A, Output::tanh>(k, begin, end);
}

template <class A>
void cell_backward_any(const CellBackward<A>& k, int64_t begin, int64_t end) {
  k.output == Output::sigmoid ? cell_backward<A, Output::sigmoid>(k, begin, end)
                              : cell_backward<A, Output::tanh>(k, begin, end);
}

// Rows of W in a tile: with four of x, as many sums as leave registers for what is loaded.
constexpr int kTileColumns = kVectorBytes == 64 ? 4 : 3;

// Inner products of kRows rows of x with kColumns rows of W, along their dense dimension: no packing, each
// load serves several multiplications, and a lane adds only inputs / lanes terms before the pairwise end.
template <class A, int kRows, int kColumns>
inline void linear_tile(const Linear<A>& k, int64_t sample, int64_t output) {
  constexpr int64_t lanes = Lanes<A>::count;
  const A* x[kRows];
  const A* w[kColumns];
  for (int r = 0; r < kRows; ++r) x[r] = k.x + (sample + r) * k.inputs;
  for (int c = 0; c < kColumns; ++c) w[c] = k.weight + (output + c) * k.weight_stride;
  // In whole vectors of sums, of which the last may be zeros.
  constexpr int places = (kRows * kColumns + lanes - 1) / lanes * lanes;
  Vector<A> sums[places] = {};
  const auto multiply = [&](auto read, int64_t i) {
    Vector<A> columns[kColumns];
    for (int c = 0; c < kColumns; ++c) columns[c] = read(w[c] + i);
    for (int r = 0; r < kRows; ++r) {
      const Vector<A> row = read(x[r] + i);
      for (int c = 0; c < kColumns; ++c) sums[r * kColumns + c] += row * columns[c];
    }
  };
  int64_t i = 0;
  for (; i + lanes <= k.inputs; i += lanes) multiply([](const A* from) { return load(from); }, i);
  if (i < k.inputs) multiply([rest = k.inputs - i](const A* from) { return load_part(from, rest); }, i);
  A totals[places];
  for (int first = 0; first < places; first += lanes) store<A>(sum_each<A>(sums + first), totals + first);
  for (int r = 0; r < kRows; ++r) {
    A* y = k.y + (sample + r) * k.outputs + output;
    const A* row = totals + r * kColumns;
    if (k.bias != nullptr)
      for (int c = 0; c < kColumns; ++c) y[c] = relu<A>(row[c] + k.bias[output + c]);
    else if (k.add)
      for (int c = 0; c < kColumns; ++c) y[c] += row[c];
    else
      for (int c = 0; c < kColumns; ++c) y[c] = row[c];
  }
}

template <class A, int kColumns>
inline void linear_columns(const Linear<A>& k, int64_t output) {
  int64_t n = 0;
  for (; n + 4 <= k.samples; n += 4) linear_tile<A, 4, kColumns>(k, n, output);
  for (; n < k.samples; ++n) linear_tile<A, 1, kColumns>(k, n, output);
}

template <class A>
void linear(const Linear<A>& k, int64_t begin, int64_t end) {
  int64_t output = begin;
  for (; output + kTileColumns <= end; output += kTileColumns) linear_columns<A, kTileColumns>(k, output);
  for (; output < end; ++output) linear_columns<A, 1>(k, output);
}

template <class A>
void bias_relu(A* z, const A* bias, int64_t width, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    A* place = z + row * width;
    for_row<A>(
        0, width, [&](int64_t k) { store<A>(relu<A>(load(place + k) + load(bias + k)), place + k); },
        [&](int64_t k) { place[k] = relu<A>(place[k] + bias[k]); });
  }
}

template <class A>
void mask(A* dz, const A* z, int64_t begin, int64_t end) {
  for_row<A>(
      begin, end, [&](int64_t k) { store<A>(masked<A>(load(dz + k), load(z + k)), dz + k); },
      [&](int64_t k) { dz[k] = masked<A>(dz[k], z[k]); });
}

template <class A>
void column_sums(const A* table, int64_t rows, int64_t width, A* sums, int64_t begin, int64_t end) {
  sum_columns<A, 1>(
      rows, begin, end, [&](int64_t row, int64_t first) { return adding(table + row * width + first); },
      [&](int64_t c, const double* total) { sums[c] = static_cast<A>(*total); });
}

template <class T>
constexpr MapKernels<T> map_kernels = {pool<T>,
                                       rescale<T>,
                                       reduce_gradient<T>,
                                       spread_gradient<T>,
                                       choose_shift<T>,
                                       split_mean<T>,
                                       moments<T>,
                                       normalise<T>,
                                       reduce_norm_gradient<T>,
                                       spread_norm_gradient<T>,
                                       extremes<T>,
                                       spread_extreme_gradient<T>};

template <class A>
constexpr CellKernels<A> cell_kernels = {linear<A>, cell_forward_any<A>, cell_backward_any<A>, bias_relu<A>,
                                         mask<A>,   column_sums<A>};

#define DIA_STRING(name) #name
#define DIA_NAME(name) DIA_STRING(name)

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {DIA_NAME(DIA_ISA),    map_kernels<float>,  map_kernels<double>, map_kernels<BFloat16>,
                         map_kernels<Float16>, cell_kernels<float>, cell_kernels<double>};

}  // namespace dia::cpu::DIA_ISA
