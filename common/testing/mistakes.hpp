// The mistakes that people make, and the question that each of them should be asked.
#pragma once

#include <string_view>

namespace flashkata::testing {

struct Mistake {
  std::string_view id;          // "scale-missing"
  std::string_view looks_like;  // completes "looks like someone who ..."
  std::string_view question;    // leads on; never names the fix
};

/// The mistake of that id, or null.
const Mistake* find_mistake(std::string_view id);

}  // namespace flashkata::testing
