// A GPU simulated on the CPU, as a Machine for the kernels of csrc/kernels: every thread of every block is a fiber, and
// every access to memory goes through the machine, which therefore knows what no profiler tells:
//
//   * bytes and 32-byte sectors read and written, of each tensor; barriers passed
//   * races: two accesses to a place, one of them a write, with no barrier between them that covers both threads
//   * accesses out of bounds, misaligned vectors, reads of memory that nothing wrote
//   * threads that wait at different barriers, and barriers that not all threads come to
//
// Clusters of blocks run one after the other, and nothing orders them; the blocks of one run together. Clusters and
// threads run in an order shuffled by a seed, each thread until it waits. What it cannot see (docs/simulated-gpu.md):
// memory fences, stale caches, contraction of multiply-adds, time.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../core/elements.h"
#include "../kernels/machine.h"
#include "fiber.h"

namespace dia::simt {

constexpr int kWarp = 32;
constexpr int64_t kSectorBytes = 32;

// What a barrier covers.
enum Scope { kWarpScope, kBlockScope, kClusterScope, kScopes };
inline const char* scope_name(int scope) {
  static const char* names[] = {"warp", "block", "cluster"};
  return names[scope];
}

struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in the kernels' source: which access or barrier this is.
struct Site {
  std::string_view file;
  uint32_t line = 0, column = 0;
  friend auto operator<=>(const Site&, const Site&) = default;
};

inline std::string text_of(const Site& site) {
  const std::string file(site.file);
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line);
}

// The shape of a launch. Its blocks come in clusters of neighbours.
struct Grid {
  int blocks = 1, threads = kWarp, cluster = 1;
  size_t shared_bytes = 0;
  uint64_t seed = 0;  // of the order in which clusters and threads run
  // Whether the launch before may still run: threads have to wait for it before they touch anything of that one's, and
  // one at least by its end.
  bool behind = false;
  // A barrier to leave out: nobody waits there. Tests show with it that it is needed.
  const Site* without = nullptr;
};

// --- memory and what is known about each place of it ------------------------------------------------

// Who did something, and how many barriers of each scope that thread had passed.
struct Moment {
  static constexpr int32_t kNobody = -1, kSeveral = -2;
  int32_t thread = kNobody, warp = kNobody, block = kNobody, cluster = kNobody;
  std::array<uint32_t, kScopes> epochs{};

  // Whether all of this came before `now`: same thread, or a barrier in between that covers both.
  bool before(const Moment& now) const {
    return block == kNobody || thread == now.thread ||
           (warp == now.warp && now.epochs[kWarpScope] > epochs[kWarpScope]) ||
           (block == now.block && now.epochs[kBlockScope] > epochs[kBlockScope]) ||
           (cluster == now.cluster && now.epochs[kClusterScope] > epochs[kClusterScope]);
  }

  // This and another, neither before the other: what is after both is after the result.
  void join(const Moment& other) {
    if (thread != other.thread) thread = kSeveral;
    if (warp != other.warp) warp = kSeveral;
    if (block != other.block) block = kSeveral;
    if (cluster != other.cluster) cluster = kSeveral;
    for (int k = 0; k < kScopes; ++k) epochs[k] = std::max(epochs[k], other.epochs[k]);
  }
};

struct Cell {
  Moment writer, readers;
  bool defined = false, allowed = true;
};

struct Counts {
  int64_t bytes_read = 0, bytes_written = 0, sectors_read = 0, sectors_written = 0;
};

// A tensor in global memory. Places that no element of it has (the gaps of a slice) are not allowed.
struct TensorMemory {
  std::string name;
  char* begin = nullptr;
  int64_t element_bytes = 0;
  std::vector<Cell> cells;
  Counts counts;

  char* end() const { return begin + static_cast<int64_t>(cells.size()) * element_bytes; }
};

