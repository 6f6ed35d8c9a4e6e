// Checks for the C++ tests: a test is a program, and every failed check is one line and a non-zero exit status.
#pragma once

#include <iostream>

namespace dia::test {

inline int failures = 0;

inline void check(bool holds, const char* text, const char* file, int line) {
  if (holds) return;
  ++failures;
  std::cerr << file << ":" << line << ": failed: " << text << "\n";
}

template <class Actual, class Expected>
void check_equal(const Actual& actual, const Expected& expected, const char* text, const char* file, int line) {
  if (actual == expected) return;
  ++failures;
  std::cerr << file << ":" << line << ": failed: " << text << " is " << actual << ", expected " << expected << "\n";
}

}  // namespace dia::test

#define CHECK(condition) dia::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_EQUAL(actual, expected) dia::test::check_equal((actual), (expected), #actual, __FILE__, __LINE__)
