// A device named npu on host memory, for tests: what Python needs of it. One source file, because PyTorch's headers
// take most of the time of a compilation.
#include "collectives.h"
#include "device.h"
#include "graph.h"
#include "memory.h"
#include "operators.h"
#include "runtime.h"

#include <torch/csrc/utils/pybind.h>

namespace simulated {

static py::dict counted() {
  auto& all = counters();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto by_name = [](const std::unordered_map<c10::OperatorName, int64_t>& calls) {
    py::dict named;
    for (const auto& [name, number] : calls) named[py::str(c10::toString(name))] = number;
    return named;
  };
  const auto traffic = [](const std::map<std::string, Traffic>& table) {
    py::dict named;
    for (const auto& [name, sum] : table) {
      named[py::str(name)] = py::dict(py::arg("calls") = sum.calls, py::arg("bytes") = sum.bytes);
    }
    return named;
  };
  return py::dict(py::arg("operators") = by_name(all.operators), py::arg("fallbacks") = by_name(all.fallbacks),
                  py::arg("collectives") = traffic(all.collectives), py::arg("copies") = traffic(all.copies));
}

static void clear_counters() {
  auto& all = counters();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.operators.clear();
  all.fallbacks.clear();
  all.collectives.clear();
  all.copies.clear();
}

static py::dict account(int device) {
  const auto now = device_memory().account(static_cast<DeviceIndex>(device));
  return py::dict(py::arg("live_bytes") = now.bytes, py::arg("peak_bytes") = now.peak,
                  py::arg("allocations") = now.allocations, py::arg("ooms") = now.ooms);
}

static Block& block_of(const at::Tensor& tensor) {
  auto* block = DeviceMemory::block_of(tensor);
  TORCH_CHECK(tensor.is_privateuseone() && block, "the tensor is not in the memory of an npu");
  return *block;
}

}  // namespace simulated

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace simulated;
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  torch::profiler::impl::registerPrivateUse1Methods(new Profiler);
  module.def("device_count", [] { return static_cast<int>(device_count()); });
  module.def("current_device", [] { return static_cast<int>(current_device); });
  module.def("set_device", [](int device) { set_current_device(static_cast<DeviceIndex>(device)); });
  module.def("default_generator", [](int device) { return default_generator(static_cast<DeviceIndex>(device)); });
  module.def("set_memory_limit", [](int device, int64_t bytes) {
    device_memory().set_limit(static_cast<DeviceIndex>(device), bytes);
  });
  module.def("account", &account);
  module.def("counted", &counted);
  module.def("clear_counters", &clear_counters);
  module.def("remove_kernel", [](const std::string& name) {
    std::lock_guard<std::mutex> lock(counters().mutex);
    without_kernel().insert(name);
  });
  module.def("memory_format", [](const at::Tensor& tensor) { return block_of(tensor).format; });
  module.def("set_memory_format", [](const at::Tensor& tensor, int format) { block_of(tensor).format = format; });
  py::class_<Graph>(module, "Graph")
      .def(py::init<>())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay)
      .def_static("recording", &Graph::recording);
  module.def("hccl", [](const c10::intrusive_ptr<c10d::Backend>& host) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<Hccl>(host));
  });
}
