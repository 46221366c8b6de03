/* Calls whose effect their line in the log does not say in full; recorded without shmget. */
#define _GNU_SOURCE
#include <linux/perf_event.h>
#include <stdint.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE, PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS, MSEAL = 462, GUARD = 102 };

static char *map(int pages, int prot, int flags)
{
	return mmap(NULL, (size_t)pages * PAGE, prot, flags, -1, 0);
}

/* Nothing says how large a segment is, and shmdt leaves alone what was mapped over it. */
static void segments(void)
{
	int id = shmget(IPC_PRIVATE, 9 * PAGE + 5, 0600 | IPC_CREAT), gone = shmget(IPC_PRIVATE, 7 * PAGE, 0600 | IPC_CREAT);
	char *kept = shmat(id, NULL, 0), *area = shmat(gone, NULL, 0);

	mmap(area + 2 * PAGE, PAGE, PROT_READ, PRIVATE | MAP_FIXED, -1, 0);
	mprotect(area + 5 * PAGE, PAGE, PROT_READ);
	munmap(kept + 3 * PAGE, PAGE);
	shmctl(id, IPC_RMID, NULL);
	shmctl(gone, IPC_RMID, NULL);
	shmdt(area);
}

/* mprotect changes what lies below the mapping that it may not change. */
static void interrupted(void)
{
	char *sealed = map(8, RW, PRIVATE), *limited;
	struct rlimit limit = { 1 << 20, RLIM_INFINITY };

	syscall(MSEAL, sealed + 3 * PAGE, 2 * PAGE, 0);
	mprotect(sealed, 8 * PAGE, PROT_READ); /* EPERM */
	limited = map(500, PROT_READ, PRIVATE);
	mprotect(limited, 2 * PAGE, RW);
	setrlimit(RLIMIT_DATA, &limit);
	mprotect(limited, 500 * PAGE, RW | PROT_EXEC); /* ENOMEM, and there is no hole */
	limit.rlim_cur = RLIM_INFINITY;
	setrlimit(RLIMIT_DATA, &limit);
}

/* Areas grow without a call. */
static void grown(void)
{
	char *place = map(600, PROT_NONE, PRIVATE), *area;

	munmap(place, 600 * PAGE);
	area = mmap(place + 590 * PAGE, 2 * PAGE, RW, PRIVATE | MAP_GROWSDOWN, -1, 0);
	area[-5000] = 1;
	mprotect(area, PAGE, PROT_READ | PROT_GROWSDOWN);
}

/* A forked child gets no mapping of a performance counter. */
static void not_inherited(void)
{
	struct perf_event_attr counter = { .type = PERF_TYPE_SOFTWARE, .size = sizeof counter, .config = 2 };
	int file = syscall(SYS_perf_event_open, &counter, 0, -1, -1, 0);

	mmap(NULL, 9 * PAGE, RW, MAP_SHARED, file, 0);
	if (!fork()) {
		map(9, RW, PRIVATE);
		_exit(0);
	}
	wait(NULL);
}

/* The ring of io_setup is as long as the kernel has processors. */
static void rings(void)
{
	unsigned long gone = 0, kept = 0;

	syscall(SYS_io_setup, 1, &gone);
	map(3, RW, PRIVATE);
	syscall(SYS_io_setup, 1000, &kept);
	syscall(SYS_io_destroy, gone);
}

/* Names that are no text, or that maps shows as it shows others. */
static void names(void)
{
	const char *const chosen[] = { "bad \xff\xfe \xc3", "line\nfeed", "line\\012feed", "<1>\", (2)]{3}" };

	for (int at = 0; at < 4; at++) {
		int memory = memfd_create(chosen[at], 0);

		if (ftruncate(memory, PAGE))
			_exit(1);
		mmap(NULL, PAGE, RW, MAP_SHARED, memory, 0);
	}
}

int main(void)
{
	char *unnamed = map(8, RW, MAP_SHARED | MAP_ANONYMOUS), *several = map(8, RW, PRIVATE), *huge;

	segments();
	interrupted();
	grown();
	not_inherited();
	rings();
	names();
	remap_file_pages(unnamed, 2 * PAGE, 0, 5, 0);
	remap_file_pages(unnamed + 5 * PAGE, PAGE, 0, 0, 0); /* which nothing maps any more */
	mprotect(several + PAGE, PAGE, PROT_NONE);
	munmap(several + 4 * PAGE, PAGE);
	mremap(several, 7 * PAGE, 7 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, map(8, PROT_NONE, PRIVATE)); /* since 6.17 */
	madvise(map(1, RW, PRIVATE), PAGE, GUARD);
	huge = map(1024, RW, PRIVATE);
	memset(huge, 1, 1024 * PAGE);
	madvise((void *)(((uintptr_t)huge + (2 << 20) - 1) & -(2 << 20)), 2 << 20, 25); /* MADV_COLLAPSE, by contents */
	mmap((void *)PAGE, PAGE, PROT_READ, PRIVATE, -1, 0); /* a hint below vm.mmap_min_addr */
	return 0;
}
