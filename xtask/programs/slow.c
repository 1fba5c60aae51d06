// Gives stress time: calls that change memory, or look at it, take a little longer, before and after. The kernel's tests
// are over in some milliseconds, and few pages would move between two of their steps. Loaded before uhmm's own library.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>

static void wait_a_little(void)
{
	static long delay_us = -1;
	int saved = errno;

	if (delay_us < 0) {
		const char *text = getenv("SLOW_US");
		delay_us = text ? atol(text) : 0;
	}
	nanosleep(&(struct timespec){ .tv_nsec = delay_us * 1000 }, NULL);
	errno = saved;
}

// Six words are what a call takes at most; one that takes fewer ignores the rest.
#define SLOW(name)                                                            \
	long name(long a, long b, long c, long d, long e, long f)             \
	{                                                                     \
		static long (*next)(long, long, long, long, long, long);      \
		if (!next)                                                    \
			*(void **)&next = dlsym(RTLD_NEXT, #name);            \
		wait_a_little();                                              \
		long result = next(a, b, c, d, e, f);                         \
		wait_a_little();                                              \
		return result;                                                \
	}

SLOW(mmap)
SLOW(munmap)
SLOW(mprotect)
SLOW(mremap)
SLOW(madvise)
SLOW(process_madvise)
SLOW(mlock)
SLOW(mlock2)
SLOW(munlock)
SLOW(mincore)
SLOW(ioctl)
SLOW(fork)
SLOW(prctl)
