#include "common/distributed/nccl.hpp"

#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/distributed/mpi.hpp"
#include "common/gpu/platform.hpp"

namespace flashkata {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto CONNECTING = std::chrono::seconds(30);  // to open all GPUs and to find the ways between them
constexpr auto ABORTING = std::chrono::seconds(10);

// A stream that waits for no other by itself, as the default stream's siblings do.
std::shared_ptr<std::remove_pointer_t<cudaStream_t>> stream_of_its_own() {
  int least = 0, most = 0;
  gpu_detail::check(cudaDeviceGetStreamPriorityRange(&least, &most), "asking for the priorities of streams");
  cudaStream_t stream = nullptr;
  gpu_detail::check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, most), "creating a stream");
  return {stream, [](cudaStream_t one) { cudaStreamDestroy(one); }};
}

// A moment in a stream. It can be asked for, other than Event, and has no time.
class Moment {
 public:
  explicit Moment(cudaStream_t stream) {
    cudaEvent_t event = nullptr;
    gpu_detail::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    event_.reset(event, [](cudaEvent_t one) { cudaEventDestroy(one); });
    gpu_detail::check(cudaEventRecord(event, stream), "recording an event");
  }
  cudaEvent_t get() const { return event_.get(); }
  bool reached() const {
    const cudaError_t state = cudaEventQuery(get());
    if (state == cudaErrorNotReady) {
      cudaGetLastError();  // it is not an error
      return false;
    }
    gpu_detail::check(state, "exchanging");
    return true;
  }

 private:
  std::shared_ptr<std::remove_pointer_t<cudaEvent_t>> event_;
};

// What a rank is about to do. The ranks compare these before they do it.
enum class Kind : std::int64_t { shift, all_gather, reduce_scatter, all_reduce, barrier };
struct Call {
  Kind kind;
  std::int64_t sent;      // bytes
  std::int64_t expected;  // bytes; other than what is sent in a shift only
};

const char* name_of(Kind kind) {
  constexpr std::array<const char*, 5> NAMES{"shift", "all_gather", "reduce_scatter", "all_reduce", "barrier"};
  return NAMES[static_cast<std::size_t>(kind)];
}

