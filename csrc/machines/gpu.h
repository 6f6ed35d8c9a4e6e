// What a GPU does for the operators: run a kernel of csrc/kernels, clear memory. machines/cuda.cu is a real one, by
// CUDA's runtime; machines/simulated_gpu.h one simulated. Plain C++, no torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <variant>

#include "../core/gpu_plan.h"
#include "../kernels/run.h"

namespace dia {

// Every kernel, as its arguments.
using AnyKernel = std::variant<
    kernels::StepForward<float, false>, kernels::StepForward<float, true>, kernels::StepForward<BFloat16, false>,
    kernels::StepForward<BFloat16, true>, kernels::StepForward<Float16, false>, kernels::StepForward<Float16, true>,
    kernels::StepBackward<float, false>, kernels::StepBackward<float, true>, kernels::StepBackward<BFloat16, false>,
    kernels::StepBackward<BFloat16, true>, kernels::StepBackward<Float16, false>, kernels::StepBackward<Float16, true>,
    kernels::Reduce<float>, kernels::Reduce<BFloat16>, kernels::Reduce<Float16>, kernels::Spread<float>,
    kernels::Spread<BFloat16>, kernels::Spread<Float16>, kernels::BottleneckSums<false>, kernels::BottleneckSums<true>,
    kernels::CellStates<false>, kernels::CellStates<true>, kernels::JoinParts, kernels::BottleneckGradientSums,
    kernels::CellGradients, kernels::SplitMeans<false>, kernels::SplitMeans<true>, kernels::SplitGates<false>,
    kernels::SplitGates<true>, kernels::SplitGateGradients<false>, kernels::SplitGateGradients<true>,
    kernels::WeightGradients<32>, kernels::WeightGradients<64>, kernels::BatchStatistics, kernels::GivenStatistics,
    kernels::MeanGradients, kernels::NormAgain, kernels::NormGradients, kernels::Rectify>;

// The current device, and the stream that work is put on. A function that fails raises std::runtime_error with what the
// runtime said.
class Gpu {
 public:
  virtual ~Gpu() = default;

  virtual GpuLimits limits() = 0;
  virtual void launch(const AnyKernel& kernel, int blocks, int64_t shared_bytes) = 0;
  // Sets `bytes` of the GPU's memory to zero, in stream order.
  virtual void clear(void* data, int64_t bytes) = 0;
};

}  // namespace dia
