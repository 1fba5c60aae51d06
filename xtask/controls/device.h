/*
 * What both controls have in common: file descriptors that stand for /dev/hmm_dmirror0..3.
 *
 * A descriptor is one of an empty memory file, so that it can be mapped. The commands are those of the kernel's HMM
 * test driver, written down from their specification: type 'H', a structure of five words.
 */
#ifndef CONTROL_DEVICE_H
#define CONTROL_DEVICE_H

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What a command is given, and what it answers. */
struct command {
	uint64_t addr;
	uint64_t ptr;
	uint64_t npages;
	uint64_t cpages;
	uint64_t faults;
};

enum { READ, WRITE, MIGRATE_TO_DEV, MIGRATE_TO_SYS, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE };

enum { FDS = 1024, PAGE = 4096 };

/* Which descriptors are a device's. */
static char is_device[FDS];

static inline int device(int fd)
{
	return fd >= 0 && fd < FDS && is_device[fd];
}

/* Whether a request is a device's command; its number then. */
static inline int command_of(unsigned long request)
{
	return (request & 0xffffff00) == 0xc0284800 ? (int)(request & 0xff) : -1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int open_device(const char *path)
{
	static const char prefix[] = "/dev/hmm_dmirror";
	size_t len = sizeof(prefix) - 1;

	if (strncmp(path, prefix, len) != 0 || path[len] < '0' || path[len] > '3' || path[len + 1] != 0)
		return -1;
	int fd = memfd_create("control", MFD_CLOEXEC);
	if (fd < 0 || fd >= FDS || ftruncate(fd, 1 << 30) != 0)
		return -1;
	is_device[fd] = 1;
	return fd;
}

#define MODE(last) ({ va_list args; va_start(args, last); mode_t mode = va_arg(args, mode_t); va_end(args); mode; })

int open(const char *path, int flags, ...)
{
	mode_t mode = MODE(flags);
	int fd = open_device(path);
	return fd >= 0 ? fd : NEXT(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
	mode_t mode = MODE(flags);
	int fd = open_device(path);
	return fd >= 0 ? fd : NEXT(open64)(path, flags, mode);
}

int openat(int dir, const char *path, int flags, ...)
{
	mode_t mode = MODE(flags);
	int fd = open_device(path);
	return fd >= 0 ? fd : NEXT(openat)(dir, path, flags, mode);
}

int close(int fd)
{
	if (device(fd))
		is_device[fd] = 0;
	return NEXT(close)(fd);
}

/* A device's mapping has its pages at once. They are read, not written: a private mapping would get copies of them. */
void *mmap(void *start, size_t len, int prot, int flags, int fd, off_t offset)
{
	enum { POPULATE_READ = 22 };
	void *mapped = NEXT(mmap)(start, len, prot, flags, fd, offset);

	if (mapped != MAP_FAILED && device(fd))
		madvise(mapped, len, POPULATE_READ);
	return mapped;
}

#endif
