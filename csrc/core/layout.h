// How a feature map lies in memory, as far as a kernel needs to know. Plain C++, no torch.
//
// A map is `samples` x `channels` x `positions`. It is either planar (a row is one channel of one
// sample: its positions are adjacent) or interleaved (a row is one position of one sample: its
// channels are adjacent; channels_last and the token layout). Samples and rows may lie at any
// distance, so that slices need no copy. All offsets are 64-bit.
#pragma once

#include <cstdint>
#include <optional>

namespace dia {

struct MapShape {
  int64_t samples = 0;
  int64_t channels = 0;
  int64_t positions = 0;
  bool interleaved = false;

  int64_t rows() const { return interleaved ? positions : channels; }
  int64_t row_length() const { return interleaved ? channels : positions; }
};

struct RowStrides {
  int64_t sample = 0;
  int64_t row = 0;
};

// Which memory format results have: that of torch's suggest for x, decided once for all.
enum class MemoryFormat { contiguous, channels_last };

namespace detail {

// Whether dimensions `first`..`last` (in this order, fastest last) with the fastest at stride `unit`
// are dense. Dimensions of size 1 may have any stride.
inline bool dense(const int64_t* sizes, const int64_t* strides, int first, int last, int64_t unit) {
  int64_t expected = unit;
  for (int d = last; d >= first; --d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline bool is_empty(const int64_t* sizes, int dims) {
  for (int d = 0; d < dims; ++d)
    if (sizes[d] == 0) return true;
  return false;
}

// Stride of the fastest dimension out of first..last that is not of size 1; 0 if there is none.
inline int64_t fastest_stride(const int64_t* sizes, const int64_t* strides, int first, int last) {
  for (int d = last; d >= first; --d)
    if (sizes[d] != 1) return strides[d];
  return 0;
}

}  // namespace detail

inline bool is_contiguous(const int64_t* sizes, const int64_t* strides, int dims) {
  return detail::is_empty(sizes, dims) || detail::dense(sizes, strides, 0, dims - 1, 1);
}

// channels_last (4-D) or channels_last_3d (5-D) of a (N, C, *spatial) tensor, as torch defines them.
inline bool is_channels_last(const int64_t* sizes, const int64_t* strides, int dims) {
  if (dims != 4 && dims != 5) return false;
  if (detail::is_empty(sizes, dims)) return true;
  int64_t expected = 1;
  const auto fits = [&](int d) {
    const bool ok = sizes[d] == 1 || strides[d] == expected;
    expected *= sizes[d];
    return ok;
  };
  if (!fits(1)) return false;
  for (int d = dims - 1; d >= 2; --d)
    if (!fits(d)) return false;
  return fits(0);
}

// Memory format of everything shaped like x: channels_last if x is and is not contiguous.
// dia_kernels/layout.py (output_format) computes the same for the fakes.
inline MemoryFormat output_format(const int64_t* sizes, const int64_t* strides, int dims, bool channel_first) {
  const bool last = channel_first && !is_contiguous(sizes, strides, dims) && is_channels_last(sizes, strides, dims);
  return last ? MemoryFormat::channels_last : MemoryFormat::contiguous;
}

// The strides by which a kernel can walk this tensor as a map of `shape`, or nothing: then it needs
// a copy in the output format. `channel_first` says which dimension the channels are, 1 or the last.
inline std::optional<RowStrides> row_strides(const int64_t* sizes, const int64_t* strides, int dims, bool channel_first,
                                             bool interleaved) {
  const int channel = channel_first ? 1 : dims - 1;
  const int first = channel_first ? 2 : 1;
  const int last = channel_first ? dims - 1 : dims - 2;
  if (detail::is_empty(sizes, dims)) return RowStrides{0, 0};
  if (!interleaved) {
    if (!detail::dense(sizes, strides, first, last, 1)) return std::nullopt;
    return RowStrides{strides[0], strides[channel]};
  }
  if (sizes[channel] != 1 && strides[channel] != 1) return std::nullopt;
  const int64_t row = detail::fastest_stride(sizes, strides, first, last);
  if (!detail::dense(sizes, strides, first, last, row)) return std::nullopt;
  return RowStrides{strides[0], row};
}

}  // namespace dia
