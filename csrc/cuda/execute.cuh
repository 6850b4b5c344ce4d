// Runs a kernel body on the device. The host harness has a twin of this file.
#pragma once

#include <cuda_runtime.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "block.cuh"
#include "launch.h"

namespace looksam::cuda {

void count_launch();

template <class Body, class Args>
__global__ void __launch_bounds__(kThreads, Body::kBlocksPerProcessor) kernel(const __grid_constant__ Args args) {
  __shared__ typename Body::Shared shared;
  Body::run(DeviceBlock{}, shared, args);
}

// What the last call said, which torch's next one would otherwise say again.
inline std::string taken_back(cudaError_t error) {
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// As the driver sees it, which knows the code in this build, its PTX, and what it can compile itself.
template <class Body, class Args>
std::optional<std::string> why_not_executable() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&kernel<Body, Args>));
  if (error == cudaSuccess) return std::nullopt;
  std::string built_for;
  for (const int architecture : {__CUDA_ARCH_LIST__})
    built_for += (built_for.empty() ? "sm_" : ", sm_") + std::to_string(architecture / 10);
  return taken_back(error) + " (this build is for " + built_for +
         "; TORCH_CUDA_ARCH_LIST names others when it is built)";
}

template <class Body, class Args>
void execute(const char* op, std::int64_t blocks, const Args& args, Stream stream) {
  if (blocks == 0) return;
  void* parameters[] = {const_cast<Args*>(&args)};
  const auto function = reinterpret_cast<const void*>(&kernel<Body, Args>);
  const cudaError_t error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), parameters,
                                             0, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + taken_back(error));
  count_launch();
}

}  // namespace looksam::cuda
