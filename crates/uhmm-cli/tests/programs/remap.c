/* Everything that changes mappings, by several threads, with every byte known. */
#include "common.h"

#define THREADS 3

static void *work(void *argument)
{
	uint64_t seed = (uintptr_t)argument * 1000;
	double end = now() + WORK;
	size_t bytes = 2 * MIB + 7 * PAGE;

	while (now() < end) {
		char *at = map(bytes), *to;

		seed++;
		fill(at, bytes, seed);
		/* Dropped pages read as zero; the others stay. */
		CHECK(madvise(at + 4 * PAGE, 2 * PAGE, MADV_DONTNEED) == 0);
		for (size_t n = 0; n < 2 * PAGE; n++)
			CHECK(at[4 * PAGE + n] == 0);
		fill(at, bytes, seed);
		/* Grown, shrunk, moved. */
		to = mremap(at, bytes, 2 * bytes, MREMAP_MAYMOVE);
		CHECK(to != MAP_FAILED);
		check(to, bytes, seed);
		for (size_t n = bytes; n < 2 * bytes; n += PAGE)
			CHECK(to[n] == 0);
		to = mremap(to, 2 * bytes, bytes, 0);
		CHECK(to != MAP_FAILED);
		at = map(bytes);
		memset(at, 1, bytes);
		to = mremap(to, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at);
		CHECK(to == at);
		check(to, bytes, seed);
		/* Cut in the middle, with something else put there. */
		CHECK(mmap(to + 16 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
		      to + 16 * PAGE);
		for (size_t n = 0; n < 8 * PAGE; n++)
			CHECK(to[16 * PAGE + n] == 0);
		check(to, 16 * PAGE, seed);
		CHECK(mprotect(to, bytes, PROT_READ) == 0);
		check(to, 16 * PAGE, seed);
		CHECK(mprotect(to, bytes, PROT_READ | PROT_WRITE) == 0);
		/* A system call that writes, and one that reads. */
		int pipes[2];

		CHECK(pipe(pipes) == 0);
		CHECK(write(pipes[1], to + 3 * PAGE - 100, 8000) == 8000);
		memset(to + 32 * PAGE, 0, 2 * PAGE);
		CHECK(read(pipes[0], to + 32 * PAGE, 8000) == 8000);
		CHECK(memcmp(to + 3 * PAGE - 100, to + 32 * PAGE, 8000) == 0);
		close(pipes[0]);
		close(pipes[1]);
		CHECK(munmap(to + PAGE, bytes - 2 * PAGE) == 0);
		check(to, PAGE, seed);
		CHECK(munmap(to, bytes) == 0);
	}
	return NULL;
}

int main(void)
{
	pthread_t threads[THREADS];

	for (uintptr_t n = 0; n < THREADS; n++)
		CHECK(pthread_create(&threads[n], NULL, work, (void *)(n + 1)) == 0);
	for (int n = 0; n < THREADS; n++)
		CHECK(pthread_join(threads[n], NULL) == 0);
	return 0;
}
