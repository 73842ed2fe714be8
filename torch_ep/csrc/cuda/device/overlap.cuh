// Kernels that are brought to the device while the one before them in the stream still runs: CUDA C++ Programming
// Guide, "Programmatic Dependent Launch and Synchronization". Of few tokens, that takes a good part of an exchange.
#pragma once

#include <cuda_runtime.h>

namespace ep::cuda {

// Before anything else than arguments and shared memory is touched: everything before in the stream has ended, and what
// it wrote is there. Every thread comes here, so that the end of this kernel says the same to the next one.
__device__ __forceinline__ void await_kernels_before() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// `overlaps`: not where ranks share a device: what is brought there early would take the room of another rank's kernel.
template <class... Parameters>
cudaError_t launch_overlapped(
    bool overlaps,
    void (*kernel)(Parameters...),
    int blocks,
    int threads,
    int shared_bytes,
    cudaStream_t stream,
    Parameters... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace ep::cuda
