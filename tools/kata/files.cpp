#include "files.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <iostream>
#include <sstream>

#include "failure.hpp"
#include "process.hpp"

namespace kata {
namespace {

bool write_all(int file, std::string_view text) {
  while (!text.empty()) {
    const auto count = ::write(file, text.data(), text.size());
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    text.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

// /dev/stdout and the like are written to; renaming a file over them would replace the device.
bool is_device(const fs::path& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  return fs::exists(status) && !fs::is_regular_file(status) && !fs::is_directory(status);
}

bool replace_file(const fs::path& path, std::string_view text, bool durable, std::string* why) {
  const auto fail = [why](const std::string& reason) {
    if (why != nullptr) *why = reason;
    return false;
  };
  std::error_code error;
  const bool device = is_device(path);
  // Through a symbolic link: the student may keep the file elsewhere, and a rename would cut the link.
  const fs::path target = fs::is_symlink(path, error) && !device ? fs::weakly_canonical(path, error) : path;
  if (target.has_parent_path()) fs::create_directories(target.parent_path(), error);
  if (error) return fail(error.message());
  const fs::path draft = device ? target : fs::path(target.string() + ".kata-" + std::to_string(::getpid()));
  const int flags = device ? O_WRONLY : O_WRONLY | O_CREAT | O_TRUNC;
  const int file = ::open(draft.c_str(), flags | O_CLOEXEC, 0666);
  if (file < 0) return fail(std::strerror(errno));
  struct stat old {};
  if (!device && ::stat(target.c_str(), &old) == 0) ::fchmod(file, old.st_mode & 07777);
  const bool written = write_all(file, text) && (device || !durable || ::fsync(file) == 0);
  const int write_error = errno;
  const bool closed = ::close(file) == 0;
  if (!written || !closed || (!device && ::rename(draft.c_str(), target.c_str()) != 0)) {
    const int reason = written ? errno : write_error;
    if (!device) ::unlink(draft.c_str());
    return fail(std::strerror(reason));
  }
  return true;
}

}  // namespace

std::optional<std::string> read_file(const fs::path& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return std::nullopt;
  std::string text;
  std::array<char, 1 << 14> buffer{};
  ssize_t count = 0;
  while ((count = ::read(file, buffer.data(), buffer.size())) > 0 || (count < 0 && errno == EINTR)) {
    if (count > 0) text.append(buffer.data(), static_cast<std::size_t>(count));
  }
  ::close(file);
  if (count < 0) return std::nullopt;  // a folder, or a disk that fails
  return text;
}

bool try_write_file(const fs::path& path, std::string_view text, std::string* why) {
  return replace_file(path, text, /*durable*/ false, why);
}

void write_file(const fs::path& path, std::string_view text) {
  std::string why;
  if (!replace_file(path, text, /*durable*/ true, &why)) {
    throw Failure("cannot write " + path.string() + ": " + why,
                  "make room, or make it writable, and run the same command again; nothing was changed");
  }
}

std::vector<fs::path> code_below(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  for (fs::recursive_directory_iterator entry(folder, error), end; !error && entry != end; entry.increment(error)) {
    const auto kind = entry->path().extension();
    const bool code = kind == ".hpp" || kind == ".h" || kind == ".cuh" || kind == ".cpp" || kind == ".cu";
    if (code && entry->is_regular_file(error)) files.push_back(entry->path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

std::string relative_to(const fs::path& path, const fs::path& root) {
  const auto relative = path.lexically_normal().lexically_relative(root.lexically_normal());
  if (relative.empty() || *relative.begin() == "..") return path.string();
  return relative.string();
}

std::string utc_timestamp() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  ::gmtime_r(&now, &parts);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y%m%dT%H%M%SZ", &parts);
  return text.data();
}

void Hash::add(std::string_view text) {
  for (std::size_t size = text.size(), i = 0; i < sizeof size; ++i, size >>= 8) byte(static_cast<unsigned char>(size));
  for (const char c : text) byte(static_cast<unsigned char>(c));
}

std::string Hash::hex() const {
  std::ostringstream text;
  text << std::hex << state_;
  return text.str();
}

std::string without_comments(std::string_view source) {
  std::string code;
  std::size_t i = 0;
  const auto at = [&](std::string_view word) { return source.substr(i).starts_with(word); };
  const auto copy_literal = [&](char quote) {
    code += source[i++];
    while (i < source.size() && source[i] != quote && source[i] != '\n') {
      if (source[i] == '\\' && i + 1 < source.size()) code += source[i++];
      code += source[i++];
    }
    if (i < source.size()) code += source[i++];
  };
  while (i < source.size()) {
    if (at("//")) {
      while (i < source.size() && source[i] != '\n') ++i;
    } else if (at("/*")) {
      const auto end = source.find("*/", i + 2);
      i = end == std::string_view::npos ? source.size() : end + 2;
      code += ' ';
    } else if (at("R\"")) {
      const auto open = source.find('(', i);
      if (open == std::string_view::npos) return code;
      const std::string close = ")" + std::string(source.substr(i + 2, open - i - 2)) + "\"";
      const auto end = source.find(close, open);
      const auto after = end == std::string_view::npos ? source.size() : end + close.size();
      code += source.substr(i, after - i);
      i = after;
    } else if (source[i] == '"') {
      copy_literal('"');
    } else if (source[i] == '\'' && (i == 0 || std::isxdigit(static_cast<unsigned char>(source[i - 1])) == 0)) {
      copy_literal('\'');  // not the ' in 1'000
    } else {
      code += source[i++];
    }
  }
  return code;
}

bool is_unfilled(std::string_view source) {
  // A commented-out marker is a filled stub, and a marker that clang-format broke over two lines is still one.
  std::string dense;
  for (const char c : without_comments(source)) {
    if (std::isspace(static_cast<unsigned char>(c)) == 0) dense += c;
  }
  return dense.find("NotImplemented(__FILE__)") != std::string::npos;
}

std::vector<fs::path> included_below(const fs::path& folder, const std::vector<fs::path>& sources,
                                     const fs::path& root) {
  std::vector<fs::path> found;
  const std::function<void(const fs::path&)> follow = [&](const fs::path& source) {
    std::istringstream lines(without_comments(read_file(source).value_or("")));
    for (std::string line; std::getline(lines, line);) {
      std::erase(line, ' ');
      if (!line.starts_with("#include\"")) continue;
      const std::string name = line.substr(9, line.rfind('"') - 9);
      const fs::path beside = source.parent_path() / name;
      const fs::path file = (fs::exists(beside) ? beside : root / name).lexically_normal();
      const bool below = relative_to(file, folder) != file.string();
      if (!below || !fs::is_regular_file(file) || std::find(found.begin(), found.end(), file) != found.end()) continue;
      found.push_back(file);
      follow(file);
    }
  };
  for (const auto& source : sources) follow(source);
  return found;
}

FolderLock::FolderLock(const fs::path& folder) {
  file_ = ::open((folder / ".kata.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (file_ < 0) return;  // an unwritable build folder: the build itself says so, and better
  if (::flock(file_, LOCK_EX | LOCK_NB) == 0) return;
  std::cerr << "  waiting for another ./kata that is building\n";
  while (::flock(file_, LOCK_EX) != 0 && errno == EINTR) throw_if_interrupted();
}

FolderLock::~FolderLock() {
  if (file_ >= 0) ::close(file_);
}

fs::path temporary_folder() {
  const char* chosen = std::getenv("TMPDIR");
  return chosen != nullptr && *chosen != '\0' ? chosen : "/tmp";
}

ScratchFolder::ScratchFolder() {
  std::string name = (temporary_folder() / "kata.XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) {
    throw Failure("cannot make a folder in " + temporary_folder().string() + ": " + std::strerror(errno),
                  "make room there, or set TMPDIR to a folder that has some");
  }
  path_ = name;
}

ScratchFolder::~ScratchFolder() {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
}

}  // namespace kata
