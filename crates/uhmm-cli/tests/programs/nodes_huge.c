/*
 * The nodes of the kernel's HMM test device and huge pages: they go and come as one, and in parts where they have to.
 * Arguments as nodes.c.
 */
#include "nodes.h"

static char bytes[HUGE_BYTES];
static char *area;

/* A block for one huge page, in mappings of its own; and the block behind it. */
static char *block(void)
{
	char *at;

	area = anonymous(4 * 512, PROT_READ | PROT_WRITE);
	at = (char *)(((uintptr_t)area + HUGE_BYTES - 1) & -(uintptr_t)HUGE_BYTES);
	CHECK(madvise(at, 2 * HUGE_BYTES, MADV_HUGEPAGE) == 0);
	return at;
}

static void end_block(void)
{
	munmap(area, 4 * HUGE_BYTES);
}

/* A number in each page tells the pages apart. */
static char *filled_block(void)
{
	char *at = block();

	for (int n = 0; n < 512; n++)
		memset(at + n * PAGE, 'A' + n % 26, PAGE);
	return at;
}

static void expect_filled(const char *at, int first, int pages)
{
	for (int n = first; n < first + pages; n++) {
		if (at[n * PAGE] != 'A' + n % 26 || at[n * PAGE + PAGE - 1] != 'A' + n % 26) {
			fprintf(stderr, "page %d is %#x\n", n, at[n * PAGE]);
			failures++;
			return;
		}
	}
}

static void expect_zeros(const char *at, int pages)
{
	static const char zeros[PAGE];

	for (int n = 0; n < pages; n++)
		SAME(memcmp(at + n * PAGE, zeros, PAGE), 0);
}

/* All pages of a block are the first device's. */
static void expect_local(const char *at, int pages, int access)
{
	look(nodes[0], at, pages);
	for (int n = 0; n < pages; n++)
		SAME(seen[n] & ~4, local(access));
}

/* Whether the kernel gives huge pages, and the library knows. */
static int has_huge_pages(void)
{
	int has = look(nodes[0], filled_block(), 512)[0] & 4;

	end_block();
	return has;
}

static void it_is_one_unit(void)
{
	char *at = filled_block();

	SAME(look(nodes[0], at, 512)[511], writable() | 4);
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(told.copied, 512);
	expect_filled(bytes, 0, 512);
	expect_away(at, 512);
	SAME(look(nodes[0], at, 512)[0], coherent ? local(2) : local(2) | 4);
	SAME(seen[511], seen[0]);
	SAME(at[5 * PAGE], 'F');
	/* All of it at once, where huge pages move as they are. */
	if (getenv("UHMM_MASK") == NULL)
		for (int n = 0; n < 512; n++)
			SAME(is_present(at + n * PAGE), 1);
	expect_filled(at, 0, 512);
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(ask(nodes[0], TO_SYSTEM, at, bytes, 512), 0);
	SAME(told.copied, coherent ? 512 : 1);
	expect_filled(at, 0, 512);
	end_block();
}

static void what_was_never_touched_goes_as_zeros(void)
{
	char *at = block();

	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(told.copied, 512);
	expect_zeros(bytes, 512);
	expect_local(at, 512, 2);
	expect_zeros(at, 512);
	/* The huge zero page. */
	SAME(at[HUGE_BYTES], 0);
	CHECK(mprotect(at + HUGE_BYTES, HUGE_BYTES, PROT_READ) == 0);
	SAME(ask(nodes[0], TO_DEVICE, at + HUGE_BYTES, bytes, 512), 0);
	expect_local(at + HUGE_BYTES, 512, 1);
	expect_zeros(at + HUGE_BYTES, 512);
	CHECK(mprotect(at + HUGE_BYTES, HUGE_BYTES, PROT_READ | PROT_WRITE) == 0);
	end_block();
}

static void small_pages_are_as_good(void)
{
	char *at = filled_block();

	SAME(ask(nodes[0], FLAGS, at, NULL, 1), 0);
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(told.copied, 512);
	expect_filled(bytes, 0, 512);
	expect_away(at, 512);
	look(nodes[0], at, 512);
	for (int n = 0; n < 512; n++)
		SAME(seen[n], local(2));
	/* Which was the allocation that failed. */
	SAME(ask(nodes[0], TO_DEVICE, at + HUGE_BYTES, bytes, 1), 0);
	expect_filled(at, 0, 512);
	/* On the way home. */
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(ask(nodes[0], FLAGS, at, NULL, 1), 0);
	expect_filled(at, 0, 512);
	/* Whether a touch of memory used the flag up is the kernel's matter. */
	ask(nodes[0], TO_DEVICE, at, bytes, 1);
	end_block();
}

static void a_part_can_be_unmapped(void)
{
	char *at = filled_block();

	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	munmap(at + 16 * PAGE, 16 * PAGE);
	SAME(look(nodes[0], at, 512)[0], local(2));
	SAME(seen[16], 0xff);
	SAME(seen[32], local(2));
	SAME(ask(nodes[0], READ, at, bytes, 16), 0);
	expect_filled(bytes, 0, 16);
	SAME(ask(nodes[0], READ, at, bytes, 17), -EFAULT);
	expect_filled(at, 0, 16);
	expect_filled(at, 32, 480);
	/* The other way round. */
	SAME(ask(nodes[0], TO_DEVICE, at + 32 * PAGE, bytes, 480), 0);
	SAME(told.copied, 480);
	expect_filled(at, 32, 480);
	end_block();
}

