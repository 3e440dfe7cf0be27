// Recorded work: the calls of operators between begin and end, done again on the same memory by every replay.
#pragma once

#include "runtime.h"

#include <functional>
#include <vector>

namespace simulated {

class Graph {
 public:
  void begin() {
    TORCH_CHECK(current() == nullptr, "a graph is being recorded already");
    TORCH_CHECK(calls_.empty(), "the graph was recorded already");
    current() = this;
  }
  void end() { current() = nullptr; }
  void replay() const {
    TORCH_CHECK(current() == nullptr, "a graph cannot be replayed while one is recorded");
    for (const auto& call : calls_) call();
  }

  // Adds work to the graph that is being recorded, if one is.
  static void record(const std::function<void()>& call) {
    if (current()) current()->calls_.push_back(call);
  }
  static bool recording() { return current() != nullptr; }
  static void refuse(const char* what) {
    TORCH_CHECK(!recording(), what, " is not permitted while a graph is recorded: the host does not wait then");
  }

 private:
  static Graph*& current() {
    static thread_local Graph* graph = nullptr;
    return graph;
  }

  std::vector<std::function<void()>> calls_;
};

}  // namespace simulated
