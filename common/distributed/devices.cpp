#include "common/distributed/devices.hpp"

#include <utility>

#include "common/gpu/platform.hpp"
#ifdef KATA_HAS_MPI
#include "common/distributed/mpi.hpp"
#endif
#ifdef KATA_HAS_NCCL
#include "common/distributed/nccl.hpp"
#endif
#if !KATA_REAL_GPU
#include <algorithm>

#include "common/virtual_gpu/device_memory.hpp"
#endif

namespace flashkata {
namespace {

#if !KATA_REAL_GPU
// What has arrived counts as written: the virtual GPU watches who reads what nobody has.
void arrived(std::span<std::byte> memory) {
  if (!memory.empty()) virtual_gpu::mark_host_write(memory.data(), memory.size(), true);
}
#endif

void copy(std::span<const std::byte> from, std::span<std::byte> to, [[maybe_unused]] const Stream& stream) {
  if (from.empty()) return;
#if KATA_REAL_GPU
  gpu_detail::check(cudaMemcpyAsync(to.data(), from.data(), from.size(), cudaMemcpyDeviceToDevice, stream.get()),
                    "copying from a rank to itself");
  stream.synchronize();
#else
  std::copy(from.begin(), from.end(), to.begin());
  arrived(to);
#endif
}

class OneDevice : public Communicator {
 public:
  explicit OneDevice(const Stream& stream) : stream_(stream) {}
  int rank() const override { return 0; }
  int size() const override { return 1; }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    if (outgoing.size() != incoming.size()) {
      throw CommunicationError("shift: rank 0 sends " + std::to_string(outgoing.size()) +
                               " bytes to itself and expects " + std::to_string(incoming.size()));
    }
    return {[=, this] { copy(outgoing, incoming, stream_); }, nullptr};
  }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override { copy(mine, all, stream_); }
  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    copy(std::as_bytes(all), std::as_writable_bytes(mine), stream_);
  }
  void sum(std::span<float>) override {}
  void meet() override {}

 private:
  Stream stream_;
};

#if !KATA_REAL_GPU && defined(KATA_HAS_MPI)

// The virtual GPU's memory is host memory, and its kernels have finished when they have been launched.
class VirtualDevices : public Communicator {
 public:
  explicit VirtualDevices(std::unique_ptr<Communicator> hosts) : hosts_(std::move(hosts)) {}
  int rank() const override { return hosts_->rank(); }
  int size() const override { return hosts_->size(); }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    const auto transfer = std::make_shared<Transfer>(hosts_->shift(outgoing, incoming));
    return {[transfer, incoming] {
              transfer->wait();
              arrived(incoming);
            },
            nullptr};  // *transfer is destroyed too, and knows what to do
  }
  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    hosts_->all_gather(mine, all);
    arrived(all);
  }
  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    hosts_->reduce_scatter(all, mine);
    arrived(std::as_writable_bytes(mine));
  }
  void sum(std::span<float> values) override { hosts_->all_reduce(values); }
  void meet() override { hosts_->barrier(); }

 private:
  std::unique_ptr<Communicator> hosts_;
};

#endif

}  // namespace

std::string why_not_so_many_devices([[maybe_unused]] int ranks) {
#if KATA_REAL_GPU
  if (!gpu_available()) return gpu_missing_reason();
  int gpus = 0;
  gpu_detail::check(cudaGetDeviceCount(&gpus), "counting GPUs");
  if (ranks > gpus) {
    return "needs " + std::to_string(ranks) + " GPUs: this machine has " + std::to_string(gpus);
  }
#ifndef KATA_HAS_NCCL
  if (ranks > 1) {
    return "needs MPI and NCCL: apt-get install libopenmpi-dev openmpi-bin libnccl-dev (or set NCCL_ROOT to where NCCL "
           "is), then cmake --preset learn-cuda once";
  }
#endif
#endif
  return "";
}

std::unique_ptr<Communicator> connect_devices([[maybe_unused]] std::chrono::milliseconds limit,
                                              [[maybe_unused]] const Stream& stream) {
#if KATA_REAL_GPU && defined(KATA_HAS_NCCL)
  return connect_by_nccl(limit, stream);
#elif KATA_REAL_GPU && defined(KATA_HAS_MPI)
  const auto hosts = connect_by_mpi(limit);
  if (hosts->size() > 1) {
    throw CommunicationError("rank " + std::to_string(hosts->rank()) + " of " + std::to_string(hosts->size()) +
                             ": built without NCCL, which several GPUs need: apt-get install libnccl-dev (or set "
                             "NCCL_ROOT to where NCCL is), then configure again");
  }
  return one_device(stream);
#elif defined(KATA_HAS_MPI)
  return std::make_unique<VirtualDevices>(connect_by_mpi(limit));
#else
  return one_device(stream);
#endif
}

std::unique_ptr<Communicator> one_device(const Stream& stream) { return std::make_unique<OneDevice>(stream); }

}  // namespace flashkata
