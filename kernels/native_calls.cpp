// Runs calls of the CPU kernels that come over standard input: how tests reach a library for
// another machine (emulate_native.py). Numbers are 64 bits, little-endian.
//
//   call:   pass (0 select, 1 forward, 2 backward), MraCall, number of arrays, then for each array
//           its pointer's offset in MraCall, its bytes, 1 if it is read, and then its content
//   answer: what the pass returned, and the content of each array that is not read
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "api.h"

namespace {

struct Array {
  int64_t offset, bytes, is_read;
};
constexpr int64_t kMostArrays = 32;

bool read_all(void* to, size_t bytes) { return !bytes || fread(to, bytes, 1, stdin) == 1; }
void write_all(const void* from, size_t bytes) {
  if (bytes && fwrite(from, bytes, 1, stdout) != 1) exit(1);
}

void answer(int64_t pass) {
  MraCall call;
  int64_t count;
  Array arrays[kMostArrays];
  char* contents[kMostArrays];
  if (!read_all(&call, sizeof call) || !read_all(&count, 8) || count > kMostArrays) exit(1);
  for (int64_t i = 0; i < count; i++) {
    if (!read_all(&arrays[i], sizeof(Array))) exit(1);
    contents[i] = static_cast<char*>(malloc(static_cast<size_t>(arrays[i].bytes) + 1));
    memset(contents[i], 0xff, static_cast<size_t>(arrays[i].bytes));
    if (arrays[i].is_read && !read_all(contents[i], arrays[i].bytes)) exit(1);
    memcpy(reinterpret_cast<char*>(&call) + arrays[i].offset, &contents[i], sizeof(char*));
  }
  int64_t result = pass == 0   ? mra_select(&call)
                   : pass == 1 ? mra_forward(&call)
                               : mra_backward(&call);
  write_all(&result, 8);
  for (int64_t i = 0; i < count; i++) {
    if (!arrays[i].is_read) write_all(contents[i], arrays[i].bytes);
    free(contents[i]);
  }
  fflush(stdout);
}

}  // namespace

int main() {
  for (int64_t pass; read_all(&pass, 8);) answer(pass);
}
