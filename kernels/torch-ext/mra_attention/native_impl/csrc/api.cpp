#include "api.h"

#include <cstdlib>
#include <iterator>

#include "cpu.h"
#include "head.h"
#include "parallel.h"

namespace mra {
namespace {

struct IsaRow {
  bool (*is_supported)();
  const KernelTable* (*kernels)();
};

bool always() { return true; }

// Best first.
constexpr IsaRow kIsas[] = {
#if defined(__x86_64__)
    {has_amx, kernels_amx},
    {has_avx512, kernels_avx512},
    {has_avx2, kernels_avx2},
#endif
    {always, kernels_base},
};

const KernelTable* kernels_of(int64_t index) {
  // Asked once: cpuid leaves a virtual machine, which takes longer than a small call. Threads that
  // ask at once write the same.
  static int known[std::size(kIsas)];  // 0: not asked, 1: no, 2: yes
  for (size_t i = 0; i < std::size(kIsas); i++) {
    int is_supported = __atomic_load_n(&known[i], __ATOMIC_RELAXED);
    if (!is_supported) {
      is_supported = kIsas[i].is_supported() ? 2 : 1;
      __atomic_store_n(&known[i], is_supported, __ATOMIC_RELAXED);
    }
    if (is_supported == 2 && index-- <= 0) return kIsas[i].kernels();
  }
  return nullptr;
}

// The key blocks of a sample: parts of its blocks, in an array of their own where they are
// narrower.
void read_key_blocks(int width, int n_blocks, int padded_keys, char* memory, Sample& sample) {
  sample.key_real = sample.real, sample.key_counts = sample.counts, sample.live_keys = sample.live;
  if (width == kBlock) return;
  int per_block = kBlock / width;
  sample.key_real = reinterpret_cast<uint32_t*>(memory);
  sample.key_counts = reinterpret_cast<float*>(memory + 4L * padded_keys);
  sample.live_keys = 0;
  for (int y = 0; y < n_blocks * per_block; y++) {
    uint32_t real = sample.real[y / per_block] >> y % per_block * width & all_real(width);
    sample.key_real[y] = real;
    sample.key_counts[y] = static_cast<float>(__builtin_popcount(real));
    sample.live_keys += real != 0;
  }
}

// Memory of all samples, in one piece.
bool read_samples(const MraCall& call, int width, int n_blocks, int padded, int padded_keys,
                  Sample* samples, void** memory) {
  size_t bytes = static_cast<size_t>(padded) * (4 + 4 + 4) + static_cast<size_t>(padded_keys) * 8;
  char* at = static_cast<char*>(*memory = calloc(static_cast<size_t>(call.batch), bytes));
  if (!at) return false;
  for (int64_t b = 0; b < call.batch; b++, at += bytes) {
    Sample& sample = samples[b];
    sample.real = reinterpret_cast<uint32_t*>(at);
    sample.counts = reinterpret_cast<float*>(at + 4L * padded);
    sample.is_first = reinterpret_cast<uint8_t*>(at + 8L * padded);
    sample.live = 0;
    for (int y = 0; y < n_blocks; y++) {
      uint32_t real = 0;
      for (int i = 0; i < kBlock; i++) {
        int64_t token = static_cast<int64_t>(y) * kBlock + i;
        bool is_real =
            token < call.length && (!call.token_mask || call.token_mask[b * call.length + token]);
        real |= static_cast<uint32_t>(is_real) << i;
      }
      sample.real[y] = real;
      sample.counts[y] = static_cast<float>(__builtin_popcount(real));
      sample.live += real != 0;
      sample.is_first[y] = call.first_blocks > 0 && sample.live <= call.first_blocks;
    }
    read_key_blocks(width, n_blocks, padded_keys, at + 12L * padded, sample);
  }
  return true;
}

using HeadPass = void (*)(const Shape& shape, long item, Arena arena, size_t* bytes);

int round_up(int blocks) { return (blocks + kBlock - 1) / kBlock * kBlock; }

struct PassOfCall {
  const Shape& shape;
  HeadPass pass;
};

// `pass_bf16`: the pass where the kernels have products of bfloat16.
int run(const MraCall& call, HeadPass pass, HeadPass pass_bf16) {
  const KernelTable* kernels = kernels_of(call.isa < 0 ? 0 : call.isa);
  if (!kernels) return 1;
  if (kernels->bf16 && call.dtype == kBFloat16 && call.scale > 0) pass = pass_bf16;
  int multiple = kernels->dim_multiple;
  int dim = (static_cast<int>(call.dim) + multiple - 1) / multiple * multiple;
  int n_blocks = static_cast<int>((call.length + kBlock - 1) / kBlock);
  // Where every live pair is selected, squares are the same pairs.
  bool has_pairs = call.blocks || call.new_blocks;
  int width = has_pairs ? static_cast<int>(call.key_block_size) : kBlock;
  int n_keys = n_blocks * (kBlock / width);
  int padded = round_up(n_blocks), padded_keys = round_up(n_keys);
  auto* samples = static_cast<Sample*>(calloc(static_cast<size_t>(call.batch), sizeof(Sample)));
  void* memory = nullptr;
  bool is_done =
      samples && read_samples(call, width, n_blocks, padded, padded_keys, samples, &memory);
  if (is_done) {
    Shape shape{call, *kernels, dim, n_blocks, padded, width, n_keys, padded_keys, samples};
    size_t bytes = 0;
    pass(shape, 0, Arena(), &bytes);
    PassOfCall context{shape, pass};
    is_done = run_items(
        call.batch * call.heads, call.threads, bytes,
        [](void* p, long item, char* scratch) {
          const auto& of = *static_cast<PassOfCall*>(p);
          of.pass(of.shape, item, Arena(scratch), nullptr);
        },
        &context);
  }
  free(memory);
  free(samples);
  return is_done ? 0 : 1;
}

}  // namespace
}  // namespace mra

#define MRA_EXPORT extern "C" __attribute__((visibility("default")))

MRA_EXPORT int mra_select(const MraCall* call) {
  return mra::run(*call, mra::select_head, mra::select_head);
}
MRA_EXPORT int mra_forward(const MraCall* call) {
  return mra::run(*call, mra::forward_head, mra::forward_head_bf16);
}
MRA_EXPORT int mra_backward(const MraCall* call) {
  return mra::run(*call, mra::backward_head, mra::backward_head_bf16);
}
MRA_EXPORT const char* mra_isa_name(int64_t index) {
  const mra::KernelTable* kernels = index < 0 ? nullptr : mra::kernels_of(index);
  return kernels ? kernels->name : nullptr;
}
MRA_EXPORT int64_t mra_call_bytes() { return sizeof(MraCall); }
