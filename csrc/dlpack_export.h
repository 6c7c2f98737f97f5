// Tensors over a region for any framework that speaks DLPack (https://dmlc.github.io/dlpack): plain
// structs of a stable ABI, so that neither torch's headers nor its version matter.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "region.h"

namespace vattn {

struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};

struct DLDataType {
  std::uint8_t code;  // kDLInt 0, kDLUInt 1, kDLFloat 2, kDLBfloat 4
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

// A tensor over [offset_bytes, ...) of a reservation, `strides` in elements. It keeps the addresses
// reserved, not the pages mapped. Throws std::invalid_argument if it would reach outside.
DLManagedTensor* make_dlpack(std::shared_ptr<Reservation> reservation, std::size_t offset_bytes,
                             std::vector<std::int64_t> shape, std::vector<std::int64_t> strides,
                             DLDataType dtype);

}  // namespace vattn
