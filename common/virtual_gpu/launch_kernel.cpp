#include "common/virtual_gpu/launch_kernel.hpp"

#include <algorithm>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "common/virtual_gpu/faults.hpp"
#include "common/virtual_gpu/global_shadow.hpp"
#include "common/virtual_gpu/options.hpp"
#include "common/virtual_gpu/profile_sums.hpp"
#include "common/virtual_gpu/worker.hpp"

namespace flashkata::virtual_gpu {
namespace {

std::mutex launch_mutex;
std::vector<std::unique_ptr<Worker>> workers;
std::uint32_t launch_number = 0;

/// Stamps in the shadow of global memory hold the number of the launch in a few bits.
std::uint32_t next_launch_number() {
  if (++launch_number == GlobalStamp::LAUNCHES) {
    launch_number = 1;
    clear_global_shadow();
  }
  return launch_number;
}

void run_worker(Worker& worker, Launch& launch) {
  const SignalStack signal_stack;
  worker.sightings.clear();
  worker.events = {};
  worker.traffic.assign(buffer_number_limit(), {});
  worker.lines.clear();
  worker.shared.prepare(launch.dynamic_shared_bytes, launch.check);
  worker.run(launch);
}

}  // namespace

const char* launch_error(dim3 grid, dim3 block, std::size_t dynamic_shared_bytes) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "invalid configuration argument: the grid is empty";
  if (block.x == 0 || block.y == 0 || block.z == 0) return "invalid configuration argument: the block is empty";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "invalid configuration argument: a grid has at most (2^31 - 1, 65535, 65535) blocks";
  }
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || std::uint64_t{block.x} * block.y * block.z > 1024) {
    return "invalid configuration argument: a block has at most 1024 threads, 64 along z";
  }
  if (dynamic_shared_bytes > MOST_DYNAMIC_SHARED_BYTES) {
    return "invalid argument: a block has at most 227 KiB of dynamic shared memory";
  }
  return nullptr;
}

void launch_kernel(const KernelCall& call, dim3 grid, dim3 block, std::size_t dynamic_shared_bytes) {
  const std::lock_guard lock(launch_mutex);
  Launch launch;
  launch.kernel = call.kernel;
  launch.enter = call.enter;
  launch.arguments = call.arguments;
  launch.argument_bytes = call.argument_bytes;
  launch.grid = grid;
  launch.block = block;
  launch.dynamic_shared_bytes = dynamic_shared_bytes;
  launch.check = has_checked_kernels() && options().check;
  launch.profile = launch.check && options().profile;
  launch.schedule_seed = options().schedule_seed;
  launch.number = next_launch_number();
  forget_releases();

  const auto wanted = static_cast<std::uint64_t>(std::max(1, options().threads));
  const auto count = static_cast<std::size_t>(std::min(launch.blocks(), wanted));
  while (workers.size() < count) workers.push_back(std::make_unique<Worker>());
  {
    const FaultHandlers fault_handlers;
    std::vector<std::jthread> helpers;
    for (std::size_t i = 1; i < count; ++i) helpers.emplace_back([&, i] { run_worker(*workers[i], launch); });
    run_worker(*workers[0], launch);
  }

  std::vector<const Sightings*> seen;
  std::vector<const Worker*> used;
  for (std::size_t i = 0; i < count; ++i) {
    seen.push_back(&workers[i]->sightings);
    used.push_back(workers[i].get());
  }
  publish(seen, launch.kernel);
  if (launch.check) add_to_profiles(used, launch);
}

}  // namespace flashkata::virtual_gpu
