#include "compile_errors.hpp"

#include <algorithm>
#include <cctype>
#include <optional>
#include <sstream>

#include "files.hpp"
#include "terminal.hpp"

namespace kata {
namespace {

std::string without_escapes(std::string_view line) {
  std::string text;
  for (std::size_t i = 0; i < line.size(); ++i) {
    if (line[i] == '\033' && i + 1 < line.size() && line[i + 1] == '[') {
      while (i < line.size() && std::isalpha(static_cast<unsigned char>(line[i])) == 0) ++i;
    } else if (line[i] != '\r') {
      text += line[i];
    }
  }
  return text;
}

struct Place {
  fs::path file;
  int line = 0;
  int column = 0;
  std::string rest;  // "error: ...", "note: ...", "  required from here"
};

int number_at(std::string_view text, std::size_t& i) {
  int value = 0;
  const auto start = i;
  while (i < text.size() && std::isdigit(static_cast<unsigned char>(text[i])) != 0 && i - start < 7) {
    value = value * 10 + (text[i++] - '0');
  }
  return i == start ? -1 : value;
}

// "file:12:5: rest", "file:12: rest" and nvcc's "file(12): rest".
std::optional<Place> parse_place(const std::string& line) {
  for (std::size_t i = 1; i < line.size(); ++i) {
    if (line[i] == ' ' && line[0] == ' ') return std::nullopt;
    if (line[i] != ':' && line[i] != '(') continue;
    const bool nvcc = line[i] == '(';
    Place place;
    place.file = line.substr(0, i);
    std::size_t next = i + 1;
    place.line = number_at(line, next);
    if (place.line < 0) continue;
    if (nvcc && line.compare(next, 2, "):") == 0) {
      ++next;
    } else if (line.compare(next, 1, ":") != 0) {
      continue;
    }
    std::size_t after = next + 1;
    const int column = number_at(line, after);
    if (column >= 0 && after < line.size() && line[after] == ':') {
      place.column = column;
      next = after;
    }
    place.rest = line.substr(next + 1);
    return place;
  }
  return std::nullopt;
}

std::optional<std::string> after_word(std::string_view rest, std::string_view word) {
  while (rest.starts_with(' ')) rest.remove_prefix(1);
  if (!rest.starts_with(word)) return std::nullopt;
  return std::string(rest.substr(word.size()));
}

std::optional<std::string> error_text(std::string_view rest) {
  for (const std::string_view word : {"error: ", "fatal error: "}) {
    if (auto text = after_word(rest, word)) return text;
  }
  return std::nullopt;
}

bool is_ninja_line(std::string_view line) {
  const bool counter = line.starts_with('[') && line.find('/') < line.find(']');
  return counter || line.starts_with("FAILED:") || line.starts_with("ninja:");
}

// What the linker says of `extern __shared__`: the tag is that of __shared__ in common/virtual_gpu/cuda_language.hpp.
bool misses_shared_array(const std::string& link_text) {
  return link_text.starts_with("undefined") && link_text.find("[abi:kata_shared]") != std::string::npos;
}

std::string link_text(const std::string& line) {
  for (const std::string_view word : {"undefined reference to", "multiple definition of", "undefined symbol:"}) {
    const auto at = line.find(word);
    if (at == std::string::npos) continue;
    std::string text = line.substr(at);
    // The parameters' types fill a page, and the header says them better.
    constexpr std::string_view UNNAMED = "(anonymous namespace)";
    auto open = text.find('(', word.size());
    while (open != std::string::npos && text.compare(open, UNNAMED.size(), UNNAMED) == 0) {
      open = text.find('(', open + UNNAMED.size());
    }
    const auto quoted = open != std::string::npos && text.ends_with('\'');
    if (quoted) text = text.substr(0, open) + "(...)'";
    return text;
  }
  return {};
}

class Reader {
 public:
  explicit Reader(const std::vector<fs::path>& student_files) : student_files_(student_files) {}

