// cpu/kernels.cpp under the sanitizers, for the instruction set that DIA_KERNELS_ISA names: every map
// lies in a block of exactly its size, so that one element too many is an error, and results are held
// to plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/dispatch.h"

namespace {

using namespace dia;
using namespace dia::cpu;

template <class T>
const MapKernels<T>& maps();
template <>
const MapKernels<float>& maps() {
  return kernels().f32;
}
template <>
const MapKernels<double>& maps() {
  return kernels().f64;
}
template <>
const MapKernels<BFloat16>& maps() {
  return kernels().bf16;
}
template <>
const MapKernels<Float16>& maps() {
  return kernels().f16;
}

// Small multiples of 1/8 are exact in every type, and so are the products and sums made of them here.
float value(std::mt19937& random) { return static_cast<float>(static_cast<int>(random() % 17) - 8) / 8; }

template <class T>
T encode(float v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return {static_cast<uint16_t>(bits >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    if (v == 0) return {0};
    int exponent;
    const float mantissa = std::frexp(std::abs(v), &exponent);
    const auto bits = static_cast<uint16_t>(((exponent + 14) << 10) | (static_cast<int>(mantissa * 2048) & 0x3ff));
    return {static_cast<uint16_t>(bits | (v < 0 ? 0x8000 : 0))};
  } else {
    return static_cast<T>(v);
  }
}

template <class T>
double decode(T v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
  } else if constexpr (std::is_same_v<T, Float16>) {
    const double sign = v.bits & 0x8000 ? -1 : 1;
    const int exponent = (v.bits >> 10) & 31;
    const int mantissa = v.bits & 0x3ff;
    if (exponent == 31) return sign / (mantissa == 0 ? 0.0 : NAN);
    return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
  } else {
    return static_cast<double>(v);
  }
}

// What T holds of a value that is a multiple of 1/64 and small: bfloat16 has 8 bits, the others hold it whole.
template <class T>
double rounded(double v) {
  if constexpr (!std::is_same_v<T, BFloat16>) return v;
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  float result;
  std::memcpy(&result, &bits, 4);
  return static_cast<double>(result);
}

// A map with `gap` unused elements between rows, which nobody may touch.
template <class T>
struct Block {
  MapShape shape;
  RowStrides strides;
  std::vector<T> data;

