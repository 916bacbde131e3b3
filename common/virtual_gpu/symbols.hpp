// What the program's own symbol table and line table say: names of kernels and shared arrays, lines of code addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace flashkata::virtual_gpu {

/// A place in the program's code: offset of a return address from the start of the program; 0 is "unknown".
using Site = std::uint32_t;

struct SourceLine {
  std::string file;  // as the compiler was given it
  int line = 0;

  /// "flash.cu:43"
  std::string text() const;
  bool known() const { return line > 0; }
  bool operator==(const SourceLine&) const = default;
};

/// Start and end of the program in memory.
struct Image {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
};
const Image& image();

/// By how much the program was moved from the addresses in its file.
extern const std::uintptr_t load_bias;

inline Site site_of(const void* return_address) {
  return static_cast<Site>(reinterpret_cast<std::uintptr_t>(return_address) - load_bias);
}

/// Line of the call before a return address: the innermost frame that is neither in our headers nor in the system's.
SourceLine line_of(Site site);

/// Looks up many at once, which is faster.
void prefetch_lines(const std::vector<Site>& sites);

/// "flash_forward", without return type and parameters; "kernel" if not known.
std::string function_name(const void* function);

/// A static __shared__ array: its offset in thread-local memory.
struct SharedSymbol {
  std::string name;
  std::size_t offset;
  std::size_t bytes;
};
const std::vector<SharedSymbol>& shared_symbols();

/// Start of the calling OS thread's copy of the program's thread-local memory, and its size.
std::uintptr_t thread_local_begin();
std::size_t thread_local_bytes();

}  // namespace flashkata::virtual_gpu
