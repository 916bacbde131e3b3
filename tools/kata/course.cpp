#include "course.hpp"

#include <nlohmann/json.hpp>

#include "failure.hpp"
#include "files.hpp"

namespace kata {

std::string Step::folder_name() const { return fs::path(folder).filename().string(); }

Course Course::load(const fs::path& manifest) {
  const std::string again = "./kata configures again when you delete " + manifest.string();
  const auto text = read_file(manifest);
  if (!text)
    throw Failure("cannot read the course's manifest, " + manifest.string(), "start with ./kata, which makes it");
  Course course;
  try {
    const auto json = nlohmann::json::parse(*text);
    course.source = json.at("source").get<std::string>();
    course.build = json.at("build").get<std::string>();
    course.answers = json.at("answers").get<std::string>();
    course.preset = json.at("preset").get<std::string>();
    for (const auto& entry : json.at("steps")) {
      Step step;
      entry.at("number").get_to(step.number);
      entry.at("label").get_to(step.label);
      entry.at("phase").get_to(step.phase);
      entry.at("phase_name").get_to(step.phase_name);
      entry.at("name").get_to(step.name);
      entry.at("folder").get_to(step.folder);
      entry.at("idea").get_to(step.idea);
      entry.at("kind").get_to(step.kind);
      entry.at("files").get_to(step.files);
      entry.at("needs").get_to(step.needs);
      entry.at("target").get_to(step.target);
      step.test = entry.at("test").get<std::string>();
      step.check = entry.value("check", "");
      if (step.files.empty()) throw Failure(step.label + " has no file to fill", "its add_exercise(...) must name one");
      course.steps.push_back(std::move(step));
    }
  } catch (const nlohmann::json::exception& error) {
    throw Failure("the course's manifest is damaged: " + std::string(error.what()), again);
  }
  if (course.steps.empty()) throw Failure("the course has no steps", "add one with add_exercise(...) in CMake");
  return course;
}

const Step* Course::find(const std::string& label) const {
  for (const auto& step : steps) {
    if (step.label == label) return &step;
  }
  return nullptr;
}

std::vector<const Step*> Course::with_needs(const Step& step) const {
  std::vector<const Step*> all = {&step};
  for (std::size_t i = 0; i < all.size(); ++i) {
    for (const auto& label : all[i]->needs) {
      const Step* need = find(label);
      bool known = need == nullptr;
      for (const Step* other : all) known |= other == need;
      if (!known) all.push_back(need);
    }
  }
  return all;
}

std::string Course::shown(const fs::path& path) const { return relative_to(path, source); }

std::vector<fs::path> Course::below(const fs::path& root, const Step& step) {
  std::vector<fs::path> paths;
  for (const auto& file : step.files) paths.push_back(root / step.folder / file);
  return paths;
}

}  // namespace kata
