// Collectives: what the documentation of the vendor's library allows, carried out by a library of the host.
//
// Data types are those that the documentation of the extension for PyTorch 2.13 lists for each operation, and for
// all_gather uint8 and int64 too: all_gather_object and DistributedDataParallel, which it lists as well, gather them.
#pragma once

#include "memory.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <set>

namespace simulated {

using Dtypes = std::set<at::ScalarType>;
using Tensors = std::vector<at::Tensor>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

inline const Dtypes kMoved{at::kBFloat16, at::kHalf, at::kFloat, at::kDouble, at::kByte,
                           at::kChar,     at::kShort, at::kInt,  at::kLong,   at::kBool};
inline const Dtypes kGathered{at::kBFloat16, at::kHalf, at::kFloat, at::kByte,
                              at::kChar,     at::kInt,  at::kLong,  at::kBool};
inline const Dtypes kExchanged{at::kFloat};
inline const Dtypes kAllReduced{at::kBFloat16, at::kHalf, at::kFloat, at::kInt, at::kLong, at::kBool};
inline const Dtypes kReduced{at::kBFloat16, at::kHalf, at::kFloat, at::kByte,
                             at::kChar,     at::kInt,  at::kLong,  at::kBool};
inline const Dtypes kScattered{at::kBFloat16, at::kHalf, at::kFloat, at::kChar, at::kInt};

// A host's work that ends with a step of the device's own; its results are the device's tensors.
class DeviceWork final : public c10d::Work {
 public:
  DeviceWork(WorkPtr work, Tensors results, std::function<void()> last = {})
      : work_(std::move(work)), results_(std::move(results)), last_(std::move(last)) {}

  bool isCompleted() override { return work_->isCompleted(); }
  bool isSuccess() const override { return work_->isSuccess(); }
  std::exception_ptr exception() const override { return work_->exception(); }
  int sourceRank() const override { return work_->sourceRank(); }
  void synchronize() override { wait(kNoTimeout); }
  Tensors result() override { return results_; }
  bool wait(std::chrono::milliseconds timeout) override {
    const bool done = work_->wait(timeout);
    if (last_) std::exchange(last_, {})();
    return done;
  }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    wait(kNoTimeout);
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future->markCompleted(c10::IValue(results_));
    return future;
  }

 private:
  WorkPtr work_;
  Tensors results_;
  std::function<void()> last_;
};

class Hccl final : public c10d::Backend {
 public:
  explicit Hccl(c10::intrusive_ptr<c10d::Backend> host)
      : c10d::Backend(host->getRank(), host->getSize()), host_(std::move(host)) {}

