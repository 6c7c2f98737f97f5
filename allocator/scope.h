// Memory that is kept apart from other memory: what has no tag, a tag's, a graph pool's.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arena.h"
#include "stats_page.h"

namespace vattn {

// PyTorch's MempoolId_t.
using GraphPoolId = std::pair<unsigned long long, unsigned long long>;
// Index of a tag in this process's table of names; 0 is no tag.
using TagId = std::uint32_t;
inline constexpr TagId kNoTag = 0;

struct Scope {
  // What a message calls it.
  std::string name;
  TagId tag = kNoTag;
  GraphPoolId graph{0, 0};
  bool is_graph = false;
  // A graph pool: those who capture into it or may replay what they captured. While there are any,
  // its pages stay where they are, free or not.
  std::uint32_t graph_users = 0;
  // Of a released one: a replay may be running still, on any stream.
  bool may_replay = false;
  std::vector<std::shared_ptr<Fence>> fences;
  bool paused = false;
  std::size_t owned_pages = 0;   // mapped for its blocks, and for its free blocks
  std::size_t budget_pages = 0;  // 0: none
  StatsEntry<TagFigures> figures;
  std::vector<std::unique_ptr<Arena>> arenas;
  // Of a paused scope: its live blocks' bytes, one after the other as the ranges have them.
  std::vector<std::byte> backup;
  std::byte* backup_at = nullptr;
  bool has_backup = false;

  // A replay touches memory without telling anybody, so nobody else gets a graph pool's.
  bool pinned() const noexcept { return is_graph && graph_users > 0; }
};

}  // namespace vattn
