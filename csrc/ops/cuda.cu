// Which architectures the library holds code for, and which of them a GPU runs.
#include <cuda_runtime.h>

#include "cuda.h"

namespace dia::cuda {
namespace {

// Compiled for every architecture, so that the driver can be asked which of the codes it would run.
__global__ void probe() {}

}  // namespace

std::string toolkit() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
}

std::vector<int> architectures() {
  std::vector<int> result;
  for (const int tenfold : {__CUDA_ARCH_LIST__}) result.push_back(tenfold / 10);
  return result;
}

int architecture_in_use() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return attributes.binaryVersion;
  // No GPU is an answer, not a failure: the next check of a launch must not find this error.
  cudaGetLastError();
  return 0;
}

}  // namespace dia::cuda
