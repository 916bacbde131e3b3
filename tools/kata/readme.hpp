#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace kata {

struct Hint {
  std::string title;  // "Hint 1: a question"
  std::string text;   // Markdown
};

/// What the kata program takes from a step's README: it is the only place where a question and hints are written.
struct Readme {
  std::string title;
  std::string question;     // the first blockquote, as one paragraph
  std::vector<Hint> hints;  // the <details> blocks whose summary starts with "Hint", in order
};

Readme parse_readme(std::string_view markdown);

/// Markdown for a terminal: paragraphs and lists wrapped, code kept as it is, marks turned into colours.
std::string rendered(std::string_view markdown, std::size_t indent);

}  // namespace kata
