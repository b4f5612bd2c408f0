/* Threads of our own: torch's OpenMP cannot be shared from outside, and a second one would spin beside it.
   A call that finds the helpers busy, or less than two units, runs alone. */
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define MAX_HELPERS 63

static pthread_mutex_t caller = PTHREAD_MUTEX_INITIALIZER; /* one call at a time has the helpers */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;   /* of all below */
static pthread_cond_t begins = PTHREAD_COND_INITIALIZER;
static pthread_cond_t ends = PTHREAD_COND_INITIALIZER;
static pid_t owner; /* helpers do not survive a fork */
static int num_helpers, num_wanted, num_working;
static unsigned generation;
static struct {
  void (*run)(void *, int);
  void *arguments;
  int num_units;
  atomic_int next;
} job;

static void work(void) {
  for (int unit; (unit = atomic_fetch_add(&job.next, 1)) < job.num_units;) job.run(job.arguments, unit);
}

static void *help(void *number) {
  unsigned seen = 0;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (generation == seen || (int)(intptr_t)number >= num_wanted) {
      seen = generation;
      pthread_cond_wait(&begins, &lock);
    }
    seen = generation;
    pthread_mutex_unlock(&lock);
    work();
    pthread_mutex_lock(&lock);
    if (--num_working == 0) pthread_cond_signal(&ends);
  }
  return 0;
}

/* With the lock held. How many of `wanted` helpers there are. */
static int start_helpers(int wanted) {
  if (owner != getpid()) {
    owner = getpid();
    num_helpers = 0;
  }
  while (num_helpers < wanted && num_helpers < MAX_HELPERS) {
    pthread_t thread;
    if (pthread_create(&thread, 0, help, (void *)(intptr_t)num_helpers)) break;
    pthread_detach(thread);
    num_helpers++;
  }
  return wanted < num_helpers ? wanted : num_helpers;
}

void for_each(void (*run)(void *, int), void *arguments, int num_units, int num_threads) {
  if (num_threads > num_units) num_threads = num_units;
  if (num_threads < 2 || pthread_mutex_trylock(&caller)) {
    for (int unit = 0; unit < num_units; unit++) run(arguments, unit);
    return;
  }
  pthread_mutex_lock(&lock);
  job.run = run;
  job.arguments = arguments;
  job.num_units = num_units;
  atomic_store(&job.next, 0);
  num_wanted = num_working = start_helpers(num_threads - 1);
  generation++;
  pthread_cond_broadcast(&begins);
  pthread_mutex_unlock(&lock);
  work();
  pthread_mutex_lock(&lock);
  while (num_working) pthread_cond_wait(&ends, &lock);
  num_wanted = 0;
  pthread_mutex_unlock(&lock);
  pthread_mutex_unlock(&caller);
}