std::string bytes(std::int64_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator(std::chrono::milliseconds limit, Stream stream)
      : limit_(limit),
        hosts_(connect_by_mpi(limit)),
        connecting_(connect_by_mpi(connecting_limit())),
        before_(std::move(stream)) {
    choose_gpu();
    own_ = stream_of_its_own();
    join(identify());
    connecting_.reset();
  }

  ~NcclCommunicator() override {
    if (comm_ == nullptr) return;
    if (std::uncaught_exceptions() > 0) {
      give_up();
      return;
    }
    try {
      settle(ncclCommFinalize(comm_), "disconnecting", limit_);
      ncclCommDestroy(comm_);
    } catch (const CommunicationError&) {  // everything has arrived: nothing is lost
    }
  }

  int rank() const override { return hosts_rank_; }
  int size() const override { return hosts_size_; }

 protected:
  Transfer start_shift(std::span<const std::byte> outgoing, std::span<std::byte> incoming) override {
    const std::string step = "shift " + std::to_string(++shifts_);
    const int next = (rank() + 1) % size();
    const int previous = (rank() + size() - 1) % size();
    compare(step, {Kind::shift, length(outgoing), length(incoming)});
    const auto exchange = begin(step, [&] {
      check(ncclGroupStart(), step);
      // A size is the same at both ends, so both leave out what is empty.
      if (!outgoing.empty()) check(ncclSend(outgoing.data(), outgoing.size(), ncclUint8, next, comm_, own()), step);
      if (!incoming.empty()) check(ncclRecv(incoming.data(), incoming.size(), ncclUint8, previous, comm_, own()), step);
      return ncclGroupEnd();
    });
    const std::string waiting = step + ": waiting for " + bytes(length(incoming)) + " from rank " +
                                std::to_string(previous) + " and for rank " + std::to_string(next) + " to take " +
                                bytes(length(outgoing));
    return {[this, exchange, waiting] { wait_for(exchange, waiting); },
            [this] { give_up(); }};  // an exception is on its way: the memory goes, so nothing may arrive any more
  }

  void gather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    run({Kind::all_gather, length(mine), length(mine)},
        [&] { return ncclAllGather(mine.data(), all.data(), mine.size(), ncclUint8, comm_, own()); });
  }

  void sum_and_scatter(std::span<const float> all, std::span<float> mine) override {
    run({Kind::reduce_scatter, length(std::as_bytes(mine)), length(std::as_bytes(mine))},
        [&] { return ncclReduceScatter(all.data(), mine.data(), mine.size(), ncclFloat, ncclSum, comm_, own()); });
  }

  void sum(std::span<float> values) override {
    run({Kind::all_reduce, length(std::as_bytes(values)), length(std::as_bytes(values))},
        [&] { return ncclAllReduce(values.data(), values.data(), values.size(), ncclFloat, ncclSum, comm_, own()); });
  }

  void meet() override { compare("barrier", {Kind::barrier, 0, 0}); }

 private:
  // ---- Connecting

  struct Place {
    std::array<char, 256> machine;
    int gpus;
  };

  struct Identity {
    cudaUUID_t gpu;
    ncclUniqueId group;  // rank 0's counts
  };

  void choose_gpu() {
    hosts_rank_ = hosts_->rank();
    hosts_size_ = hosts_->size();
    Place here{};
    gethostname(here.machine.data(), here.machine.size() - 1);
    if (cudaGetDeviceCount(&here.gpus) != cudaSuccess) here.gpus = 0;
    cudaGetLastError();
    const std::vector<Place> places = from_all(*connecting_, here);
    for (int other = 0; other < size(); ++other) {
      const Place& there = places[static_cast<std::size_t>(other)];
      if (there.gpus == 0) fail("connecting: rank " + std::to_string(other) + " has no GPU");
      if (other < rank() && there.machine == here.machine) ++local_rank_;
      if (there.machine == here.machine) ++local_size_;
    }
    gpu_ = local_rank_ % here.gpus;  // a launcher may show each rank one GPU only, its own
    gpus_ = here.gpus;
    gpu_detail::check(cudaSetDevice(gpu_), "choosing a GPU");
  }

  ncclUniqueId identify() {
    Identity mine{};
    cudaDeviceProp properties{};
    gpu_detail::check(cudaGetDeviceProperties(&properties, gpu_), "asking a GPU for its name");
    mine.gpu = properties.uuid;
    setenv("NCCL_NVLS_ENABLE", "0", 0);
    if (rank() == 0) check(ncclGetUniqueId(&mine.group), "connecting");
    const std::vector<Identity> all = from_all(*connecting_, mine);
    for (int other = 0; other < size(); ++other) {
      const bool same = std::memcmp(&all[static_cast<std::size_t>(other)].gpu, &mine.gpu, sizeof mine.gpu) == 0;
      if (other != rank() && same) {
        fail("connecting: " + std::to_string(local_size_) + " ranks on this machine, but it has " +
             std::to_string(gpus_) + (gpus_ == 1 ? " GPU" : " GPUs") + ", and GPU " + std::to_string(gpu_) +
             " is rank " + std::to_string(other) + "'s too; every rank needs one of its own: mpiexec -n " +
             std::to_string(gpus_) + ", or more machines");
      }
    }
    return all.front().group;
  }

  void join(const ncclUniqueId& group) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // so that waiting has an end
    const ncclResult_t result = ncclCommInitRankConfig(&comm_, size(), group, rank(), &config);
    settle(result, "connecting", connecting_limit());
  }

  std::chrono::milliseconds connecting_limit() const { return std::max<std::chrono::milliseconds>(limit_, CONNECTING); }

  template <typename T>
  static std::vector<T> from_all(Communicator& hosts, const T& mine) {
    static_assert(std::is_trivially_copyable_v<T>, "goes from process to process as bytes");
    std::vector<T> all(static_cast<std::size_t>(hosts.size()));
    hosts.all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(all)));
    return all;
  }

  // ---- Failing

  // Ends what is under way. Without it the memory that takes part could not even be freed: that waits for the GPU.
  // The connection over MPI is left as it is: its farewell would wait for ranks that do not come.
  void give_up() noexcept {
    if (ncclComm_t comm = std::exchange(comm_, nullptr)) {
      ncclCommAbort(comm);
      const auto begin = Clock::now();
      while (cudaStreamQuery(own()) == cudaErrorNotReady && Clock::now() - begin < ABORTING) pause(1'000'000);
      cudaGetLastError();
    }
    static_cast<void>(hosts_.release());
    static_cast<void>(connecting_.release());
  }

  [[noreturn]] void fail(const std::string& what) {
    give_up();
    throw CommunicationError("rank " + std::to_string(rank()) + " of " + std::to_string(size()) + ", " + what);
  }

  void check(ncclResult_t result, const std::string& what) {
    if (result == ncclSuccess || result == ncclInProgress) return;
    std::string text = ncclGetErrorString(result);
    if (const char* more = ncclGetLastError(comm_); more != nullptr && *more != '\0') text += std::string(": ") + more;
    fail(what + ": " + text);
  }

  // ---- Waiting

  // Who has waited long lets others work: there may be more processes than cores.
  static void pause(int tries) {
    if (tries < 10'000) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  // Until NCCL has done, on the host's side, what it was told.
  void settle(ncclResult_t result, const std::string& what, std::chrono::milliseconds limit) {
    check(result, what);
    const auto begin = Clock::now();
    for (int tries = 0;; ++tries) {
      ncclResult_t state = ncclSuccess;
      check(ncclCommGetAsyncError(comm_, &state), what);
      check(state, what);
      if (state == ncclSuccess) return;
      if (Clock::now() - begin > limit) {
        fail(what + ": NCCL has been connecting GPUs since " + std::to_string(limit.count()) + " ms");
      }
      pause(tries);
    }
  }

  struct Exchange {
    Moment ready, done;
  };

  // Launches an exchange that begins after what the caller has launched.
  template <typename Launch>
  Exchange begin(const std::string& what, const Launch& launch) {
    const Moment ready(before_.get());
    gpu_detail::check(cudaStreamWaitEvent(own(), ready.get(), 0), "making a stream wait");
    settle(launch(), what, limit_);
    return {ready, Moment(own())};
  }

  void wait_for(const Exchange& exchange, const std::string& waiting) {
    if (comm_ == nullptr) fail(waiting + ", but the connection is broken");
    const auto begin = Clock::now();
    for (int tries = 0; !exchange.done.reached(); ++tries) {
      ncclResult_t state = ncclSuccess;
      check(ncclCommGetAsyncError(comm_, &state), waiting);
      check(state, waiting);
      if (Clock::now() - begin > limit_) {
        const std::string since = " since " + std::to_string(limit_.count()) + " ms";
        if (!exchange.ready.reached()) fail(waiting + ", but this rank's GPU is busy with earlier work" + since);
        fail(waiting + since);
      }
      pause(tries);
    }
  }

  template <typename Launch>
  void run(const Call& call, const Launch& launch) {
    const std::string what = name_of(call.kind);
    compare(what, call);
    if (call.sent == 0) return;
    wait_for(begin(what, launch), what + ": waiting for the other ranks");
  }

  // ---- Agreeing

  // Calls or sizes that differ would hang, or write where they should not. Throws on every rank, of the same fault.
  void compare(const std::string& what, const Call& mine) {
    if (comm_ == nullptr) fail(what + ": the connection is broken");
    std::vector<Call> calls;
    try {
      calls = from_all(*hosts_, mine);
    } catch (const CommunicationError& error) {
      fail(what + ": the ranks do not meet: " + error.what());
    }
    const auto call_of = [&](int one) -> const Call& { return calls[static_cast<std::size_t>(one % size())]; };
    for (int other = 0; other < size(); ++other) {
      if (call_of(other).kind != mine.kind) {
        fail(what + ": rank " + std::to_string(other) + " calls " + name_of(call_of(other).kind));
      }
    }
    for (int other = 0; other < size(); ++other) {
      if (call_of(other).sent == call_of(other + 1).expected) continue;
      const std::string next = "rank " + std::to_string((other + 1) % size());
      const std::string brings = "rank " + std::to_string(other) + " sends " + bytes(call_of(other).sent);
      fail(what + ": sizes differ: " + brings + ", " + next + " expects " + bytes(call_of(other + 1).expected));
    }
  }

  static std::int64_t length(std::span<const std::byte> memory) { return static_cast<std::int64_t>(memory.size()); }
  cudaStream_t own() const { return own_.get(); }

  std::chrono::milliseconds limit_;
  std::unique_ptr<Communicator> hosts_;
  std::unique_ptr<Communicator> connecting_;  // more patient
  int hosts_rank_ = 0;
  int hosts_size_ = 1;
  int local_rank_ = 0;
  int local_size_ = 0;
  int gpu_ = 0;
  int gpus_ = 0;
  Stream before_;
  std::shared_ptr<std::remove_pointer_t<cudaStream_t>> own_;
  ncclComm_t comm_ = nullptr;
  std::int64_t shifts_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> connect_by_nccl(std::chrono::milliseconds limit, const Stream& stream) {
  return std::make_unique<NcclCommunicator>(limit, stream);
}

}  // namespace flashkata