  void add(const std::string& line) {
    if (is_ninja_line(line)) {
      finish();
      leading_.reset();
      return;
    }
    if (const auto text = link_text(line); !text.empty()) {
      if (std::find(report_.link.begin(), report_.link.end(), text) == report_.link.end()) report_.link.push_back(text);
      return;
    }
    const auto place = parse_place(line);
    if (!place) {
      if (line.starts_with("In file included from")) finish();
      if (line.find(" error: ") != std::string::npos && !error_) {  // the compiler itself gave up
        report_.others.push_back({{}, 0, 0, line, {}, {}});
      } else if (error_ && in_context_ && line.starts_with(' ')) {
        error_->context.push_back(line);
      }
      return;
    }
    const bool mine = is_mine(place->file);
    if (const auto message = error_text(place->rest)) {
      finish();
      error_ = Diagnostic{place->file, place->line, place->column, *message, {}, {}};
      error_is_mine_ = mine;
      if (!mine && leading_) lead_from(*leading_);
      leading_.reset();
      in_context_ = error_is_mine_ == mine;
    } else if (const auto note = after_word(place->rest, "note: ")) {
      const bool leads = note->find("requested here") != std::string::npos;  // clang's way to say who led here
      if (error_ && !error_is_mine_ && mine && leads) lead_from(*place);
      in_context_ = mine && error_ && !leads;
      if (in_context_) {
        error_->context.push_back("line " + std::to_string(place->line) + ": " + *note);
      }
    } else if (place->rest.find("required from") == std::string::npos) {
      finish();  // a warning, "In function ...", "At global scope": something new begins
    } else if (mine) {
      finish();
      leading_ = place;  // g++ says who led here before it says where to
    }
  }

  CompileReport report() {
    finish();
    return std::move(report_);
  }

 private:
  bool is_mine(const fs::path& file) const {
    const auto name = file.lexically_normal();
    return std::any_of(student_files_.begin(), student_files_.end(), [&](const fs::path& own) {
      // ninja runs in the build folder, so a relative path ends alike or is another file.
      return name == own.lexically_normal() || (name.is_relative() && ends_alike(own, name));
    });
  }

  static bool ends_alike(const fs::path& own, const fs::path& relative) {
    std::string tail = relative.string();
    while (tail.starts_with("../")) tail.erase(0, 3);
    return own.string().ends_with("/" + tail);
  }

  void lead_from(const Place& place) {
    error_->message += " (in " + error_->file.filename().string() + ", which this line uses)";
    error_->file = place.file;
    error_->line = place.line;
    error_->column = place.column;
    error_->context.clear();
    error_is_mine_ = true;
  }

  void finish() {
    if (error_) {
      auto& list = error_is_mine_ ? report_.mine : report_.others;
      // One line of a template leads to the same complaint again and again.
      const bool known = std::any_of(list.begin(), list.end(), [&](const Diagnostic& other) {
        return other.file == error_->file && other.line == error_->line && other.message == error_->message;
      });
      if (!known) list.push_back(std::move(*error_));
    }
    error_.reset();
    in_context_ = false;
  }

