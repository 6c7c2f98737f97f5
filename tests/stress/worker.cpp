#include "worker.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace stress {
namespace {

constexpr std::size_t kMostSequences = 5;
constexpr std::uint32_t kWritersEach = 1U << 20;

std::uint64_t stamp(std::uint32_t writer, std::size_t token, std::size_t place) {
  return (std::uint64_t{writer} << 32 | (token << 16 & 0xffff0000U)) ^ place * 0x9e3779b97f4a7c15U;
}

// The first and the last bytes of a token in each run.
template <typename Visit>
void for_places(const SlotSpace& space, std::uint32_t slot, std::size_t token, Visit visit) {
  std::size_t place = 1;
  for (std::size_t r = 0; r < space.regions().size(); ++r) {
    const vattn::Region& region = space.regions()[r];
    const std::size_t bytes = region.spec().token_bytes;
    for (std::uint32_t run = 0; run < region.spec().runs; ++run) {
      const vattn::Address at = region.address(slot, run * region.pages_per_run()) + token * bytes;
      visit(r, reinterpret_cast<char*>(at), place++);
      visit(r, reinterpret_cast<char*>(at + bytes - sizeof(std::uint64_t)), place++);
    }
  }
}

std::int32_t to_int32(std::size_t n) { return static_cast<std::int32_t>(n); }

}  // namespace

void fail(const std::string& what) { throw std::runtime_error(what); }

Worker::Worker(std::shared_ptr<SlotSpace> space, Mapper& mapper, Stream stream, std::uint32_t seed,
               std::shared_ptr<std::mutex> admission, bool keeps)
    : space_(std::move(space)),
      mapper_(mapper),
      stream_(stream),
      admission_(std::move(admission)),
      keeps_(keeps),
      rng_(seed),
      next_writer_(seed * kWritersEach) {}

void Worker::share(std::uint32_t slot, std::vector<std::uint32_t> writers) {
  has_shared_ = true;
  shared_ = {slot, std::move(writers), nullptr};
}

std::uint32_t Worker::make(std::size_t tokens) {
  open();
  grow(sequences_.back(), tokens);
  return sequences_.back().slot;
}

std::vector<std::uint32_t> Worker::writers_of(std::uint32_t slot) const {
  for (const Sequence& sequence : sequences_) {
    if (sequence.slot == slot) return sequence.writers;
  }
  fail("no such sequence");
}

void Worker::abandon(std::uint32_t slot) {
  std::erase_if(sequences_, [&](const Sequence& sequence) { return sequence.slot == slot; });
}

void Worker::run(int operations) {
  for (int i = 0; i < operations; ++i) step();
}

void Worker::finish() {
  while (!sequences_.empty()) release(sequences_.size() - 1);
}

void Worker::step() {
  if (sequences_.empty()) {
    open();
    return;
  }
  const std::size_t i = below(sequences_.size());
  Sequence& sequence = sequences_[i];
  switch (below(22)) {
    case 0:
      return open();
    case 1:
      return release(i);
    case 2:
      return truncate(sequence);
    case 3:
      return fork();
    case 4:
      return assign();
    case 5:
      return prepare(sequence);
    case 6:
      return grow(sequence, below(space_->max_tokens() + 1));
    case 7:
      return space_->mark_dirty(sequence.slot);
    case 8:
      static_cast<void>(space_->stats());
      return;
    case 9:
      return compare(sequence);
    case 10:
    case 11:
      return keep(i);
    case 12:
    case 13:
    case 14:
      return resume();
    case 15:
      return swap(i);
    default:
      return grow_all();
  }
}

// Runs `act`; without room it ends a sequence instead, as a scheduler would.
template <typename Act>
bool Worker::attempt(Act act) {
  try {
    act();
    return true;
  } catch (const vattn::OutOfPages&) {
    if (!sequences_.empty()) release(below(sequences_.size()));
    return false;
  }
}

void Worker::open() {
  if (sequences_.size() >= kMostSequences) return;
  std::uint32_t slot = 0;
  try {
    const std::lock_guard lock(*admission_);
    slot = space_->open(std::nullopt, below(space_->max_tokens()));
  } catch (const vattn::OutOfSlots&) {
    return;
  }
  sequences_.push_back({slot, {}, nullptr});
}

