#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

namespace kata {

/// One step, as add_exercise(...) told it to CMake.
struct Step {
  std::string number;              // "1.02"
  std::string label;               // "phase1.02_attention", also the label of its tests in ctest
  int phase = 0;                   // 1
  std::string phase_name;          // "eager"
  std::string name;                // "attention"
  std::string folder;              // "phase1_eager/02_attention", from the root of the course
  std::string idea;                // one line for the map
  std::string kind;                // "cpu" or "cuda"
  std::vector<std::string> files;  // the student's, inside folder
  std::vector<std::string> needs;  // labels of earlier steps whose code this one calls
  std::string target;              // what ninja builds
  std::filesystem::path test;      // the executable that it builds
  std::filesystem::path check;     // of a cuda step on the virtual GPU: the same suite, every memory access watched

  std::string folder_name() const;  // "02_attention"
  std::string title() const { return number + " " + name; }
};

/// The manifest that configuring writes: where things are, and the steps in course order.
struct Course {
  std::filesystem::path source;   // the root of the course
  std::filesystem::path build;    // build/<preset>
  std::filesystem::path answers;  // the root of the filled files: source itself, or solutions/hidden
  std::string preset;
  std::vector<Step> steps;

  /// Reads course.json. Throws Failure where it is missing or damaged.
  static Course load(const std::filesystem::path& manifest);

  const Step* find(const std::string& label) const;
  const Step& first() const { return steps.front(); }
  std::vector<const Step*> with_needs(const Step& step) const;  // the step and all that it builds on

  std::filesystem::path state() const { return source / ".kata"; }
  std::filesystem::path logs() const { return build / "kata"; }
  std::filesystem::path readme(const Step& step) const { return source / step.folder / "README.md"; }

  /// The student's files of a step, and the answers to them, which a handed-out tree does not have.
  std::vector<std::filesystem::path> filled(const Step& step) const { return below(answers, step); }
  std::vector<std::filesystem::path> hidden(const Step& step) const { return below(hidden_root(), step); }
  std::filesystem::path hidden_root() const { return source / "solutions" / "hidden"; }

  /// `path` as typed from the root of the course.
  std::string shown(const std::filesystem::path& path) const;
  /// The file to open first.
  std::string to_open(const Step& step) const { return shown(filled(step).front()); }

 private:
  static std::vector<std::filesystem::path> below(const std::filesystem::path& root, const Step& step);
};

}  // namespace kata
