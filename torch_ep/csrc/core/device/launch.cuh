// Launches kernels with attributes that <<<>>> cannot express.
#pragma once

#include <cuda_runtime.h>

namespace ep {

enum class Launch {
  plain,
  // Starts while the previous kernel in the stream still runs: CUDA C++ Programming Guide, "Programmatic Dependent
  // Launch and Synchronization". The launch is a large part of a small exchange. Not for ranks that share a device: a
  // kernel that starts early would occupy the SMs that another rank's kernel needs.
  overlapped,
  // Makes each block a thread block cluster of its own. This changes only the SMs that the blocks run on. Without
  // clusters, a kernel that runs alone on an H100 has its first eight blocks on SMs 124 to 131, which no cluster of 16
  // can use, and the others on SMs 0, 2, ... 30. There, 24 blocks that only write to their own device's memory reach 52
  // GB/s each (H200: 58). With clusters they reach 61; one block alone reaches 63. A dispatch of 4096 tokens took 554
  // us (expert_major, 4 x H100) and 476 us (rank_major). With clusters, as on any other 24 SMs that were tried, it took
  // 530 and 472 us. Combine gains nothing.
  in_clusters,
};

// One thread. Waits until all earlier work in the stream has ended and its writes are visible. A kernel that may be
// overlapped calls it before it accesses anything except its arguments and shared memory. Every thread has to call it:
// then the end of this kernel implies the end of all earlier work, for the next kernel too.
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

}  // namespace ep
