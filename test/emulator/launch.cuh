// Takes the place of device/launch.cuh: here kernels run one after the other.
#pragma once

namespace ep::cuda {

inline void await_kernels_before() {}

template <class... Parameters>
cudaError_t launch_in_clusters(
    void (*kernel)(Parameters...),
    int blocks,
    int threads,
    int shared_bytes,
    cudaStream_t,
    Parameters... arguments) {
  emulator::launch([=] { kernel(arguments...); }, blocks, threads, shared_bytes);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t launch_overlapped(
    bool,
    void (*kernel)(Parameters...),
    int blocks,
    int threads,
    int shared_bytes,
    cudaStream_t stream,
    Parameters... arguments) {
  return launch_in_clusters(kernel, blocks, threads, shared_bytes, stream, arguments...);
}

}  // namespace ep::cuda
