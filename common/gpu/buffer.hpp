// Memory on the GPU: a named array that knows its length and gives itself back.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/attention/view.hpp"
#include "common/gpu/launch.hpp"
#include "common/gpu/memory_use.hpp"
#if !KATA_REAL_GPU
#include <cstring>

#include "common/virtual_gpu/device_memory.hpp"
#endif

namespace flashkata {

/// DeviceBuffer<float> q("q", count): `count` elements, not initialised: all bytes 0xff, which is NaN in every float
/// type. The name is what findings and profiles call it.
template <typename T>
class DeviceBuffer {
  static_assert(std::is_trivially_copyable_v<T>, "device memory holds plain data");

 public:
  DeviceBuffer(std::string name, std::size_t count) : name_(std::move(name)), count_(count) {
#if KATA_REAL_GPU
    if (count_ > 0) gpu_detail::check(cudaMalloc(&data_, bytes()), "allocating " + name_);
#else
    data_ = static_cast<T*>(virtual_gpu::allocate_device_memory(name_.c_str(), bytes(), sizeof(T)));
#endif
    memory_use_detail::add(bytes());
    poison();
  }

  DeviceBuffer(std::string name, std::span<const T> values) : DeviceBuffer(std::move(name), values.size()) {
    upload(values);
  }

  ~DeviceBuffer() {
    if (data_ == nullptr) return;
#if KATA_REAL_GPU
    cudaFree(data_);
#else
    virtual_gpu::release_device_memory(data_);
#endif
    memory_use_detail::subtract(bytes());
  }

  DeviceBuffer(DeviceBuffer&& other) noexcept
      : name_(std::move(other.name_)),
        count_(std::exchange(other.count_, 0)),
        data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return count_; }
  std::size_t bytes() const { return count_ * sizeof(T); }
  const std::string& name() const { return name_; }

  /// Rows one after the other. Throws std::invalid_argument if the shape has not as many elements as the buffer.
  template <std::size_t Rank>
  View<T, static_cast<int>(Rank)> view(const std::array<Index, Rank>& shape) {
    return checked_view<T, static_cast<int>(Rank)>(data_, shape);
  }
  template <std::size_t Rank>
  View<const T, static_cast<int>(Rank)> view(const std::array<Index, Rank>& shape) const {
    return checked_view<const T, static_cast<int>(Rank)>(data_, shape);
  }

  void upload(std::span<const T> values) {
    require(values.size() == count_, name_, values.size(), std::to_string(count_) + " elements");
    copy(data_, values.data(), true);
  }
  void download(std::span<T> values) const {
    require(values.size() == count_, name_, values.size(), std::to_string(count_) + " elements");
    copy(values.data(), data_, false);
  }
  std::vector<T> download() const {
    std::vector<T> values(count_);
    download(values);
    return values;
  }

  void fill_zero() { fill(0x00, true); }
  /// Back to NaN, and to "nobody has written it".
  void poison() { fill(0xff, false); }

 private:
  template <typename Element, int Rank>
  View<Element, Rank> checked_view(Element* data, const Shape<Rank>& shape) const {
    const View<Element, Rank> result(data, shape);
    require(result.count() == static_cast<Index>(count_), name_, to_text(shape), std::to_string(count_) + " elements");
    return result;
  }

  void copy(T* to, const T* from, [[maybe_unused]] bool to_device) const {
    if (count_ == 0) return;
#if KATA_REAL_GPU
    gpu_detail::check(cudaMemcpy(to, from, bytes(), to_device ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost),
                      "copying " + name_);
#else
    std::memcpy(to, from, bytes());
    if (to_device) virtual_gpu::mark_host_write(to, bytes(), true);
#endif
  }

  void fill(int byte, [[maybe_unused]] bool initialised) {
    if (count_ == 0) return;
#if KATA_REAL_GPU
    gpu_detail::check(cudaMemset(data_, byte, bytes()), "filling " + name_);
#else
    std::memset(static_cast<void*>(data_), byte, bytes());
    virtual_gpu::mark_host_write(data_, bytes(), initialised);
#endif
  }

  std::string name_;
  std::size_t count_;
  T* data_ = nullptr;
};

}  // namespace flashkata
