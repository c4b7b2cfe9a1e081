// Work items over threads, and scratch memory that is used again.
#pragma once

#include <cstddef>

namespace mra {

using Work = void (*)(void* context, long item, char* scratch);

// Runs work(context, i, scratch) for i < items, each exactly once, with `bytes` of scratch aligned
// to 64 for each thread. Which thread runs an item must not matter. Returns false without memory,
// and nothing was run.
bool run_items(long items, long threads, size_t bytes, Work work, void* context);

}  // namespace mra
