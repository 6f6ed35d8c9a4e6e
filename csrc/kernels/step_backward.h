// The gradient of the step, but for its weights' (weight_gradients.h), in one launch:
// dx = g h' + dp / HW, with g = dy masked by the activation, and dp from the cell's gradient at dh' = sum(x g) + dh.
//
// A team's block makes g of its own channels of a group of samples, keeps it on chip and writes it as dshortcut; x
// streams through a stage of one sample. So dy, y, x are read once, dshortcut and dx written once: 5 passes, 3 without
// shortcut and activation. Two barriers of the team a group, both the cell's (cell_backward.h).
#pragma once

#include "gradient.h"
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
          pack.set(k, value(pack[k], at.index * owned + walk.channel));
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
  const int group = args.teams.group, channels = size.channels, width = owned.size();
  const bool has_g = args.dy.data != nullptr;
  const auto memory = m.template shared<T>(static_cast<int64_t>(group) * image.elements());
  const auto stage = m.template shared<T>(image.elements());
  const auto cell = cell_gradient_memory(m, group, width, args.cell.bottleneck);  // its `hidden`: g's factor in dx
  const auto sums = m.template shared<float>(group * width);                      // of x g, then dp / HW
  const auto plain = m.template shared<float>(kAffine ? group * width : 0);       // sums of g

  for (int sample = m.team() * group; sample < size.samples; sample += m.teams() * group) {
    const int count = size.samples - sample < group ? size.samples - sample : group;
    if (has_g) {
      mask_gradient(m, args, image, like, sample, count, memory);
      for (int index = 0; index < count; ++index) {
        copy_in(m, image, args.x, sample + index, 1, stage);
        const T *g_at = like.data + (sample + index) * like.stride,
                *x_at = args.x.data + (sample + index) * args.x.stride;
        sum_positions(m, image, 1, cell.scratch, sums, index, [&](int, int channel, int position) {
          const T g = memory[index * image.elements() + image.place_of(g_at, owned.begin + channel, position)];
          float x = M::widen(static_cast<T>(stage[image.place_of(x_at, owned.begin + channel, position)]));
          if constexpr (kAffine) x -= m.load(args.affine.shift + owned.begin + channel);
          return M::widen(g) * x;
        });
        if constexpr (kAffine)
          sum_positions(m, image, 1, cell.scratch, plain, index, [&](int, int channel, int position) {
            return M::widen(static_cast<T>(
                memory[index * image.elements() + image.place_of(g_at, owned.begin + channel, position)]));
          });
      }
      m.sync_block();
    }
    gate_gradients(
        m, args.cell, owned, sample, count, cell,
        [&](int k, int channel, int64_t at) {
          if constexpr (!kAffine) return has_g ? static_cast<float>(sums[k]) : 0.0f;
          const float sum = has_g ? static_cast<float>(plain[k]) : 0.0f;
          const float product = has_g ? sums[k] - m.load(args.affine.d + channel) * sum : 0.0f;
          m.store(args.sum + at, sum);
          m.store(args.product + at, product);
          return m.load(args.affine.scale + channel) * product + m.load(args.affine.bias + channel) * sum;
        },
        [&](int channel) { return kAffine ? m.load(args.affine.scale + channel) : 1.0f; });
    backward_cell(m, args.cell, args.teams, owned, sample, count, cell, kAffine || args.dx.data != nullptr,
                  [&](int index, int column, float dp) {
                    if constexpr (kAffine) {
                      m.store(args.dp + row_at(sample + index, channels) + owned.begin + column, dp);
                      dp *= m.load(args.affine.scale + owned.begin + column);
                    }
                    sums[index * width + column] = dp / static_cast<float>(size.positions);
                  });
    if (args.dx.data != nullptr) {
      m.sync_block();
      // The next group needs no barrier: a thread writes the slots that it has just read, and between this group's h'
      // and the next one's lie the barriers of its sums.
      spread_gradient(m, args, image, sample, count, memory, cell.hidden, sums);
    }
  }
}

}  // namespace dia::kernels
