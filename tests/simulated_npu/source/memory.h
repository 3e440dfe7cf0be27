// Device memory: host memory that is accounted for per device and limited.
#pragma once

#include "runtime.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <cstring>
#include <set>

namespace simulated {

constexpr size_t kGranularity = 512;  // bytes; caching allocators of accelerators round up to this
constexpr int kFormatUnset = -1;     // as allocated: PyTorch's own layout
constexpr int kFractalNz = 29;       // the vendor's number of a layout that only its kernels read

struct Account {
  int64_t bytes = 0, peak = 0, ever = 0;      // rounded bytes: now, at most, of all allocations together
  int64_t blocks = 0, allocations = 0, ooms = 0;
  int64_t limit = variable("SIMULATED_NPU_MEMORY_BYTES", int64_t{8} << 30);
};

struct Block {
  size_t bytes;
  DeviceIndex device;
  void* memory;
  int format;
};

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const auto device = current_device;
    const size_t rounded = (bytes + kGranularity - 1) / kGranularity * kGranularity;
    open_account(device, static_cast<int64_t>(rounded), bytes);
    void* memory = nullptr;
    if (rounded) TORCH_CHECK(posix_memalign(&memory, kGranularity, rounded) == 0, "the host has no memory left");
    return {memory, new Block{rounded, device, memory, kFormatUnset}, &release, Device(kNpu, device)};
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto& account = accounts_[device];
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* sums : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      auto& sum = (*sums)[0];
      sum.current = account.bytes;
      sum.peak = account.peak;
      sum.allocated = account.ever;
      sum.freed = account.ever - account.bytes;
    }
    stats.allocation[0].current = account.blocks;
    stats.allocation[0].allocated = account.allocations;
    stats.num_ooms = account.ooms;
    return stats;
  }

  void resetAccumulatedStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    accounts_[device].ever = accounts_[device].bytes;
    accounts_[device].allocations = accounts_[device].blocks;
  }

  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    accounts_[device].peak = accounts_[device].bytes;
  }

  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto& account = accounts_[device];
    return {std::max<int64_t>(0, account.limit - account.bytes), account.limit};
  }

  Account account(DeviceIndex device) {
    std::lock_guard<std::mutex> lock(mutex_);
    return accounts_[device];
  }

  void set_limit(DeviceIndex device, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    accounts_[device].limit = bytes;
  }

  static Block* block_of(const at::Tensor& tensor) {
    const auto& pointer = tensor.storage().data_ptr();
    return pointer.get_deleter() == &release ? static_cast<Block*>(pointer.get_context()) : nullptr;
  }

 private:
  void open_account(DeviceIndex device, int64_t rounded, size_t asked) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto& account = accounts_[device];
    if (account.bytes + rounded > account.limit) {
      account.ooms += 1;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "NPU out of memory. Tried to allocate ", asked, " bytes (NPU ",
                       static_cast<int>(device), "; ", account.limit, " bytes total capacity; ", account.bytes,
                       " bytes already allocated)");
    }
    account.bytes += rounded;
    account.ever += rounded;
    account.peak = std::max(account.peak, account.bytes);
    account.blocks += 1;
    account.allocations += 1;
  }

  static void release(void* context);

  std::mutex mutex_;
  Account accounts_[kMostDevices];
};

inline DeviceMemory& device_memory() {
  static auto* instance = new DeviceMemory;  // tensors may outlive static objects
  return *instance;
}

inline void DeviceMemory::release(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(device_memory().mutex_);
    auto& account = device_memory().accounts_[block->device];
    account.bytes -= static_cast<int64_t>(block->bytes);
    account.blocks -= 1;
  }
  std::free(block->memory);
  delete block;
}

// Host memory that a device may copy from without the help of the processor. Here only its name is different.
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, 64, std::max<size_t>(bytes, 64)) == 0, "the host has no memory left");
    std::lock_guard<std::mutex> lock(mutex_);
    pinned_.insert(memory);
    return {memory, memory, &release, Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }

  bool has(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    return pinned_.count(const_cast<void*>(pointer)) > 0;
  }

 private:
  static void release(void* memory);

  std::mutex mutex_;
  std::set<void*> pinned_;
};

inline PinnedMemory& pinned_memory() {
  static auto* instance = new PinnedMemory;
  return *instance;
}

inline void PinnedMemory::release(void* memory) {
  {
    std::lock_guard<std::mutex> lock(pinned_memory().mutex_);
    pinned_memory().pinned_.erase(memory);
  }
  std::free(memory);
}

REGISTER_ALLOCATOR(kNpu, &device_memory());

}  // namespace simulated
