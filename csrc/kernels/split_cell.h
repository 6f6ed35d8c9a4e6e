// The cell where a BLAS does its products: what lies between them, an element to a thread.
//
//     forward    p | z = rectify(b + W1 p) | products = W2x zx + W2h zh | split_gates
//     backward   split_gate_gradients | dz = rectify(du W2) where z > 0 | dp, dh = dz W1
//
// Right where the cell's arithmetic outweighs the map (C = 2048 at r = 4: see the plan).
#pragma once

#include "cell.h"
#include "norm.h"

namespace dia::kernels {

template <class M, class Body>
DIA_DEVICE void for_elements(M& m, int64_t count, Body body) {
  const int64_t blocks = static_cast<int64_t>(m.teams()) * m.ranks(), block = m.team() * m.ranks() + m.rank();
  for (int64_t k = block * m.threads() + m.thread(); k < count; k += blocks * m.threads()) body(k);
}

// The means (N, C) from the sweep's sums, through the norm if there is one.
struct SplitMeans {
  int samples, channels, positions;
  const float* sum;
  NormedMeans norm;  // with kAffine
  float* p;
};

template <bool kAffine, class M>
DIA_DEVICE void split_means(M& m, const SplitMeans& args) {
  for_elements(m, row_at(args.samples, args.channels), [&](int64_t k) {
    const float mean = m.load(args.sum + k) / static_cast<float>(args.positions);
    const int channel = static_cast<int>(k % args.channels);
    m.store(args.p + k, kAffine ? normed_mean(m, args.norm, channel, k, mean) : mean);
  });
}

// In place: a bottleneck's product and bias through its ReLU, forward by its own value, backward by `z`.
struct Rectify {
  int64_t count;
  float* values;
  const float *bias, *z;  // (width) or null; null: the values themselves
  int width;
};

template <class M>
DIA_DEVICE void rectify(M& m, const Rectify& args) {
  for_elements(m, args.count, [&](int64_t k) {
    const float value = m.load(args.values + k) + (args.bias != nullptr ? m.load(args.bias + k % args.width) : 0.0f);
    m.store(args.values + k, rectified(value, args.z != nullptr ? m.load(args.z + k) : value));
  });
}

struct SplitGates {
  CellForward cell;
  const float* products;  // (N, 4 C)
  ChannelAffine affine;   // with kAffine; and (N, C):
  float *factor, *added;
};

template <bool kAffine, class M>
DIA_DEVICE void split_gates(M& m, const SplitGates& args) {
  const int channels = args.cell.channels;
  for_elements(m, row_at(args.cell.samples, channels), [&](int64_t k) {
    const int64_t row = k / channels;
    const int channel = static_cast<int>(k - row * channels);
    const float* at = args.products + row * 4 * channels + channel;
    const float h =
        make_state(m, args.cell, row, channel,
                   {m.load(at), m.load(at + channels), m.load(at + 2 * channels), m.load(at + 3 * channels)});
    if constexpr (kAffine) {
      m.store(args.factor + k, m.load(args.affine.scale + channel) * h);
      m.store(args.added + k, added_of(m, args.affine, channel, h));
    }
  });
}

struct SplitGateGradients {
  CellBackward cell;
  const float* sum;  // see map_gradient
  float* product;
  ChannelAffine affine;
  float* factor;  // null: not wanted
};

template <bool kAffine, class M>
DIA_DEVICE void split_gate_gradients(M& m, const SplitGateGradients& args) {
  const int channels = args.cell.channels;
  for_elements(m, row_at(args.cell.samples, channels), [&](int64_t k) {
    const int64_t row = k / channels;
    const int channel = static_cast<int>(k - row * channels);
    const float dh = map_gradient<kAffine>(m, args.affine, args.sum, args.product, channel, k);
    const float h = gate_gradient(m, args.cell, row, channel, dh, [](int, float) {});
    if (args.factor != nullptr) m.store(args.factor + k, kAffine ? h * m.load(args.affine.scale + channel) : h);
  });
}

}  // namespace dia::kernels
