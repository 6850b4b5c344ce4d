// Runs a kernel body on the device. The host harness has a twin of this file.
#pragma once

#include <cuda_runtime.h>

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

template <class Body, class Args>
void execute(const char* op, std::int64_t blocks, const Args& args, Stream stream) {
  if (blocks == 0) return;
  void* parameters[] = {const_cast<Args*>(&args)};
  const auto function = reinterpret_cast<const void*>(&kernel<Body, Args>);
  const cudaError_t error = cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), parameters, 0,
                                             static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
  count_launch();
}

}  // namespace looksam::cuda
