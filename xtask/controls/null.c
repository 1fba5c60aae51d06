/*
 * A negative control: a device that does nothing and says that all went well.
 *
 * A test that passes with it shows nothing about devices.
 *
 *   cc -shared -fPIC -O2 null.c -o null.so -ldl
 */
#include "device.h"

int ioctl(int fd, unsigned long request, ...)
{
	va_list args;

	va_start(args, request);
	void *arg = va_arg(args, void *);
	va_end(args);
	if (!device(fd) || command_of(request) < 0)
		return NEXT(ioctl)(fd, request, arg);
	struct command *command = arg;
	command->cpages = command->npages;
	command->faults = 1;
	return 0;
}

