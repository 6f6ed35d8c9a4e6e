// The gradient of the step, but for its weights' (weight_gradients.h), in one launch:
// dx = g h' + dp / HW, with g = dy masked by the activation, and dp from the cell's gradient at dh' = sum(x g) + dh.
//
// A team's block makes g of its own channels of a group of samples, keeps it on chip and writes it as dshortcut; x
// streams through a stage of one sample. So dy, y, x are read once, dshortcut and dx written once: 5 passes, 3 without
// shortcut and activation. Two barriers of the team a group: each owner makes its channels' part of both bottlenecks'
// gradients; behind the first barrier every block adds up some columns of these, in the owners' order; behind the
// second all have them whole.
#pragma once

#include "step.h"

namespace dia::kernels {

// g of the owned channels into the image, with the phases of `like`, and as dshortcut.
template <class M, class T, bool kAffine, class Array>
DIA_DEVICE void mask_gradient(M& m, const StepBackward<T, kAffine>& args, const Image<T>& image,
                              const Samples<const T>& like, int64_t sample, int count, const Array& memory) {
  const bool written = args.dshortcut.data != nullptr;
  const bool packs =
      alike(like, args.dy) && (!args.relu || alike(like, args.y)) && (!written || alike(like, args.dshortcut));
  for_slots(
      m, image, like, sample, count, packs,
      [&](const Place& at) {
        Pack<T> g = m.load_pack(at.in(args.dy, sample));
        if (args.relu) mask_pack<M>(g, m.load_pack(at.in(args.y, sample)));
        memory.set_pack(at.place, g);
        if (written) m.store_pack(at.in(args.dshortcut, sample), g);
      },
      [&](const Place& at) {
        T g = m.load(at.in(args.dy, sample));
        if (args.relu) mask<M>(g, m.load(at.in(args.y, sample)));
        memory[at.place] = g;
        if (written) m.store(at.in(args.dshortcut, sample), g);
      });
}

// Gradients of the owned channels' pre-activations and old c; g's factor in dx (h', times the norm's scale if there is
// one) and du also on chip, by index and owned channel. `sums` of g x, or of g (x - shift) and `plain` of g.
template <class M, class T, bool kAffine, class Array>
DIA_DEVICE void gate_gradients(M& m, const StepBackward<T, kAffine>& args, Part owned, int64_t sample, int count,
                               const Array& sums, const Array& plain, const Array& hidden, const Array& du) {
  const int channels = args.size.channels, width = owned.size();
  for (int k = m.thread(); k < count * width; k += m.threads()) {
    const int channel = owned.begin + k % width;
    const int64_t row = sample + k / width, at = row_at(row, channels) + channel;
    const float* from = args.tables.gates + row * 4 * channels + channel;
    const Gates<float> gates{m.load(from), m.load(from + channels), m.load(from + 2 * channels),
                             m.load(from + 3 * channels)};
    const float new_c = m.load(args.new_c + at), old_c = args.c != nullptr ? m.load(args.c + at) : 0.0f;
    const float dc = args.dc != nullptr ? m.load(args.dc + at) : 0.0f;
    float dh = args.dh != nullptr ? m.load(args.dh + at) : 0.0f;
    if constexpr (kAffine) {
      const bool has_g = args.dy.data != nullptr;
      const float sum = has_g ? static_cast<float>(plain[k]) : 0.0f;
      const float product = has_g ? sums[k] - m.load(args.affine.d + channel) * sum : 0.0f;
      m.store(args.sum + at, sum);
      m.store(args.product + at, product);
      dh += m.load(args.affine.scale + channel) * product + m.load(args.affine.bias + channel) * sum;
    } else if (args.dy.data != nullptr) {
      dh += sums[k];
    }
    const auto with = [&](auto cell) {
      using Function = decltype(cell);
      const float s = Function::squash(new_c);
      hidden[k] = gates.o * s * (kAffine ? m.load(args.affine.scale + channel) : 1.0f);
      return Function::backward(gates, old_c, s, dh, dc);
    };
    float of[5];
    const auto keep = [&](const auto& gradient) {
      of[0] = gradient.u.i, of[1] = gradient.u.f, of[2] = gradient.u.g, of[3] = gradient.u.o, of[4] = gradient.c;
    };
    if (args.tanh_output)
      keep(with(Cell<MachineMaths<M>, Output::tanh>{}));
    else
      keep(with(Cell<MachineMaths<M>, Output::sigmoid>{}));
    DIA_UNROLL
    for (int gate = 0; gate < 4; ++gate) {
      du[(k / width * 4 + gate) * width + k % width] = of[gate];
      m.store(args.du + (row * 4 + gate) * channels + channel, of[gate]);
    }
    if (args.old_dc != nullptr) m.store(args.old_dc + at, of[4]);
  }
}

// dx of the owned channels, from the image of g (which has the phases of dx), its factor and dp / HW.
template <class M, class T, bool kAffine, class Array, class Floats>
DIA_DEVICE void spread_gradient(M& m, const StepBackward<T, kAffine>& args, const Image<T>& image, int64_t sample,
                                int count, const Array& memory, const Floats& hidden, const Floats& pooled) {
  const int owned = image.channels.size();
  const bool has_g = args.dy.data != nullptr;
  const auto value = [&](T g, int channel) {
    const float shared = pooled[channel];
    return M::template narrow<T>(has_g ? M::widen(g) * hidden[channel] + shared : shared);
  };
  for_slots(
      m, image, args.dx, sample, count, true,
      [&](const Place& at) {
        Pack<T> pack{};
        if (has_g) pack = memory.pack(at.place);
        ChannelWalk walk(image, at.element);
        DIA_UNROLL
        for (int k = 0; k < Pack<T>::size; ++k, walk.next())
          pack.values[k] = value(pack.values[k], at.index * owned + walk.channel);
        m.store_pack(at.in(args.dx, sample), pack);
      },
      [&](const Place& at) {
        T g{};
        if (has_g) g = memory[at.place];
        m.store(at.in(args.dx, sample), value(g, at.index * owned + image.channel_at(at.element)));
      });
}

template <class M, class T, bool kAffine>
DIA_DEVICE void step_backward(M& m, const StepBackward<T, kAffine>& args) {
  const MapSize& size = args.size;
  const Part owned = part_of(size.channels, m.rank(), m.ranks(), args.teams.quantum);
  // The image of g has the phases of dx, or where that is not wanted of dy.
  const Samples<const T> like = args.dx.data != nullptr ? Samples<const T>{args.dx.data, args.dx.stride} : args.dy;
  const Image<T> image(
      size, owned,
      aligned_runs(size, owned, like.data, like.stride) && aligned_runs(size, owned, args.x.data, args.x.stride));
  const int group = args.teams.group, channels = size.channels, bottleneck = args.bottleneck, width = owned.size();
  const Part columns = part_of(2 * bottleneck, m.rank(), m.ranks());
  const int most = group * (width > 2 * bottleneck ? width : 2 * bottleneck);
  const auto memory = m.template shared<T>(static_cast<int64_t>(group) * image.elements());
  const auto stage = m.template shared<T>(image.elements());
  const auto scratch = m.template shared<float>(column_scratch(m.warps(), most));
  const auto sums = m.template shared<float>(group * width);    // of x g, then dp / HW
  const auto hidden = m.template shared<float>(group * width);  // g's factor in dx
  const auto du = m.template shared<float>(group * 4 * width);
  const auto dz = m.template shared<float>(group * 2 * bottleneck);  // of the input's, then the hidden bottleneck

  const auto plain = m.template shared<float>(kAffine ? group * width : 0);  // sums of g

  for (int sample = m.team() * group; sample < size.samples; sample += m.teams() * group) {
    const int count = size.samples - sample < group ? size.samples - sample : group;
    if (args.dy.data != nullptr) {
      mask_gradient(m, args, image, like, sample, count, memory);
      for (int index = 0; index < count; ++index) {
        copy_in(m, image, args.x, sample + index, 1, stage);
        const T *g_at = like.data + (sample + index) * like.stride,
                *x_at = args.x.data + (sample + index) * args.x.stride;
        sum_positions(m, image, 1, scratch, sums, index, [&](int, int channel, int position) {
          const T g = memory[index * image.elements() + image.place_of(g_at, owned.begin + channel, position)];
          float x = M::widen(static_cast<T>(stage[image.place_of(x_at, owned.begin + channel, position)]));
          if constexpr (kAffine) x -= m.load(args.affine.shift + owned.begin + channel);
          return M::widen(g) * x;
        });
        if constexpr (kAffine)
          sum_positions(m, image, 1, scratch, plain, index, [&](int, int channel, int position) {
            return M::widen(static_cast<T>(
                memory[index * image.elements() + image.place_of(g_at, owned.begin + channel, position)]));
          });
      }
      m.sync_block();
    }
    gate_gradients(m, args, owned, sample, count, sums, plain, hidden, du);

    // This owner's part of both bottlenecks' gradients: du W2 over its own rows of W2.
    float* partial = args.partial + (static_cast<int64_t>(m.team()) * m.ranks()) * group * 2 * bottleneck;
    const auto own_row = [&](const float* weight) {
      return [&, weight](int row) {
        return weight + (static_cast<int64_t>(row / width) * channels + owned.begin + row % width) * bottleneck;
      };
    };
    const auto own_du = [&](int index, int row) { return static_cast<float>(du[index * 4 * width + row]); };
    for (int path = 0; path < 2; ++path)
      sum_columns(m, bottleneck, 4 * width, count, scratch, own_du,
                  own_row(path == 0 ? args.weights.input_expand : args.weights.hidden_expand),
                  [&](int index, int column, float sum) {
                    m.store(partial + (static_cast<int64_t>(m.rank()) * group + index) * 2 * bottleneck +
                                path * bottleneck + column,
                            sum);
                  });
    m.sync_team();

    // Some columns of them, over all owners, masked by the bottleneck's ReLU.
    for (int k = m.thread(); k < count * columns.size(); k += m.threads()) {
      const int index = k / columns.size(), column = columns.begin + k % columns.size();
      float sum = 0;
      for (int rank = 0; rank < m.ranks(); ++rank)
        sum += m.load_fresh(partial + (static_cast<int64_t>(rank) * group + index) * 2 * bottleneck + column);
      const bool input = column < bottleneck;
      const int64_t at = row_at(sample + index, bottleneck) + (input ? column : column - bottleneck);
      if (m.load((input ? args.tables.zx : args.tables.zh) + at) <= 0.0f) sum = 0;
      m.store((input ? args.dzx : args.dzh) + at, sum);
    }
    m.sync_team();

    for (int k = m.thread(); k < count * 2 * bottleneck; k += m.threads()) {
      const int index = k / (2 * bottleneck), column = k % (2 * bottleneck);
      const bool input = column < bottleneck;
      const int64_t at = row_at(sample + index, bottleneck) + (input ? column : column - bottleneck);
      dz[k] = m.load_fresh((input ? args.dzx : args.dzh) + at);
    }
    const auto down = [&](const float* weight, int first, auto done) {
      sum_columns(
          m, width, bottleneck, count, scratch,
          [&](int index, int row) { return static_cast<float>(dz[index * 2 * bottleneck + first + row]); },
          [&](int row) { return weight + static_cast<int64_t>(row) * channels + owned.begin; }, done);
    };
    if (args.old_dh != nullptr)
      down(args.weights.hidden_reduce, bottleneck, [&](int index, int column, float sum) {
        m.store(args.old_dh + row_at(sample + index, channels) + owned.begin + column, sum);
      });
    if (kAffine || args.dx.data != nullptr)
      down(args.weights.input_reduce, 0, [&](int index, int column, float sum) {
        if constexpr (kAffine) {
          m.store(args.dp + row_at(sample + index, channels) + owned.begin + column, sum);
          sum *= m.load(args.affine.scale + owned.begin + column);
        }
        sums[index * width + column] = sum / static_cast<float>(size.positions);
      });
    if (args.dx.data != nullptr) {
      m.sync_block();
      // The next group needs no barrier: a thread writes the slots that it has just read, and between this group's h'
      // and the next one's lie the barriers of its sums.
      spread_gradient(m, args, image, sample, count, memory, hidden, sums);
    }
  }
}

}  // namespace dia::kernels
