// What the CUDA side of the library was compiled for. Plain C++, readable without the CUDA headers.
#pragma once

#include <string>
#include <vector>

namespace dia::cuda {

// Version of the toolkit, as in "13.0".
std::string toolkit();

// Architectures that the library holds code for, ascending, as in {75, 80, 90}.
std::vector<int> architectures();

// Architecture of the code that the current GPU runs, or 0 where there is no GPU or no code for it.
int architecture_in_use();

// Whether the torch that this library was loaded into has CUDA: whether it tells its current stream.
bool torch_has_cuda();

}  // namespace dia::cuda
