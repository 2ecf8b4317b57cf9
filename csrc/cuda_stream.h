// PyTorch's current CUDA stream, found at run time: the function is in libtorch_cuda, against which wikigpt._C is not linked,
// so that one library loads under builds of PyTorch with CUDA and without.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace wikigpt {

using CurrentCudaStream = int32_t (*)(int32_t device, void** stream);

// The function, or null where this PyTorch has no CUDA.
inline CurrentCudaStream find_current_cuda_stream() {
  constexpr const char* name = "aoti_torch_get_current_cuda_stream";
#ifdef _WIN32
  const HMODULE library = GetModuleHandleA("torch_cuda.dll");
  return library == nullptr ? nullptr : reinterpret_cast<CurrentCudaStream>(GetProcAddress(library, name));
#else
  // Only if it is loaded: RTLD_DEFAULT would not see it, as Python loads extensions without RTLD_GLOBAL.
  void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  return library == nullptr ? nullptr : reinterpret_cast<CurrentCudaStream>(dlsym(library, name));
#endif
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