// What a launch did.
struct Report {
  std::map<std::string, Counts> tensors;
  std::map<Site, int64_t> barriers;       // threads' passes, by place in the source
  std::array<int64_t, kScopes> passed{};  // the most barriers of a scope that a thread passed
  size_t shared_bytes = 0;                // the most that a block took
};

// What the launch before touched: on a GPU it may still run until a thread waits for it. It may also be somebody
// else's, of which nothing is known.
class LaunchBefore {
 public:
  void be_unknown() { unknown_ = true; }
  void remember(const std::vector<TensorMemory>& tensors) {
    tensors_.clear(), unknown_ = false;
    for (const TensorMemory& memory : tensors) {
      Touched touched{memory.begin, memory.element_bytes, std::vector<How>(memory.cells.size(), How::not_at_all)};
      for (size_t k = 0; k < memory.cells.size(); ++k) {
        const Cell& cell = memory.cells[k];
        if (cell.writer.block != Moment::kNobody)
          touched.how[k] = How::written;
        else if (cell.readers.block != Moment::kNobody)
          touched.how[k] = How::read;
      }
      tensors_.push_back(std::move(touched));
    }
  }
  // Whether it matters to whoever reads or writes these bytes when that launch ends.
  bool concerns(const char* begin, int64_t bytes, bool write) const {
    if (unknown_) return true;
    for (const Touched& touched : tensors_) {
      const int64_t first = std::max<int64_t>(begin - touched.begin, 0) / touched.element_bytes;
      for (int64_t k = first; k < static_cast<int64_t>(touched.how.size()); ++k) {
        if (touched.begin + k * touched.element_bytes >= begin + bytes) break;
        if (touched.how[k] == How::written || (write && touched.how[k] == How::read)) return true;
      }
    }
    return false;
  }

 private:
  enum class How : signed char { not_at_all, read, written };
  struct Touched {
    char* begin;
    int64_t element_bytes;
    std::vector<How> how;
  };
  std::vector<Touched> tensors_;
  bool unknown_ = true;
};

// Of this process's launches, whatever their devices.
inline LaunchBefore& launch_before() {
  static LaunchBefore before;
  return before;
}

class Thread;

// Global memory, and launches. Not for several threads at once.
class Device {
 public:
  // Makes `count` elements at `data` known. `defined`: whether they hold values.
  template <class T>
  T* tensor(const std::string& name, T* data, int64_t count, bool defined) {
    using Plain = std::remove_const_t<T>;
    TensorMemory memory;
    memory.name = name;
    memory.begin = reinterpret_cast<char*>(const_cast<Plain*>(data));
    memory.element_bytes = sizeof(T);
    memory.cells.resize(count);
    for (Cell& cell : memory.cells) cell.defined = defined;
    tensors_.push_back(std::move(memory));
    return data;
  }
  TensorMemory& last() { return tensors_.back(); }
  // Forgets who touched what: between two launches everything is ordered.
  void settle() {
    for (TensorMemory& memory : tensors_)
      for (Cell& cell : memory.cells) cell.writer = cell.readers = Moment();
  }

  template <class Kernel>
  Report launch(const Grid& grid, Kernel kernel);

  TensorMemory* find(const void* address) {
    const char* at = static_cast<const char*>(address);
    for (TensorMemory& memory : tensors_)
      if (at >= memory.begin && at < memory.end()) return &memory;
    return nullptr;
  }

 private:
  std::vector<TensorMemory> tensors_;
};

// --- a launch ------------------------------------------------------------------------------------------

// Those who wait at a barrier of one scope.
struct Meeting {
  int arrived = 0;
  Site site{};
};

// A block: its shared memory, and its barriers.
struct Block {
  int index = 0;
  std::vector<char> shared;  // bytes, sixteen-aligned
  std::vector<Cell> cells;   // one for two bytes
  std::vector<Meeting> warps;
  Meeting meeting;

  char* base() { return shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16; }
};

class Run;

// An array in the block's shared memory.
template <class T>
class Shared;

