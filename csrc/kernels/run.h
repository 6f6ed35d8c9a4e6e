// Every kernel, by its arguments' type.
#pragma once

#include "cluster_gradient.h"
#include "cluster_step.h"
#include "extremes.h"
#include "sweeps.h"
#include "tile_cell.h"
#include "weight_gradients.h"

namespace dia::kernels {

template <class M>
DIA_DEVICE void run(M& m, const BottleneckSums& args) {
  bottleneck_sums(m, args);
}
template <class M, bool kAffine>
DIA_DEVICE void run(M& m, const CellStates<kAffine>& args) {
  cell_states(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const JoinParts& args) {
  join_parts(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const BottleneckGradientSums& args) {
  bottleneck_gradient_sums(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const CellGradients& args) {
  cell_gradients(m, args);
}
template <class M, class T>
DIA_DEVICE void run(M& m, const Reduce<T>& args) {
  reduce<OwnKernel>(m, args);
}
template <class M, class T>
DIA_DEVICE void run(M& m, const Spread<T>& args) {
  if (!args.beside) m.wait_for_kernel();
  spread<OwnKernel>(m, args);
  // Whoever comes behind waits for this kernel alone.
  if (args.beside) m.wait_for_kernel();
}
template <class M, class T>
DIA_DEVICE void run(M& m, const Extremes<T>& args) {
  extremes(m, args);
}
template <class M, class T>
DIA_DEVICE void run(M& m, const SpreadExtremeGradient<T>& args) {
  spread_extreme_gradient(m, args);
}
template <class M, class T, bool kAffine>
DIA_DEVICE void run(M& m, const ClusterStep<T, kAffine>& args) {
  cluster_step(m, args);
}
template <class M, class T, bool kAffine>
DIA_DEVICE void run(M& m, const ClusterGradient<T, kAffine>& args) {
  cluster_gradient(m, args);
}
template <class M, int kTile>
DIA_DEVICE void run(M& m, const WeightGradients<kTile>& args) {
  weight_gradients(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const BatchStatistics& args) {
  batch_statistics(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const ChannelStatistics& args) {
  channel_statistics(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const SharedNormGradients& args) {
  shared_norm_gradients(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const GivenStatistics& args) {
  given_statistics(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const MeanGradients& args) {
  mean_gradients(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const NormGradients& args) {
  norm_gradients(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const NormFactors& args) {
  norm_factors(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const ScaleGradients& args) {
  scale_gradients(m, args);
}
template <class M>
DIA_DEVICE void run(M& m, const Rectify& args) {
  rectify(m, args);
}
template <class M, bool kAffine>
DIA_DEVICE void run(M& m, const SplitGates<kAffine>& args) {
  split_gates(m, args);
}
template <class M, bool kAffine>
DIA_DEVICE void run(M& m, const SplitGateGradients<kAffine>& args) {
  split_gate_gradients(m, args);
}

// Kernels that wait for the one before by themselves: they begin with what is there without it. None is the first of an
// operator, before which anybody's may have run and written anything.
template <class Args>
constexpr bool kWaits = false;
template <class T>
constexpr bool kWaits<Spread<T>> = true;
template <>
constexpr bool kWaits<BottleneckSums> = true;
template <bool kAffine>
constexpr bool kWaits<CellStates<kAffine>> = true;
template <>
constexpr bool kWaits<BottleneckGradientSums> = true;
template <>
constexpr bool kWaits<CellGradients> = true;

// A kernel behind another.
template <class M, class Args>
DIA_DEVICE void run_behind(M& m, const Args& args) {
  if constexpr (!kWaits<Args>) m.wait_for_kernel();
  run(m, args);
}

// Whether a kernel's blocks make tiles of products, by just kTableThreads threads.
template <class Args>
constexpr bool kHasTiles = false;
template <>
constexpr bool kHasTiles<BottleneckSums> = true;
template <bool kAffine>
constexpr bool kHasTiles<CellStates<kAffine>> = true;
template <>
constexpr bool kHasTiles<BottleneckGradientSums> = true;
template <>
constexpr bool kHasTiles<CellGradients> = true;
template <int kTile>
constexpr bool kHasTiles<WeightGradients<kTile>> = true;

// Whether a kernel sweeps over maps; and whether it does so by clusters of kClusterBlocks blocks.
template <class Args>
constexpr bool kIsSweep = false;
template <class T>
constexpr bool kIsSweep<Reduce<T>> = true;
template <class T>
constexpr bool kIsSweep<Spread<T>> = true;
template <class T>
constexpr bool kIsSweep<Extremes<T>> = true;
template <class Args>
constexpr bool kHasClusters = false;
template <class T, bool kAffine>
constexpr bool kHasClusters<ClusterStep<T, kAffine>> = true;
template <class T, bool kAffine>
constexpr bool kHasClusters<ClusterGradient<T, kAffine>> = true;

// Threads of a block.
template <class Args>
constexpr int kThreadsOf = kHasClusters<Args> ? kClusterThreads
                           : kIsSweep<Args>   ? kSweepThreads
                                              : kTableThreads;

}  // namespace dia::kernels
