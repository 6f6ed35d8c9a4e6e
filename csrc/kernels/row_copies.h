// Rows of tables, copied to shared memory past the registers.
#pragma once

#include "products.h"

namespace dia::kernels {

// Rows of `width` values as the threads of a block copy them to shared memory, up to four neighbours at a time: a
// thread's first item, and how far it is to the next. Rows are filled up to a pack, with zeros.
class RowCopies {
 public:
  // Memory allows so many values `together`.
  template <class M>
  DIA_DEVICE RowCopies(const M& m, int width, int together)
      : together_(together),
        width_(width),
        across_((width + 3) / 4 * 4 / together),
        row_(m.thread() / across_),
        item_(m.thread() - row_ * across_),
        rows_(m.threads() / across_),
        items_(m.threads() - rows_ * across_) {}

  // Begins to copy `count` rows to `to` in shared memory, `pitch` apart: from(row) is where one lies.
  template <class M, class Array, class From>
  DIA_DEVICE void copy(M& m, const Array& memory, int to, int pitch, int count, const From& from) const {
    if (together_ == 4)
      copy_by<4>(m, memory, to, pitch, count, from);
    else if (together_ == 2)
      copy_by<2>(m, memory, to, pitch, count, from);
    else
      copy_by<1>(m, memory, to, pitch, count, from);
  }

 private:
  template <int kValues, class M, class Array, class From>
  DIA_DEVICE void copy_by(M& m, const Array& memory, int to, int pitch, int count, const From& from) const {
    int row = row_, item = item_;
    while (row < count) {
      const int column = item * kValues, left = width_ - column;
      const int there = left < 0 ? 0 : left < kValues ? left : kValues;
      m.template copy<kValues>(memory, to + row * pitch + column, from(row) + column, there);
      row += rows_, item += items_;
      if (item >= across_) item -= across_, ++row;
    }
  }

  int together_, width_, across_, row_, item_, rows_, items_;
};

// Until all that was begun is there, for the whole block.
template <class M>
DIA_DEVICE void finish_copies(M& m) {
  m.commit_copies();
  m.template wait_copies<0>();
  m.sync_block();
}

}  // namespace dia::kernels
