// How a batch norm keeps its running statistics: to the bits of PyTorch's own operations, so that an exported network,
// which calls those, is the network.
//
// Plain C++: no torch, no CUDA headers.
#pragma once

#include <cmath>

#include "gates.h"

namespace dia {

// A value moved by `factor` towards `to`: torch.lerp.
DIA_HOST_DEVICE inline float moved(float value, float to, float factor) {
  const float apart = to - value;
  return factor < 0.5f && factor > -0.5f ? fmaf(factor, apart, value) : fmaf(factor - 1, apart, to);
}

// A product of its own: in double it is exact, and no compiler can make one operation of it and a sum.
DIA_HOST_DEVICE inline float scaled(float value, float factor) {
  return static_cast<float>(static_cast<double>(value) * static_cast<double>(factor));
}

}  // namespace dia
