/*
 * A negative control: a device that has no memory.
 *
 * It reads and writes where the program's pages are, with the errors that the program's mappings ask for. Pages that
 * are to move to it stay where they are, and nothing is exclusive. A test that passes with it does not look where
 * pages are. It leaves the program's heap alone, as a kernel does: the tests write past the ends of small buffers there.
 *
 *   cc -shared -fPIC -O2 in_place.c -o in_place.so -ldl
 */
#include "device.h"

#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/uio.h>

/* What a page's mapping allows. */
enum { MAPPED = 1, READABLE = 2, WRITABLE = 4, SHARED = 8 };

/* Bytes of a snapshot. */
enum { S_ERROR = 0xff, S_NONE = 0, S_READ = 1, S_WRITE = 2, S_PMD = 4, S_ZERO = 0x10 };

enum { PAGES_MAX = 8192, MAPS_MAX = 1 << 20 };

/* For one command at a time. */
static unsigned char pages[PAGES_MAX];
static char bounce[(size_t)PAGES_MAX * PAGE];
static char maps[MAPS_MAX];

/* Fills in one byte a page. */
static int mappings(const struct command *c)
{
	uint64_t end = c->addr + c->npages * PAGE;
	size_t len = 0;
	ssize_t got;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return -EFAULT;
	while ((got = read(fd, maps + len, MAPS_MAX - 1 - len)) > 0)
		len += (size_t)got;
	close(fd);
	maps[len] = 0;
	memset(pages, 0, c->npages);
	for (char *line = maps; *line; line = strchr(line, '\n') + 1) {
		char *next;
		uint64_t from = strtoul(line, &next, 16), to = strtoul(next + 1, &next, 16);
		const char *prot = next + 1;
		unsigned char bits = MAPPED | (prot[0] == 'r' ? READABLE : 0) | (prot[1] == 'w' ? WRITABLE : 0) |
				     (prot[3] == 's' ? SHARED : 0);

		for (uint64_t at = from > c->addr ? from : c->addr; at < to && at < end; at += PAGE)
			pages[(at - c->addr) / PAGE] = bits;
	}
	return 0;
}

/* Whether every page allows what is asked. */
static int all(const struct command *c, unsigned char bits)
{
	for (uint64_t i = 0; i < c->npages; i++)
		if ((pages[i] & bits) != bits)
			return 0;
	return 1;
}

static int any(const struct command *c, unsigned char bits)
{
	for (uint64_t i = 0; i < c->npages; i++)
		if (pages[i] & bits)
			return 1;
	return 0;
}

/* Copies the range to where the program wants it; nothing where a part cannot be read. */
static int copy_out(struct command *c)
{
	size_t len = c->npages * PAGE;
	struct iovec here = { bounce, len }, there = { (void *)c->addr, len };

	if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != (ssize_t)len)
		return -EFAULT;
	memcpy((void *)c->ptr, bounce, len);
	c->cpages = c->npages;
	return 0;
}

static int copy_in(struct command *c)
{
	size_t len = c->npages * PAGE;
	struct iovec here = { (void *)c->ptr, len }, there = { (void *)c->addr, len };

	if (process_vm_writev(getpid(), &here, 1, &there, 1, 0) != (ssize_t)len)
		return -EFAULT;
	c->cpages = c->npages;
	return 0;
}

static uint64_t word_at(int fd, uint64_t index)
{
	uint64_t word = 0;

	return pread(fd, &word, sizeof(word), (off_t)(index * sizeof(word))) == sizeof(word) ? word : 0;
}

static int snapshot(struct command *c)
{
	int entries = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int flags = open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);

	for (uint64_t i = 0; i < c->npages; i++) {
		unsigned char mapping = pages[i];
		uint64_t entry = word_at(entries, c->addr / PAGE + i);
		uint64_t frame = entry & ((1ull << 55) - 1);
		uint64_t kind = frame && flags >= 0 ? word_at(flags, frame) : 0;
		int is_own = !(entry >> 61 & 1) && (entry >> 56 & 1);

		int is_zero = kind >> 24 & 1, is_huge = kind >> 17 & 1;
		int is_writable = (mapping & WRITABLE) && (is_own || is_huge || mapping & SHARED);

		if (!(mapping & READABLE))
			pages[i] = S_ERROR;
		else if (!(entry >> 63))
			pages[i] = S_NONE;
		else if (is_zero)
			pages[i] = S_ZERO | S_READ;
		else
			pages[i] = (is_writable ? S_WRITE : S_READ) | (is_huge ? S_PMD : 0);
	}
	if (entries >= 0)
		close(entries);
	if (flags >= 0)
		close(flags);
	memcpy((void *)c->ptr, pages, c->npages);
	c->cpages = c->npages;
	return 0;
}

static int act(int command, struct command *c)
{
	int error = mappings(c);

	if (error)
		return error;
	switch (command) {
	case READ:
		c->faults = 1;
		return copy_out(c);
	case WRITE:
		if (!all(c, READABLE))
			return -EFAULT;
		if (!all(c, WRITABLE))
			return -EPERM;
		c->faults = 1;
		return copy_in(c);
	case MIGRATE_TO_DEV:
		if (!all(c, READABLE))
			return -EINVAL;
		if (any(c, SHARED))
			return -ENOENT;
		return copy_out(c);
	case EXCLUSIVE:
		return all(c, READABLE | WRITABLE) ? copy_out(c) : -EFAULT;
	case SNAPSHOT:
		return snapshot(c);
	case MIGRATE_TO_SYS:
		c->cpages = c->npages;
		return 0;
	case CHECK_EXCLUSIVE:
	case RELEASE:
		return 0;
	default:
		return -EINVAL;
	}
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list args;

	va_start(args, request);
	void *arg = va_arg(args, void *);
	va_end(args);
	int command = command_of(request);
	if (!device(fd) || command < 0)
		return NEXT(ioctl)(fd, request, arg);
	struct command c = *(struct command *)arg;
	int error = -EINVAL;
	if (c.addr % PAGE == 0 && c.npages != 0 && c.addr + c.npages * PAGE > c.addr)
		error = c.npages <= PAGES_MAX ? act(command, &c) : -ENOMEM;
	if (error) {
		errno = -error;
		return -1;
	}
	*(struct command *)arg = c;
	return 0;
}
