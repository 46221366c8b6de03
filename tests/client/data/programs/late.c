/* A program without loader and libc, which maps memory before it first asks for its break.
 * gcc -static -nostdlib late.c */
#include <sys/mman.h>
#include <sys/syscall.h>

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE, PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS };

static long call(long number, long a, long b, long c, long d)
{
	register long flags asm("r10") = d, file asm("r8") = -1, offset asm("r9") = 0;
	long result;

	asm volatile("syscall"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(flags), "r"(file), "r"(offset)
		     : "rcx", "r11", "memory");
	return result;
}

void _start(void)
{
	long area = call(SYS_mmap, 0, 8 * PAGE, RW, PRIVATE);

	call(SYS_munmap, area + PAGE, PAGE, 0, 0);
	call(SYS_mprotect, area + 2 * PAGE, PAGE, PROT_READ, 0);
	call(SYS_brk, call(SYS_brk, 0, 0, 0, 0) + 10 * PAGE, 0, 0, 0);
	call(SYS_mmap, area + PAGE, PAGE, PROT_READ, PRIVATE | MAP_FIXED);
	call(SYS_exit_group, 0, 0, 0, 0);
}
