#include "parallel.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#include "api.h"

namespace mra {
namespace {

// torch_parallel_for(begin, end, grain, function, context) of torch's stable C interface.
using ParallelFor = int (*)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
ParallelFor parallel_for = nullptr;

constexpr long kMostThreads = 256;
// Buffers that are kept between calls: fresh memory would cost a page fault for each 4 kB.
constexpr int kKept = 64;
constexpr size_t kMostKeptBytes = size_t{256} << 20;

struct Buffer {
  void* data;
  size_t bytes;
};
Buffer kept[kKept];
int kept_count = 0;
size_t kept_bytes = 0;
bool is_locked = false;

// Never waits: a lock that is held, by another thread or in the parent of a fork, means malloc.
bool try_lock() { return !__atomic_test_and_set(&is_locked, __ATOMIC_ACQUIRE); }
void unlock() { __atomic_clear(&is_locked, __ATOMIC_RELEASE); }

Buffer take_buffer(size_t bytes) {
  if (try_lock()) {
    for (int i = kept_count - 1; i >= 0; i--)
      if (kept[i].bytes >= bytes) {
        Buffer found = kept[i];
        kept_bytes -= found.bytes;
        kept[i] = kept[--kept_count];
        unlock();
        return found;
      }
    // One that is too small makes way, so that growing lengths do not pile up buffers.
    if (kept_count) {
      kept_bytes -= kept[--kept_count].bytes;
      free(kept[kept_count].data);
    }
    unlock();
  }
  void* data = nullptr;
  return posix_memalign(&data, 64, bytes) ? Buffer{nullptr, 0} : Buffer{data, bytes};
}

void give_back(Buffer buffer) {
  if (try_lock()) {
    bool fits = kept_count < kKept && kept_bytes + buffer.bytes <= kMostKeptBytes;
    if (fits) kept[kept_count++] = buffer, kept_bytes += buffer.bytes;
    unlock();
    if (fits) return;
  }
  free(buffer.data);
}

struct Job {
  long items, next;
  size_t threads, next_buffer;
  Buffer buffers[kMostThreads];
  Work work;
  void* context;
};

void run_some(Job* job) {
  size_t mine = __atomic_fetch_add(&job->next_buffer, 1, __ATOMIC_RELAXED);
  if (mine >= job->threads) return;  // more runners than asked for
  char* scratch = static_cast<char*>(job->buffers[mine].data);
  for (;;) {
    long item = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (item >= job->items) return;
    job->work(job->context, item, scratch);
  }
}

void run_on_threads(Job* job) {
  pthread_t others[kMostThreads];
  size_t started = 0;
  auto start = [](void* p) -> void* { return run_some(static_cast<Job*>(p)), nullptr; };
  while (started + 1 < job->threads && !pthread_create(&others[started], nullptr, start, job))
    started++;
  run_some(job);
  for (size_t i = 0; i < started; i++) pthread_join(others[i], nullptr);
}

}  // namespace

bool run_items(long items, long threads, size_t bytes, Work work, void* context) {
  Job job{items, 0, 0, 0, {}, work, context};
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > items) threads = items;
  size_t wanted = threads < 1 ? 1 : static_cast<size_t>(threads);
  for (; job.threads < wanted; job.threads++) {
    Buffer buffer = take_buffer(bytes);
    if (!buffer.data) break;  // fewer threads then
    job.buffers[job.threads] = buffer;
  }
  if (!job.threads) return false;
  if (job.threads == 1)
    run_some(&job);
  else if (parallel_for)
    parallel_for(
        0, static_cast<int64_t>(job.threads), 1,
        [](int64_t begin, int64_t end, void* p) {
          for (; begin < end; begin++) run_some(static_cast<Job*>(p));
        },
        &job);
  else
    run_on_threads(&job);
  for (size_t i = 0; i < job.threads; i++) give_back(job.buffers[i]);
  return true;
}

}  // namespace mra

extern "C" __attribute__((visibility("default"))) void mra_set_parallel_for(void* function) {
  mra::parallel_for = reinterpret_cast<mra::ParallelFor>(function);
}
