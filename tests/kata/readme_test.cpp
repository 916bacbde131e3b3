#include "readme.hpp"

#include <doctest/doctest.h>

using namespace kata;

namespace {

constexpr const char* PAGE = R"(# Softmax, row by row

> What would it cost to look
> at every key twice?

Text with a < b.

> A later quotation.

<details><summary>Hint 1: a question</summary>

What is exp(1000)?

</details>

<details>
<summary><b>Hint 2</b>: a direction</summary>

Subtract a `constant` from the **whole** row:

- first this
- then that

```
x - c
```
</details>

<details><summary>When it passes</summary>not a hint</details>

<details><summary>Hint 3: the shape</summary>Two loops.</details>
)";

}  // namespace

TEST_SUITE("readme") {
  TEST_CASE("title, question and hints are found") {
    const Readme readme = parse_readme(PAGE);
    CHECK(readme.title == "Softmax, row by row");
    CHECK(readme.question == "What would it cost to look at every key twice?");
    REQUIRE(readme.hints.size() == 3);
    CHECK(readme.hints[0].title == "Hint 1: a question");
    CHECK(readme.hints[0].text == "What is exp(1000)?");
    CHECK(readme.hints[1].title == "Hint 2: a direction");
    CHECK(readme.hints[2].text == "Two loops.");
  }

  TEST_CASE("a page with Windows line ends reads the same") {
    std::string page;
    for (const char c : std::string(PAGE)) page += c == '\n' ? std::string("\r\n") : std::string(1, c);
    const Readme readme = parse_readme(page);
    CHECK(readme.title == "Softmax, row by row");
    CHECK(readme.question == "What would it cost to look at every key twice?");
    CHECK(readme.hints.size() == 3);
  }

  TEST_CASE("pages that lack something, or break off, are read as far as they go") {
    CHECK(parse_readme("").hints.empty());
    CHECK(parse_readme("# Only a title").question.empty());
    CHECK(parse_readme("<details><summary>Hint 1</summary>never closed").hints.empty());
    CHECK(parse_readme("<details>no summary</details>").hints.empty());
  }

  TEST_CASE("Markdown becomes lines for a terminal") {
    const std::string text = rendered(parse_readme(PAGE).hints[1].text, 4);
    CHECK(text ==
          "    Subtract a `constant` from the whole row:\n\n    - first this\n    - then that\n\n      x - c\n");
  }

  TEST_CASE("paragraphs are wrapped at the terminal's width") {
    std::string words;
    for (int i = 0; i < 40; ++i) words += "word ";
    const std::string text = rendered(words, 4);
    std::size_t start = 0;
    for (std::size_t end; (end = text.find('\n', start)) != std::string::npos; start = end + 1)
      CHECK(end - start <= 80);
  }
}
