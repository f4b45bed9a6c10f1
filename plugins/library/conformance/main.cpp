// l4convert_conformance [--json] LIBRARY: opens a plugin library as TensorRT would and drives every method of the
// contract, without TensorRT and without a GPU. Ends with 0, or 4 where a check failed, or 2 where it was called wrongly.
#include <cstdio>
#include <cstring>

#include "checks.h"

int main(int count, char** arguments) {
  const char* library = nullptr;
  bool json = false;
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(arguments[i], "--json") == 0) {
      json = true;
    } else {
      library = library == nullptr ? arguments[i] : "";
    }
  }
  if (library == nullptr || *library == '\0' || *library == '-') {
    std::fprintf(stderr, "usage: l4convert_conformance [--json] LIBRARY\n");
    return 2;
  }
  const l4convert::conformance::Report report = l4convert::conformance::check_library(library);
  std::fputs((json ? report.json(library) : report.table()).c_str(), stdout);
  return report.failed() == 0 ? 0 : 4;
}
