// The gradient of the cell by teams of blocks, but for its weights' (weight_gradients.h): from what the map sends to h'
// to the gradients of the means and of the old state. A part of the step's kernel, and a kernel of its own between two
// sweeps.
//
// A block makes the gradients of its own channels' pre-activations, and with them its channels' part of both
// bottlenecks' gradients. Two barriers of the team a group: behind the first every block adds up some columns of these
// parts, in the owners' order; behind the second all have them whole.
#pragma once

#include "cell.h"
#include "norm.h"
#include "sums.h"

namespace dia::kernels {

// Shared memory of the gradient, by index and owned channel.
template <class Array>
struct CellGradientMemory {
  Array scratch, hidden, du, dz;  // dz: of the input's, then the hidden bottleneck
};

template <class M>
DIA_DEVICE auto cell_gradient_memory(M& m, int group, int width, int bottleneck) {
  const int most = group * (width > 2 * bottleneck ? width : 2 * bottleneck);
  const auto scratch = m.template shared<float>(column_scratch(m.warps(), most));
  const auto hidden = m.template shared<float>(group * width);
  const auto du = m.template shared<float>(group * 4 * width);
  const auto dz = m.template shared<float>(group * 2 * bottleneck);
  return CellGradientMemory<std::remove_const_t<decltype(scratch)>>{scratch, hidden, du, dz};
}

// Gradients of the owned channels' pre-activations and old c. `map_dh(k, channel, at)` is what the map sends to h',
// `factor(channel)` goes with h' into `hidden`.
template <class M, class Memory, class MapGradient, class Factor>
DIA_DEVICE void gate_gradients(M& m, const CellBackward& args, Part owned, int64_t sample, int count,
                               const Memory& memory, MapGradient map_dh, Factor factor) {
  const int width = owned.size();
  for (int k = m.thread(); k < count * width; k += m.threads()) {
    const int channel = owned.begin + k % width;
    const int64_t row = sample + k / width;
    const float dh = map_dh(k, channel, row_at(row, args.channels) + channel);
    const float h = gate_gradient(m, args, row, channel, dh, [&](int gate, float value) {
      memory.du[(k / width * 4 + gate) * width + k % width] = value;
    });
    memory.hidden[k] = h * factor(channel);
  }
}

// From the owned channels' du in `memory` to the gradient of their old h, and of their means if they are wanted:
// `done(index, column, dp)`, behind which the caller needs a block barrier.
template <class M, class Memory, class Done>
DIA_DEVICE void backward_cell(M& m, const CellBackward& args, const Teams& teams, Part owned, int64_t sample, int count,
                              const Memory& memory, bool need_means, Done done) {
  const int channels = args.channels, bottleneck = args.bottleneck, width = owned.size();
  const TeamParts<M> parts(m, args.partial, teams.group, bottleneck);
  // du W2 over its own rows of W2.
  for (int path = 0; path < 2; ++path) {
    const float* weight = path == 0 ? args.weights.input_expand : args.weights.hidden_expand;
    sum_columns(
        m, bottleneck, 4 * width, count, memory.scratch,
        [&](int index, int row) { return static_cast<float>(memory.du[index * 4 * width + row]); },
        [&](int row) {
          return weight + (static_cast<int64_t>(row / width) * channels + owned.begin + row % width) * bottleneck;
        },
        [&](int index, int column, float sum) { m.store(parts.at(m.rank(), index, path * bottleneck + column), sum); });
  }
  m.sync_team();
  parts.add_up(m, count, [&](int index, bool input, int row, float sum) {
    const int64_t at = row_at(sample + index, bottleneck) + row;
    m.store((input ? args.dzx : args.dzh) + at, rectified(sum, m.load((input ? args.tables.zx : args.tables.zh) + at)));
  });
  m.sync_team();

  for (int k = m.thread(); k < count * 2 * bottleneck; k += m.threads()) {
    const int index = k / (2 * bottleneck), column = k % (2 * bottleneck);
    const bool input = column < bottleneck;
    const int64_t at = row_at(sample + index, bottleneck) + (input ? column : column - bottleneck);
    memory.dz[k] = m.load((input ? args.dzx : args.dzh) + at);
  }
  const auto down = [&](const float* weight, int first, auto finish) {
    sum_columns(
        m, width, bottleneck, count, memory.scratch,
        [&](int index, int row) { return static_cast<float>(memory.dz[index * 2 * bottleneck + first + row]); },
        [&](int row) { return weight + static_cast<int64_t>(row) * channels + owned.begin; }, finish);
  };
  if (args.old_dh != nullptr)
    down(args.weights.hidden_reduce, bottleneck, [&](int index, int column, float sum) {
      m.store(args.old_dh + row_at(sample + index, channels) + owned.begin + column, sum);
    });
  if (need_means) down(args.weights.input_reduce, 0, done);
}

}  // namespace dia::kernels
