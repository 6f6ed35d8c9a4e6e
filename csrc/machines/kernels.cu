// The kernels on the machine that is a GPU: every one of them for every element type and kind of team.
#include "../kernels/split_cell.h"
#include "../kernels/step_backward.h"
#include "../kernels/step_forward.h"
#include "../kernels/sweeps.h"
#include "../kernels/weight_gradients.h"
#include "cuda.cuh"

namespace dia::cuda {

// Two blocks of 512 threads a multiprocessor: one streams while the other waits for its team.
constexpr int kThreads = 512, kResident = 2;

extern __shared__ __align__(16) char shared_memory[];

template <class T, bool kAffine, Team kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    step_forward_kernel(__grid_constant__ const kernels::StepForward<T, kAffine> args, unsigned* counters) {
  Machine<kTeam> machine(shared_memory, counters);
  kernels::step_forward(machine, args);
}

template <class T, bool kAffine, Team kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    step_backward_kernel(__grid_constant__ const kernels::StepBackward<T, kAffine> args, unsigned* counters) {
  Machine<kTeam> machine(shared_memory, counters);
  kernels::step_backward(machine, args);
}

template <bool kAffine, Team kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    cell_forward_kernel(__grid_constant__ const kernels::CellForwardLaunch args, unsigned* counters) {
  Machine<kTeam> machine(shared_memory, counters);
  kernels::cell_forward<kAffine>(machine, args);
}

template <bool kAffine, Team kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    cell_backward_kernel(__grid_constant__ const kernels::CellBackwardLaunch args, unsigned* counters) {
  Machine<kTeam> machine(shared_memory, counters);
  kernels::cell_backward<kAffine>(machine, args);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident) reduce_kernel(__grid_constant__ const kernels::Reduce<T> args) {
  Machine<Team::block> machine(shared_memory, nullptr);
  kernels::reduce(machine, args);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident) spread_kernel(__grid_constant__ const kernels::Spread<T> args) {
  Machine<Team::block> machine(shared_memory, nullptr);
  kernels::spread(machine, args);
}

// Of tables, which are small: more blocks of fewer threads.
constexpr int kTableThreads = 256, kTableResident = 4;

// `name`_kernel: a kernel of kernels/ whose blocks have nothing to do with each other.
#define DIA_TABLE_KERNEL(name, Args, call)                         \
  __global__ void __launch_bounds__(kTableThreads, kTableResident) \
      name##_kernel(__grid_constant__ const kernels::Args args) {  \
    Machine<Team::block> machine(shared_memory, nullptr);          \
    kernels::call(machine, args);                                  \
  }
DIA_TABLE_KERNEL(weight_gradients, WeightGradients, weight_gradients<kTableThreads>)
DIA_TABLE_KERNEL(batch_statistics, BatchStatistics, batch_statistics)
DIA_TABLE_KERNEL(norm_gradients, NormGradients, norm_gradients)
DIA_TABLE_KERNEL(rectify, Rectify, rectify)
DIA_TABLE_KERNEL(split_means, SplitMeans, split_means<false>)
DIA_TABLE_KERNEL(split_gates, SplitGates, split_gates<false>)
DIA_TABLE_KERNEL(split_gate_gradients, SplitGateGradients, split_gate_gradients<false>)
DIA_TABLE_KERNEL(affine_split_means, SplitMeans, split_means<true>)
DIA_TABLE_KERNEL(affine_split_gates, SplitGates, split_gates<true>)
DIA_TABLE_KERNEL(affine_split_gate_gradients, SplitGateGradients, split_gate_gradients<true>)

#define DIA_STEP_KERNELS(T, kAffine, kTeam)                                 \
  template __global__ void step_forward_kernel<T, kAffine, kTeam>(          \
      __grid_constant__ const kernels::StepForward<T, kAffine>, unsigned*); \
  template __global__ void step_backward_kernel<T, kAffine, kTeam>(         \
      __grid_constant__ const kernels::StepBackward<T, kAffine>, unsigned*);
#define DIA_CELL_KERNELS(kAffine, kTeam)                                                                             \
  template __global__ void cell_forward_kernel<kAffine, kTeam>(__grid_constant__ const kernels::CellForwardLaunch,   \
                                                               unsigned*);                                           \
  template __global__ void cell_backward_kernel<kAffine, kTeam>(__grid_constant__ const kernels::CellBackwardLaunch, \
                                                                unsigned*);
#define DIA_FOR_TEAMS(MACRO, ...)   \
  MACRO(__VA_ARGS__, Team::block)   \
  MACRO(__VA_ARGS__, Team::cluster) \
  MACRO(__VA_ARGS__, Team::grid)
#define DIA_KERNELS_OF(T)                                                             \
  DIA_FOR_TEAMS(DIA_STEP_KERNELS, T, false)                                           \
  DIA_FOR_TEAMS(DIA_STEP_KERNELS, T, true)                                            \
  template __global__ void reduce_kernel(__grid_constant__ const kernels::Reduce<T>); \
  template __global__ void spread_kernel(__grid_constant__ const kernels::Spread<T>);

DIA_FOR_TEAMS(DIA_CELL_KERNELS, false)
DIA_FOR_TEAMS(DIA_CELL_KERNELS, true)
DIA_KERNELS_OF(float)
DIA_KERNELS_OF(BFloat16)
DIA_KERNELS_OF(Float16)

}  // namespace dia::cuda
