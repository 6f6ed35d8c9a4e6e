// What a GPU does for the operators: run a kernel of csrc/kernels, clear memory. machines/cuda.cu is a real one, by
// CUDA's runtime; ops/simulated_operators.cpp one simulated. Plain C++, no torch, no CUDA headers.
#pragma once

#include <cstdint>
#include <tuple>
#include <variant>

#include "../core/gpu_plan.h"
#include "../kernels/run.h"

namespace dia {

// Every kernel, as its arguments: those of a type of maps, and those of tables.
template <class T>
using KernelsOfMaps =
    std::tuple<kernels::Reduce<T>, kernels::Spread<T>, kernels::Extremes<T>, kernels::SpreadExtremeGradient<T>,
               kernels::ClusterStep<T, false>, kernels::ClusterStep<T, true>, kernels::ClusterGradient<T, false>,
               kernels::ClusterGradient<T, true>>;
using KernelsOfTables =
    std::tuple<kernels::BottleneckSums, kernels::CellStates<false>, kernels::CellStates<true>, kernels::JoinParts,
               kernels::BottleneckGradientSums, kernels::CellGradients, kernels::SplitGates<false>,
               kernels::SplitGates<true>, kernels::SplitGateGradients<false>, kernels::SplitGateGradients<true>,
               kernels::WeightGradients<32>, kernels::WeightGradients<64>, kernels::BatchStatistics,
               kernels::ChannelStatistics, kernels::GivenStatistics, kernels::MeanGradients, kernels::NormGradients,
               kernels::SharedNormGradients, kernels::NormFactors, kernels::ScaleGradients, kernels::Rectify>;
template <class... Tuples>
struct AnyOf;
template <class... A, class... B, class... Rest>
struct AnyOf<std::tuple<A...>, std::tuple<B...>, Rest...> : AnyOf<std::tuple<A..., B...>, Rest...> {};
template <class... A>
struct AnyOf<std::tuple<A...>> {
  using Kernel = std::variant<A...>;
};
using AnyKernel = AnyOf<KernelsOfMaps<float>, KernelsOfMaps<BFloat16>, KernelsOfMaps<Float16>, KernelsOfTables>::Kernel;

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
