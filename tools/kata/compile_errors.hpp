#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace kata {

/// One error of the compiler with the lines that belong to it.
struct Diagnostic {
  std::filesystem::path file;
  int line = 0;
  int column = 0;
  std::string message;
  std::vector<std::string> context;  // the source line and its caret, and notes in the student's file
  std::string hint;                  // what to write instead, for words of CUDA that the course writes otherwise
};

/// What a failed build says to the student.
struct CompileReport {
  std::vector<Diagnostic> mine;    // errors in the student's files, or that a line of them led to
  std::vector<Diagnostic> others;  // errors elsewhere
  std::vector<std::string> link;   // what the linker missed or found twice
  std::string last_words;          // the end of the log, for when nothing else was recognised
};

/// Reads the output of ninja with g++, clang++ or nvcc. A diagnostic is the student's when its file is one of
/// `student_files`, or when the compiler says that one of their lines led to it.
CompileReport read_build_log(std::string_view log, const std::vector<std::filesystem::path>& student_files);

/// The first few errors for a terminal, paths as typed from `root`.
std::string shown(const CompileReport& report, const std::filesystem::path& root, std::size_t most = 3);

}  // namespace kata
