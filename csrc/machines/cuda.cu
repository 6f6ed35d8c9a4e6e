// A GPU by CUDA's runtime: the kernels of csrc/kernels for every element type and kind of team, and their launch.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "cuda.cuh"
#include "cuda_gpu.h"
#include "gpu.h"

namespace dia::cuda {
namespace {

extern __shared__ __align__(16) char shared_memory[];

// Two blocks of 512 threads a multiprocessor: one streams while the other waits for its team. Of 256 threads three of
// sweeps, which keep packs of several maps and sums in registers, two of tiles of products, four of others.
template <class Args>
constexpr int kResidentOf = kernels::kHasTeams<Args> || kernels::kHasTiles<Args> ? 2
                            : requires(Args args) { args.tile; }                 ? kSweepResident
                                                                                 : 4;

template <class Args, GpuTeam kTeam>
__global__ void __launch_bounds__(kernels::kThreadsOf<Args>, kResidentOf<Args>)
    kernel(__grid_constant__ const Args args, unsigned* counters) {
  Machine<kTeam> machine(shared_memory, counters);
  kernels::run(machine, args);
}

template <class Args>
const void* kernel_of(GpuTeam team) {
  if constexpr (kernels::kHasTeams<Args>) {
    if (team == GpuTeam::cluster) return reinterpret_cast<const void*>(&kernel<Args, GpuTeam::cluster>);
    if (team == GpuTeam::grid) return reinterpret_cast<const void*>(&kernel<Args, GpuTeam::grid>);
  }
  return reinterpret_cast<const void*>(&kernel<Args, GpuTeam::block>);
}

// Raises with what the runtime says. The error is taken back: the next check must not find it.
void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  std::ostringstream message;
  message << "dia_kernels: CUDA: " << what << ": " << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "an attribute of the device");
  return value;
}

// Multiprocessors that plans leave to others (a collective's kernels, say): so many of sixty-four.
constexpr int kHeadroom = 1;

// What the device says of itself; its rates are those of the GPU that is known for its architecture, by
// multiprocessors.
GpuLimits limits_of(int device) {
  const int architecture =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  GpuLimits limits = kGpus[0];
  for (const GpuLimits& known : kGpus)
    if (known.architecture <= architecture) limits = known;
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const double share = static_cast<double>(multiprocessors) / limits.multiprocessors;
  limits.name = "this", limits.architecture = architecture;
  limits.multiprocessors = multiprocessors - multiprocessors * kHeadroom / 64;
  limits.threads = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  if (attribute(cudaDevAttrClusterLaunch, device) == 0) limits.cluster = 1;
  for (double* rate : {&limits.memory, &limits.l2, &limits.flops, &limits.tf32}) *rate *= share;
  return limits;
}

// A launch as the runtime takes it.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[1]{};

  Launch(const LaunchShape& shape, int threads, cudaStream_t stream) {
    config.gridDim = dim3(shape.ranks, shape.teams);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    if (shape.team == GpuTeam::cluster) {
      attributes[0].id = cudaLaunchAttributeClusterDimension;
      attributes[0].val.clusterDim = {static_cast<unsigned>(shape.ranks), 1, 1};
      config.numAttrs = 1;
    } else if (shape.team == GpuTeam::grid) {
      attributes[0].id = cudaLaunchAttributeCooperative;
      attributes[0].val.cooperative = 1;
      config.numAttrs = 1;
    }
  }
};

class CudaGpu final : public Gpu {
 public:
  explicit CudaGpu(cudaStream_t stream) : stream_(stream) { check(cudaGetDevice(&device_), "the current device"); }

  GpuLimits limits() override {
    static std::mutex mutex;
    static std::map<int, GpuLimits> known;
    const std::lock_guard lock(mutex);
    const auto found = known.find(device_);
    return found != known.end() ? found->second : known[device_] = limits_of(device_);
  }

  void launch(const AnyKernel& any, const LaunchShape& shape, unsigned* counters) override {
    std::visit(
        [&]<class Args>(const Args& args) {
          const void* function = prepared<Args>(shape);
          Launch launch(shape, kernels::kThreadsOf<Args>, stream_);
          void* arguments[] = {const_cast<Args*>(&args), &counters};
          check(cudaLaunchKernelExC(&launch.config, function, arguments), "a launch");
        },
        any);
  }

  int64_t resident(const AnyKernel& any, const LaunchShape& shape) override {
    return std::visit(
        [&]<class Args>(const Args&) -> int64_t {
          const void* function = prepared<Args>(shape);
          Launch launch(shape, kernels::kThreadsOf<Args>, stream_);
          int count = 0;
          if (shape.team == GpuTeam::cluster) {
            check(cudaOccupancyMaxActiveClusters(&count, function, &launch.config), "occupancy of clusters");
            return static_cast<int64_t>(count) * shape.ranks;
          }
          check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, kernels::kThreadsOf<Args>,
                                                              launch.config.dynamicSmemBytes),
                "occupancy");
          return static_cast<int64_t>(count) * limits().multiprocessors;
        },
        any);
  }

  void clear(void* data, int64_t bytes) override {
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_), "clearing memory");
  }

 private:
  // The kernel, with so much shared memory allowed. More than 48 KB a block has to be asked for.
  template <class Args>
  const void* prepared(const LaunchShape& shape) {
    const void* function = kernel_of<Args>(shape.team);
    if (shape.shared_bytes > (48 << 10))
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes)),
            "shared memory of a kernel");
    return function;
  }

  int device_ = 0;
  cudaStream_t stream_;
};

}  // namespace

std::unique_ptr<Gpu> gpu_on(void* stream) { return std::make_unique<CudaGpu>(static_cast<cudaStream_t>(stream)); }

}  // namespace dia::cuda