// One thread of the simulated GPU: the Machine that the kernels see.
class Thread {
 public:
  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }
  int warps() const { return threads_ / kWarp; }
  int block() const { return block_->index; }
  int blocks() const { return blocks_; }

  void sync_warp(std::source_location where = std::source_location::current()) { wait(kWarpScope, where); }
  void sync_block(std::source_location where = std::source_location::current()) { wait(kBlockScope, where); }
  void sync_cluster(std::source_location where = std::source_location::current()) { wait(kClusterScope, where); }

  // The sum over the lanes of a group of `width` neighbours that lie a multiple of `stride` apart (powers of two), in
  // each of them: lane l adds that of lane l ^ width / 2, then l ^ width / 4, ... The whole warp comes here together.
  template <class V>
  V warp_sum(V value, int stride = 1, int width = kWarp, std::source_location where = std::source_location::current());

  // Until here what the kernel before wrote must not be touched, nor what it read be written.
  void wait_for_kernel() { waited_ = true; }

  // An array in shared memory, the same for all threads of the block that ask in the same order.
  template <class T>
  Shared<T> shared(int64_t count);

  template <class T>
  std::remove_const_t<T> load(T* from, std::source_location where = std::source_location::current()) {
    std::remove_const_t<T> value;
    touch_global(from, 1, sizeof(T), false, where);
    std::memcpy(&value, from, sizeof(T));
    return value;
  }
  template <class T>
  void store(T* to, T value, std::source_location where = std::source_location::current()) {
    touch_global(to, 1, sizeof(T), true, where);
    std::memcpy(to, &value, sizeof(T));
  }
  template <class T>
  Pack<std::remove_const_t<T>> load_pack(T* from, std::source_location where = std::source_location::current()) {
    Pack<std::remove_const_t<T>> pack;
    touch_global(from, decltype(pack)::size, sizeof(T), false, where);
    std::memcpy(&pack, from, sizeof(pack));
    return pack;
  }
  template <class T>
  void store_pack(T* to, const Pack<T>& pack, std::source_location where = std::source_location::current()) {
    touch_global(to, Pack<T>::size, sizeof(T), true, where);
    std::memcpy(to, &pack, sizeof(pack));
  }

  // A copy is made at some time between here and the wait for its group: what was there is gone at once, and what is
  // to come there last; from memory that is ready now.
  template <int kCount, class Array>
  void copy(const Array& array, int index, const float* from, int there,
            std::source_location where = std::source_location::current()) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
    if (there > 0 && reinterpret_cast<uintptr_t>(from) % (4 * kCount) != 0) fail("a copy: misaligned values");
    if (there > 0 && too_early(from, there * static_cast<int64_t>(sizeof(float)), false))
      fail("a copy at " + text_of(site_of(where)) + ": race, the kernel before was not waited for");
    for (int k = 0; k < kCount; ++k) array[index + k] = std::numeric_limits<float>::quiet_NaN();
    copies_.push_back([this, array, index, from, there, where] {
      float values[kCount] = {};
      if (there < 4) {
        for (int k = 0; k < there; ++k) values[k] = load(from + k, where);
      } else {
        touch_global(from, there, sizeof(float), false, where);
        std::memcpy(values, from, sizeof(values));
      }
      for (int k = 0; k < kCount; ++k) array[index + k] = values[k];
    });
  }
  void commit_copies() {
    groups_.push_back(std::move(copies_));
    copies_.clear();
  }
  template <int kPending>
  void wait_copies() {
    for (; groups_.size() > kPending; groups_.pop_front())
      for (const auto& copy : groups_.front()) copy();
  }

  template <class T>
  static float widen(T value) {
    return dia::widen(value);
  }
  template <class T>
  static T narrow(float value) {
    T result;
    dia::narrow(value, &result);
    return result;
  }
  // Products of pieces: see kernels/machine.h.
  using Left = kernels::PlainSide;
  using Right = kernels::PlainSide;
  template <class Array>
  Left left(const Array& memory, int at, int element, int term) const {
    return kernels::plain_side(memory, at + kernels::piece_row(*this, 0) * element,
                               at + kernels::piece_row(*this, 2) * element, term);
  }
  template <class Array>
  Right right(const Array& memory, int at, int element, int term) const {
    return kernels::plain_side(memory, at + kernels::piece_column(*this, 0) * element,
                               at + kernels::piece_column(*this, 1) * element, term);
  }
  static void multiply(float (&large)[4], float (&)[4], const Left& left, const Right& right) {
    kernels::plain_multiply(large, left, right);
  }

  static float exp(float value) { return std::exp(value); }
  static float tanh(float value) { return std::tanh(value); }
  static float sqrt(float value) { return std::sqrt(value); }

  [[noreturn]] void fail(const std::string& what) const;

 private:
  friend class Device;
  friend class Run;
  template <class T>
  friend class Shared;

  static Site site_of(const std::source_location& where) { return {where.file_name(), where.line(), where.column()}; }
  Moment now() const {
    Moment moment;
    moment.thread = global_;
    moment.warp = global_ / kWarp;
    moment.block = block_->index;
    moment.cluster = cluster_;
    moment.epochs = epochs_;
    return moment;
  }
  void wait(Scope scope, const std::source_location& where);
  void touch_global(const void* at, int count, size_t element_bytes, bool write, const std::source_location& where);
  // Whether an access would have to wait for the launch before.
  bool too_early(const void* at, int64_t bytes, bool write) const;
  // `first` and `count` in cells; `what` makes the name for a message.
  template <class Name>
  void touch(Cell* cells, int64_t first, int64_t count, bool write, const Moment& moment, Name what);

  Run* run_ = nullptr;
  Block* block_ = nullptr;
  int thread_ = 0, threads_ = 0, blocks_ = 0, cluster_ = 0, global_ = 0;
  std::array<uint32_t, kScopes> epochs_{};
  std::array<int64_t, kScopes> passed_{};
  size_t shared_taken_ = 0;
  bool waiting_ = false, waited_ = false;
  int waits_for_ = 0;
  Site waits_at_{};
  double value_ = 0;
  std::vector<std::function<void()>> copies_;  // begun since the last group
  std::deque<std::vector<std::function<void()>>> groups_;
  TensorMemory* recent_ = nullptr;
  Fiber* fiber_ = nullptr;
};

