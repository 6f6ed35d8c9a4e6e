// A fiber: a function with a stack of its own that can pause and be resumed. The simulated GPU runs each of its
// threads as one. x86-64 and aarch64; a switch saves only the registers that a function call preserves.
#pragma once

#include <cstddef>

namespace dia::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Sets the fiber to call `function(argument)` from the beginning, whatever it was doing before.
  void reset(void (*function)(void*), void* argument);
  // Runs the fiber until it pauses or its function returns. Not from inside a fiber.
  void resume();
  // Inside a fiber: back to whoever resumed it.
  static void pause();

  bool finished() const { return finished_; }

 private:
  static void enter();

  char* memory_;
  void* stack_pointer_ = nullptr;
  void* fake_stack_ = nullptr;  // the address sanitizer's
  void (*function_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
};

}  // namespace dia::simt
