#include "logging.h"

#include <atomic>
#include <cstdio>

#include "tensorrt_library.h"

namespace l4convert {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> finder_in_use{nullptr};

nvinfer1::ILogger* find_logger() {
  if (!tensorrt_fits()) return nullptr;
  if (nvinfer1::ILoggerFinder* finder = finder_in_use.load()) {
    if (nvinfer1::ILogger* logger = finder->findLogger()) return logger;
  }
  // The one of the process: that of the builder or runtime that was made first.
  using GetLogger = nvinfer1::ILogger* (*)();
  auto get = reinterpret_cast<GetLogger>(tensorrt_function("getLogger"));
  return get == nullptr ? nullptr : get();
}

}  // namespace

void use_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { finder_in_use.store(finder); }

void report(nvinfer1::ILogger::Severity severity, const std::string& line) noexcept {
  nvinfer1::ILogger* logger = nullptr;
  try {
    logger = find_logger();
  } catch (...) {
    logger = nullptr;
  }
  if (logger != nullptr) {
    logger->log(severity, line.c_str());
  } else if (severity <= nvinfer1::ILogger::Severity::kWARNING) {
    std::fprintf(stderr, "l4convert: %s\n", line.c_str());
  }
}

}  // namespace l4convert
