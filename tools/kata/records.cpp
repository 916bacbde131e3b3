#include "records.hpp"

#include <charconv>
#include <nlohmann/json.hpp>

#include "files.hpp"

namespace kata {

Records read_records(const fs::path& file) {
  const auto json = nlohmann::json::parse(read_file(file).value_or("{}"), nullptr, /*allow_exceptions*/ false);
  Records records;
  if (!json.is_object()) return records;
  for (const auto& [name, entry] : json.items()) {
    if (!entry.is_object()) continue;
    for (const auto& [key, value] : entry.items()) {
      if (value.is_string()) records[name][key] = value.get<std::string>();
    }
  }
  return records;
}

bool try_write_records(const fs::path& file, const Records& records, std::string* why) {
  // A test's name may hold bytes that are not UTF-8; they are replaced rather than thrown over.
  const nlohmann::json json = records;
  return try_write_file(file, json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n", why);
}

std::size_t number_in(const Record& record, const std::string& name) {
  const auto entry = record.find(name);
  std::size_t value = 0;
  if (entry != record.end()) std::from_chars(entry->second.data(), entry->second.data() + entry->second.size(), value);
  return value;
}

}  // namespace kata
