// How a batch norm keeps its running statistics: as torch.lerp moves a value.
//
// Plain C++: no torch, no CUDA headers.
#pragma once

#include "gates.h"

namespace dia {

// A value moved by `factor` towards `to`.
DIA_HOST_DEVICE inline float moved(float value, float to, float factor) {
  return factor < 0.5f && factor > -0.5f ? value + factor * (to - value) : to - (to - value) * (1 - factor);
}

}  // namespace dia
