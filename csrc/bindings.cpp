// The module expedite_d2._C. Loading it registers the kernels: each file of cpu/ and cuda/ adds its
// own to the operators, whose schemas stand in expedite_d2/ops. The module itself only reports
// how it was built.
#include <optional>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cuda/build_info.h"

namespace py = pybind11;

namespace expedite_d2 {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
#ifdef EXPEDITE_D2_WITH_CUDA
  info["cuda"] = cuda_version();
  info["archs"] = cuda_archs();
#else
  info["cuda"] = py::none();
  info["archs"] = py::list();
#endif
  info["compiler"] = compiler();
  info["torch"] = TORCH_VERSION;
  return info;
}

}  // namespace
}  // namespace expedite_d2

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU and CUDA kernels of expedite_d2";
  m.def("build_info", &expedite_d2::build_info,
        "How this module was built: {cuda: version or None, archs, compiler, torch: version}.");
}
