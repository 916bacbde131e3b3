#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "course.hpp"

namespace kata {

/// Changes (insert, delete, replace, swap of neighbours) that turn one text into the other, ignoring case.
std::size_t edit_distance(std::string_view from, std::string_view to);

/// The candidates that somebody who typed `typed` may have meant, nearest first, at most `limit`.
std::vector<std::string> near_names(std::string_view typed, const std::vector<std::string>& candidates,
                                    std::size_t limit = 3);

/// "a", "a or b", "a, b or c".
std::string either(const std::vector<std::string>& names);

/// The step called 1.02, 1.2, phase1.02_attention, 02_attention, attention, or by its folder or one of its files.
/// Throws Failure naming the near ones.
const Step& find_step(const Course& course, std::string_view name);

/// The steps called "all", a phase (1, phase1, eager, phase1_eager) or one step.
std::vector<const Step*> find_steps(const Course& course, std::string_view name);

}  // namespace kata
