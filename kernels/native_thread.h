// Threads that never run Python and never take its signals.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <thread>
#include <utility>

namespace lohan_fx {

// Starts `run` on a thread with every signal blocked, so that Ctrl-C and the like reach Python's
// threads. `name` (15 characters at most) is what top and gdb show.
template <typename Run>
std::thread start_thread(const char* name, Run&& run) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  struct Restore {
    sigset_t* mask;
    ~Restore() { pthread_sigmask(SIG_SETMASK, mask, nullptr); }
  } restore{&before};
  std::thread thread(std::forward<Run>(run));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

}  // namespace lohan_fx
