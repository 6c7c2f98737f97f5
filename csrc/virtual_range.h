// Reserved addresses for a tensor of many rows, with pages only where rows are committed.
//
// A page exists exactly where at least one committed row has a byte. Public functions take the
// device lock, and leave the state as it was when they throw. `stream` is the stream that the
// caller's kernels run on: zeros are written on it, and no page is unmapped before its work so far
// has finished. Work of other streams on the rows is the caller's to order before that.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "region.h"
#include "row_set.h"

namespace vattn {

class VirtualRange {
 public:
  // Throws std::invalid_argument for sizes that are not positive or overflow.
  VirtualRange(std::shared_ptr<PagePool> pool, std::size_t rows, std::size_t row_bytes);
  // Gives the pages back after the work of the stream that was named last.
  ~VirtualRange();
  VirtualRange(const VirtualRange&) = delete;
  VirtualRange& operator=(const VirtualRange&) = delete;

  // Makes rows readable and writable. Those that were not committed hold zeros, in the order of the
  // stream. Throws OutOfPages.
  void commit(Rows rows, Stream stream);
  // Gives up rows. Pages without a committed row go back to the pool; for that the calling thread
  // waits for the stream, without the device lock.
  void decommit(Rows rows, Stream stream);
  // Gives up everything. The addresses stay reserved while there are tensors over them; nothing can
  // be committed any more. A second close does nothing.
  void close(Stream stream);

  std::size_t rows() const noexcept { return rows_; }
  std::size_t bytes() const noexcept { return rows_ * row_bytes_; }
  const std::shared_ptr<Reservation>& reservation() const noexcept { return reservation_; }
  bool closed();
  std::vector<Rows> committed();
  std::size_t committed_bytes();  // of pages
  void check();

 private:
  // Pages by their place: the n-th page of the range.
  using Pages = std::map<std::size_t, PageId>;
  using Place = Pages::const_iterator;

  DeviceLock enter();
  void require_open() const;
  void check_rows(Rows rows) const;
  Address address(std::size_t place) const noexcept {
    return reservation_->base() + place * page_bytes_;
  }
  Rows places_of(Rows rows) const noexcept;
  Rows rows_of(std::size_t place) const noexcept;

  Pages acquire(const std::vector<Rows>& fresh, PageRefs& refs, DeviceLock& lock);
  Pages spare(const RowSet& needed, Rows rows) const;
  void give_up(Rows rows, Stream stream, DeviceLock& lock);
  void keep(Pages& pages) noexcept;
  void drop(const Pages& pages) noexcept;
  void abandon() noexcept;

  void map(const Pages& pages);
  void unmap(const Pages& pages);
  void map_stretch(Place first, Place last);
  void unmap_stretch(Place first, Place last);
  template <typename Undo>
  void roll_back(Undo undo) noexcept;
  void map_with_room(const Pages& pages, DeviceLock& lock);

  void clear(const std::vector<Rows>& fresh, const Pages& pages, Stream stream);
  void fill(const std::vector<Rows>& fresh, const Pages& pages, Stream stream);
  void fence(Stream stream);
  void wait_for(Stream stream, DeviceLock& lock);
  void finish(Stream stream);
  void finish_all(Stream stream) noexcept;

  const std::shared_ptr<PagePool> pool_;
  const std::size_t rows_, row_bytes_, page_bytes_;
  const std::shared_ptr<Reservation> reservation_;
  RowSet committed_;
  Pages pages_;
  // After it, nothing that was submitted here or before a partial decommit uses the pages.
  std::unique_ptr<Fence> fence_;
  Stream stream_ = 0;  // the one named last
  bool closed_ = false;
  bool lost_ = false;  // a driver call failed and could not be undone
};

}  // namespace vattn
