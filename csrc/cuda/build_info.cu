#include "cuda/build_info.h"

namespace expedite_d2 {

std::string cuda_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__);
}

std::vector<std::string> cuda_archs() {
  std::vector<std::string> archs;
  // nvcc's list is in ascending order, in tenths of the usual number: 800, 900, 1210.
  for (const int arch : {__CUDA_ARCH_LIST__}) {
    archs.push_back("sm_" + std::to_string(arch / 10));
  }
  return archs;
}

}  // namespace expedite_d2
