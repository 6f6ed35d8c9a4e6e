// core/gates.h: values by the formula, derivatives against central differences, in double.
#include <cmath>

#include "check.h"
#include "core/gates.h"

namespace {

struct ScalarMaths {
  using Value = double;
  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  static double tanh(double x) { return std::tanh(x); }
};

struct State {
  double h, c;
};

template <dia::Output output>
State forward(const dia::Gates<double>& u, double c) {
  using Cell = dia::Cell<ScalarMaths, output>;
  const auto gates = Cell::activate(u);
  const double new_c = Cell::next_c(gates, c);
  return {Cell::next_h(gates, new_c), new_c};
}

bool near(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance; }

void values_follow_the_formula() {
  const double i = ScalarMaths::sigmoid(0.3), f = ScalarMaths::sigmoid(-0.7), g = std::tanh(1.1),
               o = ScalarMaths::sigmoid(0.5), c = f * 0.9 + i * g;
  const auto paper = forward<dia::Output::sigmoid>({0.3, -0.7, 1.1, 0.5}, 0.9);
  const auto classic = forward<dia::Output::tanh>({0.3, -0.7, 1.1, 0.5}, 0.9);
  CHECK(near(paper.c, c, 1e-15) && near(classic.c, c, 1e-15));
  CHECK(near(paper.h, o * ScalarMaths::sigmoid(c), 1e-15));
  CHECK(near(classic.h, o * std::tanh(c), 1e-15));
}

template <dia::Output output>
void derivatives_match_central_differences() {
  using Cell = dia::Cell<ScalarMaths, output>;
  const double dh = 0.8, dc = -0.6, step = 1e-5;
  for (double shift : {-2.0, -0.4, 0.0, 0.3, 1.7}) {
    const dia::Gates<double> u{0.3 + shift, -0.7 * shift, 1.1 - shift, 0.5};
    const double c = 0.9 - shift;
    const auto gates = Cell::activate(u);
    const auto gradient = Cell::backward(gates, c, Cell::squash(Cell::next_c(gates, c)), dh, dc);
    const auto slope = [&](auto nudge) {
      auto up = u, down = u;
      double c_up = c, c_down = c;
      nudge(up, c_up, step);
      nudge(down, c_down, -step);
      const State a = forward<output>(up, c_up), b = forward<output>(down, c_down);
      return (dh * (a.h - b.h) + dc * (a.c - b.c)) / (2 * step);
    };
    // Central differences err by step^2 times a third derivative of order one, and by rounding / step.
    const double tolerance = 1e-9;
    using Gates = dia::Gates<double>;
    CHECK(near(gradient.u.i, slope([](Gates& v, double&, double d) { v.i += d; }), tolerance));
    CHECK(near(gradient.u.f, slope([](Gates& v, double&, double d) { v.f += d; }), tolerance));
    CHECK(near(gradient.u.g, slope([](Gates& v, double&, double d) { v.g += d; }), tolerance));
    CHECK(near(gradient.u.o, slope([](Gates& v, double&, double d) { v.o += d; }), tolerance));
    CHECK(near(gradient.c, slope([](Gates&, double& s, double d) { s += d; }), tolerance));
  }
}

}  // namespace

int main() {
  values_follow_the_formula();
  derivatives_match_central_differences<dia::Output::sigmoid>();
  derivatives_match_central_differences<dia::Output::tanh>();
  return dia::test::failures == 0 ? 0 : 1;
}
