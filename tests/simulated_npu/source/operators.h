// Operators. A few know the device; all others run in the host's kernels on the device's memory, under the device's
// rules: tensors of one device only, random numbers of the device's generator.
#pragma once

#include "device.h"
#include "graph.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <unordered_set>

namespace simulated {

using Stack = torch::jit::Stack;

// ------------------------------------------------------------------------------------------ how an operator is run

struct Plan {
  bool view = false;         // a result shares memory with an argument that is not written
  bool product = false;      // of matrices, which the device multiplies in some data types only
  bool random = false;       // draws random numbers
  int generator = -1;        // the argument that is a generator
  std::vector<int> out;      // arguments that only receive results
  std::vector<int> same_as;  // for each result the argument it is, -1: a new tensor
};

inline Plan make_plan(const c10::FunctionSchema& schema, bool random) {
  static const std::unordered_set<std::string> products{"aten::mm",    "aten::bmm", "aten::addmm", "aten::baddbmm",
                                                        "aten::addmv", "aten::mv",  "aten::dot",   "aten::addbmm"};
  Plan plan;
  plan.product = products.count(schema.name()) > 0;
  plan.random = random;
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto* alias = arguments[i].alias_info();
    if (alias && !alias->isWrite()) plan.view = true;
    if (arguments[i].is_out()) plan.out.push_back(static_cast<int>(i));
    const auto type = arguments[i].type()->str();
    if (type == "Generator?" || type == "Generator") plan.generator = static_cast<int>(i);
  }
  for (const auto& result : schema.returns()) {
    int same = -1;
    if (const auto* alias = result.alias_info()) {
      for (size_t i = 0; i < arguments.size(); i++) {
        if (arguments[i].alias_info() && *arguments[i].alias_info() == *alias) same = static_cast<int>(i);
      }
    }
    plan.same_as.push_back(same);
  }
  return plan;
}

// Operators that the real device lacks, as tests name them: "aten::erfinv".
inline std::unordered_set<std::string>& without_kernel() {
  static std::unordered_set<std::string> names;
  return names;
}

inline const Plan& called(const c10::OperatorHandle& op) {
  static std::unordered_map<c10::OperatorName, Plan> plans;
  const auto& name = op.operator_name();
  auto& all = counters();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.operators[name] += 1;
  if (!without_kernel().empty() && without_kernel().count(name.name)) {
    const char* disabled = std::getenv("TORCH_NPU_FALLBACK_CPU_DISABLE");
    TORCH_CHECK_NOT_IMPLEMENTED(!(disabled && std::string(disabled) == "1"), "CAUTION: The operator '", name,
                                "' is not currently supported on the NPU backend.");
    all.fallbacks[name] += 1;
  }
  auto found = plans.find(name);
  if (found == plans.end()) {
    found = plans.emplace(name, make_plan(op.schema(), op.hasTag(at::Tag::nondeterministic_seeded))).first;
  }
  return found->second;
}

// ----------------------------------------------------------------------------------------------- rules of the device

// PyTorch's rule: all tensors on one device, but for scalars of the host and for indices.
class OneDevice {
 public:
  explicit OneDevice(const c10::OperatorHandle& op) : op_(op) {}

  void see(const at::Tensor& tensor, bool written) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0 && !written)) return;
    if (!device) device = tensor.device();
    TORCH_CHECK(*device == tensor.device(), "Expected all tensors to be on the same device, but found at least two "
                "devices, ", *device, " and ", tensor.device(), "! (when calling ", op_.operator_name(), ")");
  }

  std::optional<Device> device;

 private:
  const c10::OperatorHandle& op_;
};

inline Device common_device(const c10::OperatorHandle& op, c10::ArrayRef<c10::IValue> values) {
  OneDevice rule(op);
  const auto& arguments = op.schema().arguments();
  for (size_t i = 0; i < values.size(); i++) {
    const auto& value = values[i];
    const bool written = arguments[i].alias_info() && arguments[i].alias_info()->isWrite();
    if (value.isTensor()) {
      rule.see(value.toTensor(), written);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) rule.see(tensor, written);
    } else if (value.isDevice() && value.toDevice().type() == kNpu && !rule.device) {
      rule.device = value.toDevice();
    }
  }
  auto device = rule.device.value_or(Device(kNpu, current_device));
  if (!device.has_index()) device.set_index(current_device);
  TORCH_CHECK(device.type() == kNpu, "Expected all tensors to be on the same device, but found at least two devices, ",
              device, " and npu! (when calling ", op.operator_name(), ")");
  return device;
}

