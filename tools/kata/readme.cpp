#include "readme.hpp"

#include <cctype>
#include <sstream>

#include "terminal.hpp"

namespace kata {
namespace {

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front())) != 0) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0) text.remove_suffix(1);
  return text;
}

std::vector<std::string> lines_of(std::string_view text) {
  std::vector<std::string> lines;
  std::istringstream stream{std::string(text)};
  for (std::string line; std::getline(stream, line);) {
    if (line.ends_with('\r')) line.pop_back();
    lines.push_back(line);
  }
  return lines;
}

std::string without_tags(std::string_view text) {
  std::string result;
  bool tag = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    // Only <b>, </i> and their like: "a < b" is mathematics.
    const bool letter_next =
        i + 1 < text.size() && (std::isalpha(static_cast<unsigned char>(text[i + 1])) != 0 || text[i + 1] == '/');
    if (text[i] == '<' && letter_next && text.find('>', i) != std::string_view::npos) tag = true;
    if (!tag) result += text[i];
    if (text[i] == '>') tag = false;
  }
  return std::string(trimmed(result));
}

// The text between two tags, from position `from` on; `end` becomes the position after it, or npos.
std::string_view between(std::string_view text, std::string_view open, std::string_view close, std::size_t from,
                         std::size_t& end) {
  end = std::string_view::npos;
  const auto start = text.find(open, from);
  if (start == std::string_view::npos) return {};
  const auto stop = text.find(close, start + open.size());
  if (stop == std::string_view::npos) return {};
  end = stop + close.size();
  return text.substr(start + open.size(), stop - start - open.size());
}

// `code` and **strong** become colours, or lose nothing but the stars where there are none.
std::string with_colours(std::string_view text) {
  std::string result;
  std::size_t i = 0;
  while (i < text.size()) {
    const bool strong = text.substr(i).starts_with("**");
    const std::string_view mark = strong ? "**" : "`";
    const auto end = text.substr(i).starts_with(mark) ? text.find(mark, i + mark.size()) : std::string_view::npos;
    if (end == std::string_view::npos) {
      result += text[i++];
      continue;
    }
    const auto inner = text.substr(i + mark.size(), end - i - mark.size());
    result += strong ? bold(inner) : Terminal::out().colour ? cyan(inner) : "`" + std::string(inner) + "`";
    i = end + mark.size();
  }
  return result;
}

}  // namespace

Readme parse_readme(std::string_view markdown) {
  Readme readme;
  bool quoting = false;
  for (const auto& line : lines_of(markdown)) {
    const auto text = trimmed(line);
    if (readme.title.empty() && text.starts_with("# ")) readme.title = trimmed(text.substr(2));
    const bool quote = text.starts_with('>');
    if (quote && (quoting || readme.question.empty())) {
      const auto words = trimmed(text.substr(1));
      if (!readme.question.empty() && !words.empty()) readme.question += ' ';
      readme.question += words;
      quoting = true;
    } else if (quoting) {
      break;
    }
  }
  std::size_t position = 0;
  for (;;) {
    std::size_t end = 0;
    const auto block = between(markdown, "<details>", "</details>", position, end);
    if (end == std::string_view::npos) break;
    std::size_t after_summary = 0;
    const auto summary = without_tags(between(block, "<summary>", "</summary>", 0, after_summary));
    if (after_summary != std::string_view::npos && summary.starts_with("Hint")) {
      readme.hints.push_back({summary, std::string(trimmed(block.substr(after_summary)))});
    }
    position = end;
  }
  return readme;
}

std::string rendered(std::string_view markdown, std::size_t indent) {
  const std::string margin(indent, ' ');
  std::string result;
  std::string paragraph;
  std::size_t hang = indent;
  bool code = false;
  const auto flush = [&] {
    if (!paragraph.empty()) result += margin + wrapped(with_colours(paragraph), hang) + "\n";
    paragraph.clear();
    hang = indent;
  };
  for (const auto& line : lines_of(markdown)) {
    const auto text = trimmed(line);
    if (text.starts_with("```")) {
      flush();
      code = !code;
    } else if (code) {
      result += margin + "  " + line + "\n";
    } else if (text.empty()) {
      flush();
      if (!result.empty() && !result.ends_with("\n\n")) result += "\n";
    } else if (text.starts_with("|")) {
      flush();
      result += margin + line + "\n";
    } else {
      const bool item = text.starts_with("- ") || text.starts_with("* ");
      if (item) {
        flush();
        hang = indent + 2;
      }
      paragraph += (paragraph.empty() ? "" : " ") + std::string(text);
    }
  }
  flush();
  while (result.ends_with("\n\n")) result.pop_back();
  return result;
}

}  // namespace kata
