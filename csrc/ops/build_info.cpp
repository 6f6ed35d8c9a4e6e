// What the library was built with, as JSON, for `python -m dia_kernels info`.
#include <torch/csrc/stable/version.h>

#include <string>

#include "../cpu/dispatch.h"
#if defined(DIA_CUDA)
#include "cuda.h"
#endif

static_assert(TORCH_ABI_VERSION >= TORCH_TARGET_VERSION, "the headers are older than the oldest torch to be served");

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

std::string quoted(const std::string& text) { return '"' + text + '"'; }

// "2.10" out of a version in the encoding of torch/headeronly/version.h: a byte each.
std::string major_and_minor(unsigned long long version) {
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 0xff);
}

std::string describe() {
  std::string json = "{\"compiler\": " + quoted(kCompiler);
  json += ", \"torch_headers\": " + quoted(major_and_minor(TORCH_ABI_VERSION));
  json += ", \"torch_target\": " + quoted(major_and_minor(TORCH_TARGET_VERSION));
#if defined(DIA_X86)
  json += ", \"instruction_sets\": [\"baseline\", \"avx2\", \"avx512\"]";
#else
  json += ", \"instruction_sets\": [\"baseline\"]";
#endif
  json += ", \"instruction_set_in_use\": " + quoted(dia::cpu::instruction_set());
#if defined(DIA_CUDA)
  std::string architectures;
  for (const int architecture : dia::cuda::architectures()) {
    architectures += (architectures.empty() ? "" : ", ") + quoted(std::to_string(architecture));
  }
  const int in_use = dia::cuda::architecture_in_use();
  json += ", \"cuda\": " + quoted(dia::cuda::toolkit());
  json += ", \"cuda_architectures\": [" + architectures + "]";
  json += ", \"cuda_architecture_in_use\": " + (in_use == 0 ? "null" : quoted(std::to_string(in_use)));
  json += std::string(", \"torch_has_cuda\": ") + (dia::cuda::torch_has_cuda() ? "true" : "false");
#else
  json +=
      ", \"cuda\": null, \"cuda_architectures\": [], \"cuda_architecture_in_use\": null, "
      "\"torch_has_cuda\": null";
#endif
  return json + "}";
}

}  // namespace

// The text lives as long as the library. Looks for a GPU, so it is not called when torch imports the library.
extern "C" __attribute__((visibility("default"))) const char* dia_kernels_build_info() {
  static const std::string text = describe();
  return text.c_str();
}
