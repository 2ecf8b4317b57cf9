// wikigpt._C: importing it registers the operators of this folder under torch.ops.wikigpt; its only Python-visible
// content is what `wikigpt doctor` prints about the build.

// The pybind11 that comes with torch 2.11 refuses it. Nothing here uses PyTorch's library.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>

#include "cuda_stream.h"

#ifndef WIKIGPT_TORCH_VERSION
#define WIKIGPT_TORCH_VERSION "unknown"
#endif
#ifndef WIKIGPT_STABLE_ABI
#define WIKIGPT_STABLE_ABI "unknown"
#endif
#ifndef WIKIGPT_NO_CUDA_BECAUSE
#define WIKIGPT_NO_CUDA_BECAUSE "unknown"
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
  info["stable_abi"] = WIKIGPT_STABLE_ABI;
  info["instruction_set"] = wikigpt::instruction_set();
#ifdef WIKIGPT_CUDA
  info["cuda"] = WIKIGPT_CUDA;
  info["cuda_targets"] = WIKIGPT_CUDA_TARGETS;
#else
  info["cuda"] = pybind11::none();
  info["no_cuda_because"] = WIKIGPT_NO_CUDA_BECAUSE;
#endif
  return info;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ operators of WikiGPT; import registers them as torch.ops.wikigpt.*";
  m.def("build_info", &build_info, "What this module was built with and for, and the instruction set it uses.");
  m.def(
      "finds_cuda_stream", [] { return wikigpt::find_current_cuda_stream() != nullptr; },
      "Whether the PyTorch of this process has the CUDA stream that kernels are launched on.");
}
