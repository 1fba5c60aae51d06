/* Thread-local storage of a library that is opened while threads come and go. */
#include "common.h"
#include <dlfcn.h>

static void *use(void *library)
{
	uint64_t *(*place)(void) = (uint64_t * (*)(void)) dlsym(library, "place");
	char *own = map(MIB);

	CHECK(place);
	CHECK(*place() == 11);
	*place() = (uintptr_t)&own;
	fill(own, MIB, 5);
	usleep(2000);
	check(own, MIB, 5);
	CHECK(*place() == (uintptr_t)&own);
	CHECK(munmap(own, MIB) == 0);
	return NULL;
}

int main(int argc, char **argv)
{
	double end = now() + WORK;

	CHECK(argc == 2);
	usleep(100000);
	while (now() < end) {
		void *library = dlopen(argv[1], RTLD_NOW);
		pthread_t threads[4];

		CHECK(library);
		for (int n = 0; n < 4; n++)
			CHECK(pthread_create(&threads[n], NULL, use, library) == 0);
		for (int n = 0; n < 4; n++)
			CHECK(pthread_join(threads[n], NULL) == 0);
		CHECK(dlclose(library) == 0);
	}
	return 0;
}
