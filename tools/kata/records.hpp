#pragma once

#include <filesystem>
#include <map>
#include <string>

namespace kata {

/// What the program remembers between two runs: named records of named texts, as JSON that a person can read.
using Record = std::map<std::string, std::string>;
using Records = std::map<std::string, Record>;

/// Nothing where the file is absent or damaged: what is remembered may always be lost.
Records read_records(const std::filesystem::path& file);

/// False, with the reason in *why, where it could not be written.
bool try_write_records(const std::filesystem::path& file, const Records& records, std::string* why = nullptr);

/// A number in a record; 0 where there is none.
std::size_t number_in(const Record& record, const std::string& name);

}  // namespace kata
