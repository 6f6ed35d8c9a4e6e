// The way to machines/cuda.cu, readable without the CUDA headers.
#pragma once

#include <memory>

#include "gpu.h"

namespace dia::cuda {

// The current device, with work put on `stream`, a cudaStream_t.
std::unique_ptr<Gpu> gpu_on(void* stream);

}  // namespace dia::cuda
