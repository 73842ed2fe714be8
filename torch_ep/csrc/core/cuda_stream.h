// Copies that do not wait for kernels.
#pragma once

#include <c10/cuda/CUDAException.h>

namespace ep {

// A stream for small copies. It does not wait for kernels on other streams.
class Stream {
 public:
  Stream() { C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { static_cast<void>(cudaStreamDestroy(stream_)); }

  void copy(void* to, const void* from, size_t bytes) const {
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace ep
