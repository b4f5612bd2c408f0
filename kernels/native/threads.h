/* A loop over independent units of work, by the caller's thread and the others of torch's team. */
#ifndef CABOCHON_THREADS_H
#define CABOCHON_THREADS_H

/* run(arguments, unit) for every unit in [0, num_units), in any order, at most num_threads at once. */
void for_each(void (*run)(void *, int), void *arguments, int num_units, int num_threads);

#endif
