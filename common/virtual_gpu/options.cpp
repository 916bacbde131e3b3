#include "common/virtual_gpu/options.hpp"

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace flashkata::virtual_gpu {
namespace {

std::uint64_t from_environment(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  return std::strtoull(text, nullptr, 10);
}

Options default_options() {
  Options result{};
  const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  result.threads = static_cast<int>(std::clamp<std::uint64_t>(from_environment("KATA_GPU_THREADS", cores), 1, 256));
  result.schedule_seed = from_environment("KATA_GPU_SCHEDULE", 0);
  const std::uint64_t kilobytes = std::clamp<std::uint64_t>(from_environment("KATA_GPU_STACK_KB", 64), 16, 65536);
  result.stack_bytes = (kilobytes * 1024 + 4095) / 4096 * 4096;
  return result;
}

}  // namespace

Options& options() {
  static Options the_options = default_options();
  return the_options;
}

}  // namespace flashkata::virtual_gpu
