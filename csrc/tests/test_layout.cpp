// core/layout.h: which tensors a kernel can walk without a copy, and by which strides.
#include <vector>

#include "check.h"
#include "core/layout.h"

namespace {

using Sizes = std::vector<int64_t>;

std::optional<dia::RowStrides> strides_of(const Sizes& sizes, const Sizes& strides, bool channel_first,
                                          bool interleaved) {
  return dia::row_strides(sizes.data(), strides.data(), static_cast<int>(sizes.size()), channel_first, interleaved);
}

void check_strides(std::optional<dia::RowStrides> actual, int64_t sample, int64_t row) {
  CHECK(actual.has_value());
  if (!actual) return;
  CHECK_EQUAL(actual->sample, sample);
  CHECK_EQUAL(actual->row, row);
}

bool keeps_channels_last(const Sizes& sizes, const Sizes& strides, bool channel_first) {
  return dia::output_format(sizes.data(), strides.data(), static_cast<int>(sizes.size()), channel_first) ==
         dia::MemoryFormat::channels_last;
}

void rows_of_a_shape() {
  const dia::MapShape planar{2, 3, 5, false}, interleaved{2, 3, 5, true};
  CHECK_EQUAL(planar.rows(), 3);
  CHECK_EQUAL(planar.row_length(), 5);
  CHECK_EQUAL(interleaved.rows(), 5);
  CHECK_EQUAL(interleaved.row_length(), 3);
}

void planar_maps() {
  check_strides(strides_of({2, 3, 4, 5}, {60, 20, 5, 1}, true, false), 60, 20);
  // A slice of channels, and of samples: rows stay dense.
  check_strides(strides_of({2, 3, 4, 5}, {240, 40, 5, 1}, true, false), 240, 40);
  // Token layout whose positions are adjacent: the channels are the last dimension.
  check_strides(strides_of({2, 5, 3}, {15, 1, 5}, false, false), 15, 5);
  // A slice of columns leaves holes in a row, and an expanded map repeats an element.
  CHECK(!strides_of({2, 3, 4, 5}, {96, 32, 8, 1}, true, false));
  CHECK(!strides_of({2, 3, 4, 5}, {3, 1, 0, 0}, true, false));
}

void interleaved_maps() {
  check_strides(strides_of({2, 3, 4, 5}, {60, 1, 15, 3}, true, true), 60, 3);
  check_strides(strides_of({2, 5, 3}, {15, 3, 1}, false, true), 15, 3);
  // A slice of channels: rows lie further apart than they are long.
  check_strides(strides_of({2, 3, 4, 5}, {160, 1, 40, 8}, true, true), 160, 8);
  // Neither the channels adjacent, nor the positions at one distance.
  CHECK(!strides_of({2, 3, 4, 5}, {60, 20, 5, 1}, true, true));
  CHECK(!strides_of({2, 3, 4, 5}, {72, 1, 18, 3}, true, true));
}

void maps_without_elements() {
  check_strides(strides_of({0, 3, 4, 5}, {60, 20, 5, 1}, true, false), 0, 0);
  check_strides(strides_of({2, 3, 0, 5}, {1, 7, 7, 7}, true, true), 0, 0);
}

void dimensions_of_size_one_may_have_any_stride() {
  check_strides(strides_of({2, 3, 1, 5}, {15, 5, 99, 1}, true, false), 15, 5);
  check_strides(strides_of({2, 1, 4, 5}, {20, 77, 5, 1}, true, true), 20, 1);
}

void offsets_are_64_bit() {
  const int64_t large = int64_t{1} << 33;
  check_strides(strides_of({2, 2, large}, {2 * large, large, 1}, true, false), 2 * large, large);
}

void format_of_results() {
  CHECK(keeps_channels_last({2, 3, 4, 5}, {60, 1, 15, 3}, true));
  CHECK(keeps_channels_last({2, 3, 2, 2, 2}, {24, 1, 12, 6, 3}, true));
  CHECK(!keeps_channels_last({2, 3, 4, 5}, {60, 20, 5, 1}, true));
  // Both formats at once, and a slice that is dense in neither: contiguous.
  CHECK(!keeps_channels_last({2, 1, 4, 5}, {20, 1, 5, 1}, true));
  CHECK(!keeps_channels_last({2, 3, 4, 5}, {160, 1, 40, 8}, true));
  // In the token layout the last dimension is the channels' anyway.
  CHECK(!keeps_channels_last({2, 3, 4, 5}, {60, 1, 15, 3}, false));
}

}  // namespace

int main() {
  rows_of_a_shape();
  planar_maps();
  interleaved_maps();
  maps_without_elements();
  dimensions_of_size_one_may_have_any_stride();
  offsets_are_64_bit();
  format_of_results();
  return dia::test::failures == 0 ? 0 : 1;
}
