// A GPU by CUDA's runtime: the kernels of csrc/kernels for every element type, and their launch.
#include <cuda_runtime.h>

#include <array>
#include <atomic>
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

using kernels::kHasClusters;
using kernels::kIsSweep;

// Of 256 threads three blocks of sweeps a multiprocessor, which keep packs of several maps and sums in registers, two
// of tiles of products, four of others; of the 512 threads of clusters one.
template <class Args>
constexpr int kResidentOf = kHasClusters<Args>         ? 1
                            : kernels::kHasTiles<Args> ? 2
                            : kIsSweep<Args>           ? kSweepResident
                                                       : 4;

template <class Args>
__global__ void __launch_bounds__(kernels::kThreadsOf<Args>, kResidentOf<Args>)
    kernel(__grid_constant__ const Args args) {
  // Behind a kernel of tables, which leaves room, the next is launched early. Behind a sweep it would take room of
  // blocks that have not finished.
#if __CUDA_ARCH__ < 900
  if constexpr (kHasClusters<Args>)
    __trap();  // never launched: plans know which GPUs have clusters
  else
#endif
  {
    Machine<!kIsSweep<Args> && !kHasClusters<Args>> machine(shared_memory);
    kernels::run_behind(machine, args);
  }
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

// The architecture that the code of a kernel was compiled for, as on this device.
int compiled_for(const void* function) {
  cudaFuncAttributes of{};
  check(cudaFuncGetAttributes(&of, function), "the attributes of a kernel");
  return of.ptxVersion;
}

// What has to be done for a kernel once on each device; and whether its code waits for the kernel before it, so that it
// may be launched while that one still runs.
enum class Ready : signed char { no, yes, early };

Ready make_ready(const void* function, int device) {
  // More than 48 KB of shared memory a block have to be asked for.
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "shared memory of a kernel");
  // Drivers before that of CUDA 12.3 cannot capture such a launch.
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "the driver's version");
  return compiled_for(function) >= 90 && driver >= 12030 ? Ready::early : Ready::yes;
}

template <class Args>
Ready ready(const void* function, int device) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<Ready>, kDevices> known{};
  if (device >= kDevices) return make_ready(function, device);
  Ready found = known[device].load(std::memory_order_relaxed);
  if (found == Ready::no) known[device].store(found = make_ready(function, device), std::memory_order_relaxed);
  return found;
}

// How a kernel is launched.
template <class Args>
struct Launch {
  cudaLaunchConfig_t config{};

  Launch(int blocks, int64_t shared_bytes) {
    config.gridDim = dim3(blocks), config.blockDim = dim3(kernels::kThreadsOf<Args>);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.attrs = attributes_;
    if (!kHasClusters<Args>) return;
    cudaLaunchAttribute& cluster = attributes_[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kClusterBlocks, 1, 1};
  }
  Launch(const Launch&) = delete;

  // While the kernel before still runs.
  void make_early() {
    cudaLaunchAttribute& early = attributes_[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }

 private:
  cudaLaunchAttribute attributes_[2]{};
};

// Multiprocessors that plans leave to others (a collective's kernels, say): so many of sixty-four.
constexpr int kHeadroom = 1;

// How many clusters the device runs at a time, each of whose blocks has a multiprocessor to itself; 0 where there are
// none: on older devices, in code compiled for them, on a part of a device that has no such group of multiprocessors.
int clusters_of(int device) {
  if (attribute(cudaDevAttrClusterLaunch, device) == 0) return 0;
  using Args = kernels::ClusterStep<float, false>;
  const void* function = reinterpret_cast<const void*>(&kernel<Args>);
  if (compiled_for(function) < 90) return 0;
  make_ready(function, device);
  const Launch<Args> launch(kClusterBlocks, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, function, &launch.config) == cudaSuccess) return count;
  cudaGetLastError();  // not to be found by the next check
  return 0;
}

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
  limits.shared_per_multiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  limits.clusters = clusters_of(device);
  for (double* rate : {&limits.memory, &limits.l2, &limits.flops, &limits.tf32}) *rate *= share;
  return limits;
}

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

  void launch(const AnyKernel& any, int blocks, int64_t shared_bytes) override {
    std::visit(
        [&]<class Args>(const Args& args) {
          const void* function = reinterpret_cast<const void*>(&kernel<Args>);
          Launch<Args> launch(blocks, shared_bytes);
          launch.config.stream = stream_;
          if (ready<Args>(function, device_) == Ready::early) launch.make_early();
          void* arguments[] = {const_cast<Args*>(&args)};
          check(cudaLaunchKernelExC(&launch.config, function, arguments), "a launch");
        },
        any);
  }

  void clear(void* data, int64_t bytes) override {
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream_), "clearing memory");
  }

 private:
  int device_ = 0;
  cudaStream_t stream_;
};

}  // namespace

std::unique_ptr<Gpu> gpu_on(void* stream) { return std::make_unique<CudaGpu>(static_cast<cudaStream_t>(stream)); }

}  // namespace dia::cuda
