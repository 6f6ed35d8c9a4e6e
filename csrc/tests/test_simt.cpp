// machines/simt.h: it counts what kernels move, and each kind of mistake that it promises to see is seen.
#include <numeric>

#include "check.h"
#include "machines/simt.h"

namespace {

using namespace dia::simt;

// What the launch says is wrong; empty if nothing is.
template <class Kernel>
std::string complaint(Device& device, const Grid& grid, Kernel kernel) {
  try {
    device.launch(grid, kernel);
  } catch (const LaunchError& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Values of a tensor at a phase of `shift` elements behind a sector's begin.
template <class T>
struct Buffer {
  std::vector<char> memory;
  T* data;
  int64_t count;

  explicit Buffer(int64_t count, int64_t shift = 0) : memory((count + shift) * sizeof(T) + 64), count(count) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    data = reinterpret_cast<T*>((address + 31) / 32 * 32) + shift;
    for (int64_t k = 0; k < count; ++k) data[k] = static_cast<T>(k % 7);
  }
};

void bytes_and_sectors_are_counted() {
  for (int64_t shift : {0, 1}) {
    Device device;
    Buffer<float> x(256, shift), y(256);
    device.tensor("x", x.data, 256, true);
    device.tensor("y", y.data, 256, false);
    const Report report = device.launch({.threads = 64}, [&](Thread& m) {
      for (int k = m.thread(); k < 256; k += m.threads()) m.store(y.data + k, m.load(x.data + k));
    });
    const Counts read = report.tensors.at("x"), written = report.tensors.at("y");
    CHECK_EQUAL(read.bytes_read, 1024);
    CHECK_EQUAL(read.bytes_written, 0);
    CHECK_EQUAL(written.bytes_written, 1024);
    CHECK_EQUAL(written.sectors_written, 32);
    // A warp's 128 bytes lie in four sectors, or in five where they begin inside of one.
    CHECK_EQUAL(read.sectors_read, shift == 0 ? 32 : 40);
    for (int64_t k = 0; k < 256; ++k) CHECK_EQUAL(y.data[k], x.data[k]);
  }
}

void wide_accesses_move_sixteen_bytes() {
  Device device;
  Buffer<float> x(128), y(128);
  device.tensor("x", x.data, 128, true);
  device.tensor("y", y.data, 128, false);
  const Report report = device.launch(
      {.threads = 32}, [&](Thread& m) { m.store_pack(y.data + 4 * m.lane(), m.load_pack(x.data + 4 * m.lane())); });
  CHECK_EQUAL(report.tensors.at("x").sectors_read, 16);
  CHECK(has(complaint(device, {.threads = 32}, [&](Thread& m) { m.load_pack(x.data + 1 + m.lane()); }), "misaligned"));
}

void strided_accesses_cost_a_sector_each() {
  Device device;
  Buffer<float> x(32 * 8);
  device.tensor("x", x.data, x.count, true);
  const Report report = device.launch({.threads = 32}, [&](Thread& m) { m.load(x.data + 8 * m.lane()); });
  CHECK_EQUAL(report.tensors.at("x").sectors_read, 32);
}

void accesses_out_of_bounds() {
  Device device;
  Buffer<float> x(40);
  device.tensor("x", x.data + 4, 32, true);
  CHECK(has(complaint(device, {}, [&](Thread& m) { m.load(x.data + 5 + m.lane()); }), "out of bounds"));
  CHECK(has(complaint(device, {}, [&](Thread& m) { m.store(x.data + 3 + m.lane(), 0.0f); }), "out of bounds"));
  CHECK(has(complaint(device, {}, [&](Thread& m) { m.load_pack(x.data + 4 * (m.lane() + 2)); }), "out of bounds"));
  CHECK(has(complaint(device, {.shared_bytes = 128}, [&](Thread& m) { m.shared<float>(32)[m.lane() + 1] = 0; }),
            "out of bounds"));
  CHECK(has(complaint(device, {.shared_bytes = 127}, [&](Thread& m) { m.shared<float>(32); }), "shared memory"));
}

void gaps_of_a_slice_are_not_to_be_touched() {
  Device device;
  Buffer<float> x(64);
  device.tensor("x", x.data, 64, true);
  for (int64_t k = 32; k < 64; k += 2) device.last().cells[k].allowed = false;
  CHECK_EQUAL(complaint(device, {}, [&](Thread& m) { m.load(x.data + m.lane()); }), "");
  CHECK(has(complaint(device, {}, [&](Thread& m) { m.load(x.data + 32 + m.lane()); }), "no element"));
}

void reads_of_what_nothing_wrote() {
  Device device;
  Buffer<float> y(32);
  device.tensor("y", y.data, 32, false);
  CHECK(has(complaint(device, {}, [&](Thread& m) { m.load(y.data + m.lane()); }), "nothing was written"));
  CHECK(has(complaint(device, {.shared_bytes = 128},
                      [&](Thread& m) { m.store(y.data, static_cast<float>(m.shared<float>(32)[m.lane()])); }),
            "nothing was written"));
}

// Each thread writes its place and reads that of another, `distance` threads on, after a barrier.
template <class Sync>
std::string exchange(Grid grid, int distance, Sync sync) {
  Device device;
  const int count = grid.blocks * grid.threads;
  Buffer<float> x(count), y(count);
  device.tensor("x", x.data, count, false);
  device.tensor("y", y.data, count, false);
  return complaint(device, grid, [&](Thread& m) {
    const int self = m.block() * m.threads() + m.thread();
    m.store(x.data + self, 1.0f);
    sync(m);
    m.store(y.data + self, m.load(x.data + (self + distance) % count));
  });
}

void a_barrier_must_cover_both_threads() {
  const Grid warp{.threads = 32}, block{.threads = 64}, blocks{.blocks = 2, .threads = 64};
  const Grid cluster{.blocks = 2, .threads = 64, .cluster = 2}, clusters{.blocks = 4, .threads = 64, .cluster = 2};
  const auto none = [](Thread&) {};
  const auto by_warp = [](Thread& m) { m.sync_warp(); };
  const auto by_block = [](Thread& m) { m.sync_block(); };
  const auto by_cluster = [](Thread& m) { m.sync_cluster(); };
  for (uint64_t seed = 0; seed < 5; ++seed) {
    const auto at = [seed](Grid shape) {
      shape.seed = seed;
      return shape;
    };
    CHECK(has(exchange(at(warp), 1, none), "race") || has(exchange(at(warp), 1, none), "nothing was written"));
    CHECK_EQUAL(exchange(at(warp), 1, by_warp), "");
    CHECK(exchange(at(block), 32, by_warp) != "");
    CHECK_EQUAL(exchange(at(block), 32, by_block), "");
    CHECK(exchange(at(blocks), 64, by_block) != "");
    // Blocks of a cluster run together; others do not.
    CHECK_EQUAL(exchange(at(cluster), 64, by_cluster), "");
    CHECK_EQUAL(exchange(at(cluster), 32, by_cluster), "");
    CHECK(exchange(at(cluster), 64, by_block) != "");
    CHECK(exchange(at(clusters), 64, by_cluster) != "");
  }
}

void a_place_is_not_written_while_others_may_still_read_it() {
  // Every thread reads the first place; then one writes it.
  const auto run = [](bool barrier) {
    Device device;
    Buffer<float> x(64);
    device.tensor("x", x.data, 64, true);
    return complaint(device, {.threads = 64}, [&](Thread& m) {
      m.load(x.data);
      if (barrier) m.sync_block();
      if (m.thread() == 40) m.store(x.data, 0.0f);
    });
  };
  CHECK(has(run(false), "race, written"));
  CHECK_EQUAL(run(true), "");
}

// Each block reads a place, and one of them writes it behind a barrier of its own.
void blocks_do_not_order_each_other() {
  const auto run = [](int blocks, uint64_t seed) {
    Device device;
    Buffer<float> x(1);
    device.tensor("x", x.data, 1, true);
    return complaint(device, {.blocks = blocks, .threads = 64, .seed = seed}, [&](Thread& m) {
      m.load(x.data);
      m.sync_block();
      if (m.block() == 0 && m.thread() == 40) m.store(x.data, 0.0f);
    });
  };
  for (uint64_t seed = 0; seed < 5; ++seed) {
    CHECK_EQUAL(run(1, seed), "");
    for (const int blocks : {2, 3}) CHECK(has(run(blocks, seed), "race"));
  }
}

// A whole cluster has to come to its barrier, and each block has shared memory of its own.
void blocks_of_a_cluster() {
  Device device;
  Buffer<float> y(128);
  device.tensor("y", y.data, 128, false);
  const Grid grid{.blocks = 4, .threads = 32, .cluster = 2, .shared_bytes = 128};
  const Report report = device.launch(grid, [&](Thread& m) {
    const auto own = m.shared<float>(32);
    own[m.lane()] = static_cast<float>(m.block());
    m.sync_cluster();
    m.store(y.data + 32 * m.block() + m.lane(), static_cast<float>(own[31 - m.lane()]));
  });
  CHECK_EQUAL(report.passed[kClusterScope], 1);
  for (int k = 0; k < 128; ++k) CHECK_EQUAL(y.data[k], static_cast<float>(k / 32));
  CHECK(has(complaint(device, grid,
                      [](Thread& m) {
                        if (m.block() % 2 == 0) m.sync_cluster();
                      }),
            "deadlock: 32 threads have finished, 32 wait at the cluster barrier test_simt.cpp"));
  CHECK(has(complaint(device, {.blocks = 3, .threads = 32, .cluster = 2}, [](Thread&) {}), "whole clusters"));
}

void two_writes_are_a_race_too() {
  Device device;
  Buffer<float> x(32);
  device.tensor("x", x.data, 32, false);
  CHECK(has(complaint(device, {}, [&](Thread& m) { m.store(x.data + m.lane() / 2, 1.0f); }), "race, written"));
}

void a_barrier_left_out_is_a_race() {
  Device device;
  Buffer<float> y(64);
  device.tensor("y", y.data, 64, false);
  const auto kernel = [&](Thread& m) {
    const auto values = m.shared<float>(64);
    values[m.thread()] = 1;
    m.sync_block();
    m.store(y.data + m.thread(), static_cast<float>(values[63 - m.thread()]));
  };
  Grid grid{.threads = 64, .shared_bytes = 256};
  const Report report = device.launch(grid, kernel);
  CHECK_EQUAL(report.barriers.size(), 1u);
  CHECK_EQUAL(report.barriers.begin()->second, 64);
  CHECK_EQUAL(report.passed[kBlockScope], 1);
  CHECK_EQUAL(report.shared_bytes, 256u);
  const Site site = report.barriers.begin()->first;
  grid.without = &site;
  const std::string text = complaint(device, grid, kernel);
  CHECK(has(text, "race") || has(text, "nothing was written"));
}

void threads_must_come_to_the_same_barrier() {
  Device device;
  const auto two_places = [](Thread& m) {
    if (m.warp() == 0)
      m.sync_block();
    else
      m.sync_block();
  };
  const auto one_warp_only = [](Thread& m) {
    if (m.warp() == 0) m.sync_block();
  };
  const auto half_a_warp = [](Thread& m) {
    if (m.lane() < 16) m.warp_sum(1.0f);
  };
  CHECK(has(complaint(device, {.threads = 64}, two_places), "divergence"));
  CHECK(has(complaint(device, {.threads = 64}, one_warp_only),
            "deadlock: 32 threads have finished, 32 wait at the block barrier test_simt.cpp"));
  CHECK(has(complaint(device, {}, half_a_warp), "deadlock"));
}

// A launch that may begin before the one before has ended.
void a_launch_waits_for_the_one_before() {
  Device device;
  Buffer<float> x(32), y(32), z(32);
  device.tensor("x", x.data, 32, true), device.tensor("y", y.data, 32, true), device.tensor("z", z.data, 32, true);
  const Grid behind{.threads = 32, .behind = true};
  const auto before = [&](Thread& m) {
    m.wait_for_kernel();
    m.store(y.data + m.thread(), m.load(x.data + m.thread()));
  };
  const auto after = [&](float* early, bool writes) {
    CHECK_EQUAL(complaint(device, behind, before), "");
    return complaint(device, behind, [&](Thread& m) {
      if (writes)
        m.store(early + m.thread(), 1.0f);
      else
        m.load(early + m.thread());
      m.wait_for_kernel();
      m.store(x.data + m.thread(), m.load(y.data + m.thread()));
    });
  };
  // What that one has read may be read, what it has not touched written.
  CHECK_EQUAL(after(x.data, false), "");
  CHECK_EQUAL(after(z.data, true), "");
  CHECK(has(after(y.data, false), "y at element"));
  CHECK(has(after(y.data, false), "race, the kernel before was not waited for"));
  CHECK(has(after(x.data, true), "race, the kernel before was not waited for"));
  // Two launches later it is over, as the one between has waited.
  CHECK_EQUAL(complaint(device, behind, before), "");
  CHECK_EQUAL(complaint(device, behind, [&](Thread& m) { m.wait_for_kernel(); }), "");
  CHECK_EQUAL(complaint(device, behind,
                        [&](Thread& m) {
                          m.load(y.data + m.thread());
                          m.wait_for_kernel();
                        }),
              "");
  CHECK(has(complaint(device, behind, [](Thread&) {}), "the launch may end before the kernel before"));
  // Of a launch that is not known anything may have been touched.
  const auto early = [&](Thread& m) {
    m.load(z.data + m.thread());
    m.wait_for_kernel();
  };
  CHECK_EQUAL(complaint(device, behind, before), "");
  CHECK_EQUAL(complaint(device, behind, early), "");
  launch_before().be_unknown();
  CHECK(has(complaint(device, behind, early), "z at element"));
  // A copy may read as soon as it is begun.
  const auto copies = [&](const float* from) {
    CHECK_EQUAL(complaint(device, behind, before), "");
    return complaint(device, {.threads = 32, .shared_bytes = 128, .behind = true}, [&](Thread& m) {
      const auto to = m.shared<float>(32);
      m.copy<1>(to, m.thread(), from + m.thread(), 1);
      m.wait_for_kernel();
      m.commit_copies();
      m.wait_copies<0>();
    });
  };
  CHECK_EQUAL(copies(z.data), "");
  CHECK(has(copies(y.data), "a copy at test_simt.cpp"));
  // A launch that is not behind another waits for nobody.
  CHECK_EQUAL(complaint(device, {.threads = 32}, [&](Thread& m) { m.load(y.data + m.thread()); }), "");
}

void sums_of_a_warp() {
  Device device;
  Buffer<float> y(64);
  device.tensor("y", y.data, 64, false);
  device.launch({.threads = 64}, [&](Thread& m) {
    const float total = m.warp_sum(static_cast<float>(m.thread()));
    m.store(y.data + m.thread(), total + m.warp_sum(1.0f));
  });
  for (int k = 0; k < 64; ++k) CHECK_EQUAL(y.data[k], k < 32 ? 496.0f + 32 : 496.0f + 1024 + 32);
}

void the_order_of_blocks_and_threads_depends_on_the_seed_only() {
  const auto order = [](uint64_t seed) {
    Device device;
    std::vector<int> seen;
    device.launch({.blocks = 3, .threads = 32, .seed = seed},
                  [&](Thread& m) { seen.push_back(m.block() * 32 + m.lane()); });
    return seen;
  };
  CHECK(order(1) == order(1));
  CHECK(order(1) != order(2));
}

}  // namespace

int main() {
  bytes_and_sectors_are_counted();
  wide_accesses_move_sixteen_bytes();
  strided_accesses_cost_a_sector_each();
  accesses_out_of_bounds();
  gaps_of_a_slice_are_not_to_be_touched();
  reads_of_what_nothing_wrote();
  a_barrier_must_cover_both_threads();
  a_place_is_not_written_while_others_may_still_read_it();
  blocks_do_not_order_each_other();
  blocks_of_a_cluster();
  two_writes_are_a_race_too();
  a_barrier_left_out_is_a_race();
  threads_must_come_to_the_same_barrier();
  a_launch_waits_for_the_one_before();
  sums_of_a_warp();
  the_order_of_blocks_and_threads_depends_on_the_seed_only();
  return dia::test::failures == 0 ? 0 : 1;
}
