#pragma once

#include <string>

#include "course.hpp"
#include "progress.hpp"

namespace kata {

/// The bars, one line for each phase that has steps.
std::string progress_bars(const Course& course, const Progress& progress);

/// Where the student is: the step, how it stands, its question, the file to open.
std::string current_page(const Course& course, const Progress& progress, const Step& step);

/// "type ./kata test", or what else leads on from here.
std::string what_to_type(const Progress& progress, const Step& step);

/// What to say when nothing is left to do.
std::string finished_page(const Course& course, const Progress& progress);

/// "[x]", "[ ]", "[!]", coloured.
std::string mark(State state);

int show_progress(const Course& course);  // ./kata
int show_list(const Course& course);      // ./kata list
int show_next(const Course& course);      // ./kata next

}  // namespace kata