static void a_part_can_be_dropped(void)
{
	char *at = filled_block();

	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	CHECK(madvise(at + 100 * PAGE, 200 * PAGE, MADV_DONTNEED) == 0);
	SAME(look(nodes[0], at, 512)[99], local(2));
	SAME(seen[100], 0);
	SAME(seen[300], local(2));
	SAME(ask(nodes[0], READ, at, bytes, 512), 0);
	expect_filled(bytes, 0, 100);
	expect_zeros(bytes + 100 * PAGE, 200);
	expect_filled(at, 300, 212);
	expect_zeros(at + 100 * PAGE, 200);
	expect_filled(at, 0, 100);
	/* What may be thrown away is there as long as it is not. */
	end_block();
	at = filled_block();
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	CHECK(madvise(at, HUGE_BYTES, MADV_FREE) == 0);
	for (int n = 0; n < 512; n++)
		SAME(at[n * PAGE] == 0 || at[n * PAGE] == 'A' + n % 26, 1);
	end_block();
}

/* Moves `pages` of the block at `at`, from number `first` on, to `to`, and looks at both. */
static void move_and_look(char *at, int first, int pages, char *to)
{
	SAME(mremap(at + first * PAGE, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, 1);
	expect_local(to, pages, 2);
	SAME(ask(nodes[0], READ, to, bytes, pages), 0);
	expect_filled(bytes - first * PAGE, first, pages);
	if (first > 0) {
		expect_local(at, first, 2);
		expect_filled(at, 0, first);
	}
	expect_filled(to - first * PAGE, first, pages);
	SAME(ask(nodes[0], TO_DEVICE, to, bytes, pages), 0);
	expect_filled(to - first * PAGE, first, pages);
}

static void it_moves_with_its_mapping(void)
{
	char *to = (char *)(((uintptr_t)anonymous(4 * 512, PROT_NONE) + HUGE_BYTES - 1) & -(uintptr_t)HUGE_BYTES);
	char *at = filled_block();

	/* As a whole, to where there is something, and to a fresh hole. */
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	move_and_look(at, 0, 512, to);
	end_block();
	munmap(to, HUGE_BYTES);
	at = filled_block();
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	move_and_look(at, 0, 512, to);
	end_block();
	/* Half of it, and to where it is no block any more. */
	at = filled_block();
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	move_and_look(at, 256, 256, to + 3 * PAGE);
	end_block();
	/* Half of it first. */
	at = filled_block();
	SAME(mremap(at + 256 * PAGE, 256 * PAGE, 256 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to, 1);
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 256), 0);
	SAME(ask(nodes[0], TO_DEVICE, to, bytes, 256), 0);
	expect_filled(bytes - 256 * PAGE, 256, 256);
	expect_filled(to - 256 * PAGE, 256, 256);
	expect_filled(at, 0, 256);
	end_block();
	/* What it leaves behind is empty. */
	at = filled_block();
	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(mremap(at, HUGE_BYTES, HUGE_BYTES, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == to, 1);
	expect_local(to, 512, 2);
	expect_filled(to, 0, 512);
	expect_zeros(at, 512);
	end_block();
	munmap(to, 2 * HUGE_BYTES);
}

static void a_fork_has_it_twice(void)
{
	char *at = filled_block();
	int status;
	pid_t child;

	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		failures = 0;
		expect_filled(at, 0, 512);
		memset(at, 'c', HUGE_BYTES);
		_exit(failures != 0);
	}
	at[7 * PAGE] = 'p';
	CHECK(waitpid(child, &status, 0) == child);
	SAME(status, 0);
	SAME(at[7 * PAGE], 'p');
	expect_filled(at, 8, 504);
	SAME(ask(nodes[0], READ, at, bytes, 512), 0);
	expect_filled(bytes, 0, 7);
	end_block();
}

static void another_device_has_a_page_of_it(void)
{
	char *at = filled_block();

	SAME(ask(nodes[0], TO_DEVICE, at, bytes, 512), 0);
	SAME(ask(nodes[1], TO_DEVICE, at, bytes, 512), -ENOENT);
	expect_local(at, 512, 2);
	SAME(ask(nodes[1], READ, at + 9 * PAGE, bytes, 1), 0);
	SAME(bytes[0], 'J');
	memset(bytes, '1', PAGE);
	SAME(ask(nodes[1], WRITE, at + 9 * PAGE, bytes, 1), 0);
	SAME(look(nodes[0], at, 512)[8], local(2));
	SAME(seen[10], local(2));
	SAME(at[9 * PAGE], '1');
	expect_filled(at, 10, 502);
	/* It takes what is free. */
	SAME(ask(nodes[0], TO_SYSTEM, at, bytes, 512), 0);
	SAME(ask(nodes[1], TO_DEVICE, at, bytes, 512), 0);
	SAME(bytes[9 * PAGE], '1');
	SAME(ask(nodes[1], RELEASE, at, bytes, 512), 0);
	expect_filled(at, 0, 9);
	end_block();
}

int main(int argc, char **argv)
{
	if (!open_nodes(argc, argv))
		return 0;
	if (!has_huge_pages()) {
		printf("skipped: no huge page\n");
		return 0;
	}
	it_is_one_unit();
	what_was_never_touched_goes_as_zeros();
	small_pages_are_as_good();
	a_part_can_be_unmapped();
	a_part_can_be_dropped();
	it_moves_with_its_mapping();
	a_fork_has_it_twice();
	another_device_has_a_page_of_it();
	printf("%d failures\n", failures);
	return failures != 0;
}