  Block(const MapShape& s, int64_t gap, std::mt19937& random) : shape(s) {
    strides = {s.rows() * (s.row_length() + gap), s.row_length() + gap};
    // The last row ends the block: no gap behind it.
    data.resize(static_cast<size_t>(std::max<int64_t>(s.samples * strides.sample - gap, 0)));
    for (auto& element : data) element = encode<T>(value(random));
  }
  int64_t offset(int64_t n, int64_t c, int64_t k) const {
    return n * strides.sample + (shape.interleaved ? k * strides.row + c : c * strides.row + k);
  }
  double at(int64_t n, int64_t c, int64_t k) const { return decode(data[static_cast<size_t>(offset(n, c, k))]); }
  Map<const T> reader() const { return {data.data(), strides}; }
  Map<T> writer() { return {data.data(), strides}; }
};

template <class T>
void check_shape(const MapShape& shape, int64_t gap, uint32_t seed) {
  using A = Compute<T>;
  std::mt19937 random(seed);
  const Block<T> x(shape, gap, random), s(shape, gap, random), dy(shape, gap, random), y(shape, gap, random);
  Block<T> out(shape, gap, random), g(shape, gap, random), dx(shape, gap, random);
  const Block<T> untouched = out;
  const size_t entries = static_cast<size_t>(shape.samples * shape.channels);
  std::vector<A> scale(entries), offset(entries), p(entries), dscale(entries);
  for (auto& v : scale) v = static_cast<A>(value(random));
  for (auto& v : offset) v = static_cast<A>(value(random));

  const auto& k = maps<T>();
  // Reductions by two ranges of channels, rescalings by two ranges of rows: cuts must not matter.
  const int64_t channel_cut = shape.channels / 3, row_cut = shape.rows() / 2;
  const Pool<T> pool{shape, x.reader(), p.data()};
  const ReduceGradient<T> reduce{shape, dy.reader(), y.reader(), x.reader(), g.writer(), dscale.data()};
  const Rescale<T> rescale{shape, x.reader(), s.reader(), out.writer(), scale.data(), true};
  const SpreadGradient<T> spread{shape, dy.reader(), y.reader(), dx.writer(), scale.data(), offset.data()};
  for (int64_t n = 0; n < shape.samples; ++n) {
    for (const auto& [a, b] : {std::pair{int64_t{0}, channel_cut}, std::pair{channel_cut, shape.channels}}) {
      k.pool(pool, n, a, b);
      k.reduce_gradient(reduce, n, a, b);
    }
    for (const auto& [a, b] : {std::pair{int64_t{0}, row_cut}, std::pair{row_cut, shape.rows()}}) {
      k.rescale(rescale, n, a, b);
      k.spread_gradient(spread, n, a, b);
    }
  }

  for (int64_t n = 0; n < shape.samples; ++n)
    for (int64_t c = 0; c < shape.channels; ++c) {
      const size_t entry = static_cast<size_t>(n * shape.channels + c);
      double sum = 0, product = 0;
      for (int64_t i = 0; i < shape.positions; ++i) {
        const double masked = y.at(n, c, i) <= 0 ? 0 : dy.at(n, c, i);
        sum += x.at(n, c, i);
        product += x.at(n, c, i) * masked;
        const double before = x.at(n, c, i) * static_cast<double>(scale[entry]) + s.at(n, c, i);
        CHECK_EQUAL(out.at(n, c, i), before > 0 ? before : 0);
        CHECK_EQUAL(g.at(n, c, i), masked);
        CHECK_EQUAL(dx.at(n, c, i), masked * static_cast<double>(scale[entry]) + static_cast<double>(offset[entry]));
      }
      const A mean = static_cast<A>(sum) / static_cast<A>(shape.positions);
      CHECK(p[entry] == mean || (shape.positions == 0 && std::isnan(p[entry])));
      CHECK_EQUAL(static_cast<double>(dscale[entry]), product);
    }
  // What lies between the rows is still what it was.
  for (size_t e = 0; e < out.data.size(); ++e)
    if (static_cast<int64_t>(e) % out.strides.row >= shape.row_length())
      CHECK(std::memcmp(&out.data[e], &untouched.data[e], sizeof(T)) == 0);
}

// Out of the first, the middle and the last sample, a value each, far from the corners.
template <class T>
double median_of_three(const Block<T>& z, int64_t c) {
  const int64_t last = z.shape.samples - 1, positions = z.shape.positions;
  if (last < 0 || positions == 0) return 0;
  std::vector<double> values{z.at(0, c, positions * 27 / 128), z.at(last / 2, c, positions * 66 / 128),
                             z.at(last, c, positions * 107 / 128)};
  std::sort(values.begin(), values.end());
  return values[1];
}

// The sweeps of the tail. Shifts, scales and values are eighths, so sums and products are exact in float; the moments
// are held to the rounding of a division.
template <class T>
void check_tail_shape(const MapShape& shape, int64_t gap, uint32_t seed) {
  using A = Compute<T>;
  std::mt19937 random(seed);
  const Block<T> z(shape, gap, random), s(shape, gap, random), dy(shape, gap, random), y(shape, gap, random);
  Block<T> out(shape, gap, random), g(shape, gap, random), dz(shape, gap, random);
  const Block<T> untouched = out;
  const size_t entries = static_cast<size_t>(shape.samples * shape.channels);
  const size_t channels = static_cast<size_t>(shape.channels);
  std::vector<A> shift(channels), slope(channels), scale(entries), offset(entries), s0(entries), s1(entries);
  std::vector<double> d1(entries), m2(entries);
  for (auto* table : {&slope, &scale, &offset})
    for (auto& v : *table) v = static_cast<A>(value(random));

  const auto& k = maps<T>();
  k.choose_shift(z.reader(), shape, shift.data());
  const Moments<T> moments{shape, z.reader(), shift.data(), nullptr, d1.data(), m2.data()};
  const Normalise<T> normalise{shape,        z.reader(),   s.reader(),    out.writer(),
                               shift.data(), scale.data(), offset.data(), true};
  const ReduceNormGradient<T> reduce{shape,      dy.reader(),  y.reader(), z.reader(),
                                     g.writer(), shift.data(), s0.data(),  s1.data()};
  const SpreadNormGradient<T> spread{shape,        dy.reader(),  y.reader(),   z.reader(),    dz.writer(),
                                     shift.data(), scale.data(), slope.data(), offset.data(), 0};
  const int64_t channel_cut = shape.channels / 3, row_cut = shape.rows() / 2;
  for (int64_t n = 0; n < shape.samples; ++n) {
    for (const auto& [a, b] : {std::pair{int64_t{0}, channel_cut}, std::pair{channel_cut, shape.channels}}) {
      k.moments(moments, n, a, b);
      k.reduce_norm_gradient(reduce, n, a, b);
    }
    for (const auto& [a, b] : {std::pair{int64_t{0}, row_cut}, std::pair{row_cut, shape.rows()}}) {
      k.normalise(normalise, n, a, b);
      k.spread_norm_gradient(spread, n, a, b);
    }
  }

  for (int64_t c = 0; c < shape.channels; ++c) {
    const double about = static_cast<double>(shift[static_cast<size_t>(c)]);
    CHECK_EQUAL(about, median_of_three(z, c));
    for (int64_t n = 0; n < shape.samples; ++n) {
      const size_t entry = static_cast<size_t>(n * shape.channels + c);
      double sum = 0, squares = 0, gradient = 0, product = 0;
      for (int64_t i = 0; i < shape.positions; ++i) {
        const double v = z.at(n, c, i) - about, masked = y.at(n, c, i) <= 0 ? 0 : dy.at(n, c, i);
        sum += v, squares += v * v, gradient += masked, product += masked * v;
        const double before =
            v * static_cast<double>(scale[entry]) + static_cast<double>(offset[entry]) + s.at(n, c, i);
        const double sent = v * static_cast<double>(slope[static_cast<size_t>(c)]) +
                            static_cast<double>(offset[entry]) + masked * static_cast<double>(scale[entry]);
        CHECK_EQUAL(out.at(n, c, i), rounded<T>(before > 0 ? before : 0));
        CHECK_EQUAL(g.at(n, c, i), masked);
        CHECK_EQUAL(dz.at(n, c, i), rounded<T>(sent));
      }
      CHECK_EQUAL(static_cast<double>(s0[entry]), gradient);
      CHECK_EQUAL(static_cast<double>(s1[entry]), product);
      if (shape.positions == 0) {
        CHECK(std::isnan(d1[entry]));
        continue;
      }
      const double mean = sum / static_cast<double>(shape.positions);
      CHECK(std::abs(d1[entry] - mean) <= 1e-15 * std::abs(mean));
      CHECK(std::abs(m2[entry] - (squares - sum * mean)) <= 1e-12 * (1 + squares));
    }
  }
  for (size_t e = 0; e < out.data.size(); ++e)
    if (static_cast<int64_t>(e) % out.strides.row >= shape.row_length())
      CHECK(std::memcmp(&out.data[e], &untouched.data[e], sizeof(T)) == 0);
}

// Moments about each sample's own value, and slopes of each sample; extremes, and the gradient that goes to them. The
// map has few values, infinities and NaN among them.
template <class T>
void check_statistics_shape(const MapShape& shape, int64_t gap, uint32_t seed) {
  using A = Compute<T>;
  std::mt19937 random(seed);
  Block<T> z(shape, gap, random), plain(shape, gap, random), dy(shape, gap, random), y(shape, gap, random);
  Block<T> dz(shape, gap, random);
  const A special[] = {std::numeric_limits<A>::infinity(), -std::numeric_limits<A>::infinity(),
                       std::numeric_limits<A>::quiet_NaN()};
  for (T& v : z.data) {
    const int die = static_cast<int>(random() % 64);
    narrow(die < 3 ? special[die] : static_cast<A>(die % 4), &v);
  }
  const size_t entries = static_cast<size_t>(shape.samples * shape.channels);
  const size_t channels = static_cast<size_t>(shape.channels);
  std::vector<A> gamma(channels), shift(channels), own(entries), found(entries);
  std::vector<A> slope(entries), scale(entries), offset(entries), added(entries);
  std::vector<int64_t> where(entries);
  std::vector<double> d1(entries), m2(entries);
  for (auto* table : {&gamma, &shift, &own, &slope, &scale, &offset, &added})
    for (auto& v : *table) v = static_cast<A>(value(random));
  gamma[0] = 0;

  const auto& k = maps<T>();
  const Moments<T> moments{shape, plain.reader(), shift.data(), own.data(), d1.data(), m2.data()};
  const int64_t cut = shape.channels / 3, row_cut = shape.rows() / 2;
  for (const A* signs : {static_cast<const A*>(nullptr), static_cast<const A*>(gamma.data())}) {
    const Extremes<T> extremes{shape, z.reader(), signs, found.data(), where.data()};
    const SpreadNormGradient<T> spread{shape,        dy.reader(),  y.reader(),   plain.reader(), dz.writer(),
                                       shift.data(), scale.data(), slope.data(), offset.data(),  shape.channels};
    const SpreadExtremeGradient<T> at_extremes{spread, where.data(), added.data()};
    for (int64_t n = 0; n < shape.samples; ++n) {
      for (const auto& [a, b] : {std::pair{int64_t{0}, cut}, std::pair{cut, shape.channels}}) {
        k.moments(moments, n, a, b);
        k.extremes(extremes, n, a, b);
      }
      for (const auto& [a, b] : {std::pair{int64_t{0}, row_cut}, std::pair{row_cut, shape.rows()}})
        k.spread_norm_gradient(spread, n, a, b);
      for (const auto& [a, b] : {std::pair{int64_t{0}, cut}, std::pair{cut, shape.channels}})
        k.spread_extreme_gradient(at_extremes, n, a, b);
    }
    for (int64_t n = 0; n < shape.samples; ++n)
      for (int64_t c = 0; c < shape.channels; ++c) {
        const size_t entry = static_cast<size_t>(n * shape.channels + c);
        const bool smallest = signs != nullptr && gamma[static_cast<size_t>(c)] < 0;
        int64_t at = 0;
        double sum = 0, squares = 0;
        const double about = static_cast<double>(own[entry]);
        for (int64_t i = 0; i < shape.positions; ++i) {
          const double v = z.at(n, c, i), best = z.at(n, c, at), off = plain.at(n, c, i) - about;
          if ((smallest ? v < best : v > best) || (std::isnan(v) && !std::isnan(best))) at = i;
          sum += off, squares += off * off;
        }
        CHECK_EQUAL(where[entry], at);
        const double of = static_cast<double>(found[entry]);
        CHECK(of == z.at(n, c, at) || (std::isnan(of) && std::isnan(z.at(n, c, at))));
        const double mean = sum / static_cast<double>(shape.positions);
        const double apart = about - static_cast<double>(shift[static_cast<size_t>(c)]);
        CHECK(std::abs(d1[entry] - (apart + mean)) <= 1e-15 * (std::abs(apart) + std::abs(mean)));
        CHECK(std::abs(m2[entry] - (squares - sum * mean)) <= 1e-12 * (1 + squares));
        for (int64_t i = 0; i < shape.positions; ++i) {
          const double masked = y.at(n, c, i) <= 0 ? 0 : dy.at(n, c, i);
          const double sent = (plain.at(n, c, i) - static_cast<double>(shift[static_cast<size_t>(c)])) *
                                  static_cast<double>(slope[entry]) +
                              static_cast<double>(offset[entry]) + masked * static_cast<double>(scale[entry]);
          CHECK_EQUAL(dz.at(n, c, i), rounded<T>(i == at ? sent + static_cast<double>(added[entry]) : sent));
        }
      }
  }
}

// A mean is split into a part that the map's type holds and the rest, beyond float16's range too.
template <class T>
void check_split_mean() {
  using A = Compute<T>;
  const std::vector<double> means = {0, 0.1, -1e4, 12345.678, 1e30, std::numeric_limits<double>::quiet_NaN()};
  std::vector<A> shift(means.size()), d(means.size());
  maps<T>().split_mean(means.data(), static_cast<int64_t>(means.size()), shift.data(), d.data());
  for (size_t k = 0; k + 1 < means.size(); ++k) {
    const double sum = static_cast<double>(shift[k]) + static_cast<double>(d[k]);
    CHECK(std::abs(sum - means[k]) <= std::numeric_limits<A>::epsilon() * std::abs(means[k]));
  }
  CHECK(std::isnan(shift.back()));
}

template <class T>
void check_maps() {
  check_split_mean<T>();
  uint32_t seed = 1;
  for (const bool interleaved : {false, true})
    for (const int64_t channels : {1, 12, 25, 102, 1030})
      for (const int64_t positions : {0, 1, 7, 49, 64, 131, 600}) {
        // Larger sums of eighths would not be exact in 24 bits, and the largest maps add no new path.
        if (channels * positions > 20000) continue;
        for (const int64_t gap : {0, 3}) {
          check_shape<T>({2, channels, positions, interleaved}, gap, seed++);
          check_tail_shape<T>({2, channels, positions, interleaved}, gap, seed++);
          if (positions > 0) check_statistics_shape<T>({2, channels, positions, interleaved}, gap, seed++);
        }
      }
}

template <class A>
const CellKernels<A>& cells();
template <>
const CellKernels<float>& cells() {
  return kernels().cell32;
}
template <>
const CellKernels<double>& cells() {
  return kernels().cell64;
}

// The gates over the whole range, ends and NaN included, against the C library. A result of order one is
// right to a few ulp; the exponential behind it to two.
template <class A>
void check_cell(Output output) {
  const std::vector<double> points = {-1e30, -800, -104, -89,  -20, -1.5, -0.63, -0.6, -1e-4, 0,
                                      1e-4,  0.5,  0.62, 0.64, 3,   18,   88,    90,   711,   1e30};
  const int64_t width = static_cast<int64_t>(points.size());
  std::vector<A> gates(static_cast<size_t>(4 * width)), bias(gates.size(), A(0)), c(points.size()), h(c), new_c(c);
  for (size_t k = 0; k < points.size(); ++k) {
    for (size_t gate = 0; gate < 4; ++gate) gates[gate * points.size() + k] = static_cast<A>(points[k]);
    c[k] = static_cast<A>(0.25);
  }
  const CellForward<A> args{width, output, gates.data(), bias.data(), c.data(), h.data(), new_c.data()};
  cells<A>().forward(args, 0, 1);
  const double tolerance = 4 * std::numeric_limits<A>::epsilon();
  const auto near = [&](A actual, double expected) {
    return std::abs(static_cast<double>(actual) - expected) <= tolerance * std::abs(expected) + 1e-37;
  };
  for (size_t k = 0; k < points.size(); ++k) {
    const double u = static_cast<double>(static_cast<A>(points[k])), s = 1 / (1 + std::exp(-u)), t = std::tanh(u);
    CHECK(near(gates[k], s));
    CHECK(near(gates[2 * points.size() + k], t));
    const double next = s * 0.25 + s * t;
    CHECK(std::abs(static_cast<double>(new_c[k]) - next) <= 2 * tolerance);
    const double squashed = output == Output::sigmoid ? 1 / (1 + std::exp(-next)) : std::tanh(next);
    CHECK(std::abs(static_cast<double>(h[k]) - s * squashed) <= 3 * tolerance);
  }
  gates.assign(gates.size(), std::numeric_limits<A>::quiet_NaN());
  cells<A>().forward(args, 0, 1);
  for (const A v : h) CHECK(std::isnan(v));
}

// Inner products of eighths are exact, so every tile and every end must give the very sum.
template <class A>
void check_linear() {
  std::mt19937 random(7);
  for (const int64_t samples : {0, 1, 3, 4, 9})
    for (const int64_t inputs : {1, 7, 8, 33, 102})
      for (const int64_t outputs : {1, 2, 3, 4, 25})
        for (const bool add : {false, true})
          for (const bool with_bias : {false, true}) {
            const int64_t stride = inputs + 2;
            std::vector<A> x(static_cast<size_t>(samples * inputs)), w(static_cast<size_t>(outputs * stride - 2)),
                bias(static_cast<size_t>(outputs)), y(static_cast<size_t>(samples * outputs));
            for (auto* part : {&x, &w, &bias, &y})
              for (auto& v : *part) v = static_cast<A>(value(random));
            const std::vector<A> before = y;
            const A* bias_data = with_bias ? bias.data() : nullptr;
            const Linear<A> args{samples, inputs, outputs, x.data(), w.data(), stride, bias_data, y.data(), add};
            cells<A>().linear(args, 0, outputs / 2);
            cells<A>().linear(args, outputs / 2, outputs);
            for (int64_t n = 0; n < samples; ++n)
              for (int64_t o = 0; o < outputs; ++o) {
                const size_t place = static_cast<size_t>(n * outputs + o);
                A sum = with_bias ? bias[static_cast<size_t>(o)] : add ? before[place] : A(0);
                for (int64_t i = 0; i < inputs; ++i)
                  sum += x[static_cast<size_t>(n * inputs + i)] * w[static_cast<size_t>(o * stride + i)];
                CHECK_EQUAL(y[place], with_bias && sum < 0 ? A(0) : sum);
              }
          }
}

}  // namespace

int main() {
  check_linear<float>();
  check_linear<double>();
  check_maps<float>();
  check_maps<double>();
  check_maps<BFloat16>();
  check_maps<Float16>();
  for (const Output output : {Output::sigmoid, Output::tanh}) {
    check_cell<float>(output);
    check_cell<double>(output);
  }
  return dia::test::failures == 0 ? 0 : 1;
}
