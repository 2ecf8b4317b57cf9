// wikigpt._C: importing it registers the operators of this folder under torch.ops.wikigpt; its only Python-visible
// content is what `wikigpt doctor` prints about the build.
#include <pybind11/pybind11.h>

#ifndef WIKIGPT_TORCH_VERSION
#define WIKIGPT_TORCH_VERSION "unknown"
#endif

namespace wikigpt {
const char* instruction_set();
}

static pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["torch"] = WIKIGPT_TORCH_VERSION;
  info["cuda"] = pybind11::none();
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["instruction_set"] = wikigpt::instruction_set();
  return info;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ operators of WikiGPT; import registers them as torch.ops.wikigpt.*";
  m.def("build_info", &build_info, "Compiler, torch version and instruction set this module was built with and uses.");
}