void Worker::grow(Sequence& sequence, std::size_t tokens) {
  const std::int32_t slot = to_int32(sequence.slot), length = to_int32(tokens);
  const bool done =
      attempt([&] { space_->ensure(std::span(&slot, 1), std::span(&length, 1), stream_); });
  if (done) write(sequence, tokens);
}

// A decode step: every sequence gets a token or a few.
void Worker::grow_all() {
  std::vector<std::int32_t> slots, lengths;
  for (const Sequence& sequence : sequences_) {
    slots.push_back(to_int32(sequence.slot));
    const std::size_t wanted = sequence.writers.size() + 1 + below(3);
    lengths.push_back(to_int32(std::min(wanted, space_->max_tokens())));
  }
  if (!attempt([&] { space_->ensure(slots, lengths, stream_); })) return;
  for (std::size_t i = 0; i < sequences_.size(); ++i) {
    write(sequences_[i], static_cast<std::size_t>(lengths[i]));
  }
}

// Whoever uses the slot next need not wait for it, but whoever gives it up must.
void Worker::prepare(Sequence& sequence) {
  settle(sequence);
  const std::vector<std::int32_t> slots = {to_int32(sequence.slot)};
  const std::vector<std::int32_t> lengths = {to_int32(below(space_->max_tokens() + 1))};
  sequence.ticket = mapper_.submit([space = space_, slots, lengths, stream = stream_] {
    space->prepare(slots, lengths, stream);
  });
}

void Worker::settle(Sequence& sequence) {
  if (!sequence.ticket) return;
  try {
    sequence.ticket->wait();
  } catch (const vattn::OutOfPages&) {
    // Then the next ensure() has more to do.
  }
  sequence.ticket.reset();
}

void Worker::fork() {
  if (sequences_.size() >= kMostSequences) return;
  const bool from_shared = has_shared_ && below(2) == 0;
  Sequence& parent = from_shared ? shared_ : sequences_[below(sequences_.size())];
  settle(parent);
  // A window layer may no longer hold what a shorter prefix needs.
  const std::size_t tokens = from_shared ? below(parent.writers.size() + 1) : parent.writers.size();
  std::vector<std::uint32_t> writers(parent.writers.begin(),
                                     parent.writers.begin() + static_cast<std::ptrdiff_t>(tokens));
  std::uint32_t slot = 0;
  try {
    const std::lock_guard lock(*admission_);
    slot = space_->fork(parent.slot, tokens, stream_);
  } catch (const vattn::OutOfPages&) {
    return;
  }
  sequences_.push_back({slot, std::move(writers), nullptr});
  compare(sequences_.back());
}

void Worker::keep(std::size_t i) {
  if (!keeps_) return release(i);
  Sequence sequence = std::move(sequences_[i]);
  sequences_.erase(sequences_.begin() + static_cast<std::ptrdiff_t>(i));
  settle(sequence);
  compare(sequence);
  sequence.generation = space_->generation(sequence.slot);
  space_->release(sequence.slot, stream_, true);
  kept_.push_back(std::move(sequence));
}

// Goes on from what a slot still keeps, in place or beside it. Others may take pages meanwhile, and
// have taken the slot.
void Worker::resume() {
  if (kept_.empty() || sequences_.size() >= kMostSequences) return;
  const std::size_t i = below(kept_.size());
  Sequence sequence = std::move(kept_[i]);
  kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
  try {
    const std::lock_guard lock(*admission_);
    if (space_->generation(sequence.slot) != sequence.generation) return;
    const vattn::KeptRange range = space_->kept(sequence.slot);
    if (range.tokens == 0) return;
    const std::size_t tokens = range.lowest + below(range.tokens - range.lowest + 1);
    if (below(2) == 0) {
      space_->reopen(sequence.slot, tokens);
    } else {
      const std::uint32_t source = sequence.slot;
      sequence.slot = space_->fork(source, tokens, stream_);
      kept_.push_back({source, sequence.writers, nullptr, sequence.generation});
    }
    sequence.writers.resize(tokens);
  } catch (const vattn::PagesGone&) {
    return;
  } catch (const vattn::OutOfPages&) {
    return;
  }
  sequences_.push_back(std::move(sequence));
  compare(sequences_.back());
}

