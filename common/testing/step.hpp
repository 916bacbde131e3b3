// Which step a test executable judges; add_exercise() generates the definition.
#pragma once

namespace flashkata::testing {

struct Step {
  const char* number;  // "1.02", as ./kata test takes it
  const char* label;   // "phase1.02_attention", as ctest takes it
  const char* file;    // "phase1_eager/02_attention/attention.cpp", what the student fills
};

extern const Step step;

}  // namespace flashkata::testing
