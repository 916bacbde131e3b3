#include "terminal.hpp"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

namespace kata {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool locale_is_utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    std::string value = environment(name);
    if (value.empty()) continue;
    std::transform(value.begin(), value.end(), value.begin(), [](unsigned char c) { return std::tolower(c); });
    return value.find("utf-8") != std::string::npos || value.find("utf8") != std::string::npos;
  }
  return false;
}

Terminal inspect(int stream) {
  Terminal terminal;
  terminal.interactive = ::isatty(stream) == 1;
  terminal.colour = terminal.interactive && environment("NO_COLOR").empty() && environment("TERM") != "dumb";
  terminal.unicode = locale_is_utf8();
  winsize size{};
  if (terminal.interactive && ::ioctl(stream, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) {
    terminal.width = std::clamp<std::size_t>(size.ws_col, 40, 100);  // longer lines are hard to read
  }
  return terminal;
}

std::string coloured(const char* code, std::string_view text) {
  if (!Terminal::out().colour) return std::string(text);
  return "\033[" + std::string(code) + "m" + std::string(text) + "\033[0m";
}

std::string repeated(std::string_view piece, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) text += piece;
  return text;
}

}  // namespace

const Terminal& Terminal::out() {
  static const Terminal terminal = inspect(STDOUT_FILENO);
  return terminal;
}

const Terminal& Terminal::err() {
  static const Terminal terminal = inspect(STDERR_FILENO);
  return terminal;
}

std::string bold(std::string_view text) { return coloured("1", text); }
std::string dim(std::string_view text) { return coloured("2", text); }
std::string red(std::string_view text) { return coloured("31", text); }
std::string green(std::string_view text) { return coloured("32", text); }
std::string yellow(std::string_view text) { return coloured("33", text); }
std::string cyan(std::string_view text) { return coloured("36", text); }

std::size_t columns(std::string_view text) {
  std::size_t count = 0;
  bool escape = false;
  for (const char c : text) {
    if (c == '\033') escape = true;
    if (!escape && (static_cast<unsigned char>(c) & 0xC0u) != 0x80u) ++count;
    if (escape && c == 'm') escape = false;
  }
  return count;
}

std::string padded(std::string_view text, std::size_t width) {
  const auto used = columns(text);
  return std::string(text) + std::string(used < width ? width - used : 0, ' ');
}

std::string wrapped(std::string_view text, std::size_t indent) {
  const std::size_t width = Terminal::out().width;
  std::string result;
  std::size_t column = indent;
  std::size_t i = 0;
  while (i < text.size()) {
    const auto start = std::min(text.find_first_not_of(' ', i), text.size());
    const auto end = std::min(text.find(' ', start), text.size());
    const auto gap = column == indent ? 0 : start - i;  // several blanks in a row are meant, but not at a line's start
    const auto word = text.substr(start, end - start);
    const auto length = columns(word);
    if (column > indent && column + gap + length > width) {
      result += "\n" + std::string(indent, ' ');
      column = indent;
    } else {
      result += std::string(word.empty() ? 0 : gap, ' ');
      column += gap;
    }
    result += word;
    column += length;
    i = end;
  }
  return result;
}

std::string field(std::string_view label, std::string_view text) {
  constexpr std::size_t INDENT = 13;  // as the suites print theirs
  return "  " + dim(padded(label, INDENT - 2)) + wrapped(text, INDENT) + "\n";
}

std::string bar(std::size_t done, std::size_t total, std::size_t width) {
  // A started phase shows something and an unfinished one is never full, however they round.
  std::size_t full = total == 0 ? 0 : done * width / total;
  if (done > 0 && full == 0) full = 1;
  const bool unicode = Terminal::out().unicode;
  return green(repeated(unicode ? "\u2501" : "#", full)) + dim(repeated(unicode ? "\u2500" : ".", width - full));
}

std::string counted(std::size_t count, std::string_view noun) {
  return std::to_string(count) + " " + std::string(noun) + (count == 1 ? "" : "s");
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, seconds < 10 ? "%.1f s" : "%.0f s", seconds);
  return text;
}

void ProgressLine::tick() {
  using std::chrono::milliseconds;
  const auto now = Clock::now();
  const bool tty = Terminal::err().interactive;
  const auto pause = shown_ ? (tty ? milliseconds(100) : milliseconds(10000)) : milliseconds(2000);
  if (now - last_ < pause) return;
  last_ = now;
  shown_ = true;
  const auto elapsed = std::chrono::duration_cast<std::chrono::seconds>(now - start_).count();
  std::string line = "  " + what_ + (detail_.empty() ? "" : " " + detail_) + " (" + std::to_string(elapsed) + " s)";
  if (tty) {
    line.resize(std::min(line.size(), Terminal::err().width - 1));
    std::cerr << "\r\033[K" << line << std::flush;
  } else {
    std::cerr << line << std::endl;
  }
}

void ProgressLine::clear() {
  if (shown_ && Terminal::err().interactive) std::cerr << "\r\033[K" << std::flush;
  shown_ = false;
  last_ = Clock::now();
}

}  // namespace kata
