#include "page_pool.h"

#include <algorithm>
#include <string>
#include <utility>

namespace vattn {

void PageRefs::clear() noexcept {
  for (const PageId id : ids_) pool_->drop_ref(id);
  ids_.clear();
}

PagePins::~PagePins() {
  for (const PageId id : ids_) pool_.unpin(id);
}

void PagePins::add(PageId id) {
  ids_.push_back(id);
  pool_.pin(id);
}

namespace {

std::size_t checked_page_bytes(const Driver& driver, std::size_t page_bytes) {
  if (page_bytes == 0) return driver.default_page_bytes();
  if (page_bytes % driver.granularity() != 0) {
    throw std::invalid_argument("page_bytes=" + std::to_string(page_bytes) +
                                " is not a multiple of the granularity of " + driver.name() +
                                ", which is " + std::to_string(driver.granularity()) + " bytes");
  }
  return page_bytes;
}

std::size_t checked_budget_pages(std::size_t budget_bytes, std::size_t page_bytes) {
  if (budget_bytes < page_bytes) {
    throw std::invalid_argument("budget_bytes=" + std::to_string(budget_bytes) +
                                " is below one page of " + std::to_string(page_bytes) +
                                " bytes; give at least one page");
  }
  return budget_bytes / page_bytes;
}

}  // namespace

PagePool::PagePool(std::shared_ptr<Driver> driver, const PoolOptions& options)
    : driver_(std::move(driver)),
      page_bytes_(checked_page_bytes(*driver_, options.page_bytes)),
      low_pages_(options.low_bytes / page_bytes_),
      high_pages_(options.high_bytes / page_bytes_),
      budget_pages_(checked_budget_pages(options.budget_bytes, page_bytes_)),
      pages_(1),
      figures_(pool_entry(driver_->name(), page_bytes_)) {
  if (options.low_bytes > options.high_bytes) {
    throw std::invalid_argument("the low watermark of " + std::to_string(options.low_bytes) +
                                " bytes is above the high one of " +
                                std::to_string(options.high_bytes) + "; give low <= high");
  }
  figures_->budget.store(budget_pages_ * page_bytes_, std::memory_order_relaxed);
  figures_.show();
}

PagePool::~PagePool() {
  // Whoever holds pages holds the pool, so all pages are free here.
  if (!driver_->usable()) return;
  std::vector<PageHandle> handles;
  while (free_.size() > 0) handles.push_back(pages_[free_.take_lowest()].handle);
  // A destructor has nobody to tell of an error; one more try, then the driver goes with its pages.
  std::exception_ptr error;
  const std::span<const PageHandle> all(handles);
  const std::size_t gone = driver_->destroy(all, page_bytes_, error);
  if (gone < all.size()) driver_->destroy(all.subspan(gone), page_bytes_, error);
}

std::size_t PagePool::unclaimed() const noexcept {
  return free_.size() + (budget_pages_ > created_ ? budget_pages_ - created_ : 0);
}

// Over the budget, pages that are free or stale go back to the device before any is given out.
std::size_t PagePool::available(const DeviceLock& lock) const noexcept {
  const std::size_t live = live_pages(lock);
  return budget_pages_ > live ? budget_pages_ - live : 0;
}

std::size_t PagePool::unkept(const DeviceLock& lock) const noexcept {
  const std::size_t pages = available(lock);
  return pages - std::min(pages, kept_stale_);
}

// Without those that are in nobody's use though they are not stale.
std::size_t PagePool::live_pages(const DeviceLock& lock) const noexcept {
  const std::size_t live = created_ - free_.size() - stale_;
  std::size_t idle = 0;
  for (Reclaimer* reclaimer : reclaimers_) idle += reclaimer->idle_pages(lock);
  return live - std::min(live, idle);
}

// Who does not go all the way has other sources, and asks again.
void PagePool::count_refusal(Effort most) noexcept {
  if (most == Effort::kWait) figures_->refused.fetch_add(1, std::memory_order_relaxed);
}

void PagePool::throw_out_of_pages(std::size_t wanted, std::size_t reserved,
                                  const DeviceLock& lock) const {
  const std::size_t live = live_pages(lock);
  const std::size_t most = budget_pages_ - std::min(budget_pages_, live);
  throw OutOfPages(std::to_string(wanted) + " pages of " + std::to_string(page_bytes_) +
                   " bytes are needed, and " + std::to_string(most - std::min(most, reserved)) +
                   " can be had: the budget is " + std::to_string(budget_pages_) +
                   " pages, live sequences hold " + std::to_string(live) +
                   "; release or truncate sequences, or raise the budget");
}

PageRefs PagePool::acquire(std::span<const Address> homes, DeviceLock& lock, std::size_t reserved,
                           Effort most) {
  PageRefs refs(*this);
  const std::size_t n = homes.size();
  if (n == 0) return refs;
  if (over_budget(lock))
    settle(lock, most);  // what became stale meanwhile goes back before anything new
  if (available(lock) < n + reserved) {
    count_refusal(most);
    throw_out_of_pages(n, reserved, lock);
  }
  if (free_.size() < n) find_more(homes, lock, most);
  std::vector<PageId> taken(n, kNoPage);
  take_at_home(homes, taken);
  for (PageId& id : taken) {
    if (id == kNoPage) id = free_.take_lowest();
    pages_[id].refs = 1;
    ++stale_;  // until somebody declares it live
    refs.adopt(id);
  }
  publish();
  wake_if_low();
  return refs;
}

// Brings the free list to the length of `homes`: creates what the budget allows, for the addresses
// that no free page is at home at, and reclaims the rest.
void PagePool::find_more(std::span<const Address> homes, DeviceLock& lock, Effort most) {
  const std::size_t n = homes.size();
  const std::size_t creatable = budget_pages_ > created_ ? budget_pages_ - created_ : 0;
  bool device_full = false;
  try {
    std::vector<Address> homeless;
    for (const Address home : homes) {
      if (free_at_home(home) == kNoPage) homeless.push_back(home);
    }
    // The last ones: those before them get the free pages that are at home nowhere near.
    const std::size_t more = std::min({n - free_.size(), creatable, homeless.size()});
    create_pages(std::span<const Address>(homeless).last(more));
  } catch (const OutOfPages&) {
    device_full = true;  // less memory than the budget says: stale pages may still do
  }
  if (free_.size() < n) reclaim(n - free_.size(), lock, most);
  if (free_.size() >= n) return;
  count_refusal(most);
  if (!device_full) throw_out_of_pages(n, 0, lock);
  throw OutOfPages("the device is out of memory at " + std::to_string(created_) +
                   " pages, below the budget of " + std::to_string(budget_pages_) +
                   "; lower the budget or free device memory");
}

// The free page that is at home at an address, if there is one.
PageId PagePool::free_at_home(Address home) const {
  const PageHandle handle = driver_->page_at_home(home);
  if (handle == kNoPageHandle) return kNoPage;
  const auto found = by_handle_.find(handle);
  return found != by_handle_.end() && free_.contains(found->second) ? found->second : kNoPage;
}

void PagePool::take_at_home(std::span<const Address> homes, std::vector<PageId>& taken) {
  for (std::size_t i = 0; i < homes.size(); ++i) {
    taken[i] = free_at_home(homes[i]);
    if (taken[i] != kNoPage) free_.erase(taken[i]);
  }
}

void PagePool::drop_ref(PageId id) noexcept {
  Page& page = at(id);
  if (--page.refs > 0) return;
  --stale_;
  free_.insert(id);
  publish();
}

void PagePool::add_live(PageId id) noexcept {
  Page& page = at(id);
  if (page.live++ > 0) return;
  --stale_;
  kept_stale_ -= page.kept > 0;
  publish();
}

void PagePool::drop_live(PageId id) noexcept {
  Page& page = at(id);
  if (--page.live == 0) {
    page.was_shared = page.was_shared && page.pins > 0;  // an operation may have plans with it
    ++stale_;
    kept_stale_ += page.kept > 0;
    publish();
  }
  kept_once_changes_ += kept_once(id);
}

void PagePool::unpin(PageId id) noexcept {
  Page& page = at(id);
  --page.pins;
  page.was_shared = page.was_shared && (page.pins > 0 || page.live > 0);
}

void PagePool::add_kept(PageId id) noexcept {
  Page& page = at(id);
  kept_stale_ += page.kept++ == 0 && page.live == 0;
}

void PagePool::drop_kept(PageId id) noexcept {
  Page& page = at(id);
  kept_stale_ -= --page.kept == 0 && page.live == 0;
  kept_once_changes_ += kept_once(id);
}

// One call per stretch of neighbouring addresses.
void PagePool::create_pages(std::span<const Address> homes) {
  for (std::size_t i = 0; i < homes.size();) {
    std::size_t n = 1;
    while (i + n < homes.size() && homes[i + n] == homes[i + n - 1] + page_bytes_) ++n;
    std::vector<PageHandle> handles(n);
    driver_->create(handles, page_bytes_, homes[i]);
    add_pages(handles);
    i += n;
  }
}

void PagePool::add_pages(std::span<const PageHandle> handles) {
  const Content content = driver_->fresh_pages_are_zero() ? Content::kZero : Content::kDirty;
  for (const PageHandle handle : handles) {
    PageId id = kNoPage;
    if (vacant_.size() > 0) {
      id = vacant_.take_lowest();
    } else {
      id = static_cast<PageId>(pages_.size());
      pages_.emplace_back();
      // Room in both sets now, so that giving a page back never allocates and cannot fail.
      free_.reserve(pages_.size());
      vacant_.reserve(pages_.size());
    }
    pages_[id] = {handle, 0, 0, 0, 0, content, true};
    by_handle_.emplace(handle, id);
    free_.insert(id);
  }
  created_ += handles.size();
  created_total_ += handles.size();
  peak_created_ = std::max(peak_created_, created_);
  publish();
}

std::size_t PagePool::destroy_free(std::size_t n) {
  n = std::min(n, free_.size());
  if (n == 0) return 0;
  std::vector<PageId> ids;
  std::vector<PageHandle> handles;
  for (std::size_t i = 0; i < n; ++i) {
    ids.push_back(free_.take_lowest());
    handles.push_back(pages_[ids.back()].handle);
  }
  std::exception_ptr error;
  const std::size_t gone = driver_->destroy(handles, page_bytes_, error);
  for (std::size_t i = 0; i < n; ++i) {
    if (i < gone) {
      by_handle_.erase(handles[i]);
      pages_[ids[i]] = {};
      vacant_.insert(ids[i]);
    } else {
      free_.insert(ids[i]);
    }
  }
  created_ -= gone;
  destroyed_total_ += gone;
  publish();
  if (error) std::rethrow_exception(error);
  return gone;
}

std::size_t PagePool::reclaim(std::size_t pages, DeviceLock& lock, Effort most) {
  std::size_t got = 0;
  for (const Effort effort : {Effort::kIdle, Effort::kKept, Effort::kWait}) {
    if (effort > most) break;
    for (std::size_t i = 0; i < reclaimers_.size() && got < pages; ++i) {
      got += reclaimers_[i]->reclaim(pages - got, effort, lock);
    }
  }
  return got;
}

void PagePool::set_budget(std::size_t bytes) {
  const std::size_t pages = checked_budget_pages(bytes, page_bytes_);
  DeviceLock guard = lock();
  const std::size_t before = std::exchange(budget_pages_, pages);
  try {
    settle(guard);
  } catch (...) {
    budget_pages_ = before;
    throw;
  }
  figures_->budget.store(pages * page_bytes_, std::memory_order_relaxed);
}

void PagePool::settle(DeviceLock& lock, Effort most) {
  if (created_ <= budget_pages_) return;
  const std::size_t excess = created_ - budget_pages_;
  if (free_.size() < excess) reclaim(excess - free_.size(), lock, most);
  destroy_free(excess);
}

std::size_t PagePool::trim(std::size_t keep_bytes, DeviceLock&) {
  const std::size_t keep = keep_bytes / page_bytes_;
  if (free_.size() <= keep) return 0;
  return destroy_free(free_.size() - keep) * page_bytes_;
}

bool PagePool::refill_some() {
  // In small batches, so that whoever needs a page now does not wait for all of them.
  constexpr std::size_t kBatch = 16;
  DeviceLock guard = lock();
  if (free_.size() >= high_pages_ || created_ >= budget_pages_) return false;
  const std::size_t n = std::min({kBatch, high_pages_ - free_.size(), budget_pages_ - created_});
  std::vector<PageHandle> handles(n);
  guard.unlock();
  try {
    driver_->create(handles, page_bytes_);
  } catch (const std::exception&) {
    return false;  // whoever needs the page will meet the error, with a caller to tell
  }
  guard.lock();
  add_pages(handles);
  // The budget may have been used up, or lowered, while the lock was free.
  if (created_ > budget_pages_) destroy_free(created_ - budget_pages_);
  return free_.size() < high_pages_ && created_ < budget_pages_;
}

void PagePool::refill() {
  while (refill_some()) {
  }
}

void PagePool::on_low(std::function<void()> wake) {
  const DeviceLock guard = lock();
  wake_ = std::move(wake);
  wake_if_low();
}

void PagePool::wake_if_low() {
  if (wake_ && free_.size() < low_pages_ && created_ < budget_pages_) wake_();
}

void PagePool::attach(Reclaimer* reclaimer) {
  const DeviceLock guard = lock();
  reclaimers_.push_back(reclaimer);
}

void PagePool::detach(Reclaimer* reclaimer) {
  const DeviceLock guard = lock();
  std::erase(reclaimers_, reclaimer);
}

void PagePool::publish() noexcept {
  const auto show = [this](Figure& figure, std::size_t pages) {
    figure.store(pages * page_bytes_, std::memory_order_relaxed);
  };
  show(figures_->created, created_);
  show(figures_->peak_created, peak_created_);
  show(figures_->free, free_.size());
  show(figures_->stale, stale_);
}

PoolStats PagePool::stats() {
  const DeviceLock guard = lock();
  return stats_locked(guard);
}

PoolStats PagePool::stats_locked(const DeviceLock&) const noexcept {
  return {page_bytes_, budget_pages_, created_,       free_.size(),    created_ - free_.size(),
          stale_,      peak_created_, created_total_, destroyed_total_};
}

void PagePool::check(const DeviceLock&) const {
  const auto require = [](bool holds, const char* what, PageId id) {
    if (!holds) throw InvariantError(std::string("page ") + std::to_string(id) + ": " + what);
  };
  std::size_t exist = 0, free = 0, stale = 0, kept = 0;
  for (PageId id = 1; id < pages_.size(); ++id) {
    const Page& page = pages_[id];
    require(page.exists != vacant_.contains(id), "exists and vacant disagree", id);
    require(free_.contains(id) == (page.exists && page.refs == 0), "free list is wrong", id);
    require(page.live + page.kept <= page.refs, "more uses than references", id);
    require(page.pins == 0, "pinned between operations", id);
    require(page.live > 0 || !page.was_shared, "shared, and used by nobody", id);
    require(page.live < 2 || page.was_shared, "used by several, and not known as shared", id);
    exist += page.exists;
    free += page.exists && page.refs == 0;
    stale += page.exists && page.refs > 0 && page.live == 0;
    kept += page.exists && page.kept > 0 && page.live == 0;
  }
  require(exist == created_, "count of existing pages is wrong", 0);
  require(free == free_.size(), "count of free pages is wrong", 0);
  require(stale == stale_, "count of stale pages is wrong", 0);
  require(kept == kept_stale_, "count of kept pages is wrong", 0);
  require(pages_[0].refs == 0, "the null page is in use", 0);
}

}  // namespace vattn