// To memory of our own and back, into whatever slot.
void Worker::swap(std::size_t i) {
  Sequence& sequence = sequences_[i];
  settle(sequence);
  const std::size_t tokens = sequence.writers.size(), anchor = space_->anchor(sequence.slot);
  std::vector<char> memory(space_->saved_bytes(sequence.slot) + 1);
  const std::size_t bytes = memory.size() - 1;
  space_->copy_out(sequence.slot, memory.data(), bytes, stream_);
  space_->release(sequence.slot, stream_);
  {
    const std::lock_guard lock(*admission_);
    sequence.slot = space_->open(std::nullopt, tokens);
  }
  try {
    space_->copy_in(sequence.slot, tokens, anchor, memory.data(), bytes, 0, stream_);
    space_->pool().driver().synchronize(stream_);
    compare(sequence);
  } catch (const vattn::OutOfPages&) {
    space_->release(sequence.slot, stream_);
    sequences_.erase(sequences_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void Worker::truncate(Sequence& sequence) {
  settle(sequence);
  const std::size_t tokens = below(sequence.writers.size() + 1);
  try {
    space_->truncate(sequence.slot, tokens, stream_);
  } catch (const std::invalid_argument&) {
    compare(sequence);  // a window layer no longer holds what it would need
    return;
  }
  sequence.writers.resize(tokens);
}

void Worker::assign() {
  std::vector<std::int32_t> destinations, sources;
  std::vector<std::vector<std::uint32_t>> writers;
  for (Sequence& sequence : sequences_) {
    settle(sequence);
    const Sequence& source = sequences_[below(sequences_.size())];
    destinations.push_back(to_int32(sequence.slot));
    sources.push_back(to_int32(source.slot));
    writers.push_back(source.writers);
  }
  if (!attempt([&] { space_->assign(destinations, sources, stream_); })) return;
  for (std::size_t i = 0; i < sequences_.size(); ++i) sequences_[i].writers = writers[i];
  for (const Sequence& sequence : sequences_) compare(sequence);
}

void Worker::release(std::size_t i) {
  settle(sequences_[i]);
  compare(sequences_[i]);
  space_->release(sequences_[i].slot, stream_);
  sequences_.erase(sequences_.begin() + static_cast<std::ptrdiff_t>(i));
}

// The CPU's accesses come after the device's work.
void Worker::write(Sequence& sequence, std::size_t tokens) {
  if (tokens <= sequence.writers.size()) return;
  space_->pool().driver().synchronize(stream_);
  const std::uint32_t writer = next_writer_++;
  for (std::size_t token = sequence.writers.size(); token < tokens; ++token) {
    for_places(*space_, sequence.slot, token, [&](std::size_t, char* at, std::size_t place) {
      const std::uint64_t value = stamp(writer, token, place);
      std::memcpy(at, &value, sizeof value);
    });
  }
  sequence.writers.resize(tokens, writer);
}

void Worker::compare(const Sequence& sequence) const {
  if (space_->tokens(sequence.slot) != sequence.writers.size()) fail("a length is wrong");
  space_->pool().driver().synchronize(stream_);
  std::vector<std::size_t> first;
  for (std::uint32_t r = 0; r < space_->regions().size(); ++r) {
    first.push_back(space_->first_token(sequence.slot, r));
  }
  for (std::size_t token = 0; token < sequence.writers.size(); ++token) {
    for_places(*space_, sequence.slot, token, [&](std::size_t r, char* at, std::size_t place) {
      if (token < first[r]) return;
      std::uint64_t value = 0;
      std::memcpy(&value, at, sizeof value);
      if (value != stamp(sequence.writers[token], token, place)) {
        fail("slot " + std::to_string(sequence.slot) + " token " + std::to_string(token) +
             " of region " + std::to_string(r) + " has somebody else's bytes");
      }
    });
  }
}

}  // namespace stress
