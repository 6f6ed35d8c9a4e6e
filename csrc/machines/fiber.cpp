#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define DIA_FIBER_SANITIZED 1
#endif

// void dia_switch_stack(void** save, void* load): keeps this stack's pointer in *save, goes on with the stack `load`.
extern "C" void dia_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl dia_switch_stack
.hidden dia_switch_stack
.type dia_switch_stack, @function
dia_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dia_switch_stack, .-dia_switch_stack
)");
// Six registers, then the address to return to, which a call leaves 8 bytes below a multiple of 16.
static constexpr size_t kFrameWords = 8, kReturnWord = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl dia_switch_stack
.hidden dia_switch_stack
.type dia_switch_stack, %function
dia_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size dia_switch_stack, .-dia_switch_stack
)");
static constexpr size_t kFrameWords = 20, kReturnWord = 11;
#else
#error "the simulated GPU has fibers for x86-64 and aarch64 only"
#endif

namespace dia::simt {
namespace {

#if defined(DIA_FIBER_SANITIZED)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// At the end of each stack: looked at whenever its fiber pauses.
constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11;

thread_local Fiber* current = nullptr;
thread_local void* scheduler_stack_pointer = nullptr;

#if defined(DIA_FIBER_SANITIZED)
thread_local const void* scheduler_bottom = nullptr;
thread_local size_t scheduler_bytes = 0;
#endif

// Tells the address sanitizer that the stack changes; `save` is null where the stack left will not be used again.
void leave([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t bytes) {
#if defined(DIA_FIBER_SANITIZED)
  __sanitizer_start_switch_fiber(save, bottom, bytes);
#endif
}

void arrive([[maybe_unused]] void* fake, [[maybe_unused]] bool from_scheduler) {
#if defined(DIA_FIBER_SANITIZED)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake, &bottom, &bytes);
  if (from_scheduler) scheduler_bottom = bottom, scheduler_bytes = bytes;
#endif
}

void leave_for_scheduler([[maybe_unused]] void** save) {
#if defined(DIA_FIBER_SANITIZED)
  leave(save, scheduler_bottom, scheduler_bytes);
#endif
}

}  // namespace

// A stack's pages are the system's until they are touched.
Fiber::Fiber() {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
}

Fiber::~Fiber() { munmap(memory_, kStackBytes); }

void Fiber::reset(void (*function)(void*), void* argument) {
  function_ = function;
  argument_ = argument;
  finished_ = false;
  fake_stack_ = nullptr;
#if defined(DIA_FIBER_SANITIZED)
  ASAN_UNPOISON_MEMORY_REGION(memory_, kStackBytes);  // of the frames that an abandoned run left
#endif
  *reinterpret_cast<uint64_t*>(memory_) = kCanary;
  auto* frame = reinterpret_cast<uintptr_t*>(memory_ + kStackBytes) - kFrameWords;
  for (size_t k = 0; k < kFrameWords; ++k) frame[k] = 0;
  frame[kReturnWord] = reinterpret_cast<uintptr_t>(&Fiber::enter);
  stack_pointer_ = frame;
}

void Fiber::enter() {
  arrive(nullptr, true);
  Fiber* self = current;
  self->function_(self->argument_);
  self->finished_ = true;
  leave_for_scheduler(nullptr);
  dia_switch_stack(&self->stack_pointer_, scheduler_stack_pointer);
}

void Fiber::resume() {
  current = this;
  void* fake = nullptr;
  leave(&fake, memory_, kStackBytes);
  dia_switch_stack(&scheduler_stack_pointer, stack_pointer_);
  arrive(fake, false);
  current = nullptr;
  if (*reinterpret_cast<uint64_t*>(memory_) != kCanary) throw std::runtime_error("a fiber's stack overflowed");
}

void Fiber::pause() {
  Fiber* self = current;
  leave_for_scheduler(&self->fake_stack_);
  dia_switch_stack(&self->stack_pointer_, scheduler_stack_pointer);
  arrive(self->fake_stack_, true);
}

}  // namespace dia::simt
