/* A userfaultfd of the program's own, on memory that was used before. */
#include "common.h"
#include <linux/userfaultfd.h>

static int uffd;
static char *page;
static volatile long served;

static void *serve(void *none)
{
	struct pollfd ready = { .fd = uffd, .events = POLLIN };
	struct uffd_msg message;

	while (poll(&ready, 1, -1) == 1 && read(uffd, &message, sizeof message) == sizeof message) {
		struct uffdio_copy copy = { .dst = message.arg.pagefault.address & ~(PAGE - 1), .src = (uintptr_t)page,
					    .len = PAGE };

		CHECK(message.event == UFFD_EVENT_PAGEFAULT);
		served++;
		CHECK(ioctl(uffd, UFFDIO_COPY, &copy) == 0);
	}
	return none;
}

int main(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	size_t bytes = 4 * MIB;
	char *at = map(bytes), *other = map(bytes);
	double start = now();
	pthread_t thread;

	page = map(PAGE);
	memset(page, 'u', PAGE);
	/* For a while it is like any other memory, and moves. */
	for (uint64_t seed = 1; now() < start + WORK; seed++) {
		fill(at, bytes, seed);
		check(at, bytes, seed);
	}
	fill(other, bytes, 7);
	uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	/* Without privileges: for its own touches only. */
	if (uffd < 0 && errno == EPERM)
		uffd = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	CHECK(uffd >= 0);
	CHECK(ioctl(uffd, UFFDIO_API, &api) == 0);
	struct uffdio_register reg = { .range = { (uintptr_t)at, bytes }, .mode = UFFDIO_REGISTER_MODE_MISSING };

	CHECK(ioctl(uffd, UFFDIO_REGISTER, &reg) == 0);
	CHECK(pthread_create(&thread, NULL, serve, NULL) == 0);
	for (double end = now() + WORK; now() < end;) {
		long before = served;

		CHECK(madvise(at, bytes, MADV_DONTNEED) == 0);
		for (size_t n = 0; n < bytes; n += PAGE)
			CHECK(at[n] == 'u' && at[n + PAGE - 1] == 'u');
		CHECK(served - before == (long)(bytes / PAGE));
		check(other, bytes, 7);
	}
	CHECK(ioctl(uffd, UFFDIO_UNREGISTER, &reg.range) == 0);
	return 0;
}
