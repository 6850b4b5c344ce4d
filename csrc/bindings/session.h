// Where an op runs: the device, torch's current stream there, and the graph capture under way on it.
#pragma once

#if !defined(LOOKSAM_HARNESS)
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "../cuda/launch.h"
#include "arguments.h"

namespace looksam::cuda {

#if defined(LOOKSAM_HARNESS)

// CPU tensors, on which the harness runs the kernels. Tests say which stream and which capture it is.
inline Stream harness_stream = nullptr;
inline unsigned long long harness_capture = 0;
inline std::vector<std::pair<std::uintptr_t, std::uintptr_t>> harness_recorded;  // address, stream

struct Session {
  explicit Session(const at::Device&) {}
  void record(const at::Tensor& x) const {
    harness_recorded.emplace_back(reinterpret_cast<std::uintptr_t>(x.const_data_ptr()),
                                  reinterpret_cast<std::uintptr_t>(stream));
  }
  Stream stream = harness_stream;
  unsigned long long capture = harness_capture;
};
inline constexpr at::DeviceType kDeviceType = at::kCPU;

#else

// One op: its device, torch's current stream there, and the graph capture under way on it (0: none).
struct Session {
  explicit Session(const at::Device& device) : guard(device), current(c10::cuda::getCurrentCUDAStream(device.index())) {
    stream = current.stream();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamGetCaptureInfo(current.stream(), &status, &capture);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or torch's next call reports it
      throw std::runtime_error(cudaGetErrorString(error));
    }
    if (status == cudaStreamCaptureStatusNone) capture = 0;
  }
  // The memory of x is given to no other tensor before this stream has done what it was asked so far.
  void record(const at::Tensor& x) const { x.record_stream(current.unwrap()); }

  c10::cuda::CUDAGuard guard;
  c10::cuda::CUDAStream current;
  Stream stream = nullptr;
  unsigned long long capture = 0;
};
inline constexpr at::DeviceType kDeviceType = at::kCUDA;

#endif

}  // namespace looksam::cuda
