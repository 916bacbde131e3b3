// Findings and profiles as JSON, for --json.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "common/virtual_gpu/findings.hpp"
#include "common/virtual_gpu/profile.hpp"

namespace flashkata {

NLOHMANN_JSON_SERIALIZE_ENUM(MemorySpace, {{MemorySpace::global, "global"}, {MemorySpace::shared, "shared"}})
NLOHMANN_JSON_SERIALIZE_ENUM(MemoryAccess, {{MemoryAccess::load, "load"},
                                            {MemoryAccess::store, "store"},
                                            {MemoryAccess::atomic, "atomic"}})
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(TensorTraffic, name, bytes, loaded, stored, atomic, least_loaded, least_stored)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LineProfile, file, line, space, access, requests, lanes, transactions,
                                   least_transactions)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(EventCounts, barriers, warp_barriers, shuffles, matrix_products, matrix_loads,
                                   copy_groups, overlapped_groups)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(KernelProfile, kernel, launches, blocks, threads, dynamic_shared_bytes,
                                   peak_device_bytes, events, tensors, lines)

inline void to_json(nlohmann::json& json, const Finding& finding) {
  json = {{"kind", std::string(to_text(finding.kind))},
          {"sentence", finding.sentence},
          {"file", finding.file},
          {"line", finding.line},
          {"other_file", finding.other_file},
          {"other_line", finding.other_line},
          {"kernel", finding.kernel},
          {"abandoned", finding.abandoned},
          {"count", finding.count}};
}

}  // namespace flashkata
