#include "common/virtual_gpu/findings.hpp"

#include <filesystem>
#include <ostream>

namespace flashkata {

std::string_view to_text(FindingKind kind) {
  switch (kind) {
    case FindingKind::shared_race:
      return "shared-memory race";
    case FindingKind::global_race:
      return "global-memory race";
    case FindingKind::out_of_bounds:
      return "out of bounds";
    case FindingKind::uninitialised_read:
      return "uninitialised read";
    case FindingKind::async_copy_not_waited:
      return "cp.async not waited for";
    case FindingKind::divergent_barrier:
      return "divergent barrier";
    case FindingKind::barrier_after_exit:
      return "barrier after exit";
    case FindingKind::deadlock:
      return "deadlock";
    case FindingKind::absent_lane:
      return "absent lane";
    case FindingKind::divergent_warp:
      return "divergent warp";
    case FindingKind::misaligned_access:
      return "misaligned access";
    case FindingKind::dynamic_shared_too_small:
      return "too little dynamic shared memory";
    case FindingKind::stack_overflow:
      return "stack overflow";
    case FindingKind::use_after_free:
      return "use after free";
    case FindingKind::wrong_memory:
      return "wrong kind of memory";
    case FindingKind::crash:
      return "crash";
  }
  return "finding";
}

std::string from_here(const std::string& path) {
  std::error_code ignored;
  const std::filesystem::path relative = std::filesystem::proximate(path, ignored);
  return relative.empty() || *relative.begin() == ".." ? path : relative.string();
}

void print_findings(std::ostream& out, const std::vector<Finding>& findings) {
  constexpr std::size_t MOST_PRINTED = 20;
  for (std::size_t i = 0; i < findings.size() && i < MOST_PRINTED; ++i) {
    const Finding& finding = findings[i];
    out << finding.kernel << " · " << to_text(finding.kind);
    if (finding.line > 0) out << " · " << from_here(finding.file) << ':' << finding.line;
    out << "\n  " << finding.sentence << '\n';
    if (finding.count > 1) out << "  seen " << finding.count << " times\n";
    if (finding.abandoned) out << "  The launch was abandoned here: what it would have written later is missing.\n";
  }
  if (findings.size() > MOST_PRINTED) out << "... and " << findings.size() - MOST_PRINTED << " findings more\n";
}

}  // namespace flashkata
