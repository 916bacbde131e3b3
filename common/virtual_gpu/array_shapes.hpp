// Indices for a byte of a shared array: "[3][5]".
#pragma once

#include <cstddef>
#include <string>

#include "common/virtual_gpu/symbols.hpp"

namespace flashkata::virtual_gpu {

/// Which element of the array lies `offset` bytes after its start. If the shape is unknown (no debug information), the
/// array counts as one row of elements of the size of the access.
std::string element_text(const SharedSymbol& symbol, std::size_t offset, std::size_t access_bytes);

}  // namespace flashkata::virtual_gpu
