#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace dia::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(DIA_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

// The position of an instruction set in the order of width; unknown names ask for the widest.
int rank(const char* name) {
  if (name == nullptr) return 2;
  if (std::strcmp(name, "baseline") == 0) return 0;
  if (std::strcmp(name, "avx2") == 0) return 1;
  return 2;
}

const Kernels& choose() {
#if defined(DIA_X86)
  const int most = rank(std::getenv("DIA_KERNELS_ISA"));
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (most >= 2 && has_avx512) return avx512::kernels;
  if (most >= 1 && has_avx2) return avx2::kernels;
#endif
  return baseline::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* instruction_set() { return kernels().instruction_set; }

}  // namespace dia::cpu