template <class T>
class Shared {
 public:
  // A place of the array: reads and writes through it are checked.
  class Place {
   public:
    Place(const Shared& array, int64_t index) : array_(array), index_(index) {}
    operator T() const {
      T value;
      std::memcpy(&value, array_.touch(index_, 1, false), sizeof(T));
      return value;
    }
    const Place& operator=(T value) const {
      std::memcpy(array_.touch(index_, 1, true), &value, sizeof(T));
      return *this;
    }
    const Place& operator=(const Place& other) const { return *this = static_cast<T>(other); }

   private:
    Shared array_;
    int64_t index_;
  };

  Shared() = default;
  Shared(Thread* thread, size_t offset, int64_t count) : thread_(thread), offset_(offset), count_(count) {}

  Place operator[](int64_t index) const { return {*this, index}; }
  Pack<T> pack(int64_t index) const {
    Pack<T> pack;
    std::memcpy(&pack, touch(index, Pack<T>::size, false), sizeof(pack));
    return pack;
  }

 private:
  char* touch(int64_t index, int count, bool write) const {
    const auto name = [&](int64_t) { return "shared memory at element " + std::to_string(index); };
    if (index < 0 || index + count > count_)
      thread_->fail(name(0) + " of " + std::to_string(count_) + ": out of bounds");
    const size_t byte = offset_ + index * sizeof(T);
    if (count > 1 && byte % 16 != 0) thread_->fail(name(0) + ": misaligned vector");
    thread_->touch(thread_->block_->cells.data(), byte / 2, count * sizeof(T) / 2, write, thread_->now(), name);
    return thread_->block_->base() + byte;
  }

  Thread* thread_ = nullptr;
  size_t offset_ = 0;
  int64_t count_ = 0;
};