  const std::string getBackendName() const override { return "hccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { host_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { host_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return host_->getSequenceNumberForGroup(); }
  void abort() override { host_->abort(); }
  void shutdown() override { host_->shutdown(); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto lent = bytes_of(tensors, "broadcast", kMoved, tensors);
    return work(host_->broadcast(lent, options), tensors);
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto lent = numbers_of(tensors, "all_reduce", kAllReduced, tensors);
    auto asked = options;
    asked.reduceOp = host_reduction(options.reduceOp, tensors);
    return work(host_->allreduce(lent, asked), tensors, average(options.reduceOp, tensors));
  }

  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto lent = numbers_of(tensors, "reduce", kReduced, tensors);
    auto asked = options;
    asked.reduceOp = host_reduction(options.reduceOp, tensors);
    return work(host_->reduce(lent, asked), tensors, average(options.reduceOp, tensors));
  }

  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    auto from = numbers_of({input}, "reduce_scatter", kScattered, {input}).front();
    auto to = numbers_of({output}, "reduce_scatter", kScattered, {}).front();
    auto asked = options;
    asked.reduceOp = host_reduction(options.reduceOp, {input});
    return work(host_->_reduce_scatter_base(to, from, asked), {output}, average(options.reduceOp, {output}));
  }

  WorkPtr reduce_scatter(Tensors& outputs, std::vector<Tensors>& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    std::vector<Tensors> from{numbers_of(inputs.at(0), "reduce_scatter", kScattered, inputs.at(0))};
    auto to = numbers_of(outputs, "reduce_scatter", kScattered, {});
    auto asked = options;
    asked.reduceOp = host_reduction(options.reduceOp, outputs);
    return work(host_->reduce_scatter(to, from, asked), outputs, average(options.reduceOp, outputs));
  }

  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    auto from = numbers_of(inputs, "reduce_scatter", kScattered, inputs);
    auto to = numbers_of(outputs, "reduce_scatter", kScattered, {});
    auto asked = options;
    asked.reduceOp = host_reduction(options.reduceOp, inputs);
    return work(host_->reduce_scatter_tensor_coalesced(to, from, asked), outputs, average(options.reduceOp, outputs));
  }

  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto from = bytes_of({input}, "all_gather", kGathered, {input}).front();
    auto to = bytes_of({output}, "all_gather", kGathered, {}).front();
    return work(host_->_allgather_base(to, from, options), {output});
  }

  WorkPtr allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto from = bytes_of(inputs, "all_gather", kGathered, inputs);
    std::vector<Tensors> to{bytes_of(outputs.at(0), "all_gather", kGathered, {})};
    return work(host_->allgather(to, from, options), outputs.at(0));
  }

  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    auto from = bytes_of(inputs, "all_gather", kGathered, inputs);
    auto to = bytes_of(outputs, "all_gather", kGathered, {});
    return work(host_->allgather_into_tensor_coalesced(to, from, options), outputs);
  }

  WorkPtr gather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto from = bytes_of(inputs, "gather", kGathered, inputs);
    std::vector<Tensors> to;
    for (const auto& list : outputs) to.push_back(bytes_of(list, "gather", kGathered, {}));
    return work(host_->gather(to, from, options), outputs.empty() ? Tensors{} : outputs.front());
  }

  WorkPtr scatter(Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ScatterOptions& options) override {
    std::vector<Tensors> from;
    for (const auto& list : inputs) from.push_back(bytes_of(list, "scatter", kMoved, list));
    auto to = bytes_of(outputs, "scatter", kMoved, {});
    return work(host_->scatter(to, from, options), outputs);
  }

  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_rows,
                        std::vector<int64_t>& input_rows, const c10d::AllToAllOptions& options) override {
    TORCH_CHECK(input.dim() > 0 && output.dim() > 0, "HCCL all_to_all: a tensor of no dimension cannot be split");
    auto from = numbers_of({input}, "all_to_all", kExchanged, {input}).front();
    auto to = numbers_of({output}, "all_to_all", kExchanged, {}).front();
    return work(host_->alltoall_base(to, from, output_rows, input_rows, options), {output});
  }

  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    for (const auto& tensor : inputs) {
      TORCH_CHECK(tensor.dim() > 0, "HCCL all_to_all: a tensor of no dimension cannot be sent");
    }
    auto from = numbers_of(inputs, "all_to_all", kExchanged, inputs);
    auto to = numbers_of(outputs, "all_to_all", kExchanged, {});
    std::vector<int64_t> sent, received;
    const auto flat = [](const Tensors& parts, std::vector<int64_t>& sizes) {
      Tensors rows;
      for (const auto& part : parts) {
        rows.push_back(part.reshape({-1}));
        sizes.push_back(part.numel());
      }
      return at::cat(rows);
    };
    auto packed = flat(from, sent), arrived = flat(to, received);
    const auto spread = [to, arrived, received] {  // with its own sizes: the host's library takes those it is given
      const auto parts = arrived.split_with_sizes(received);
      for (size_t i = 0; i < to.size(); i++) at::Tensor(to[i]).copy_(parts[i].view(to[i].sizes()));
    };
    return work(host_->alltoall_base(arrived, packed, received, sent, options), outputs, spread);
  }

  WorkPtr send(Tensors& tensors, int to, int tag) override {
    auto lent = bytes_of(tensors, "send", kMoved, tensors);
    return work(host_->send(lent, to, tag), tensors);
  }

  WorkPtr recv(Tensors& tensors, int from, int tag) override {
    auto lent = bytes_of(tensors, "recv", kMoved, tensors);
    return work(host_->recv(lent, from, tag), tensors);
  }

  WorkPtr recvAnysource(Tensors&, int) override {
    TORCH_CHECK(false, "HCCL recv: the rank to receive from must be named, receiving from any is not supported");
  }

  WorkPtr barrier(const c10d::BarrierOptions& options) override { return work(host_->barrier(options), {}); }

 private:
  static void check(const at::Tensor& tensor, const char* operation, const Dtypes& dtypes) {
    TORCH_CHECK(tensor.is_privateuseone(), "HCCL ", operation, ": No backend type associated with device type ",
                tensor.device().type(), ", tensors must be on npu");
    TORCH_CHECK(tensor.layout() == at::kStrided && tensor.is_contiguous(), "HCCL ", operation,
                ": Tensors must be contiguous");
    TORCH_CHECK(dtypes.count(tensor.scalar_type()), "HCCL ", operation, ": Unsupported data type ",
                tensor.scalar_type());
    const auto* block = DeviceMemory::block_of(tensor);
    TORCH_CHECK(!block || block->format != kFractalNz, "HCCL ", operation, ": the memory of a tensor is moved as it "
                "lies, and this one lies in the private format FRACTAL_NZ; cast it to ND first");
  }

  // Counts the bytes that this rank puts in.
  static void count_input(const char* operation, const Tensors& tensors) {
    int64_t bytes = 0;
    for (const auto& tensor : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
    if (!tensors.empty()) count(&Counters::collectives, operation, bytes);
  }

  static Tensors numbers_of(const Tensors& tensors, const char* operation, const Dtypes& dtypes, const Tensors& input) {
    Tensors lent;
    for (const auto& tensor : tensors) {
      check(tensor, operation, dtypes);
      auto host = on_host(tensor);
      lent.push_back(host.scalar_type() == at::kBool ? host.view(at::kByte) : host);
    }
    count_input(operation, input);
    return lent;
  }

  // What is only moved is moved as bytes: every data type, whatever the host's library knows.
  static Tensors bytes_of(const Tensors& tensors, const char* operation, const Dtypes& dtypes, const Tensors& input) {
    Tensors lent;
    for (const auto& tensor : tensors) {
      check(tensor, operation, dtypes);
      lent.push_back(at::from_blob(tensor.data_ptr(), {static_cast<int64_t>(tensor.nbytes())}, [tensor](void*) {},
                                   at::TensorOptions(at::kByte)));
    }
    count_input(operation, input);
    return lent;
  }

  // A mean is a sum that is divided afterwards; a sum of truth values is their maximum.
  static c10d::ReduceOp host_reduction(const c10d::ReduceOp& asked, const Tensors& tensors) {
    const c10d::ReduceOp::RedOpType type = asked;
    switch (type) {
      case c10d::ReduceOp::AVG:
        return c10d::ReduceOp::SUM;
      case c10d::ReduceOp::SUM:
        return tensors.front().scalar_type() == at::kBool ? c10d::ReduceOp::MAX : c10d::ReduceOp::SUM;
      case c10d::ReduceOp::PRODUCT:
      case c10d::ReduceOp::MAX:
      case c10d::ReduceOp::MIN:
        return type;
      default:
        TORCH_CHECK(false, "HCCL: Unsupported reduction, there are SUM, AVG, PRODUCT, MAX and MIN");
    }
  }

  std::function<void()> average(const c10d::ReduceOp& asked, const Tensors& tensors) const {
    const c10d::ReduceOp::RedOpType type = asked;
    if (type != c10d::ReduceOp::AVG) return {};
    return [tensors, size = size_] {
      for (const auto& tensor : tensors) {
        auto host = on_host(tensor);
        if (host.is_floating_point()) {
          host.div_(size);
        } else {
          host.floor_divide_(size);
        }
      }
    };
  }

  static WorkPtr work(WorkPtr host, const Tensors& results, std::function<void()> last = {}) {
    return c10::make_intrusive<DeviceWork>(std::move(host), results, std::move(last));
  }

  c10::intrusive_ptr<c10d::Backend> host_;
};

}  // namespace simulated
