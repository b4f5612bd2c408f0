/* The team of torch's own OpenMP, through the entry that GCC's and LLVM's libraries share: a second set of threads
   would wait for a core while torch's spin on it. Where there is none, and in a fork, the caller works alone. */
#define _GNU_SOURCE
#include "threads.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <unistd.h>

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

static parallel_function parallel;
static pid_t owner; /* a team does not survive a fork */

/* When the library is loaded: torch is there already. */
__attribute__((constructor)) static void find_parallel(void) {
  parallel = (parallel_function)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  owner = getpid();
}

struct job {
  void (*run)(void *, int);
  void *arguments;
  int num_units;
  atomic_int next;
};

static void work(void *arguments) {
  struct job *job = arguments;
  for (int unit; (unit = atomic_fetch_add(&job->next, 1)) < job->num_units;) job->run(job->arguments, unit);
}

/* Always all of torch's threads: a smaller team would end the others. */
void for_each(void (*run)(void *, int), void *arguments, int num_units, int num_threads) {
  struct job job = {run, arguments, num_units, 0};
  if (num_units < 2 || num_threads < 2 || !parallel || owner != getpid())
    work(&job);
  else
    parallel(work, &job, num_threads, 0);
}
