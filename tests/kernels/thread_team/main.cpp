// Leaders in several threads run loops of random numbers of tasks, on random numbers of threads, and some tasks throw.
// Every task must be computed once, and seen by the leader after the loop. Arguments: rounds, and whether to fork.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/runtime/thread_team.h"

using hne::parallel_tasks;
using hne::ThreadTeam;
using Helpers = ThreadTeam::Helpers;

void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}

void run_loop(int64_t tasks, int work) {
  std::vector<int64_t> done(2 * tasks);  // not atomic: the sanitizer reports what is computed twice at a time
  parallel_tasks(tasks, [&](int64_t task) {
    for (volatile int i = 0; i < work;) i = i + 1;
    parallel_tasks(2, [&](int64_t part) { done[2 * task + part] += 1; });  // on this thread, unless there is one task
  });
  for (const int64_t times : done) expect(times == 1, "a task is not computed once");
}

void run_failing_loop(int64_t tasks) {
  std::string caught;
  try {
    parallel_tasks(tasks, [&](int64_t task) {
      if (task == tasks / 2) throw std::runtime_error("of a task");
    });
  } catch (const std::runtime_error& error) {
    caught = error.what();
  }
  expect(caught == (tasks > 0 ? "of a task" : ""), "an exception is lost");
}

void lead(unsigned seed, int rounds) {
  std::mt19937 random(seed);
  for (int round = 0; round < rounds; ++round) {
    torch::stable::num_threads() = 1 + random() % 4;
    const auto body = [&] {
      for (int loop = 0; loop < 4; ++loop) run_loop(random() % 9, int(random() % 2000));
      if (random() % 4 == 0) run_failing_loop(random() % 9);
    };
    const int kind = int(random() % 40);  // PyTorch's are started for each team here, and stay for a while
    ThreadTeam::lead(body, kind == 0 ? Helpers::of_torch : kind < 10 ? Helpers::of_library_awake : Helpers::of_library);
    if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));  // helpers sleep
  }
}

int main(int count, char** arguments) {
  expect(count == 3, "arguments: rounds, and whether to fork");
  const int rounds = std::atoi(arguments[1]);
  std::vector<std::thread> leaders;
  for (unsigned seed = 0; seed < 4; ++seed) leaders.emplace_back(lead, seed, rounds);
  for (std::thread& leader : leaders) leader.join();
  lead(4, rounds);
  if (std::string(arguments[2]) == "fork") {
    const pid_t child = fork();
    if (child == 0) {
      lead(5, rounds);
      std::_Exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    expect(status == 0, "a forked process fails");
    lead(6, rounds);
  }
  std::puts("done");
}
