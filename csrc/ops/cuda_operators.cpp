// The operators for CUDA. In a torch without CUDA they are registered and never called.
#include <torch/csrc/stable/accelerator.h>

#include "../machines/cuda_gpu.h"
#include "cuda.h"
#include "gpu_operators.h"

// These stand in libtorch_cuda only, which a CPU build of torch lacks: weak, null there, and found in a CUDA build
// because the library depends on libtorch (CMakeLists.txt).
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle left, AtenTensorHandle right,
                                                               double beta, double alpha);
}

bool dia::cuda::torch_has_cuda() {
  return aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_cuda_addmm_out != nullptr;
}

namespace dia::ops {

struct GpuDevice::State {
  torch::stable::accelerator::DeviceGuard guard;
  std::unique_ptr<Gpu> gpu;
};

GpuDevice::GpuDevice(const Tensor& x) {
  check(cuda::torch_has_cuda(), "this torch has no CUDA: it cannot tell the current stream");
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  state_.reset(new State{std::move(guard), cuda::gpu_on(stream)});
}

GpuDevice::~GpuDevice() = default;

Gpu& GpuDevice::gpu() { return *state_->gpu; }

void GpuDevice::product(const Tensor& out, const Tensor& left, const Tensor& right, bool add, double factor) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), out.get(), left.get(), right.get(), add ? 1.0 : 0.0, factor));
}

}  // namespace dia::ops

STABLE_TORCH_LIBRARY_IMPL(dia_kernels, CUDA, m) { DIA_REGISTER_GPU_OPERATORS(m, ""); }
