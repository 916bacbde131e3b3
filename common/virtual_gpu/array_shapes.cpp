// The shapes of shared arrays, from the program's debug information (DWARF 4, which checked kernel files are told to
// use).
//
// Only what is needed is read: variables in thread-local storage with their offsets, and the types that these refer to.

#include "common/virtual_gpu/array_shapes.hpp"

#include <elf.h>

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <string_view>
#include <vector>

namespace flashkata::virtual_gpu {
namespace {

// Names and numbers are those of the DWARF 4 standard, section 7.
enum Tag { ARRAY_TYPE = 0x01, SUBRANGE_TYPE = 0x21 };
enum Attribute {
  LOCATION = 0x02,
  BYTE_SIZE = 0x0b,
  UPPER_BOUND = 0x2f,
  ORIGIN = 0x31,
  COUNT = 0x37,
  SPECIFICATION = 0x47,
  TYPE = 0x49
};
enum Form {
  ADDR = 0x01,
  BLOCK2 = 0x03,
  BLOCK4 = 0x04,
  DATA2 = 0x05,
  DATA4 = 0x06,
  DATA8 = 0x07,
  STRING = 0x08,
  BLOCK = 0x09,
  BLOCK1 = 0x0a,
  DATA1 = 0x0b,
  FLAG = 0x0c,
  SDATA = 0x0d,
  STRP = 0x0e,
  UDATA = 0x0f,
  REF_ADDR = 0x10,
  REF1 = 0x11,
  REF2 = 0x12,
  REF4 = 0x13,
  REF8 = 0x14,
  REF_UDATA = 0x15,
  SEC_OFFSET = 0x17,
  EXPRLOC = 0x18,
  FLAG_PRESENT = 0x19,
  REF_SIG8 = 0x20
};
constexpr std::uint8_t OP_CONST8U = 0x0e;  // of a location: the offset in thread-local storage follows

/// Reads numbers one after the other.
class Cursor {
 public:
  Cursor(std::string_view bytes, std::size_t at) : bytes_(bytes), at_(at) {}

  std::uint64_t fixed(std::size_t size) {
    std::uint64_t value = 0;
    if (at_ + size <= bytes_.size()) std::memcpy(&value, bytes_.data() + at_, size);
    at_ += size;
    return value;
  }
  std::uint64_t leb() {
    std::uint64_t value = 0;
    for (unsigned shift = 0; at_ < bytes_.size(); shift += 7) {
      const auto byte = static_cast<std::uint8_t>(bytes_[at_++]);
      if (shift < 64) value |= std::uint64_t{byte & 0x7fu} << shift;
      if ((byte & 0x80) == 0) break;
    }
    return value;
  }
  void skip_string() { at_ = bytes_.find('\0', at_) + 1; }
  void skip(std::uint64_t count) { at_ += count; }
  std::size_t at() const { return at_; }
  bool done(std::size_t end) const { return at_ >= end || at_ >= bytes_.size(); }

 private:
  std::string_view bytes_;
  std::size_t at_;
};

struct Abbreviation {
  std::uint64_t tag = 0;
  bool has_children = false;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> attributes;  // name, form
};

/// A debugging entry, as far as it matters here. References are offsets of other entries.
struct Entry {
  std::uint64_t tag = 0;
  std::uint64_t type = 0;
  std::uint64_t origin = 0;
  std::uint64_t byte_size = 0;
  std::uint64_t length = 0;               // of a subrange
  std::vector<std::uint64_t> dimensions;  // of an array
};

struct ArrayShape {
  std::vector<std::uint64_t> dimensions;
  std::uint64_t element_bytes = 0;
};

class DebugInformation {
 public:
  DebugInformation() {
    std::ifstream stream("/proc/self/exe", std::ios::binary);
    file_.assign(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    info_ = section(".debug_info");
    abbreviations_ = section(".debug_abbrev");
    for (std::size_t unit = 0; unit + 11 < info_.size();) unit = read_unit(unit);
  }

  /// Null if nothing is known about a variable at this offset of thread-local storage.
  const ArrayShape* shape_at(std::size_t offset) const {
    const auto found = shapes_.find(offset);
    return found == shapes_.end() ? nullptr : &found->second;
  }

 private:
  std::string_view section(std::string_view name) const {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file_.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file_.data() + header->e_shoff);
    const char* names = file_.data() + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; ++i) {
      if (name != names + sections[i].sh_name || (sections[i].sh_flags & SHF_COMPRESSED) != 0) continue;
      return std::string_view(file_).substr(sections[i].sh_offset, sections[i].sh_size);
    }
    return {};
  }

  std::map<std::uint64_t, Abbreviation> read_abbreviations(std::uint64_t offset) const {
    std::map<std::uint64_t, Abbreviation> result;
    Cursor cursor(abbreviations_, offset);
    while (!cursor.done(abbreviations_.size())) {
      const std::uint64_t code = cursor.leb();
      if (code == 0) break;
      Abbreviation& abbreviation = result[code];
      abbreviation.tag = cursor.leb();
      abbreviation.has_children = cursor.fixed(1) != 0;
      while (!cursor.done(abbreviations_.size())) {
        const std::uint64_t name = cursor.leb();
        const std::uint64_t form = cursor.leb();
        if (name == 0 && form == 0) break;
        abbreviation.attributes.emplace_back(name, form);
      }
    }
    return result;
  }

