// The device itself: random numbers, streams and events, and what PyTorch asks of an accelerator.
#pragma once

#include "memory.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/profiler/stubs/base.h>

#include <atomic>
#include <chrono>

namespace simulated {

// A seed and an offset, 8 bytes each, as on the real device: DTensor's random number tracker takes no other state.
class Generator final : public c10::GeneratorImpl {
 public:
  explicit Generator(DeviceIndex device)
      : c10::GeneratorImpl(Device(kNpu, device), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}

  void set_current_seed(uint64_t seed) override { state_ = {seed, 0}; }
  uint64_t current_seed() const override { return state_.seed; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return state_.seed;
  }
  void set_offset(uint64_t offset) override { state_.offset = offset; }
  uint64_t get_offset() const override { return state_.offset; }

  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    auto bytes = at::empty({sizeof(State)}, at::kByte);
    std::memcpy(bytes.data_ptr(), &state_, sizeof(State));
    return bytes.getIntrusivePtr();
  }
  void set_state(const c10::TensorImpl& bytes) override {
    TORCH_CHECK(bytes.numel() == sizeof(State) && bytes.is_cpu() && bytes.dtype() == at::kByte,
                "the state of an npu generator is a uint8 tensor of ", sizeof(State), " elements on the host");
    std::memcpy(&state_, bytes.data(), sizeof(State));
  }

  // The seed of one operator's random numbers. Mixed as in SplitMix64: neighbouring offsets give unlike seeds.
  uint64_t next() {
    uint64_t mixed = state_.seed + (state_.offset / 4 + 1) * 0x9E3779B97F4A7C15ULL;
    state_.offset += 4;
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    return mixed ^ (mixed >> 31);
  }

 private:
  struct State {
    uint64_t seed, offset;
  };

  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->state_ = state_;
    return copy;
  }

  State state_{67280421310721ULL, 0};  // PyTorch's default seed
};

inline const at::Generator& default_generator(DeviceIndex device) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < device_count(); i++) made.push_back(at::make_generator<Generator>(i));
    return made;
  }();
  return all.at(or_current(device));
}

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return maybeExchangeDevice(device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    const auto before = current_device;
    set_current_device(device);
    return before;
  }

  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory(); }
  bool isPinnedPtr(const void* pointer) const override { return pinned_memory().has(pointer); }

  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<Generator>(or_current(device));
  }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    const c10::DeviceGuard guard(impl->device());
    auto grown = device_memory().allocate(bytes);
    if (bytes && impl->data()) std::memcpy(grown.get(), impl->data(), std::min(bytes, impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(grown));
    impl->set_nbytes(bytes);
  }
};

inline thread_local std::map<DeviceIndex, int64_t> current_stream;

// Work is done when its call returns, so that waiting for it is never wrong; streams and events keep order and time.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr c10::DeviceType static_type = kNpu;

  c10::DeviceType type() const override { return kNpu; }
  Device getDevice() const override { return Device(kNpu, current_device); }
  void setDevice(Device device) const override { set_current_device(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }

  c10::Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  c10::Stream getStream(Device device) const override {
    return stream(device, current_stream[or_current(device.index())]);
  }
  c10::Stream getNewStream(Device device, int) const override {
    static std::atomic<int64_t> last{0};
    return stream(device, ++last);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const auto before = std::exchange(current_stream[next.device_index()], next.id());
    return stream(next.device(), before);
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}

  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* from, void* to, const DeviceIndex) const override {
    TORCH_CHECK(from && to, "both events must be recorded before the time between them is asked for");
    const auto passed = *static_cast<Clock::time_point*>(to) - *static_cast<Clock::time_point*>(from);
    return std::chrono::duration<double, std::milli>(passed).count();
  }

 private:
  using Clock = std::chrono::steady_clock;

  static c10::Stream stream(Device device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, Device(kNpu, or_current(device.index())), id);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// What PyTorch's profiler asks of a device: times of events, here the host's.
class Profiler final : public torch::profiler::impl::ProfilerStubs {
 public:
  using Event = torch::profiler::impl::ProfilerVoidEventStub;

  void record(DeviceIndex* device, Event* event, int64_t* host_ns) const override {
    if (device) *device = current_device;
    const int64_t now = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
    *event = std::make_shared<int64_t>(now);
    if (host_ns) *host_ns = now;
  }
  float elapsed(const Event* from, const Event* to) const override {  // microseconds
    const auto time = [](const Event* event) { return *static_cast<const int64_t*>(event->get()); };
    return static_cast<float>(time(to) - time(from)) / 1e3f;
  }
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)> function) const override {
    for (int i = 0; i < device_count(); i++) function(i);
  }
  void synchronize() const override {}
};

}  // namespace simulated