// The vendor's matrix products (aclnnMm and its kin) list float16, bfloat16 and float32.
inline void check_product(const c10::OperatorHandle& op, const at::Tensor& first) {
  const auto dtype = first.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, op.operator_name(),
              ": the npu multiplies matrices of Float, Half and BFloat16, not of ", dtype);
}

// ------------------------------------------------------------------------------------------- running on the host

inline at::Tensor lend(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_privateuseone() ? on_host(tensor) : tensor;
}

inline c10::IValue lend(const c10::IValue& value) {
  if (value.isTensor()) return lend(value.toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> lent;
    for (const at::Tensor& tensor : value.toTensorList()) lent.push_back(lend(tensor));
    return lent;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> lent;
    for (const std::optional<at::Tensor> tensor : value.toOptionalTensorList()) {
      lent.push_back(tensor ? std::optional<at::Tensor>(lend(*tensor)) : std::nullopt);
    }
    return lent;
  }
  if (value.isDevice() && value.toDevice().type() == kNpu) return Device(at::kCPU);
  return value;
}

inline at::Tensor give(const at::Tensor& result, Device device) {
  if (!result.defined() || !result.is_cpu()) return result;
  TORCH_CHECK_NOT_IMPLEMENTED(result.layout() == at::kStrided, "an npu holds strided tensors, not ", result.layout());
  const c10::DeviceGuard guard(device);
  const at::Tensor given = at::detail::empty_strided_generic(result.sizes(), result.strides(), &device_memory(),
                                                             c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                                             result.scalar_type());
  on_host(given).copy_(result);
  return given;
}

inline c10::IValue give(const c10::IValue& value, Device device) {
  if (value.isTensor()) return give(value.toTensor(), device);
  if (!value.isTensorList()) return value;
  std::vector<at::Tensor> given;
  for (const at::Tensor& tensor : value.toTensorList()) given.push_back(give(tensor, device));
  return given;
}

// An empty tensor to write to may be one that the operator shall resize: the host's kernel gets one it can.
inline bool takes_size(const c10::IValue& out) { return out.isTensor() && out.toTensor().numel() == 0; }

inline void run_on_host(const c10::OperatorHandle& op, const Plan& plan, Stack* stack, Device device) {
  const size_t first = stack->size() - op.schema().arguments().size();
  const std::vector<c10::IValue> arguments(stack->begin() + static_cast<int64_t>(first), stack->end());
  for (size_t i = first; i < stack->size(); i++) (*stack)[i] = lend((*stack)[i]);
  std::vector<std::pair<at::Tensor, at::Tensor>> sized;
  for (const int i : plan.out) {
    if (!takes_size(arguments[i])) continue;
    const auto& out = arguments[i].toTensor();
    sized.emplace_back(out, at::empty({0}, out.options().device(at::kCPU)));
    (*stack)[first + i] = sized.back().second;
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (const auto& [out, written] : sized) {
    if (out.sizes() != written.sizes()) at::native::resize_(out, written.sizes(), std::nullopt);
    on_host(out).copy_(written);
  }
  for (size_t i = 0; i < plan.same_as.size(); i++) {
    auto& result = (*stack)[stack->size() - plan.same_as.size() + i];
    result = plan.same_as[i] >= 0 ? arguments[plan.same_as[i]] : give(result, device);
  }
}

// The numbers that an operator draws come from the device's generator; the host's goes on as if nothing had been.
class DeviceRandomness {
 public:
  DeviceRandomness(const Plan& plan, Stack* stack, size_t arguments, Device device) {
    if (!plan.random && plan.generator < 0) return;
    at::Generator generator = default_generator(device.index());
    if (plan.generator >= 0) {
      auto& given = (*stack)[stack->size() - arguments + plan.generator];
      if (given.isGenerator()) {
        generator = given.toGenerator();
        TORCH_CHECK(generator.device().type() == kNpu, "Expected a 'npu' device type for generator but found '",
                    generator.device().type(), "'");
      }
      given = at::detail::createCPUGenerator(draw(generator));
      return;
    }
    host_ = at::detail::getDefaultCPUGenerator();
    before_ = host_.get_state();
    host_.set_current_seed(draw(generator));
  }
  ~DeviceRandomness() {
    if (host_.defined()) host_.set_state(before_);
  }
  DeviceRandomness(const DeviceRandomness&) = delete;
  DeviceRandomness& operator=(const DeviceRandomness&) = delete;

 private:
  static uint64_t draw(at::Generator& generator) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get<Generator>()->next();
  }

  at::Generator host_;
  at::Tensor before_;
};

inline void run_operator(const c10::OperatorHandle& op, Stack* stack);

