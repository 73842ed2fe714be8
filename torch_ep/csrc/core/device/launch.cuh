// Kernels brought to the device in ways for which <<<>>> has no words.
#pragma once

#include <cuda_runtime.h>

namespace ep::nvlink {

enum class Launch {
  plain,
  // While the kernel before it in the stream still runs: CUDA C++ Programming Guide, "Programmatic Dependent Launch and
  // Synchronization". Of few tokens, that takes a good part of an exchange. Not where ranks share a device: what is
  // brought there early would take the room of another rank's kernel.
  overlapped,
  // Each block a thread block cluster of its own, which changes nothing but the SMs they run on. Without that, the
  // first eight blocks of a kernel alone on an H100 come to SMs 124 to 131, which no cluster of 16 can use, and the
  // others to 0, 2, ... 30. There 24 blocks that do nothing but write to their own device's memory write 52 GB/s each
  // (H200: 58), with clusters 61, and one alone 63. A dispatch of 4096 tokens took 554 us (expert_major, 4 x H100) and
  // 476 (rank_major); with clusters, as on any other 24 SMs tried, 530 and 472. Combine gains nothing.
  in_clusters,
};

// In a kernel that may be overlapped, before anything else than arguments and shared memory is touched: everything
// before in the stream has ended, and what it wrote is there. Every thread comes here, so that the end of this kernel
// says the same to the next one.
__device__ __forceinline__ void await_kernels_before() {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

template <class... Parameters>
cudaError_t launch_kernel(
    Launch how,
    void (*kernel)(Parameters...),
    int blocks,
    int threads,
    int shared_bytes,
    cudaStream_t stream,
    Parameters... arguments) {
  cudaLaunchAttribute attribute{};
  if (how == Launch::overlapped) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  } else if (how == Launch::in_clusters) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = how == Launch::plain ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace ep::nvlink
