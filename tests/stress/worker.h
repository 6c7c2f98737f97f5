// One thread's life: sequences of its own on one cache, every operation in random order, and the
// bytes of every token compared again and again.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

#include "mapper.h"
#include "slots.h"

namespace stress {

using vattn::Mapper;
using vattn::SlotSpace;
using vattn::Stream;
using vattn::Ticket;

[[noreturn]] void fail(const std::string& what);

class Worker {
 public:
  // `admission` is held by whoever opens a slot: only then is a kept slot still what it was.
  Worker(std::shared_ptr<SlotSpace> space, Mapper& mapper, Stream stream, std::uint32_t seed,
         std::shared_ptr<std::mutex> admission, bool keeps);

  // A sequence that nobody writes any more; every worker of its cache may fork it.
  void share(std::uint32_t slot, std::vector<std::uint32_t> writers);
  void run(int operations);
  // Ends all sequences.
  void finish();

  // Opens a sequence of so many tokens, written and finished. For the one to share.
  std::uint32_t make(std::size_t tokens);
  std::vector<std::uint32_t> writers_of(std::uint32_t slot) const;
  void abandon(std::uint32_t slot);  // somebody else releases it

 private:
  struct Sequence {
    std::uint32_t slot;
    std::vector<std::uint32_t> writers;  // who wrote each token
    std::shared_ptr<Ticket> ticket;      // of a prepare() on its way
    std::uint32_t generation = 0;        // of the slot, when it was kept
  };

  void step();
  void open();
  void grow(Sequence& sequence, std::size_t tokens);
  void grow_all();
  void prepare(Sequence& sequence);
  void fork();
  void truncate(Sequence& sequence);
  void keep(std::size_t i);
  void resume();
  void swap(std::size_t i);
  void assign();
  void release(std::size_t i);

  void write(Sequence& sequence, std::size_t tokens);
  void compare(const Sequence& sequence) const;
  void settle(Sequence& sequence);
  template <typename Act>
  bool attempt(Act act);
  std::size_t below(std::size_t n) {
    return std::uniform_int_distribution<std::size_t>(0, n - 1)(rng_);
  }

  const std::shared_ptr<SlotSpace> space_;
  Mapper& mapper_;
  const Stream stream_;
  const std::shared_ptr<std::mutex> admission_;
  const bool keeps_;  // the cache can
  std::mt19937 rng_;
  std::uint32_t next_writer_;
  std::vector<Sequence> sequences_;
  std::vector<Sequence> kept_;  // slots released with what these had; others may have taken them
  bool has_shared_ = false;
  Sequence shared_{};
};

}  // namespace stress