  const std::vector<fs::path>& student_files_;
  CompileReport report_;
  std::optional<Diagnostic> error_;
  std::optional<Place> leading_;
  bool error_is_mine_ = false;
  bool in_context_ = false;
};

std::string line_of(const fs::path& file, int number) {
  std::istringstream stream{read_file(file).value_or("")};
  std::string line;
  for (int i = 0; i < number; ++i) {
    if (!std::getline(stream, line)) return {};
  }
  return line;
}

std::string_view without_comment(std::string_view line) { return line.substr(0, line.find("//")); }

// Words of CUDA that a C++ compiler does not understand, and what to write instead; it serves nvcc as well.
constexpr std::string_view SHARED_HINT =
    "Shared memory whose size the launch gives is `float* s = dynamic_shared<float>();` here, on the virtual GPU and "
    "on a real one alike.";
constexpr std::string_view LAUNCH_HINT =
    "A kernel is started by `launch(kernel, grid, block, shared_bytes, stream, arguments...)` here; the default stream "
    "is `Stream()`.";
constexpr std::string_view LINK_HINT =
    "Every function of the step's header must be defined once, with exactly the signature that it has there, and in "
    "its namespace.";
constexpr std::string_view NOINLINE_HINT =
    "It is `__attribute__((noinline))` here, which g++, clang++ and nvcc all understand.";

/// In `kernel<<<grid, block>>>(...)` a C++ compiler stumbles over both ends.
void add_hints(std::vector<Diagnostic>& errors) {
  std::vector<Diagnostic> kept;
  for (Diagnostic& error : errors) {
    const std::string line = error.context.empty() ? line_of(error.file, error.line) : error.context.front();
    const auto code = without_comment(line);
    const bool begins = code.find("<<<") != std::string_view::npos;
    const bool ends = code.find(">>>") != std::string_view::npos;
    const bool expects =
        error.message.starts_with("expected primary-expression") || error.message.starts_with("expected expression");
    if (expects && (begins || ends)) {
      const bool is_echo = !kept.empty() && kept.back().hint == LAUNCH_HINT && kept.back().file == error.file &&
                           (kept.back().line == error.line || !begins);
      if (is_echo) continue;
      error.hint = LAUNCH_HINT;
    } else if (error.message.find("__noinline__") != std::string::npos) {
      error.hint = NOINLINE_HINT;
    }
    kept.push_back(std::move(error));
  }
  errors = std::move(kept);
}

/// The lines `extern __shared__ float s[];`, which only the linker complains of, and without a line.
std::vector<Diagnostic> unsized_shared_arrays(const std::vector<fs::path>& files) {
  std::vector<Diagnostic> found;
  for (const fs::path& file : files) {
    std::istringstream stream{read_file(file).value_or("")};
    std::string line;
    for (int number = 1; std::getline(stream, line); ++number) {
      const auto code = without_comment(line);
      const auto at = code.find("extern ");
      if (at == std::string_view::npos || code.find("__shared__", at) == std::string_view::npos) continue;
      found.push_back({file,
                       number,
                       static_cast<int>(at) + 1,
                       "the linker finds no memory for `extern __shared__`",
                       {},
                       std::string(SHARED_HINT)});
    }
  }
  return found;
}

// For an error that lies elsewhere but was led to from here, the compiler shows the other place's line, not this one.
std::string source_line(const fs::path& file, int number) {
  const auto line = line_of(file, number);
  if (line.empty()) return {};
  const auto digits = std::to_string(number);  // where g++ puts it
  return std::string(digits.size() < 5 ? 5 - digits.size() : 0, ' ') + digits + " | " + line;
}

std::string shown_one(const Diagnostic& error, const fs::path& root) {
  if (error.file.empty()) return "  " + error.message + "\n";
  std::string place = relative_to(error.file, root) + ":" + std::to_string(error.line);
  if (error.column > 0) place += ":" + std::to_string(error.column);
  std::string text = "  " + wrapped(bold(place) + ": " + red("error:") + " " + error.message, 4) + "\n";
  if (error.context.empty()) text += "  " + source_line(error.file, error.line) + "\n";
  constexpr std::size_t MOST_LINES = 8;  // a template's candidates go on for pages
  for (std::size_t i = 0; i < std::min(error.context.size(), MOST_LINES); ++i) text += "  " + error.context[i] + "\n";
  if (!error.hint.empty()) text += "  " + wrapped(error.hint, 2) + "\n";
  return text;
}

}  // namespace

CompileReport read_build_log(std::string_view log, const std::vector<fs::path>& student_files) {
  Reader reader(student_files);
  std::vector<std::string> lines;
  std::istringstream stream{std::string(log)};
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(without_escapes(line));
    reader.add(lines.back());
  }
  CompileReport report = reader.report();
  add_hints(report.mine);
  if (report.mine.empty() && std::any_of(report.link.begin(), report.link.end(), misses_shared_array)) {
    report.mine = unsized_shared_arrays(student_files);
    // With g++ the linker misses two things for one such array.
    std::erase_if(report.link, [](const std::string& text) { return text.find("__tls_init") != std::string::npos; });
  }
  constexpr std::size_t LAST = 15;
  for (std::size_t i = lines.size() > LAST ? lines.size() - LAST : 0; i < lines.size(); ++i) {
    report.last_words += "  " + lines[i] + "\n";
  }
  return report;
}

std::string shown(const CompileReport& report, const fs::path& root, std::size_t most) {
  std::string text;
  if (report.mine.empty() && !report.link.empty()) {
    for (std::size_t i = 0; i < std::min(report.link.size(), most); ++i) {
      text += "  " + red("linker:") + " " + wrapped(report.link[i], 10) + "\n";
    }
    const bool shared = std::any_of(report.link.begin(), report.link.end(), misses_shared_array);
    return text + "\n  " + wrapped(shared ? SHARED_HINT : LINK_HINT, 2) + "\n";
  }
  const auto& errors = report.mine.empty() ? report.others : report.mine;
  if (errors.empty()) return report.last_words;
  if (report.mine.empty()) text += "  The compiler's complaint is outside your file:\n\n";
  for (std::size_t i = 0; i < std::min(errors.size(), most); ++i) {
    text += (i > 0 ? "\n" : "") + shown_one(errors[i], root);
  }
  if (errors.size() > most) text += "\n  and " + counted(errors.size() - most, "more error") + ", often echoes\n";
  return text;
}

}  // namespace kata
