#include "names.hpp"

#include <algorithm>
#include <cctype>
#include <cstdint>

#include "failure.hpp"

namespace kata {
namespace {

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return result;
}

// "1.2" and "01.02" are "1.02" to a person in a hurry.
std::string without_leading_zeros(std::string_view number) {
  std::string result;
  for (std::size_t i = 0; i < number.size(); ++i) {
    const bool starts_part = i == 0 || number[i - 1] == '.';
    const bool more_digits = i + 1 < number.size() && std::isdigit(static_cast<unsigned char>(number[i + 1])) != 0;
    if (number[i] == '0' && (starts_part || result.empty() || result.back() == '.') && more_digits) continue;
    result += number[i];
  }
  return result;
}

// What tab completion makes of a folder or a file: "./phase1_eager/02_attention/".
std::string as_path(std::string_view name) {
  std::string path = lower(name);
  if (path.starts_with("./")) path.erase(0, 2);
  while (path.ends_with('/')) path.pop_back();
  return path;
}

bool is_called(const Step& step, std::string_view name) {
  const std::string typed = as_path(name);
  if (typed == lower(step.label) || typed == lower(step.name) || typed == lower(step.folder_name())) return true;
  if (without_leading_zeros(typed) == without_leading_zeros(step.number)) return true;
  for (const auto& file : step.files) {
    if (typed == lower(file)) return true;
  }
  const std::string folder = lower(step.folder);
  // A file or a test in the folder names the step too, also by its whole path.
  return typed == folder || typed.starts_with(folder + "/") || typed.ends_with("/" + folder) ||
         typed.find("/" + folder + "/") != std::string::npos;
}

std::vector<std::string> phase_names(const Step& step) {
  const std::string number = std::to_string(step.phase);
  return {"phase" + number, number, lower(step.phase_name), "phase" + number + "_" + lower(step.phase_name)};
}

std::vector<const Step*> called(const Course& course, std::string_view name) {
  std::vector<const Step*> found;
  for (const auto& step : course.steps) {
    if (is_called(step, name)) found.push_back(&step);
  }
  return found;
}

[[noreturn]] void refuse(const Course& course, std::string_view name, bool phases_too) {
  std::vector<std::string> candidates;
  std::vector<std::string> shown;
  for (const auto& step : course.steps) {
    candidates.insert(candidates.end(), {step.label, step.name, step.folder_name(), step.number});
    if (phases_too) candidates.push_back("phase" + std::to_string(step.phase));
  }
  if (phases_too) candidates.emplace_back("all");
  for (const auto& candidate : near_names(name, candidates, candidates.size())) {
    // Different spellings of one step are one answer, given by number and name.
    const auto steps = called(course, candidate);
    const std::string text = steps.empty() ? candidate : steps.front()->number + " (" + steps.front()->name + ")";
    if (std::find(shown.begin(), shown.end(), text) == shown.end() && shown.size() < 3) shown.push_back(text);
  }
  throw Failure("there is no step called '" + std::string(name) + "'",
                shown.empty() ? "./kata list shows every step" : "did you mean " + either(shown) + "?", 2);
}

}  // namespace

std::size_t edit_distance(std::string_view from, std::string_view to) {
  const std::string a = lower(from);
  const std::string b = lower(to);
  std::vector<std::vector<std::size_t>> cost(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) cost[i][0] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) cost[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t replaced = cost[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, replaced});
      const bool swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
      if (swapped) cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
    }
  }
  return cost[a.size()][b.size()];
}

std::vector<std::string> near_names(std::string_view typed, const std::vector<std::string>& candidates,
                                    std::size_t limit) {
  std::vector<std::pair<std::size_t, std::string>> ranked;
  const std::string word = lower(typed);
  for (const auto& candidate : candidates) {
    const std::string other = lower(candidate);
    // A third of the letters wrong is a typing mistake, more is another word; part of the word is the word cut short.
    const bool part = word.size() >= 3 && (other.find(word) != std::string::npos || word.find(other) == 0);
    const std::size_t distance = std::min<std::size_t>(edit_distance(word, other), part ? 1 : SIZE_MAX);
    if (distance <= std::max<std::size_t>(1, std::max(word.size(), other.size()) / 3)) {
      ranked.emplace_back(distance, candidate);
    }
  }
  std::stable_sort(ranked.begin(), ranked.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::string> names;
  for (const auto& [distance, name] : ranked) {
    if (names.size() < limit && std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

std::string either(const std::vector<std::string>& names) {
  std::string text;
  for (std::size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

const Step& find_step(const Course& course, std::string_view name) {
  const auto found = called(course, name);
  if (found.empty()) refuse(course, name, /*phases_too*/ false);
  if (found.size() > 1) {
    std::vector<std::string> numbers;
    for (const Step* step : found) numbers.push_back(step->number + " (" + step->label + ")");
    throw Failure("'" + std::string(name) + "' names " + std::to_string(found.size()) + " steps",
                  "use the number: " + either(numbers), 2);
  }
  return *found.front();
}

std::vector<const Step*> find_steps(const Course& course, std::string_view name) {
  const std::string typed = as_path(name);
  std::vector<const Step*> found;
  for (const auto& step : course.steps) {
    const auto names = phase_names(step);
    const bool in_phase = std::find(names.begin(), names.end(), typed) != names.end();
    if (typed == "all" || in_phase) found.push_back(&step);
  }
  if (!found.empty()) return found;
  if (called(course, name).empty()) refuse(course, name, /*phases_too*/ true);
  return {&find_step(course, name)};
}

}  // namespace kata
