// What nvcc was told, for bindings.cpp, which is not compiled by nvcc. Only in builds with CUDA.
#pragma once

#include <string>
#include <vector>

namespace expedite_d2 {

std::string cuda_version();             // of the toolkit, e.g. "13.0"
std::vector<std::string> cuda_archs();  // with binary code in this module, e.g. {"sm_80", "sm_90"}

}  // namespace expedite_d2
