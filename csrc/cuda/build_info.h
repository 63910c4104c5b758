// What only nvcc knows of a build with CUDA, for bindings.cpp, which the C++ compiler compiles.
#pragma once

#include <string>
#include <vector>

namespace expedite_d2 {

std::string cuda_version();             // of the toolkit, e.g. "13.0"
std::vector<std::string> cuda_archs();  // with binary code in this module, e.g. {"sm_80", "sm_90"}

}  // namespace expedite_d2
