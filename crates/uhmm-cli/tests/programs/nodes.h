/* What the programs that use the nodes of the kernel's HMM test device have in common. */
#include "common.h"

#define HUGE_BYTES (2 * MIB)

enum { READ, WRITE, TO_DEVICE, TO_SYSTEM, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE, FLAGS, READ_UNLOCKED };

struct command {
	uint64_t addr, ptr, pages, copied, faults;
};

static int coherent, frames;
static int nodes[2];
/* What the last command told. */
static struct command told;
static unsigned char seen[4096];

#define SAME(a, b)                                                                                                     \
	do {                                                                                                           \
		long a_ = (long)(a), b_ = (long)(b);                                                                   \
		if (a_ != b_) {                                                                                        \
			fprintf(stderr, "%s:%d: %s is %ld (%#lx), not %s = %ld (%#lx)\n", __func__, __LINE__, #a, a_,  \
				a_, #b, b_, b_);                                                                       \
			failures++;                                                                                    \
		}                                                                                                      \
	} while (0)
static int failures;

static char path[] = "/dev/hmm_dmirrorN";

static int node(int n)
{
	path[sizeof path - 2] = '0' + n;
	return open(path, O_RDWR);
}

static int ask(int fd, int number, const void *addr, void *ptr, uint64_t pages)
{
	/* What an error must leave as it is. */
	struct command command = { (uintptr_t)addr, (uintptr_t)ptr, pages, 77, 88 };
	int answer = ioctl(fd, _IOWR('H', number, struct command), &command);

	if (answer != 0) {
		SAME(command.copied, 77);
		SAME(command.faults, 88);
	}
	told = command;
	return answer == 0 ? 0 : -errno;
}

static char *anonymous(uint64_t pages, int prot)
{
	char *at = mmap(NULL, pages * PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

/* The byte of a snapshot for a page of the first device's that may be written or not. */
static int local(int access)
{
	return (coherent ? 0x40 : 0x20) | access;
}

/* What a snapshot shows of a page in RAM that may be written. */
static int writable(void)
{
	return frames ? 2 : 1;
}

static unsigned char *look(int fd, const void *addr, uint64_t pages)
{
	SAME(ask(fd, SNAPSHOT, addr, seen, pages), 0);
	SAME(told.copied, pages);
	return seen;
}

static uint64_t page_map(const void *addr)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t word = 0;

	CHECK(fd >= 0 && pread(fd, &word, 8, (uintptr_t)addr / PAGE * 8) == 8);
	close(fd);
	return word;
}

/* Whether a page is known not to be there, and not to be lost either. */
static int is_swapped(const void *addr)
{
	return page_map(addr) >> 62 == 1;
}

static int is_present(const void *addr)
{
	return page_map(addr) >> 63;
}

/* Whether a page is on a device: out of the CPU's page table, where the memory is private. */
static void expect_away(const char *addr, uint64_t pages)
{
	for (uint64_t n = 0; n < pages; n++) {
		SAME(is_present(addr + n * PAGE), coherent);
		SAME(is_swapped(addr + n * PAGE), !coherent);
	}
}

/* Opens the two nodes that the arguments name: private or coherent; whether page frames are known ("frames") or not ("blind").
 * Returns whether they are there. */
static int open_nodes(int argc, char **argv)
{
	int first;

	CHECK(argc == 3);
	coherent = strcmp(argv[1], "coherent") == 0;
	frames = strcmp(argv[2], "frames") == 0;
	first = coherent ? 2 : 0;
	nodes[0] = node(first);
	if (nodes[0] < 0 && coherent && errno == ENOENT) {
		printf("skipped: no coherent memory here\n");
		return 0;
	}
	nodes[1] = node(first + 1);
	CHECK(nodes[0] >= 0 && nodes[1] >= 0);
	return 1;
}
