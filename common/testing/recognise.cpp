#include "common/testing/recognise.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <set>

#include "common/attention/not_implemented.hpp"
#include "common/testing/mistakes.hpp"
#include "common/testing/step.hpp"

namespace flashkata::testing {
namespace {

struct Registered {
  std::vector<int> cases;
  std::function<std::vector<Array>(int)> outputs;
};

Registered& registered() {
  static Registered instance;
  return instance;
}

// A fixed random sign for each position: a finaliser's avalanche decides, so that no regular layout cancels out.
double sign(std::uint64_t position) {
  std::uint64_t bits = position + 0x9e3779b97f4a7c15ULL;
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ULL;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebULL;
  return ((bits >> 40) & 1) != 0 ? 1.0 : -1.0;
}

Fingerprint fingerprint_of(const std::vector<Array>& outputs) {
  Fingerprint print;
  std::uint64_t position = 0;
  for (const Array& array : outputs) {
    for (const double value : array.values) {
      ++position;
      if (std::isnan(value)) {
        ++print.nan;
      } else if (std::isinf(value)) {
        ++print.infinite;
      } else {
        print.norm += value * value;
        print.first += sign(2 * position) * value;
        print.second += sign(2 * position + 1) * value;
      }
    }
  }
  print.norm = std::sqrt(print.norm);
  return print;
}

Fingerprint threw() { return {-1.0, 0.0, 0.0, 0.0, 0.0}; }

Fingerprint from_json(const nlohmann::json& values) {
  return {values.at(0), values.at(1), values.at(2), values.at(3), values.at(4)};
}

}  // namespace

Recognise::Recognise(std::vector<int> cases, std::function<std::vector<Array>(int)> outputs) {
  registered() = {std::move(cases), std::move(outputs)};
}

Fingerprints take_fingerprints() {
  Fingerprints prints;
  for (const int number : registered().cases) {
    try {
      prints[number] = fingerprint_of(registered().outputs(number));
    } catch (const NotImplemented&) {
      continue;  // a part that is a stub still: the others may be recognised
    } catch (const std::exception&) {
      prints[number] = threw();
    }
  }
  return prints;
}

bool alike(const Fingerprint& one, const Fingerprint& other) {
  if (one.nan != other.nan || one.infinite != other.infinite) return false;
  const double allowed = 1e-3 * std::max(one.norm, other.norm) + 1e-30;
  return std::abs(one.norm - other.norm) <= allowed && std::abs(one.first - other.first) <= allowed &&
         std::abs(one.second - other.second) <= allowed;
}

// A known wrong answer explains this one if this one does what it did on the cases that it spoiled. One such case in
// six may differ, and so may cases that it did not spoil, because people make two mistakes at once; but it must explain
// at least half of the faults, and more of them than any other mistake does; of two that explain as many, the one with
// less to forgive.
std::optional<std::string> recognise(const Fingerprints& answer, std::istream& fingerprints) {
  if (!fingerprints || answer.empty()) return std::nullopt;
  const nlohmann::json stored = nlohmann::json::parse(fingerprints, nullptr, /*allow_exceptions=*/false);
  if (stored.is_discarded()) return std::nullopt;

  const auto faults = static_cast<std::size_t>(std::count_if(answer.begin(), answer.end(), [&](const auto& own) {
    const auto right = stored.at("right").find(std::to_string(own.first));
    return right != stored.at("right").end() && !alike(own.second, from_json(*right));
  }));
  const std::size_t enough = std::max<std::size_t>(1, (faults + 1) / 2);
  std::pair<std::size_t, std::size_t> most{enough, 0};  // cases explained, and of the cases predicted those that differ
  std::set<std::string> best;
  for (const nlohmann::json& wrong : stored.at("wrong")) {
    std::size_t predicted = 0, come_true = 0;
    for (const auto& [number, print] : wrong.at("cases").items()) {
      const auto own = answer.find(std::stoi(number));
      if (own == answer.end()) continue;
      ++predicted;
      come_true += alike(own->second, from_json(print));
    }
    const std::size_t differ = predicted - come_true;
    if (differ > predicted / 6 || come_true < most.first) continue;
    const bool better = best.empty() || come_true > most.first || differ < most.second;
    if (!better && differ > most.second) continue;
    if (better) best.clear();
    best.insert(wrong.at("mistake").get<std::string>());
    most = {come_true, differ};
  }
  if (best.size() != 1 || find_mistake(*best.begin()) == nullptr) return std::nullopt;
  return *best.begin();
}

std::optional<std::string> recognise(const Fingerprints& answer) {
  std::ifstream file(std::string(KATA_ROOT "/common/testing/fingerprints/") + step.label + ".json");
  return recognise(answer, file);
}

void print_fingerprints(std::ostream& out, const Fingerprints& fingerprints) {
  nlohmann::json object = nlohmann::json::object();
  const auto short_number = [](double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    return std::strtod(text, nullptr);
  };
  for (const auto& [number, print] : fingerprints) {
    object[std::to_string(number)] = {print.nan, print.infinite, short_number(print.norm), short_number(print.first),
                                      short_number(print.second)};
  }
  out << object.dump() << '\n';
}

}  // namespace flashkata::testing
