// Graph captures under stress: memory that a captured graph may touch is nobody else's, and stays
// where it is, until the last graph of its pool is released.
#pragma once

#include "allocator_worker.h"

namespace stress {

class GraphPools {
 public:
  explicit GraphPools(Shared& shared) : shared_(shared) {}

  // Captures a graph, replays one, or gives one up; nothing if another thread is at it.
  void step(Random& random);
  void finish();

 private:
  struct Graph {
    vattn::GraphPoolId id;
    Stream replays_on;          // one stream for a pool: its graphs share memory
    std::vector<Held> touched;  // in the order of the capture
    std::vector<Held> outputs;  // of those: still held
  };

  void capture(Random& random);
  void allocate_nodes(Graph& graph, Random& random);
  void replay(const Graph& graph);
  void drop(std::size_t i, Random& random);

  Shared& shared_;
  std::mutex mutex_;
  unsigned long long next_pool_ = 1;
  std::vector<Graph> graphs_;
};

}  // namespace stress
