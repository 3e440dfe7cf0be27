// What all parts of the simulated device share: how many devices there are, the current one, and counters.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>

namespace simulated {

using c10::Device;
using c10::DeviceIndex;

constexpr auto kNpu = c10::DeviceType::PrivateUse1;
constexpr int kMostDevices = 64;

inline int64_t variable(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoll(value) : otherwise;
}

// As many as SIMULATED_NPU_DEVICES says, of which ASCEND_RT_VISIBLE_DEVICES may hide some.
inline DeviceIndex device_count() {
  static const DeviceIndex count = [] {
    int64_t there = std::min<int64_t>(variable("SIMULATED_NPU_DEVICES", 2), kMostDevices);
    if (const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES")) {
      const std::string list = visible;
      const int64_t listed = list.empty() ? 0 : 1 + std::count(list.begin(), list.end(), ',');
      there = std::min(there, listed);
    }
    return static_cast<DeviceIndex>(there);
  }();
  return count;
}

inline thread_local DeviceIndex current_device = 0;

inline DeviceIndex or_current(DeviceIndex index) { return index < 0 ? current_device : index; }

inline void set_current_device(DeviceIndex index) {
  TORCH_CHECK(index < device_count(), "invalid device ordinal ", static_cast<int>(index), ": there are ",
              static_cast<int>(device_count()), " npu devices");
  if (index >= 0) current_device = index;
}

struct Traffic {
  int64_t calls = 0;
  int64_t bytes = 0;
};

// Exact, and the same in every run of the same program.
struct Counters {
  std::mutex mutex;
  std::unordered_map<c10::OperatorName, int64_t> operators;
  std::unordered_map<c10::OperatorName, int64_t> fallbacks;
  std::map<std::string, Traffic> collectives;
  std::map<std::string, Traffic> copies;  // "host to device", "device to host", "device to device"
};

inline Counters& counters() {
  static Counters instance;
  return instance;
}

inline void count(std::map<std::string, Traffic> Counters::*table, const std::string& name, int64_t bytes) {
  auto& all = counters();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto& traffic = (all.*table)[name];
  traffic.calls += 1;
  traffic.bytes += bytes;
}

// The same memory as the host's kernels see it. Keeps the device tensor alive.
inline at::Tensor on_host(const at::Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), [tensor](void*) {},
                       tensor.options().device(at::kCPU).requires_grad(false));
}

}  // namespace simulated
