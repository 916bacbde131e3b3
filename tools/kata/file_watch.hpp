#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace kata {

/// Notices when one of some files is saved. The files' times and sizes decide; inotify, where there is one, only makes
/// the wait short. Editors that write a new file and rename it over the old one are seen too.
class FileWatch {
 public:
  explicit FileWatch(std::vector<std::filesystem::path> files);
  FileWatch(const FileWatch&) = delete;
  FileWatch& operator=(const FileWatch&) = delete;
  ~FileWatch();

  /// True when something was saved since the last time that this said so. Does not wait.
  bool changed();
  /// The same question, for asking again.
  bool has_change() const { return look() != seen_; }

  /// Waits until something may have changed, `other` (a file descriptor, or -1) can be read, or a while has passed.
  void wait(int other) const;

  /// Waits until nothing has changed for a moment: editors save in several steps.
  void settle();

 private:
  std::vector<std::string> look() const;

  std::vector<std::filesystem::path> files_;
  std::vector<std::string> seen_;
  int notifier_ = -1;
};

/// Single key presses without Enter and echo, while it lives and standard input is a terminal.
class Keys {
 public:
  Keys();
  Keys(const Keys&) = delete;
  Keys& operator=(const Keys&) = delete;
  ~Keys();

  int descriptor() const;  // -1 where nobody can press a key
  char pressed() const;    // 0: none

 private:
  bool active_ = false;
};

}  // namespace kata
