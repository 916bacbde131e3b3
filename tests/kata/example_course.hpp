#pragma once

#include <string>

#include "course.hpp"

/// Four steps in two phases, two of which share a name.
inline kata::Course example_course() {
  const auto step = [](int phase, const std::string& phase_name, const std::string& number, const std::string& name) {
    kata::Step result;
    result.phase = phase;
    result.phase_name = phase_name;
    result.number = std::to_string(phase) + "." + number;
    result.name = name;
    result.label = "phase" + std::to_string(phase) + "." + number + "_" + name;
    result.folder = "phase" + std::to_string(phase) + "_" + phase_name + "/" + number + "_" + name;
    result.files = {name + ".cpp"};
    return result;
  };
  kata::Course course;
  course.source = "/course";
  course.answers = "/course";
  course.build = "/course/build/learn";
  course.preset = "learn";
  course.steps = {step(1, "eager", "01", "softmax"), step(1, "eager", "02", "attention"),
                  step(2, "forward", "02", "merge"), step(3, "backward", "10", "merge")};
  course.steps[1].needs = {"phase1.01_softmax"};
  course.steps[2].needs = {"phase1.02_attention", "phase1.01_softmax"};
  return course;
}
