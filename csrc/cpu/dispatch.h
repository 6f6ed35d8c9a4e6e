// Which table of kernels this processor runs.
#pragma once

#include "kernels.h"

namespace dia::cpu {

// The kernels for the widest instruction set that both the library and the processor have, chosen at
// the first call. The environment variable DIA_KERNELS_ISA (baseline, avx2 or avx512) asks for a
// narrower one; a wider one than the processor has is never taken.
const Kernels& kernels();

// Its name.
const char* instruction_set();

}  // namespace dia::cpu
