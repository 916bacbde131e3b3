#include "file_watch.hpp"

#include <poll.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <thread>
#include <utility>

#include "process.hpp"
#ifdef __linux__
#include <sys/inotify.h>
#endif

namespace kata {
namespace {

termios normal_terminal{};

}  // namespace

FileWatch::FileWatch(std::vector<std::filesystem::path> files) : files_(std::move(files)), seen_(look()) {
#ifdef __linux__
  notifier_ = ::inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
  if (notifier_ < 0) return;  // out of them: looking now and then does as well
  for (const auto& file : files_) {
    // The folder, not the file: a rename puts another file in its place.
    ::inotify_add_watch(notifier_, file.parent_path().c_str(), IN_CLOSE_WRITE | IN_MOVED_TO | IN_CREATE | IN_ATTRIB);
  }
#endif
}

FileWatch::~FileWatch() {
  if (notifier_ >= 0) ::close(notifier_);
}

std::vector<std::string> FileWatch::look() const {
  std::vector<std::string> looks;
  for (const auto& file : files_) {
    struct stat now {};
    if (::stat(file.c_str(), &now) != 0) {
      looks.emplace_back();  // between two steps of an editor, or gone
      continue;
    }
#ifdef __APPLE__
    const auto time = now.st_mtimespec;
#else
    const auto time = now.st_mtim;
#endif
    looks.push_back(std::to_string(time.tv_sec) + "." + std::to_string(time.tv_nsec) + "/" +
                    std::to_string(now.st_size) + "/" + std::to_string(now.st_ino));
  }
  return looks;
}

bool FileWatch::changed() {
  auto now = look();
  if (now == seen_) return false;
  seen_ = std::move(now);
  return true;
}

void FileWatch::wait(int other) const {
  std::array<pollfd, 2> both{{{notifier_, POLLIN, 0}, {other, POLLIN, 0}}};  // poll passes over negative ones
  ::poll(both.data(), both.size(), notifier_ >= 0 ? 1000 : 200);
#ifdef __linux__
  std::array<char, 4096> events{};
  while (notifier_ >= 0 && ::read(notifier_, events.data(), events.size()) > 0) {
  }
#endif
}

void FileWatch::settle() {
  using namespace std::chrono_literals;
  constexpr int MOST = 100;  // a file that never rests must not keep us for ever
  for (int i = 0; i < MOST && !interrupted(); ++i) {
    std::this_thread::sleep_for(40ms);
    const bool whole = look() == seen_;
    changed();
    if (whole) return;
  }
}

Keys::Keys() {
  if (::isatty(STDIN_FILENO) != 1 || ::tcgetattr(STDIN_FILENO, &normal_terminal) != 0) return;
  if (::tcgetpgrp(STDIN_FILENO) != ::getpgrp()) return;  // in the background the keys are the shell's
  termios raw = normal_terminal;
  raw.c_lflag &= ~static_cast<tcflag_t>(ICANON | ECHO);  // Ctrl-C stays a signal
  active_ = ::tcsetattr(STDIN_FILENO, TCSANOW, &raw) == 0;
}

Keys::~Keys() {
  if (active_) ::tcsetattr(STDIN_FILENO, TCSANOW, &normal_terminal);
}

int Keys::descriptor() const { return active_ ? STDIN_FILENO : -1; }

char Keys::pressed() const {
  pollfd input{STDIN_FILENO, POLLIN, 0};
  if (!active_ || ::poll(&input, 1, 0) <= 0) return 0;
  char key = 0;
  return ::read(STDIN_FILENO, &key, 1) == 1 ? key : 'q';  // the terminal went away
}

}  // namespace kata
