// PyTorch's current CUDA stream, found at run time: the function is in libtorch_cuda, against which wikigpt._C is not linked,
// so that one library loads under builds of PyTorch with CUDA and without.
#pragma once

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace wikigpt {

using CurrentCudaStream = int32_t (*)(int32_t device, void** stream);

// The function, or null where this PyTorch has no CUDA.
inline CurrentCudaStream find_current_cuda_stream() {
  // Only if it is loaded: RTLD_DEFAULT would not see it, as Python loads extensions without RTLD_GLOBAL.
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<CurrentCudaStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// A cudaStream_t.
inline void* current_cuda_stream(int32_t device) {
  static const CurrentCudaStream current = find_current_cuda_stream();
  STD_TORCH_CHECK(current != nullptr, "this PyTorch has no CUDA: libtorch_cuda is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(current(device, &stream) == 0, "PyTorch gave no stream for CUDA device ", device);
  return stream;
}

}  // namespace wikigpt
