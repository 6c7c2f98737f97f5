#include "allocator_graphs.h"

namespace stress {
namespace {

constexpr std::size_t kMostGraphs = 4;
constexpr std::size_t kMostNodeBytes = std::size_t{8} << 20;

}  // namespace

void GraphPools::step(Random& random) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  const std::size_t dice = random.below(8);
  if (graphs_.empty() || (dice < 2 && graphs_.size() < kMostGraphs)) return capture(random);
  if (dice == 2 || graphs_.size() == kMostGraphs) return drop(random.below(graphs_.size()), random);
  replay(graphs_[random.below(graphs_.size())]);
}

// A new pool, or that of a graph before it.
void GraphPools::capture(Random& random) {
  Graph graph{{0, next_pool_}, shared_.device.any(random), {}, {}};
  if (!graphs_.empty() && random.below(2) == 0) {
    const Graph& other = graphs_[random.below(graphs_.size())];
    graph.id = other.id;
    graph.replays_on = other.replays_on;
  } else {
    ++next_pool_;
  }
  const Stream stream = shared_.device.capture_stream();
  // What is given up while its other stream is captured waits for the end of that.
  std::optional<Held> input =
      allocate(shared_, random, random.log_uniform(kMostNodeBytes), shared_.device.any(random));
  if (input) use_on(shared_, random, *input, stream);
  const FakeControl* fake = shared_.device.fake();
  insist([&] {
    shared_.allocator.begin_graph_pool(graph.id,
                                       [stream](Stream asked) { return asked == stream; });
  });
  if (fake != nullptr) fake->capture(stream, true);
  allocate_nodes(graph, random);
  if (input) free(shared_, *input);
  if (fake != nullptr) fake->capture(stream, false);
  insist([&] { shared_.allocator.end_graph_pool(graph.id); });
  ++shared_.captures;
  graphs_.push_back(std::move(graph));
}

void GraphPools::allocate_nodes(Graph& graph, Random& random) {
  const Stream stream = shared_.device.capture_stream();
  for (std::size_t i = random.below(6); i > 0; --i) {
    const std::size_t bytes = random.log_uniform(kMostNodeBytes);
    Held node;
    try {
      node.address = reinterpret_cast<Address>(shared_.allocator.allocate(bytes, stream));
    } catch (const vattn::OutOfMemory&) {
      ++shared_.out_of_memory;
      continue;
    } catch (const vattn::DriverError& error) {
      if (error.fatal()) throw;
      ++shared_.failures;
      continue;
    }
    node.bytes = bytes;
    node.stream = stream;
    shared_.live.add(node.address, (bytes + 511) / 512 * 512);
    if (shared_.device.fake() != nullptr) {
      shared_.device.fake()->launch(stream, node.address, bytes);
    }
    node.marks.choose(node.address, bytes, random);
    graph.touched.push_back(node);
    if (random.below(2) == 0) {
      free(shared_, node);
    } else {
      graph.outputs.push_back(std::move(node));
    }
  }
}

// A replay touches all that was captured, also what was given up since.
void GraphPools::replay(const Graph& graph) {
  for (const Held& node : graph.touched) node.marks.repeat(shared_.device, graph.replays_on);
  ++shared_.replays;
  shared_.device.synchronize(graph.replays_on);
  for (std::size_t i = 0; i < graph.touched.size(); ++i) {
    bool last = true;
    for (std::size_t j = i + 1; j < graph.touched.size(); ++j) {
      last = last && !graph.touched[i].marks.overlap(graph.touched[j].marks);
    }
    if (last) graph.touched[i].marks.verify();
  }
}

// Its last replay may be on its way still.
void GraphPools::drop(std::size_t i, Random& random) {
  const Graph graph = std::move(graphs_[i]);
  graphs_.erase(graphs_.begin() + static_cast<std::ptrdiff_t>(i));
  for (const Held& node : graph.touched) node.marks.repeat(shared_.device, graph.replays_on);
  const bool outputs_first = random.below(2) == 0;
  if (!outputs_first) shared_.allocator.release_graph_pool(graph.id);
  for (const Held& node : graph.outputs) free(shared_, node);
  if (outputs_first) shared_.allocator.release_graph_pool(graph.id);
}

void GraphPools::finish() {
  Random random(1);
  while (!graphs_.empty()) drop(graphs_.size() - 1, random);
}

}  // namespace stress
