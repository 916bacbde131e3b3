#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "course.hpp"

namespace kata {

/// The file as the course handed it out, and where it was found.
struct Stub {
  std::string text;
  std::string origin;  // "HEAD", "commit 1a2b3c4 of 2024-01-31", ".kata/stubs/..."
};

/// Looks for the stub of a file in git: in HEAD, or, where the student has committed an answer, in the newest commit
/// that still had it; without git, in the copy that .kata keeps.
std::optional<Stub> find_stub(const Course& course, const std::filesystem::path& file);

/// Where there is no git (the course came as an archive), keeps a copy of the step's files while they are unfilled.
void keep_stub_without_git(const Course& course, const Step& step);

/// Copies the step's files to .kata/backups/<label>/<UTC time>/ and returns that folder. Throws Failure, having changed
/// nothing, where it cannot.
std::filesystem::path back_up(const Course& course, const Step& step);

/// A command of git in the course's folder, its output; nothing where it failed.
std::optional<std::string> git(const Course& course, std::vector<std::string> arguments);

}  // namespace kata
