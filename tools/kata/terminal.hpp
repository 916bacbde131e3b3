#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <string_view>

namespace kata {

/// What a stream's terminal can show.
struct Terminal {
  bool interactive = false;  // a person looks at it
  bool colour = false;       // and wants colours (NO_COLOR, TERM=dumb)
  bool unicode = false;      // and its locale has line-drawing characters
  std::size_t width = 80;

  static const Terminal& out();  // standard output
  static const Terminal& err();  // standard error
};

/// Text for standard output, plain where it shows no colours.
std::string bold(std::string_view text);
std::string dim(std::string_view text);
std::string red(std::string_view text);
std::string green(std::string_view text);
std::string yellow(std::string_view text);
std::string cyan(std::string_view text);

/// Columns that a text takes: colours take none, and a UTF-8 character one.
std::size_t columns(std::string_view text);
std::string padded(std::string_view text, std::size_t width);

/// Breaks text at spaces; every line after the first is indented by `indent`, which the first is taken to have already.
std::string wrapped(std::string_view text, std::size_t indent);

/// "  open       phase1_eager/01_softmax/softmax.cpp": a dim label, then text that hangs below itself.
std::string field(std::string_view label, std::string_view text);

/// A bar of `width` columns, `done` of `total` full.
std::string bar(std::size_t done, std::size_t total, std::size_t width);

/// "1 step", "5 steps".
std::string counted(std::size_t count, std::string_view noun);

/// "0.3 s"
std::string seconds_text(double seconds);

/// One line on standard error for work that lasts longer than two seconds: rewritten in place on a terminal, printed
/// anew now and then elsewhere.
class ProgressLine {
 public:
  explicit ProgressLine(std::string what) : what_(std::move(what)) {}
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  ~ProgressLine() { clear(); }

  void say(std::string_view detail) { detail_ = detail; }
  void tick();   // call a few times a second
  void clear();  // before anything else is printed

 private:
  using Clock = std::chrono::steady_clock;
  std::string what_;
  std::string detail_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point last_ = start_;
  bool shown_ = false;
};

}  // namespace kata
