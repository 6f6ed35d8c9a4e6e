#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tensors.h"

namespace dia::ops {

// A fresh map of tens of megabytes costs more in page faults than in arithmetic: 100 MB written once
// took 52 ms in 4 KiB pages and 14 ms in 2 MiB pages (AMD EPYC 7003, two cores), where writing to
// memory already mapped takes 8 ms. Allocators map large blocks anew each time (glibc: above 32 MiB
// at most), so the advice holds for each such result; it is free where pages are there already, and
// without effect where transparent huge pages are switched off.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  constexpr int64_t least = int64_t{8} << 20;
  if (bytes < least) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / page * page;
  // A hint: its failure (an old kernel, pages switched off) changes nothing but speed.
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dia::ops
