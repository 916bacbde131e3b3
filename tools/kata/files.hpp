#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace kata {

namespace fs = std::filesystem;

/// The text of a file, or nothing where it cannot be read.
std::optional<std::string> read_file(const fs::path& path);

/// Replaces a file whole: written beside it under another name, then renamed, so that a full disk, an unwritable folder
/// or Ctrl-C leave the old text as it was. Makes the folders above it. Throws Failure naming the path.
void write_file(const fs::path& path, std::string_view text);

/// Writes what may be lost (a cache): false where it could not, with the reason in *why.
bool try_write_file(const fs::path& path, std::string_view text, std::string* why = nullptr);

/// All C++ and CUDA code below a folder, in an order that does not depend on the file system.
std::vector<fs::path> code_below(const fs::path& folder);

/// `path` as a person in `root` would type it; unchanged where it lies elsewhere.
std::string relative_to(const fs::path& path, const fs::path& root);

/// 20240131T235959Z: sorts by name, and is legal in a file name everywhere.
std::string utc_timestamp();

/// FNV-1a over everything added, with lengths, so that moving a byte from one text to the next is seen.
class Hash {
 public:
  void add(std::string_view text);
  std::string hex() const;

 private:
  void byte(unsigned char value) { state_ = (state_ ^ value) * 1099511628211ull; }
  std::uint64_t state_ = 14695981039346656037ull;
};

/// The text of a C++ file without its comments; literals stay, so that "//" in a string does not count as one.
std::string without_comments(std::string_view source);

/// True while a student's file still throws NotImplemented somewhere that is not commented out.
bool is_unfilled(std::string_view source);

/// The files below `folder` that `sources` include by #include "...", directly or through each other, each once and in
/// the order in which they are met. A name is looked for beside the file that includes it, then from `root`.
std::vector<fs::path> included_below(const fs::path& folder, const std::vector<fs::path>& sources,
                                     const fs::path& root);

/// Held while something is built: two builds in one folder at a time would damage each other.
class FolderLock {
 public:
  explicit FolderLock(const fs::path& folder);
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;
  ~FolderLock();

 private:
  int file_ = -1;
};

/// Where what is needed for a while is kept: TMPDIR, or /tmp.
fs::path temporary_folder();

/// A folder that goes away with its owner.
class ScratchFolder {
 public:
  ScratchFolder();
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  ~ScratchFolder();
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

}  // namespace kata