// The sectors that a warp touches by one access in the source: the k-th time that each lane comes to it counts as one
// instruction.
struct WarpAccesses {
  std::array<uint32_t, kWarp> times{};
  std::vector<std::vector<int64_t>> sectors;
};

// A launch under way.
class Run {
 public:
  Run(Device& device, const Grid& grid, void (*body)(void*, Thread&), void* kernel)
      : device(device), grid(grid), body_(body), kernel_(kernel), random_(grid.seed) {}

  void all() {
    if (grid.threads % kWarp != 0) throw LaunchError("threads: expected a multiple of 32");
    if (grid.blocks % grid.cluster != 0) throw LaunchError("blocks: expected whole clusters");
    std::vector<int> order(grid.blocks / grid.cluster);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_);
    for (int cluster : order) run(cluster);
    // Whoever comes behind waits for this launch alone. That it cannot end sooner, one thread is enough.
    if (grid.behind && !waited_) throw LaunchError("the launch may end before the kernel before: none of it waited");
    for (auto& [key, accesses] : accesses_) {
      Counts& counts = std::get<0>(key)->counts;
      for (const auto& sectors : accesses.sectors)
        (std::get<3>(key) ? counts.sectors_written : counts.sectors_read) += static_cast<int64_t>(sectors.size());
    }
  }

  void count_sectors(TensorMemory* memory, int warp, int lane, const Site& site, bool write, int64_t first,
                     int64_t last) {
    WarpAccesses& accesses = accesses_[{memory, warp, site, write}];
    const uint32_t time = accesses.times[lane]++;
    if (accesses.sectors.size() <= time) accesses.sectors.resize(time + 1);
    auto& sectors = accesses.sectors[time];
    for (int64_t sector = first; sector <= last; ++sector)
      if (std::find(sectors.begin(), sectors.end(), sector) == sectors.end()) sectors.push_back(sector);
  }

  Meeting& meeting(Thread& thread, int scope) {
    if (scope == kClusterScope) return meeting_;
    return scope == kWarpScope ? thread.block_->warps[thread.warp()] : thread.block_->meeting;
  }
  int members(int scope) const {
    return scope == kWarpScope ? kWarp : scope == kBlockScope ? grid.threads : grid.threads * grid.cluster;
  }
  // Lets everybody at the barrier of `thread` go on.
  void release(Thread& thread, int scope) {
    Thread* first =
        scope == kClusterScope ? threads_.data() : &thread - (scope == kWarpScope ? thread.lane() : thread.thread());
    for (Thread* other = first; other < first + members(scope); ++other) {
      other->waiting_ = false;
      for (int k = 0; k <= scope; ++k) ++other->epochs_[k];
      ++other->passed_[scope];
    }
    meeting(thread, scope) = Meeting();
  }
  Thread& lane_of(const Thread& thread, int lane) { return threads_[&thread - threads_.data() - thread.lane() + lane]; }

  Device& device;
  const Grid& grid;
  Report report;

 private:
  // Runs the blocks of a cluster to their ends.
  void run(int cluster) {
    blocks_.assign(grid.cluster, Block());
    threads_.assign(static_cast<size_t>(grid.cluster) * grid.threads, Thread());
    meeting_ = Meeting();
    while (fibers().size() < threads_.size()) fibers().push_back(std::make_unique<Fiber>());
    for (int k = 0; k < grid.cluster; ++k) {
      Block& block = blocks_[k];
      block.index = cluster * grid.cluster + k;
      block.shared.resize(grid.shared_bytes + 16);
      block.cells.resize((grid.shared_bytes + 1) / 2);
      block.warps.resize(grid.threads / kWarp);
      for (int t = 0; t < grid.threads; ++t) {
        const int at = k * grid.threads + t;
        Thread& thread = threads_[at];
        thread.run_ = this;
        thread.block_ = &block;
        thread.thread_ = t, thread.threads_ = grid.threads, thread.blocks_ = grid.blocks, thread.cluster_ = cluster;
        thread.global_ = block.index * grid.threads + t;
        thread.fiber_ = fibers()[at].get();
        thread.fiber_->reset(&Run::start, &thread);
      }
    }
    std::vector<Thread*> ready;
    while (true) {
      ready.clear();
      for (Thread& thread : threads_)
        if (!thread.waiting_ && !thread.fiber_->finished()) ready.push_back(&thread);
      if (ready.empty()) break;
      std::shuffle(ready.begin(), ready.end(), random_);
      for (Thread* thread : ready) {
        thread->fiber_->resume();
        if (!error_.empty()) throw LaunchError(error_);
      }
    }
    for (const Thread& thread : threads_) {
      if (!thread.fiber_->finished()) throw LaunchError(stuck());
      waited_ = waited_ || thread.waited_;
      for (int k = 0; k < kScopes; ++k) report.passed[k] = std::max(report.passed[k], thread.passed_[k]);
      report.shared_bytes = std::max(report.shared_bytes, thread.shared_taken_);
    }
  }

  // Fibers serve one block and one launch after another: to make and unmake their stacks takes longer than most
  // launches.
  static std::vector<std::unique_ptr<Fiber>>& fibers() {
    static thread_local std::vector<std::unique_ptr<Fiber>> made;
    return made;
  }

  std::string stuck() const {
    std::map<std::pair<int, Site>, int> waiting;
    int finished = 0;
    for (const Thread& thread : threads_)
      thread.fiber_->finished() ? ++finished : ++waiting[{thread.waits_for_, thread.waits_at_}];
    std::ostringstream text;
    text << "deadlock: " << finished << " threads have finished";
    for (const auto& [key, count] : waiting)
      text << ", " << count << " wait at the " << scope_name(key.first) << " barrier " << text_of(key.second);
    return text.str();
  }

  static void start(void* argument) {
    // An error ends the launch; it must not leave the fiber's own stack.
    Thread& thread = *static_cast<Thread*>(argument);
    try {
      thread.run_->body_(thread.run_->kernel_, thread);
    } catch (const LaunchError& error) {
      thread.run_->error_ = error.what();
    }
  }

  void (*body_)(void*, Thread&);
  void* kernel_;
  std::mt19937_64 random_;
  std::vector<Block> blocks_;  // under way, a cluster's, and their threads
  std::vector<Thread> threads_;
  Meeting meeting_;      // of the cluster
  bool waited_ = false;  // whether a thread waited for the launch before
  std::map<std::tuple<TensorMemory*, int, Site, bool>, WarpAccesses> accesses_;
  std::string error_;
};

