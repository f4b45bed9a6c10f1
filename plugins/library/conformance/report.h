// What was checked and what came of it, as a table or as JSON.
#pragma once

#include <string>
#include <vector>

namespace l4convert::conformance {

struct Check {
  std::string subject;  // a case, or the library
  std::string name;
  std::string wrong;  // empty: the check passed
};

class Report {
 public:
  void add(const std::string& subject, const std::string& name, const std::string& wrong) {
    checks_.push_back({subject, name, wrong});
  }
  const std::vector<Check>& checks() const { return checks_; }
  int failed() const;
  std::string table() const;
  std::string json(const std::string& library) const;

 private:
  std::vector<Check> checks_;
};

}  // namespace l4convert::conformance
