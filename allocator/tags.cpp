// The table of tags of this process, and the one that a thread allocates under.
#include <mutex>

#include "caching_allocator.h"

namespace vattn {
namespace {

constexpr std::size_t kMaxTags = 4096;

struct TagTable {
  std::mutex mutex;
  std::unordered_map<std::string, TagId> ids;
  std::vector<std::string> names{""};
};

// Never destroyed: tensors may be freed while the process ends.
TagTable& table() {
  static TagTable* const tags = new TagTable;
  return *tags;
}

thread_local TagId tag_of_this_thread = kNoTag;

}  // namespace

TagId tag_id(const std::string& name) {
  if (name.empty()) throw std::invalid_argument("a tag needs a name; '' is none");
  TagTable& tags = table();
  const std::lock_guard guard(tags.mutex);
  const auto found = tags.ids.find(name);
  if (found != tags.ids.end()) return found->second;
  if (tags.names.size() >= kMaxTags) {
    throw std::invalid_argument("tag='" + name + "' would be number " + std::to_string(kMaxTags) +
                                "; use the same tags again");
  }
  const auto id = static_cast<TagId>(tags.names.size());
  tags.names.push_back(name);
  tags.ids.emplace(name, id);
  return id;
}

std::string tag_name(TagId tag) {
  TagTable& tags = table();
  const std::lock_guard guard(tags.mutex);
  return tag < tags.names.size() ? tags.names[tag] : "";
}

TagId current_tag() noexcept { return tag_of_this_thread; }

TagId set_current_tag(TagId tag) noexcept { return std::exchange(tag_of_this_thread, tag); }

}  // namespace vattn