// --- what needs the above ----------------------------------------------------------------------------

inline void Thread::fail(const std::string& what) const {
  throw LaunchError(what + " (block " + std::to_string(block_->index) + ", thread " + std::to_string(thread_) + ")");
}

inline void Thread::wait(Scope scope, const std::source_location& where) {
  const Site site = site_of(where);
  ++run_->report.barriers[site];
  if (run_->grid.without != nullptr && *run_->grid.without == site) return;
  Meeting& meeting = run_->meeting(*this, scope);
  if (meeting.arrived > 0 && meeting.site != site)
    fail("divergence: at one " + std::string(scope_name(scope)) + " barrier, threads wait at " + text_of(meeting.site) +
         " and " + text_of(site));
  meeting.site = site;
  if (++meeting.arrived == run_->members(scope)) return run_->release(*this, scope);
  waiting_ = true, waits_for_ = scope, waits_at_ = site;
  Fiber::pause();
}

template <class V>
V Thread::warp_sum(V value, int stride, int width, std::source_location where) {
  value_ = value;
  wait(kWarpScope, where);
  std::array<V, kWarp> values;
  for (int lane = 0; lane < kWarp; ++lane) values[lane] = static_cast<V>(run_->lane_of(*this, lane).value_);
  wait(kWarpScope, where);  // nobody's value is replaced before all have read it
  for (int step = width / 2; step >= stride; step /= 2) {
    const std::array<V, kWarp> before = values;
    for (int lane = 0; lane < kWarp; ++lane) values[lane] = before[lane] + before[lane ^ step];
  }
  return values[lane()];
}

