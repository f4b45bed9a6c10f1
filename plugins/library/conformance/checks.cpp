#include "checks.h"

#include <exception>
#include <set>
#include <thread>

namespace l4convert::conformance {
namespace {

constexpr int kHeadDims[] = {128, 64, 32, 16, 256};
constexpr int kThreads = 8, kRounds = 25;

bool can_make(const Library& library, const Case& given) {
  return create(library, given, given.attributes) != nullptr;
}

// A head size that the library has kernels for; 0 where it has none.
int head_dim_of(const Library& library) {
  for (const int head_dim : kHeadDims) {
    for (const Case& each : cases(head_dim)) {
      if (each.plugin == "LongContextAttention" && can_make(library, each)) return head_dim;
    }
  }
  return 0;
}

// All cases that a library must pass: with the types of activations that it can do anything with. One of them at least
// must be there.
std::vector<Case> cases_for(const Library& library, int head_dim) {
  std::set<std::string> known;
  const std::vector<Case> all = cases(head_dim);
  for (const Case& each : all) {
    if (can_make(library, each)) known.insert(each.attributes.at("compute").text);
  }
  std::vector<Case> wanted;
  for (const Case& each : all) {
    if (head_dim == 0 && each.plugin == "LongContextAttention") continue;
    if (known.empty() || known.count(each.attributes.at("compute").text) != 0) wanted.push_back(each);
  }
  return wanted;
}

std::string creators_are_right(const Library& library) {
  if (library.creators().size() != 2) return "has " + std::to_string(library.creators().size()) + " creators";
  for (const char* name : {"MoE", "LongContextAttention"}) {
    const nvinfer1::IPluginCreatorV3One* found = library.creator(name);
    if (found == nullptr) return std::string("has no creator for ") + name;
    if (std::string(found->getPluginVersion()) != "1") return std::string(name) + " is not of version 1";
    if (std::string(found->getPluginNamespace()) != "") return std::string(name) + " has a namespace";
  }
  return {};
}

// Creators and plugins are used by several threads at once where engines are built or loaded at once.
std::string threads_agree(const Library& library, const std::vector<Case>& all) {
  std::vector<std::string> wrong(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds && wrong[i].empty(); ++round) {
        const Case& given = all[static_cast<std::size_t>(i + round) % all.size()];
        const PluginPointer plugin = create(library, given, given.attributes);
        const PluginPointer copy(plugin == nullptr ? nullptr : plugin->clone());
        if (copy == nullptr || shape_change(*copy, given, describe(given, given.sizes)) != 0) wrong[i] = given.name;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& each : wrong) {
    if (!each.empty()) return "fails with several threads: " + each;
  }
  return silence(library);
}

}  // namespace

Report check_library(const std::string& path) {
  Report report;
  try {
    const Library library(path);
    report.add("library", "opens, has its creators", creators_are_right(library));
    if (report.failed() != 0) return report;
    const int head_dim = head_dim_of(library);
    const auto lines = library.logger().take();
    const std::string none = lines.empty() ? "no attention plugin can be made" : lines.front().second;
    report.add("library", "has kernels for attention", head_dim == 0 ? none : "");
    std::vector<Case> all;
    for (const Case& given : cases_for(library, head_dim)) {
      if (!check_creation(library, given, report)) continue;
      check_tensors(library, given, report);
      all.push_back(given);
    }
    if (!all.empty()) report.add("library", "several threads", threads_agree(library, all));
  } catch (const std::exception& error) {
    report.add("library", "opens", error.what());
  }
  return report;
}

}  // namespace l4convert::conformance
