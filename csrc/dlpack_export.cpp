#include "dlpack_export.h"

#include <string>

namespace vattn {
namespace {

// What a tensor needs for as long as somebody holds it.
struct Holder {
  DLManagedTensor managed;
  std::shared_ptr<Reservation> reservation;
  std::vector<std::int64_t> shape, strides;
};

void destroy(DLManagedTensor* managed) { delete static_cast<Holder*>(managed->manager_ctx); }

}  // namespace

DLManagedTensor* make_dlpack(std::shared_ptr<Reservation> reservation, std::size_t offset_bytes,
                             std::vector<std::int64_t> shape, std::vector<std::int64_t> strides,
                             DLDataType dtype) {
  if (shape.size() != strides.size()) {
    throw std::invalid_argument("shape has " + std::to_string(shape.size()) +
                                " dimensions and strides " + std::to_string(strides.size()));
  }
  std::int64_t last = 0;
  bool empty = false;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 0 || strides[i] < 0) {
      throw std::invalid_argument("shape and strides of a view are not negative");
    }
    empty = empty || shape[i] == 0;
    last += (shape[i] > 0 ? shape[i] - 1 : 0) * strides[i];
  }
  const std::size_t end =
      offset_bytes + (empty ? 0 : (static_cast<std::size_t>(last) + 1) * dtype.bits / 8);
  if (end > reservation->bytes()) {
    throw std::invalid_argument("a view that ends at byte " + std::to_string(end) +
                                " reaches outside its region of " +
                                std::to_string(reservation->bytes()) + " bytes");
  }
  auto holder = std::make_unique<Holder>();
  const DlpackDevice device = reservation->dlpack_device();
  holder->shape = std::move(shape);
  holder->strides = std::move(strides);
  // The address goes into `data`, since some consumers ignore byte_offset.
  holder->managed.dl_tensor = {reinterpret_cast<void*>(reservation->base() + offset_bytes),
                               {device.type, device.id},
                               static_cast<std::int32_t>(holder->shape.size()),
                               dtype,
                               holder->shape.data(),
                               holder->strides.data(),
                               0};
  holder->reservation = std::move(reservation);
  holder->managed.manager_ctx = holder.get();
  holder->managed.deleter = destroy;
  return &holder.release()->managed;
}

}  // namespace vattn
