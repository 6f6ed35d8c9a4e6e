// The kernels on the machine that is a GPU: every one of them for every element type and kind of team.
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
    step_forward_kernel(__grid_constant__ const kernels::StepForward<T, kAffine> args, int ranks, unsigned* counters) {
  Machine<kTeam> machine(ranks, shared_memory, counters);
  kernels::step_forward(machine, args);
}

template <class T, bool kAffine, Team kTeam>
__global__ void __launch_bounds__(kThreads, kResident)
    step_backward_kernel(__grid_constant__ const kernels::StepBackward<T, kAffine> args, int ranks,
                         unsigned* counters) {
  Machine<kTeam> machine(ranks, shared_memory, counters);
  kernels::step_backward(machine, args);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident) reduce_kernel(__grid_constant__ const kernels::Reduce<T> args) {
  Machine<Team::block> machine(1, shared_memory, nullptr);
  kernels::reduce(machine, args);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident) spread_kernel(__grid_constant__ const kernels::Spread<T> args) {
  Machine<Team::block> machine(1, shared_memory, nullptr);
  kernels::spread(machine, args);
}

constexpr int kWeightThreads = 256;

__global__ void __launch_bounds__(kWeightThreads, 4)
    weight_gradients_kernel(__grid_constant__ const kernels::WeightGradients args) {
  Machine<Team::block> machine(1, shared_memory, nullptr);
  kernels::weight_gradients<kWeightThreads>(machine, args);
}

__global__ void __launch_bounds__(kWeightThreads, 4)
    affine_gradients_kernel(__grid_constant__ const kernels::AffineGradients args) {
  Machine<Team::block> machine(1, shared_memory, nullptr);
  kernels::affine_gradients(machine, args);
}

#define DIA_STEP_KERNELS(T, kAffine, kTeam)                                      \
  template __global__ void step_forward_kernel<T, kAffine, kTeam>(               \
      __grid_constant__ const kernels::StepForward<T, kAffine>, int, unsigned*); \
  template __global__ void step_backward_kernel<T, kAffine, kTeam>(              \
      __grid_constant__ const kernels::StepBackward<T, kAffine>, int, unsigned*);
#define DIA_KERNELS_OF(T)                                                             \
  DIA_STEP_KERNELS(T, false, Team::block)                                             \
  DIA_STEP_KERNELS(T, false, Team::cluster)                                           \
  DIA_STEP_KERNELS(T, false, Team::grid)                                              \
  DIA_STEP_KERNELS(T, true, Team::block)                                              \
  DIA_STEP_KERNELS(T, true, Team::cluster)                                            \
  DIA_STEP_KERNELS(T, true, Team::grid)                                               \
  template __global__ void reduce_kernel(__grid_constant__ const kernels::Reduce<T>); \
  template __global__ void spread_kernel(__grid_constant__ const kernels::Spread<T>);

DIA_KERNELS_OF(float)
DIA_KERNELS_OF(BFloat16)
DIA_KERNELS_OF(Float16)

}  // namespace dia::cuda
