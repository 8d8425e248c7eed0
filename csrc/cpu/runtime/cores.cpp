#include "cores.h"

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace hne {

// On a machine with more cores than a cpu_set_t has, sched_getaffinity fails: threads stay where they are.
#ifdef __linux__

int current_core() { return sched_getcpu(); }

SystemThread SystemThread::current() {
  clockid_t clock = 0;
  if (pthread_getcpuclockid(pthread_self(), &clock) != 0) clock = 0;
  return {int32_t(syscall(SYS_gettid)), int32_t(clock)};
}

int64_t SystemThread::time_on_core() const {
  timespec time;
  if (clock == 0 || clock_gettime(clock, &time) != 0) return -1;
  return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
}

void SystemThread::fetch(const SystemThread& like) const {
  const int core = sched_getcpu();
  cpu_set_t allowed, here;
  if (sched_getaffinity(like.id, sizeof allowed, &allowed) != 0) return;
  if (core < 0 || core >= CPU_SETSIZE || !CPU_ISSET(core, &allowed)) return;
  CPU_ZERO(&here);
  CPU_SET(core, &here);
  if (sched_setaffinity(id, sizeof here, &here) == 0) sched_setaffinity(id, sizeof allowed, &allowed);
}

void SystemThread::keep_off(int core, const SystemThread& like) const {
  cpu_set_t allowed;
  if (sched_getaffinity(like.id, sizeof allowed, &allowed) != 0) return;
  if (core >= 0 && core < CPU_SETSIZE && CPU_COUNT(&allowed) > 1) CPU_CLR(core, &allowed);
  sched_setaffinity(id, sizeof allowed, &allowed);
}

void prefer_short_slices() {
#ifdef SYS_sched_setattr
  // sched_attr, which glibc does not declare before 2.41. Linux knows slices of ordinary threads since 6.12.
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes = {48, SCHED_OTHER, 0, 0, 0, 300000, 0, 0};
  if (sched_getscheduler(0) != SCHED_OTHER) return;
  attributes.nice = getpriority(PRIO_PROCESS, 0);
  syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

bool ClaimedCores::claim() {
  const int core = sched_getcpu();
  if (core < 0 || core >= kMaxCores) return true;
  const uint64_t bit = uint64_t(1) << (core % kBitsPerWord);
  return (claimed_[core / kBitsPerWord].fetch_or(bit) & bit) == 0;
}

void ClaimedCores::move_to_free_core() const {
  cpu_set_t allowed, free;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  free = allowed;
  for (int other = 0; other < kMaxCores; ++other)
    if (claimed_[other / kBitsPerWord].load() >> (other % kBitsPerWord) & 1) CPU_CLR(other, &free);
  if (CPU_COUNT(&free) == 0) return;
  if (sched_setaffinity(0, sizeof free, &free) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}

#else

int current_core() { return -1; }
SystemThread SystemThread::current() { return {}; }
int64_t SystemThread::time_on_core() const { return -1; }
void SystemThread::fetch(const SystemThread&) const {}
void SystemThread::keep_off(int, const SystemThread&) const {}
void prefer_short_slices() {}
bool ClaimedCores::claim() { return true; }
void ClaimedCores::move_to_free_core() const {}

#endif

}  // namespace hne
