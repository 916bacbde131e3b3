#include "common/virtual_gpu/symbols.hpp"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <string_view>

namespace flashkata::virtual_gpu {

namespace {

struct Function {
  std::uintptr_t offset;
  std::string mangled;
};

struct ProgramSymbols {
  std::vector<SharedSymbol> shared;
  std::vector<Function> functions;
  std::size_t thread_local_bytes = 0;
};

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

/// "void flash<64>(float*)::k_smem[abi:kata_shared]" -> "k_smem"
std::string array_name(const std::string& mangled) {
  std::string name = demangled(mangled);
  name = name.substr(0, name.rfind("[abi:"));
  const std::size_t colons = name.rfind("::");
  return colons == std::string::npos ? name : name.substr(colons + 2);
}

template <typename T>
const T* at(const std::vector<char>& file, std::size_t offset) {
  return reinterpret_cast<const T*>(file.data() + offset);
}

ProgramSymbols read_symbols() {
  ProgramSymbols result;
  std::ifstream stream("/proc/self/exe", std::ios::binary);
  const std::vector<char> file((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (file.size() < sizeof(Elf64_Ehdr)) return result;

  const auto* header = at<Elf64_Ehdr>(file, 0);
  const auto* segments = at<Elf64_Phdr>(file, header->e_phoff);
  for (int i = 0; i < header->e_phnum; ++i) {
    if (segments[i].p_type == PT_TLS) result.thread_local_bytes = segments[i].p_memsz;
  }

  const auto* sections = at<Elf64_Shdr>(file, header->e_shoff);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (sections[i].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = at<Elf64_Sym>(file, sections[i].sh_offset);
    const char* names = at<char>(file, sections[sections[i].sh_link].sh_offset);
    for (std::size_t k = 0; k < sections[i].sh_size / sizeof(Elf64_Sym); ++k) {
      const Elf64_Sym& symbol = symbols[k];
      const std::string_view name = names + symbol.st_name;
      const auto type = ELF64_ST_TYPE(symbol.st_info);
      if (type == STT_TLS && name.starts_with("_ZZ") && name.find("B11kata_shared") != name.npos) {
        result.shared.push_back({array_name(std::string(name)), symbol.st_value, symbol.st_size});
      } else if (type == STT_FUNC && symbol.st_value != 0) {
        result.functions.push_back({symbol.st_value, std::string(name)});
      }
    }
  }
  std::sort(result.shared.begin(), result.shared.end(),
            [](const SharedSymbol& a, const SharedSymbol& b) { return a.offset < b.offset; });
  return result;
}

const ProgramSymbols& program_symbols() {
  static const ProgramSymbols symbols = read_symbols();
  return symbols;
}

/// Calls visit(info) for the program itself, which the dynamic linker lists first.
template <typename Visit>
void visit_program(Visit visit) {
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        (*static_cast<Visit*>(data))(*info);
        return 1;
      },
      &visit);
}

// ---- lines -----------------------------------------------------------------------------------------------------

std::mutex line_mutex;
std::map<Site, SourceLine> line_cache;

bool belongs_to_a_kernel(const std::string& file) {
  for (const char* ours : {"common/gpu/", "common/virtual_gpu/", "common/attention/view.hpp", "/usr/"}) {
    if (file.find(ours) != std::string::npos) return false;
  }
  return !file.empty() && file[0] != '?';
}

/// "/home/me/flash.cu:43 (discriminator 2)" -> file and line
SourceLine parse_place(std::string place) {
  place = place.substr(0, place.find(" (discriminator"));
  const std::size_t colon = place.rfind(':');
  if (colon == std::string::npos) return {};
  return {place.substr(0, colon), std::atoi(place.c_str() + colon + 1)};
}

/// addr2line -a prints the address, then for each frame, innermost first, a function and a place.
void ask_addr2line(const std::vector<Site>& sites) {
  char program[4096];
  const ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
  if (length <= 0) return;
  program[length] = '\0';

  std::ostringstream command;
  command << "addr2line -a -f -i -e '" << program << "'" << std::hex;
  for (const Site site : sites) command << " 0x" << site - 1;
  command << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (pipe == nullptr) return;

  std::vector<std::string> lines;
  char* text = nullptr;
  std::size_t capacity = 0;
  for (ssize_t n; (n = getline(&text, &capacity, pipe)) > 0;) {
    lines.emplace_back(text, text[n - 1] == '\n' ? n - 1 : n);
  }
  std::free(text);
  pclose(pipe);

  std::size_t next = 0;
  for (const Site site : sites) {
    SourceLine best;
    if (next < lines.size()) ++next;  // the address
    while (next + 1 < lines.size() && !lines[next].starts_with("0x")) {
      const SourceLine frame = parse_place(lines[next + 1]);
      if (!best.known() && belongs_to_a_kernel(frame.file)) best = frame;
      next += 2;
    }
    line_cache[site] = best;
  }
}

}  // namespace

std::string SourceLine::text() const {
  if (!known()) return "an unknown line (is addr2line installed?)";
  const std::size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" + std::to_string(line);
}

const Image& image() {
  static const Image the_image = [] {
    Image result;
    visit_program([&](const dl_phdr_info& info) {
      result.begin = UINTPTR_MAX;
      for (int i = 0; i < info.dlpi_phnum; ++i) {
        const auto& segment = info.dlpi_phdr[i];
        if (segment.p_type != PT_LOAD) continue;
        const std::uintptr_t begin = info.dlpi_addr + segment.p_vaddr;
        result.begin = std::min(result.begin, begin);
        result.end = std::max<std::uintptr_t>(result.end, begin + segment.p_memsz);
      }
    });
    return result;
  }();
  return the_image;
}

const std::uintptr_t load_bias = [] {
  std::uintptr_t result = 0;
  visit_program([&](const dl_phdr_info& info) { result = info.dlpi_addr; });
  return result;
}();

SourceLine line_of(Site site) {
  if (site == 0) return {};
  const std::lock_guard lock(line_mutex);
  const auto known = line_cache.find(site);
  if (known != line_cache.end()) return known->second;
  ask_addr2line({site});
  return line_cache[site];
}

void prefetch_lines(const std::vector<Site>& sites) {
  const std::lock_guard lock(line_mutex);
  std::vector<Site> unknown;
  for (const Site site : sites) {
    if (site != 0 && !line_cache.contains(site)) unknown.push_back(site);
  }
  std::sort(unknown.begin(), unknown.end());
  unknown.erase(std::unique(unknown.begin(), unknown.end()), unknown.end());
  constexpr std::size_t AT_ONCE = 2000;
  for (std::size_t start = 0; start < unknown.size(); start += AT_ONCE) {
    const std::size_t stop = std::min(unknown.size(), start + AT_ONCE);
    ask_addr2line(
        {unknown.begin() + static_cast<std::ptrdiff_t>(start), unknown.begin() + static_cast<std::ptrdiff_t>(stop)});
  }
}

std::string function_name(const void* function) {
  const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(function) - load_bias;
  for (const Function& candidate : program_symbols().functions) {
    if (candidate.offset != offset) continue;
    std::string name = demangled(candidate.mangled);
    // Drop parameters and template arguments, then the namespaces and the return type.
    const std::size_t anonymous = name.find("(anonymous namespace)::");
    if (anonymous != std::string::npos) name = name.substr(anonymous + 23);
    name = name.substr(0, name.find('('));
    name = name.substr(0, name.find('<'));
    const std::size_t start = name.find_last_of(" :");
    return start == std::string::npos ? name : name.substr(start + 1);
  }
  return "kernel";
}

const std::vector<SharedSymbol>& shared_symbols() { return program_symbols().shared; }

std::uintptr_t thread_local_begin() {
  std::uintptr_t result = 0;
  visit_program([&](const dl_phdr_info& info) { result = reinterpret_cast<std::uintptr_t>(info.dlpi_tls_data); });
  return result;
}

std::size_t thread_local_bytes() { return program_symbols().thread_local_bytes; }

}  // namespace flashkata::virtual_gpu