  /// The value of an attribute; of a location, the offset in thread-local storage, or ~0 if it is no such location.
  static std::uint64_t read_value(Cursor& cursor, std::uint64_t form, std::size_t unit) {
    switch (form) {
      case ADDR:
      case DATA8:
      case REF_SIG8:
        return cursor.fixed(8);
      case REF8:
        return unit + cursor.fixed(8);
      case DATA4:
      case STRP:
      case SEC_OFFSET:
      case REF_ADDR:
        return cursor.fixed(4);
      case REF4:
        return unit + cursor.fixed(4);
      case DATA2:
        return cursor.fixed(2);
      case REF2:
        return unit + cursor.fixed(2);
      case DATA1:
      case FLAG:
        return cursor.fixed(1);
      case REF1:
        return unit + cursor.fixed(1);
      case UDATA:
      case SDATA:
        return cursor.leb();
      case REF_UDATA:
        return unit + cursor.leb();
      case FLAG_PRESENT:
        return 1;
      case STRING:
        cursor.skip_string();
        return 0;
      case BLOCK1:
        cursor.skip(cursor.fixed(1));
        return ~0ull;
      case BLOCK2:
        cursor.skip(cursor.fixed(2));
        return ~0ull;
      case BLOCK4:
        cursor.skip(cursor.fixed(4));
        return ~0ull;
      case BLOCK:
        cursor.skip(cursor.leb());
        return ~0ull;
      case EXPRLOC: {
        const std::uint64_t length = cursor.leb();
        const bool is_thread_local = length == 10 && cursor.fixed(1) == OP_CONST8U;
        const std::uint64_t offset = is_thread_local ? cursor.fixed(8) : 0;
        cursor.skip(is_thread_local ? 1 : length == 10 ? 9 : length);
        return is_thread_local ? offset : ~0ull;
      }
      default:
        return 0;
    }
  }

  /// Reads the unit that starts here and returns where the next one does.
  std::size_t read_unit(std::size_t unit) {
    Cursor cursor(info_, unit);
    const std::size_t end = unit + 4 + cursor.fixed(4);
    if (cursor.fixed(2) != 4) return end;  // another version
    const auto abbreviations = read_abbreviations(cursor.fixed(4));
    cursor.skip(1);  // size of an address

    std::map<std::uint64_t, Entry> entries;
    std::map<std::uint64_t, std::uint64_t> variables;  // offset in thread-local storage -> entry
    std::vector<std::uint64_t> parents;
    while (!cursor.done(end)) {
      const std::uint64_t position = cursor.at();
      const std::uint64_t code = cursor.leb();
      if (code == 0) {
        if (!parents.empty()) parents.pop_back();
        continue;
      }
      const auto abbreviation = abbreviations.find(code);
      if (abbreviation == abbreviations.end()) return end;
      Entry& entry = entries[position];
      entry.tag = abbreviation->second.tag;
      for (const auto& [name, form] : abbreviation->second.attributes) {
        const std::uint64_t value = read_value(cursor, form, unit);
        if (name == TYPE) entry.type = value;
        if (name == ORIGIN || name == SPECIFICATION) entry.origin = value;
        if (name == BYTE_SIZE) entry.byte_size = value;
        if (name == COUNT) entry.length = value;
        if (name == UPPER_BOUND) entry.length = value + 1;
        if (name == LOCATION && form == EXPRLOC && value != ~0ull) variables[value] = position;
      }
      if (entry.tag == SUBRANGE_TYPE && !parents.empty()) entries[parents.back()].dimensions.push_back(entry.length);
      if (abbreviation->second.has_children) parents.push_back(position);
    }
    for (const auto& [offset, position] : variables) add_shape(entries, offset, position);
    return end;
  }

  void add_shape(std::map<std::uint64_t, Entry>& entries, std::uint64_t offset, std::uint64_t position) {
    ArrayShape shape;
    const Entry* entry = &entries[position];
    for (int steps = 0; steps < 20 && entry->byte_size == 0; ++steps) {
      if (entry->tag == ARRAY_TYPE) {
        shape.dimensions.insert(shape.dimensions.end(), entry->dimensions.begin(), entry->dimensions.end());
      }
      const std::uint64_t next = entry->type != 0 ? entry->type : entry->origin;
      if (next == 0) return;
      entry = &entries[next];
    }
    shape.element_bytes = entry->byte_size;
    shapes_[offset] = shape;
  }

  std::string file_;
  std::string_view info_;
  std::string_view abbreviations_;
  std::map<std::uint64_t, ArrayShape> shapes_;
};

std::uint64_t total_bytes(const ArrayShape& shape) {
  std::uint64_t bytes = shape.element_bytes;
  for (const std::uint64_t dimension : shape.dimensions) bytes *= dimension;
  return bytes;
}

}  // namespace

std::string element_text(const SharedSymbol& symbol, std::size_t offset, std::size_t access_bytes) {
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  static const DebugInformation information;
  const ArrayShape* known = information.shape_at(symbol.offset);
  ArrayShape shape{{symbol.bytes / access_bytes}, access_bytes};
  if (known != nullptr && total_bytes(*known) == symbol.bytes) shape = *known;

  std::string text;
  std::uint64_t index = offset / shape.element_bytes;
  for (auto dimension = shape.dimensions.rbegin(); dimension != shape.dimensions.rend(); ++dimension) {
    const std::uint64_t length = std::max<std::uint64_t>(1, *dimension);
    text.insert(0, "[" + std::to_string(index % length) + "]");
    index /= length;
  }
  return text;
}

}  // namespace flashkata::virtual_gpu
