// Maps among an operator's results that its caller has made: each operator `name` that can write into them is there a
// second time, as `name_into`. A compiler (or, in eager inference, dia_kernels/overwriting.py), which knows what memory
// is free, gives it memory that is mapped and perhaps in a cache, where a map of our own is fresh (docs/kernels.md,
// compiled).
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "arguments.h"

namespace dia::ops {

// The maps among the results, which stand at `places` there. Those that the caller has made, in this order; or nothing,
// and each is made when it is asked for. `over`: the map may be one of the operator's arguments, which it then writes
// over: the map that it reads, or the shortcut, of both of which an element is read before it is written.
template <bool over, int... places>
class Results {
 public:
  using Given = std::array<OptionalTensor, sizeof...(places)>;

  Results() = default;
  explicit Results(Given given) : given_(std::move(given)) {}

  // The k-th, shaped like x; an empty tensor where it is not wanted.
  Tensor make(size_t k, bool wanted, const Tensor& x, const MapInfo& info) const {
    if (!given_) return map_if(wanted, x, info);
    const OptionalTensor& map = (*given_)[k];
    check(map.has_value() == wanted, "into: result ", std::array{places...}[k],
          wanted ? ": expected a map, got None" : ": a map that the flags do not ask for");
    if (!wanted) return map_if(false, x, info);
    check_map("into", *map, x);
    for (int64_t d = 0; d < x.dim() && x.numel() > 0; ++d)
      check(x.size(d) == 1 || map->stride(d) == info.strides[d], "into: result ", std::array{places...}[k],
            ": expected the strides that the operator gives its own");
    return *map;
  }

 private:
  std::optional<Given> given_;
};

template <int... places>
using ResultMaps = Results<false, places...>;
using ResultOverMap = Results<true, 0>;

namespace detail {

template <int>
using EachMap = OptionalTensor;

inline bool shares(const Tensor& map, const Tensor& t) { return overlap(Span(map), Span(t)); }
inline bool shares(const Tensor& map, const OptionalTensor& t) { return t && shares(map, *t); }
template <class Other>
bool shares(const Tensor&, const Other&) {
  return false;
}

// Whether the map is the argument; tables have fewer dimensions.
inline bool is_same(const Tensor& map, const Tensor& t) { return is_same_map(map, t); }
inline bool is_same(const Tensor& map, const OptionalTensor& t) { return t && is_same(map, *t); }
template <class Other>
bool is_same(const Tensor&, const Other&) {
  return false;
}

template <int place, int... places>
auto unless_in(Tensor& t) {
  if constexpr (((place == places) || ...))
    return std::tuple<>();
  else
    return std::tuple<Tensor>(std::move(t));
}

// What an operator returns beside its maps.
template <int... places, class... Returned, size_t... all>
auto rest_of(std::tuple<Returned...>& results, std::index_sequence<all...>) {
  return std::tuple_cat(unless_in<static_cast<int>(all), places...>(std::get<all>(results))...);
}

}  // namespace detail

// The two forms of an operator that takes its Results before its arguments.
template <auto operation>
struct Forms;

template <class Returned, bool over, int... places, class First, class... Rest,
          Returned (*operation)(const Results<over, places...>&, First, Rest...)>
struct Forms<operation> {
  // With maps of its own.
  static Returned own(First first, Rest... rest) { return operation({}, std::move(first), std::move(rest)...); }

  // Into `maps`, which overlap no argument.
  static auto into(First first, Rest... rest, detail::EachMap<places>... maps) {
    const auto check_apart = [&](const OptionalTensor& map) {
      if (!map) return;
      const auto is_apart = [&](const auto& argument) {
        return !detail::shares(*map, argument) || (over && detail::is_same(*map, argument));
      };
      check(is_apart(first) && (is_apart(rest) && ...), "into: a map that shares memory with an argument");
    };
    (check_apart(maps), ...);
    if constexpr (sizeof...(places) == 2) {
      const typename Results<over, places...>::Given given{maps...};
      check(!given[0] || !detail::shares(*given[0], given[1]), "into: maps that share memory");
    }
    const Results<over, places...> results({maps...});
    if constexpr (std::is_same_v<Returned, Tensor>) {
      operation(results, std::move(first), std::move(rest)...);
    } else {
      Returned all = operation(results, std::move(first), std::move(rest)...);
      auto others = detail::rest_of<places...>(all, std::make_index_sequence<std::tuple_size_v<Returned>>());
      if constexpr (std::tuple_size_v<decltype(others)> == 1)
        return std::get<0>(others);
      else
        return others;
    }
  }
};

}  // namespace dia::ops

// Registers an operator in both forms.
#define DIA_IMPL_FORMS(m, name)                             \
  m.impl(#name, TORCH_BOX(&::dia::ops::Forms<&name>::own)); \
  m.impl(#name "_into", TORCH_BOX(&::dia::ops::Forms<&name>::into))