// A replay computes from the same arguments, whatever is in them by then, into the results of the recording.
inline void record(const c10::OperatorHandle& op, const std::vector<c10::IValue>& arguments,
                   const std::vector<c10::IValue>& results) {
  Graph::record([op, arguments, results] {
    Stack stack = arguments;
    run_operator(op, &stack);
    for (size_t i = 0; i < results.size(); i++) {
      if (!results[i].isTensor() || !results[i].toTensor().defined() || results[i].is(stack[i])) continue;
      on_host(results[i].toTensor()).copy_(on_host(stack[i].toTensor()));
    }
  });
}

inline void run_operator(const c10::OperatorHandle& op, Stack* stack) {
  const auto& plan = called(op);
  const size_t count = op.schema().arguments().size();
  const auto arguments = c10::ArrayRef<c10::IValue>(*stack).slice(stack->size() - count);
  const auto device = common_device(op, arguments);
  TORCH_CHECK_NOT_IMPLEMENTED(!plan.view, "the simulated npu has no '", op.operator_name(), "', which is a view");
  const c10::DeviceGuard guard(device);
  if (plan.product) check_product(op, arguments[0].toTensor());
  std::vector<c10::IValue> recorded;
  if (Graph::recording()) recorded = arguments.vec();
  const DeviceRandomness randomness(plan, stack, count, device);
  run_on_host(op, plan, stack, device);
  if (Graph::recording()) record(op, recorded, {stack->end() - static_cast<int64_t>(plan.same_as.size()), stack->end()});
}

// ------------------------------------------------------------------------------------- operators of the device's own

inline at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(sizes, &device_memory(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(sizes, strides, &device_memory(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

inline at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  if (target.is_cpu()) Graph::refuse("copying to the host");
  Graph::record([=] { copy_from(source, target, non_blocking); });
  const auto place = [](const at::Tensor& tensor) { return tensor.is_cpu() ? "host" : "device"; };
  count(&Counters::copies, std::string(place(source)) + " to " + place(target), static_cast<int64_t>(target.nbytes()));
  auto to = target.is_cpu() ? target : on_host(target);
  to.copy_(source.is_cpu() ? source : on_host(source));
  return target;
}

inline at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

inline at::Scalar item(const at::Tensor& tensor) {
  Graph::refuse("reading a value");
  count(&Counters::copies, "device to host", static_cast<int64_t>(tensor.nbytes()));
  return on_host(tensor).item();
}

inline const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef sizes,
                                std::optional<at::MemoryFormat> format) {
  return at::native::resize_(tensor, C10_AS_INTARRAYREF_SLOW(sizes), format);
}

inline at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

inline at::Tensor as_strided(const at::Tensor& tensor, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                             std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(tensor, sizes, strides, offset);
}

inline at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef sizes) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes));
}

inline at::Tensor unfold(const at::Tensor& tensor, int64_t dimension, int64_t size, int64_t step) {
  return at::native::unfold(tensor, dimension, size, step);
}

inline at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& source) {
  return at::native::set_tensor_(tensor, source);
}

inline at::Tensor& set_storage(at::Tensor& tensor, at::Storage source) {
  return at::native::set_(tensor, std::move(source));
}

inline at::Tensor& set_strided(at::Tensor& tensor, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef sizes,
                               c10::SymIntArrayRef strides) {
  return at::cpu::set__symint(tensor, std::move(source), std::move(offset), sizes, strides);
}

// scaled_dot_product_attention as its definition, from operators that run here.
inline int64_t attention_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, double, bool, std::optional<double>, bool) {
  return static_cast<int64_t>(at::SDPBackend::math);
}

inline void record_stream(at::Tensor&, c10::Stream) {}

// Lets `parameter.data = tensor_on_another_device` keep the parameter, as module.to() and FSDP's offload do.
inline bool has_compatible_shallow_copy_type(const at::Tensor& one, const at::Tensor& other) {
  return one.layout() == at::kStrided && other.layout() == at::kStrided;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("resize_", resize);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("unfold", unfold);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_strided);
  library.impl("_fused_sdp_choice", attention_choice);
  library.impl("record_stream", record_stream);
  library.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { library.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  using namespace at;           // the macros name PyTorch's operators without it
  using namespace at::autocast;
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  LOWER(linear) LOWER(matmul) LOWER(mm) LOWER(bmm) LOWER(addmm) LOWER(addbmm) LOWER(baddbmm) LOWER(mv)
  LOWER(scaled_dot_product_attention)
  FLOAT32(exp) FLOAT32(log) FLOAT32(rsqrt) FLOAT32(softplus) FLOAT32(layer_norm) FLOAT32(cumsum) FLOAT32(nll_loss)
  FLOAT32(cross_entropy_loss) FLOAT32(mse_loss)
#undef LOWER
#undef FLOAT32
}

}  // namespace simulated

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &simulated::attention_choice)
}
