// Time of the warps of one scheduler of a GPU's multiprocessor, in clock cycles (tools/cost_prediction.py).
//
// A warp issues its instructions in order, each as soon as the cycles of the previous one are over, the scoreboards
// that it waits for are released, and its pipe is free. The scheduler issues one instruction in a cycle, of the warp
// that has waited longest.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Instruction {
  int32_t stall, write_barrier, read_barrier, wait;
  int32_t pipe, cycles, latency, read_latency;
  int32_t kind;     // 0 ordinary, 1 barrier, 2 copy to shared memory, 3 end of a group of copies, 4 wait for groups
  int32_t pending;  // groups of copies that may be in flight after a wait
};

struct Warp {
  const int32_t *at, *end;
  int block;
  int64_t ready = 0;
  int64_t released[8] = {};
  int64_t copied = 0;           // when the copies so far are complete
  std::vector<int64_t> groups;  // when each group is complete
  bool waiting = false;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) int64_t hne_simulate_issue(const Instruction* code,
                                                                             const int32_t* traces,
                                                                             const int64_t* begins, const int64_t* ends,
                                                                             const int32_t* blocks, int64_t count,
                                                                             int64_t most_cycles) {
  std::vector<Warp> warps(count);
  for (int64_t i = 0; i < count; ++i) {
    warps[i].at = traces + begins[i], warps[i].end = traces + ends[i], warps[i].block = blocks[i];
  }
  int64_t pipes[16] = {}, now = 0, finished = 0;
  size_t next = 0;
  int64_t alive = 0;
  for (const Warp& w : warps) alive += w.at != w.end;
  while (alive > 0 && now < most_cycles) {
    int64_t earliest = INT64_MAX;
    bool issued = false;
    for (int64_t turn = 0; turn < count && !issued; ++turn) {
      Warp& w = warps[(next + turn) % count];
      if (w.at == w.end || w.waiting) continue;
      const Instruction& i = code[*w.at];
      int64_t start = std::max(w.ready, pipes[i.pipe]);
      for (int b = 0; b < 6; ++b)
        if (i.wait >> b & 1) start = std::max(start, w.released[b]);
      if (i.kind == 4 && int64_t(w.groups.size()) > i.pending)
        start = std::max(start, w.groups[w.groups.size() - 1 - i.pending]);
      if (start > now) {
        earliest = std::min(earliest, start);
        continue;
      }
      issued = true;
      next = (next + turn + 1) % count;
      pipes[i.pipe] = now + i.cycles;
      w.ready = now + std::max(i.stall, 1);
      const int64_t done = now + i.cycles + i.latency;
      if (i.kind == 2) w.copied = std::max(w.copied, done);
      if (i.kind == 3) w.groups.push_back(w.copied);
      if (i.write_barrier < 6)
        w.released[i.write_barrier] = std::max(w.released[i.write_barrier], i.kind == 3 ? w.copied : done);
      if (i.read_barrier < 6)
        w.released[i.read_barrier] = std::max(w.released[i.read_barrier], now + i.cycles + i.read_latency);
      if (i.kind == 1) w.waiting = true;
      if (++w.at == w.end) --alive, finished = std::max(finished, w.ready);
      if (i.kind == 1) {
        bool all = true;
        for (const Warp& other : warps) all = all && (other.block != w.block || other.waiting || other.at == other.end);
        if (all)
          for (Warp& other : warps)
            if (other.block == w.block) other.waiting = false, other.ready = std::max(other.ready, now + 20);
      }
    }
    if (issued) {
      ++now;
    } else if (earliest != INT64_MAX) {
      now = earliest;
    } else {  // the others of the block have ended
      for (Warp& w : warps) w.waiting = false;
      ++now;
    }
  }
  return std::max(now, finished);
}
