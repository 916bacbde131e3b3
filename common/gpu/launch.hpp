// Launching kernels, streams, events, errors: the host's side of the GPU, the same in both worlds.
//
// On the virtual GPU a kernel has finished when launch() returns.
#pragma once

#include <chrono>
#include <cstddef>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/gpu/platform.hpp"
#if !KATA_REAL_GPU
#include "common/virtual_gpu/launch_kernel.hpp"
#include "common/virtual_gpu/symbols.hpp"
#endif

namespace flashkata {

/// The GPU, or the launch of a kernel, refused: "launching flash_forward: invalid configuration argument".
class GpuError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace gpu_detail {
#if KATA_REAL_GPU
inline void check(cudaError_t error, const std::string& doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw GpuError(doing + ": " + cudaGetErrorString(error));
}

inline std::string kernel_name(const void* kernel) {
  const char* mangled = nullptr;
  const bool known = cudaFuncGetName(&mangled, kernel) == cudaSuccess && mangled != nullptr;
  return known ? mangled : "a kernel";
}

/// "a block on this GPU has at most 101376"
inline std::string most_shared_bytes() {
  int gpu = 0, bytes = 0;
  const bool known = cudaGetDevice(&gpu) == cudaSuccess &&
                     cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, gpu) == cudaSuccess;
  return "a block on this GPU has at most " + (known ? std::to_string(bytes) : "an unknown number");
}
#endif
}  // namespace gpu_detail

/// Empty if a GPU is there, otherwise the reason why none is.
inline std::string gpu_missing_reason() {
#if KATA_REAL_GPU
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  return error == cudaSuccess ? "no GPU in this machine" : cudaGetErrorString(error);
#else
  return "";
#endif
}

inline bool gpu_available() { return gpu_missing_reason().empty(); }

/// A sequence of work on the GPU. A copy is the same stream; a default one is the default stream.
class Stream {
 public:
  Stream() = default;

  static Stream create() {
    Stream result;
#if KATA_REAL_GPU
    cudaStream_t handle = nullptr;
    gpu_detail::check(cudaStreamCreate(&handle), "creating a stream");
    result.handle_.reset(handle, [](cudaStream_t stream) { cudaStreamDestroy(stream); });
#endif
    return result;
  }

#if KATA_REAL_GPU
  /// Somebody else's stream, who also destroys it.
  static Stream borrowed(cudaStream_t handle) {
    Stream result;
    result.handle_.reset(handle, [](cudaStream_t) {});
    return result;
  }
#endif

  void synchronize() const {
#if KATA_REAL_GPU
    gpu_detail::check(cudaStreamSynchronize(get()), "waiting for a stream");
#endif
  }

#if KATA_REAL_GPU
  cudaStream_t get() const { return handle_.get(); }

 private:
  std::shared_ptr<std::remove_pointer_t<cudaStream_t>> handle_;
#endif
};

/// A moment in a stream.
class Event {
 public:
#if KATA_REAL_GPU
  Event() {
    cudaEvent_t handle = nullptr;
    gpu_detail::check(cudaEventCreate(&handle), "creating an event");
    handle_.reset(handle, [](cudaEvent_t event) { cudaEventDestroy(event); });
  }
#endif

  void record(const Stream& stream = {}) {
#if KATA_REAL_GPU
    gpu_detail::check(cudaEventRecord(handle_.get(), stream.get()), "recording an event");
#else
    (void)stream;
    time_ = std::chrono::steady_clock::now();
#endif
  }

  /// Milliseconds from `start` to `stop`, once both have been reached.
  static float elapsed_ms(const Event& start, const Event& stop) {
#if KATA_REAL_GPU
    gpu_detail::check(cudaEventSynchronize(stop.handle_.get()), "waiting for an event");
    float milliseconds = 0.0f;
    gpu_detail::check(cudaEventElapsedTime(&milliseconds, start.handle_.get(), stop.handle_.get()), "reading events");
    return milliseconds;
#else
    return std::chrono::duration<float, std::milli>(stop.time_ - start.time_).count();
#endif
  }

 private:
#if KATA_REAL_GPU
  std::shared_ptr<std::remove_pointer_t<cudaEvent_t>> handle_;
#else
  std::chrono::steady_clock::time_point time_{};
#endif
};

/// Waits until the GPU has done everything; throws what went wrong meanwhile.
inline void synchronize() {
#if KATA_REAL_GPU
  gpu_detail::check(cudaDeviceSynchronize(), "waiting for the GPU");
#endif
}

/// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), with every error checked.
/// `shared_bytes` is the dynamic shared memory of a block; more than 48 KiB are asked for as CUDA wants it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, const Stream& stream,
            Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "launch: one argument for each parameter of the kernel");
  std::tuple<std::remove_cv_t<Parameters>...> values(static_cast<Parameters>(arguments)...);
  const void* address = reinterpret_cast<const void*>(kernel);
#if KATA_REAL_GPU
  const auto doing = [&] { return "launching " + gpu_detail::kernel_name(address); };
  constexpr std::size_t UNASKED_BYTES = 48 * 1024;
  if (shared_bytes > UNASKED_BYTES) {
    const auto error =
        cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      gpu_detail::check(error, doing() + " with " + std::to_string(shared_bytes) + " bytes of dynamic shared memory (" +
                                   gpu_detail::most_shared_bytes() + ")");
    }
  }
  const cudaError_t error = std::apply(
      [&](auto&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        return cudaLaunchKernel(address, grid, block, pointers, shared_bytes, stream.get());
      },
      values);
  if (error != cudaSuccess) gpu_detail::check(error, doing());
  gpu_detail::check(cudaGetLastError(), "an earlier call");
#else
  (void)stream;
  if (const char* error = virtual_gpu::launch_error(grid, block, shared_bytes)) {
    throw GpuError("launching " + virtual_gpu::function_name(address) + ": " + error);
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cv_t<Parameters>...> values;
  } call{kernel, std::move(values)};
  const auto enter = [](void* pointer) {
    const Call& the_call = *static_cast<const Call*>(pointer);
    std::apply(the_call.kernel, the_call.values);
  };
  virtual_gpu::launch_kernel({address, enter, &call, sizeof call}, grid, block, shared_bytes);
#endif
}

/// How many tiles of `size` cover `count`.
template <typename Integer>
constexpr Integer ceil_div(Integer count, std::type_identity_t<Integer> size) {
  return (count + size - 1) / size;
}

}  // namespace flashkata
