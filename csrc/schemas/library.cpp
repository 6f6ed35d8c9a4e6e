// libdia_kernels_schemas.so: the operators' schemas, for a C++ process that runs what torch.export made. A process with
// Python has them from dia_kernels/operators.py, which never loads this library. Both are written in
// dia_kernels/schemas.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdio>

namespace {

constexpr const char* kSchemas[] = {
#include "schemas.inc"
};

// STABLE_TORCH_LIBRARY takes success for granted: the second definition of the namespace would crash the process.
class Definitions {
 public:
  Definitions() {
    if (aoti_torch_library_init_def("dia_kernels", __FILE__, __LINE__, &library_) != AOTI_TORCH_SUCCESS) {
      library_ = nullptr;
      std::fputs("dia_kernels: this process has the operators' schemas already; these are left unused\n", stderr);
      return;
    }
    for (const char* schema : kSchemas)
      if (aoti_torch_library_def(library_, schema) != AOTI_TORCH_SUCCESS)
        std::fprintf(stderr, "dia_kernels: this torch does not take the schema %s\n", schema);
  }
  ~Definitions() {
    if (library_ != nullptr) aoti_torch_delete_library_object(library_);
  }
  Definitions(const Definitions&) = delete;
  Definitions& operator=(const Definitions&) = delete;

 private:
  TorchLibraryHandle library_ = nullptr;
};

const Definitions definitions;

}  // namespace
