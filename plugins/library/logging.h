// Where the plugins say what is wrong: TensorRT's logger where there is one, else the standard error stream.
#pragma once

#include <NvInferRuntime.h>

#include <exception>
#include <string>

namespace l4convert {

// One line. Never throws: it is called while other exceptions are dealt with.
void report(nvinfer1::ILogger::Severity severity, const std::string& line) noexcept;

// What TensorRT hands over when it loads the library; kept for as long as the library is loaded.
void use_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;

// Runs `work`; an exception becomes a line in the log and `failed`, for none may leave the library.
template <typename Result, typename Work>
Result guarded(const char* where, Result failed, Work work) noexcept {
  try {
    return work();
  } catch (const std::exception& error) {
    report(nvinfer1::ILogger::Severity::kERROR, std::string(where) + ": " + error.what());
  } catch (...) {
    report(nvinfer1::ILogger::Severity::kERROR, std::string(where) + ": failed, and gives no reason");
  }
  return failed;
}

}  // namespace l4convert
