// A call's tasks, shared among the threads of XLA's pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace {

// Calls work(0) to work(count - 1), each once, and returns when all of them have returned: the
// caller and its helpers take tasks until none is left. A helper may wake up when the call is over,
// so it holds what it looks at, and calls work, with the arrays behind it, only for a task it got.
template <typename Work>
void share(xla::ffi::ThreadPool threads, int64_t count, Work work) {
  struct Tasks {
    const int64_t count;
    Work work;
    std::atomic<int64_t> next{0}, done{0};
    void drain() { for (int64_t i; (i = next++) < count; ++done) work(i); }
  };
  const std::shared_ptr<Tasks> tasks(new Tasks{count, std::move(work)});
  for (int64_t i = 1; i < std::min<int64_t>(threads.num_threads(), count); ++i)
    threads.Schedule([tasks] { tasks->drain(); });
  tasks->drain();
  while (tasks->done < count) std::this_thread::yield();
}

}  // namespace
