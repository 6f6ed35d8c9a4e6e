// Runs a network that AOTInductor packaged, in a process without Python.
//
//   run_package FOLDER PACKAGE N C H W
//
// FOLDER holds libdia_kernels.so and libdia_kernels_schemas.so (dia_kernels/lib of an installation), PACKAGE is the
// .pt2 file. The input of shape (N, C, H, W) counts up, 0, 1, 2, ..., divided by the number of its values; the program
// prints the outputs' values, one a line. docs/deploying.md says how to compile it.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace {

// Its kernels or schemas register themselves as the library is loaded.
void load(const std::string& path) {
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr) return;
  std::fprintf(stderr, "%s\n", dlerror());
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::fputs("usage: run_package FOLDER PACKAGE N C H W\n", stderr);
    return 2;
  }
  const std::string folder = argv[1];
  load(folder + "/libdia_kernels_schemas.so");
  load(folder + "/libdia_kernels.so");
  try {
    std::vector<int64_t> shape;
    int64_t count = 1;
    for (int k = 3; k < argc; ++k) {
      shape.push_back(std::stoll(argv[k]));
      count *= shape.back();
    }
    const at::Tensor x = at::arange(count, at::kFloat).div(count).view(shape);

    torch::inductor::AOTIModelPackageLoader network(argv[2]);
    for (const at::Tensor& y : network.run({x})) {
      const at::Tensor values = y.contiguous();
      for (int64_t k = 0; k < values.numel(); ++k) std::printf("%.9g\n", values.data_ptr<float>()[k]);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
