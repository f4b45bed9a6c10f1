#include "support.h"

#include <cstdio>
#include <cstring>
#include <set>

#include "../long_context_attention/plugin.h"
#include "../moe/plugin.h"
#include "driver.h"
#include "logging.h"
#include "lookup.h"

namespace l4convert {
namespace {

// Of an H100. Which kernels are launched does not hang on it, only how many blocks they have.
constexpr int kMultiprocessors = 132;
constexpr std::uintptr_t kAddress = 0x10000000;

// Launches nothing, but refuses what the library does not have for one compute capability: launch code run with it
// tells which kernels it would use. Addresses are never read.
class ProbeLauncher final : public Launcher {
 public:
  explicit ProbeLauncher(int sm) : sm_(sm) {}

  Status launch(const std::string& kernel, Grid, const std::vector<Argument>&) override {
    return has(kernel) ? Status()
                       : "the plugin library has no kernel " + kernel + " for SM " + std::to_string(sm_) +
                             ": l4convert plugins build makes it with the --sm, --compute and --head-dim that it needs";
  }
  Status zero(void*, std::size_t) override { return {}; }
  Status copy(void*, const void*, std::size_t) override { return {}; }
  int multiprocessors() const override { return kMultiprocessors; }
  int sm() const override { return sm_; }
  bool has(const std::string& kernel) const override { return find_kernel(kernel, sm_) != nullptr; }
  std::int64_t constant(const std::string& kernel, const std::string& name, std::int64_t missing) const override {
    const l4_kernel_info* found = find_kernel(kernel, sm_);
    return found == nullptr ? missing : constant_of(*found, name, missing);
  }

 private:
  int sm_;
};

Status check_for(const Op& op, int sm) {
  std::vector<void*> addresses;
  std::size_t count = op.inputs().size() + op.outputs().size() + 1;
  for (std::size_t i = 0; i < count; ++i) addresses.push_back(reinterpret_cast<void*>(kAddress * (i + 1)));
  ProbeLauncher launcher(sm);
  for (const Sizes& sizes : op.probes()) {
    Status status = op.enqueue(launcher, sizes, addresses.data(), addresses.data() + op.inputs().size(),
                               addresses.back());
    if (!status.empty()) return status;
  }
  return {};
}

}  // namespace

int device_sm() { return DriverLauncher(nullptr).sm(); }

Status check_kernels(const Op& op, int sm) {
  if (sm != 0) return check_for(op, sm);
  std::set<int> sms;
  for (int i = 0; i < kKernelCount; ++i) sms.insert(kKernels[i].sm);
  Status status = "the plugin library has no kernels: l4convert plugins build";
  for (int each : sms) {  // the newest GPU's reason is told: older ones may lack whole number formats
    status = check_for(op, each);
    if (status.empty()) break;
  }
  return status;
}

Status make_op(const OpKind& kind, const nvinfer1::PluginFieldCollection* given, const std::vector<FieldRule>& rules,
               int sm, Fields& fields, std::shared_ptr<const Op>& op) {
  Status status = Fields::read(given, rules, fields);
  if (status.empty()) status = kind.make(fields, op);
  return status.empty() ? check_kernels(*op, sm) : status;
}

const std::vector<const OpKind*>& op_kinds() {
  static const std::vector<const OpKind*> kinds = {&moe_kind(), &attention_kind()};
  return kinds;
}

}  // namespace l4convert

// For programs that build engines: 0 where a plugin of these fields can be made and has all its kernels for a compute
// capability (90: 9.0); otherwise 1, and `why` is one line.
extern "C" __attribute__((visibility("default"))) std::int32_t l4_supports(
    const char* plugin, const nvinfer1::PluginFieldCollection* given, std::int32_t sm, char* why,
    std::size_t size) noexcept {
  const l4convert::Status status = l4convert::guarded(plugin, l4convert::Status("fails"), [&]() -> l4convert::Status {
    for (const l4convert::OpKind* kind : l4convert::op_kinds()) {
      if (std::strcmp(kind->name, plugin) != 0) continue;
      l4convert::Fields fields;
      std::shared_ptr<const l4convert::Op> op;
      return l4convert::make_op(*kind, given, kind->fields, sm, fields, op);
    }
    return "the library has no plugin of this name";
  });
  if (size > 0) std::snprintf(why, size, "%s", status.c_str());
  return status.empty() ? 0 : 1;
}