template <class T>
Shared<T> Thread::shared(int64_t count) {
  const size_t offset = (shared_taken_ + 15) / 16 * 16;
  shared_taken_ = offset + static_cast<size_t>(count) * sizeof(T);
  if (shared_taken_ > run_->grid.shared_bytes)
    fail("shared memory: " + std::to_string(shared_taken_) + " bytes asked for, " +
         std::to_string(run_->grid.shared_bytes) + " there");
  return {this, offset, count};
}

template <class Name>
void Thread::touch(Cell* cells, int64_t first, int64_t count, bool write, const Moment& moment, Name what) {
  for (int64_t k = first; k < first + count; ++k) {
    Cell& cell = cells[k];
    if (!cell.allowed) fail(what(k) + ": no element of the tensor");
    if (!write && !cell.defined) fail(what(k) + ": read, but nothing was written there");
    if (!cell.writer.before(moment))
      fail(what(k) + ": race, " + (write ? "written" : "read") + " with no barrier since another thread's write");
    if (write) {
      if (!cell.readers.before(moment)) fail(what(k) + ": race, written with no barrier since another thread's read");
      cell.writer = moment, cell.readers = Moment();
      cell.defined = true;
    } else if (cell.readers.before(moment)) {
      cell.readers = moment;
    } else {
      cell.readers.join(moment);
    }
  }
}

inline bool Thread::too_early(const void* at, int64_t bytes, bool write) const {
  return run_->grid.behind && !waited_ && launch_before().concerns(static_cast<const char*>(at), bytes, write);
}

inline void Thread::touch_global(const void* at, int count, size_t element_bytes, bool write,
                                 const std::source_location& where) {
  const char* address = static_cast<const char*>(at);
  const Site site = site_of(where);
  if (recent_ == nullptr || address < recent_->begin || address >= recent_->end()) recent_ = run_->device.find(at);
  if (recent_ == nullptr) fail("global memory at " + text_of(site) + ": out of bounds of every tensor");
  TensorMemory& memory = *recent_;
  const int64_t first = (address - memory.begin) / memory.element_bytes;
  const auto name = [&](int64_t k) {
    return memory.name + " at element " + std::to_string(k) + " (" + text_of(site) + ")";
  };
  if (static_cast<int64_t>(element_bytes) != memory.element_bytes || (address - memory.begin) % memory.element_bytes)
    fail(name(first) + ": wrong element type");
  if (first + count > static_cast<int64_t>(memory.cells.size())) fail(name(first) + ": out of bounds");
  if (count > 1 && reinterpret_cast<uintptr_t>(address) % 16 != 0) fail(name(first) + ": misaligned vector");
  if (too_early(address, count * memory.element_bytes, write))
    fail(name(first) + ": race, the kernel before was not waited for");
  touch(memory.cells.data(), first, count, write, now(), name);
  const int64_t bytes = count * memory.element_bytes;
  (write ? memory.counts.bytes_written : memory.counts.bytes_read) += bytes;
  const int64_t start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(address));
  run_->count_sectors(&memory, global_ / kWarp, lane(), site, write, start / kSectorBytes,
                      (start + bytes - 1) / kSectorBytes);
}

template <class Kernel>
Report Device::launch(const Grid& grid, Kernel kernel) {
  for (TensorMemory& memory : tensors_) memory.counts = Counts();
  settle();
  Run run(*this, grid, [](void* body, Thread& thread) { (*static_cast<Kernel*>(body))(thread); }, &kernel);
  run.all();
  for (const TensorMemory& memory : tensors_) run.report.tensors[memory.name] = memory.counts;
  if (grid.behind) launch_before().remember(tensors_);
  return run.report;
}

}  // namespace dia::simt
