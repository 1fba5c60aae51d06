/* What the programs share that are run under uhmm by tests/run.rs. Each checks itself and ends with status 0. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)

static void fail(const char *what)
{
	fprintf(stderr, "program failed: %s (errno %d: %s)\n", what, errno, strerror(errno));
	_exit(1);
}

#define CHECK(condition) do { if (!(condition)) fail(#condition); } while (0)

__attribute__((unused)) static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

/* The number that belongs to a place. */
__attribute__((unused)) static uint64_t number(uint64_t seed, uint64_t n)
{
	uint64_t x = (n + 1) * 0x9e3779b97f4a7c15ul ^ seed * 0xbf58476d1ce4e5b9ul;

	return x ^ x >> 29;
}

__attribute__((unused)) static void fill(void *at, size_t bytes, uint64_t seed)
{
	uint64_t *words = at;

	for (size_t n = 0; n < bytes / 8; n++)
		words[n] = number(seed, n);
}

#define check(at, bytes, seed) check_at(__LINE__, at, bytes, seed)

__attribute__((unused)) static void check_at(int line, const void *at, size_t bytes, uint64_t seed)
{
	const volatile uint64_t *words = at;

	for (size_t n = 0; n < bytes / 8; n++) {
		uint64_t found = words[n];

		if (found != number(seed, n)) {
			fprintf(stderr, "program failed, line %d: word %zu at %p is %#lx, not %#lx; seen again: %#lx\n", line, n,
				(void *)&words[n], found, number(seed, n), words[n]);
			_exit(1);
		}
	}
}

__attribute__((unused)) static void *map(size_t bytes)
{
	void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

/* How long a program works on: long enough for the engine to have come up, and for much to have moved. */
#define WORK 0.6
