/* One of each call that changes a layout, with arguments that succeed, fail, and fail half way. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <unistd.h>

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE, PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS };

static int grow_stack(int depth)
{
	volatile char frame[PAGE];

	frame[0] = depth;
	return depth ? grow_stack(depth - 1) + frame[0] : 0;
}

static void segments(void)
{
	int id = shmget(IPC_PRIVATE, 3 * PAGE + 5, 0600 | IPC_CREAT);
	char *writable = shmat(id, NULL, 0);

	shmat(id, NULL, SHM_RDONLY);
	shmctl(id, IPC_RMID, NULL);
	*writable = 1;
	shmdt(writable);
}

static void shared_memory(void)
{
	char *area = mmap(NULL, 10 * PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	mprotect(area + PAGE, PAGE, PROT_NONE);
	mremap(area, 0, PAGE, MREMAP_MAYMOVE); /* the same pages at a second place */
	munmap(area + 3 * PAGE, PAGE);
	mprotect(area, 10 * PAGE, PROT_READ); /* ENOMEM at the hole */
	madvise(area, 10 * PAGE, MADV_DONTNEED); /* ENOMEM, and done behind the hole too */
	msync(area, 10 * PAGE, MS_ASYNC);
}

static char *moves(void)
{
	char *area = mmap(NULL, 20 * PAGE, RW, PRIVATE, -1, 0), *moved;

	memset(area, 1, 20 * PAGE);
	moved = mremap(area + 5 * PAGE, 5 * PAGE, 5 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
	mremap(area, 5 * PAGE, 2 * PAGE, 0);
	mremap(moved, 5 * PAGE, 5 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, area + 2 * PAGE);
	mremap((void *)PAGE, PAGE, 2 * PAGE, MREMAP_MAYMOVE); /* EFAULT */
	mmap(area, PAGE, PROT_READ, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0); /* EEXIST */
	munmap(area + 1, PAGE); /* EINVAL */
	return area;
}

static void files(const char *self)
{
	char name[] = "/tmp/layout-XXXXXX";
	int program = open(self, O_RDONLY), zero = open("/dev/zero", O_RDWR), file = mkstemp(name);
	int memory = memfd_create("a (strange)\nname", 0);
	char *text = mmap(NULL, 8 * PAGE, PROT_READ, MAP_PRIVATE, program, 0), *pages;

	mmap(text + PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, program, PAGE);
	mmap(text + 2 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, program, 0);
	mprotect(text + PAGE, PAGE, RW); /* EACCES */
	mmap(NULL, 4 * PAGE, RW, MAP_PRIVATE, zero, 0);
	mmap(NULL, 4 * PAGE, RW, MAP_SHARED, zero, 2 * PAGE);
	unlink(name);
	if (ftruncate(memory, 4 * PAGE) || ftruncate(file, 2 * PAGE))
		abort();
	mmap(NULL, 2 * PAGE, RW, MAP_SHARED, file, 0);
	pages = mmap(NULL, 4 * PAGE, RW, MAP_SHARED, memory, 0);
	remap_file_pages(pages + PAGE, PAGE, 0, 3, 0);
	msync(pages, PAGE, MS_SYNC);
}

int main(int argc, char **argv)
{
	char *area;

	grow_stack(500);
	segments();
	shared_memory();
	area = moves();
	files(argv[0]);
	mprotect((void *)((uintptr_t)&argc & -PAGE), PAGE, RW | PROT_EXEC | PROT_GROWSDOWN);
	mmap(NULL, 4 * PAGE, RW, PRIVATE | MAP_GROWSDOWN, -1, 0);
	brk((char *)sbrk(0) + 100000);
	brk((char *)sbrk(0) - 50000);
	brk((void *)1); /* not granted */
	mlock(area, PAGE);
	mlock2(area, PAGE, MLOCK_ONFAULT);
	munlock(area, PAGE);
	mlockall(MCL_CURRENT);
	munlockall();
	return 0;
}
