#include "report.h"

#include <algorithm>
#include <cstdio>

namespace l4convert::conformance {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += std::string("\\") + c;
    } else if (static_cast<unsigned char>(c) < ' ') {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      result += escaped;
    } else {
      result += c;
    }
  }
  return result + "\"";
}

std::string padded(const std::string& text, std::size_t width) {
  return text + std::string(width - std::min(width, text.size()), ' ');
}

}  // namespace

int Report::failed() const {
  return static_cast<int>(
      std::count_if(checks_.begin(), checks_.end(), [](const Check& check) { return !check.wrong.empty(); }));
}

// A line a check, over all cases; cases that fail have lines of their own.
std::string Report::table() const {
  std::vector<std::string> names;
  std::size_t width = 0;
  for (const Check& check : checks_) {
    width = std::max(width, check.name.size());
    if (std::find(names.begin(), names.end(), check.name) == names.end()) names.push_back(check.name);
  }
  std::string text;
  for (const std::string& name : names) {
    int passed = 0, all = 0;
    std::string wrong;
    for (const Check& check : checks_) {
      if (check.name != name) continue;
      ++all;
      passed += check.wrong.empty() ? 1 : 0;
      if (!check.wrong.empty()) wrong += "  " + check.subject + ": " + check.wrong + "\n";
    }
    text += padded(name, width) + "  " + (passed == all ? "ok" : "FAILED") + "  " + std::to_string(passed) + " of " +
            std::to_string(all) + "\n" + wrong;
  }
  return text + std::to_string(checks_.size()) + " checks, " + std::to_string(failed()) + " failed\n";
}

std::string Report::json(const std::string& library) const {
  std::string text = "{\"schema\": 1, \"library\": " + quoted(library) + ", \"failed\": " + std::to_string(failed()) +
                     ", \"checks\": [";
  for (std::size_t i = 0; i < checks_.size(); ++i) {
    const Check& check = checks_[i];
    text += std::string(i == 0 ? "" : ",") + "\n  {\"subject\": " + quoted(check.subject) +
            ", \"name\": " + quoted(check.name) + ", \"ok\": " + (check.wrong.empty() ? "true" : "false") +
            ", \"wrong\": " + quoted(check.wrong) + "}";
  }
  return text + "\n]}\n";
}

}  // namespace l4convert::conformance
