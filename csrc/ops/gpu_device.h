// The device of an operator's tensors. ops/cuda_operators.cpp has a real one, ops/simulated_operators.cpp one
// simulated.
#pragma once

#include <memory>

#include "../machines/gpu.h"
#include "tensors.h"

namespace dia::ops {

// For as long as an operator runs: its device is the current one, and work goes to that device's current stream.
class GpuDevice {
 public:
  explicit GpuDevice(const Tensor& x);
  ~GpuDevice();
  GpuDevice(const GpuDevice&) = delete;

  Gpu& gpu();
  // out = factor left right (+ out), float32 matrices, by the BLAS that torch holds and below its dispatcher, so that
  // autocast does not see it.
  void product(const Tensor& out, const Tensor& left, const Tensor& right, bool add, double factor);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace dia::ops
