/* recorder.c: a file system with one file, `disk`, that writes down what a device would be told.
 *
 *     recorder IMAGE LOG MOUNTPOINT
 *
 * IMAGE holds the bytes.  Each write appends a head and its data to LOG, each flush a head alone,
 * and both before they are answered; so the length of LOG, looked at when a program has its answer,
 * is the point behind which nothing of that program's may be missing.  One thread: what is written
 * down first happened first. */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

struct head {
	uint64_t at, size;      /* both UINT64_MAX: a flush */
};

static int image, record;

static int write_down(uint64_t at, uint64_t size, const void *data, size_t n)
{
	struct head h = { at, size };
	struct iovec v[2] = { { &h, sizeof h }, { (void *)(uintptr_t)data, n } };

	return writev(record, v, 2) == (ssize_t)(sizeof h + n) ? 0 : -EIO;
}

static int do_getattr(const char *path, struct stat *st, struct fuse_file_info *f)
{
	(void)f;
	memset(st, 0, sizeof *st);
	if (!strcmp(path, "/")) {
		st->st_mode = S_IFDIR | 0700;
		st->st_nlink = 2;
		return 0;
	}
	if (strcmp(path, "/disk") != 0)
		return -ENOENT;
	if (fstat(image, st) < 0)
		return -errno;
	st->st_mode = S_IFREG | 0600;
	st->st_nlink = 1;
	return 0;
}

static int do_readdir(const char *path, void *to, fuse_fill_dir_t fill, off_t at,
    struct fuse_file_info *f, enum fuse_readdir_flags flags)
{
	(void)path, (void)at, (void)f, (void)flags;
	fill(to, "disk", NULL, 0, 0);
	return 0;
}

static int do_open(const char *path, struct fuse_file_info *f)
{
	(void)f;
	return strcmp(path, "/disk") ? -ENOENT : 0;
}

static int do_read(const char *path, char *to, size_t n, off_t at, struct fuse_file_info *f)
{
	ssize_t k = pread(image, to, n, at);

	(void)path, (void)f;
	return k < 0 ? -errno : (int)k;
}

static int do_write(const char *path, const char *p, size_t n, off_t at, struct fuse_file_info *f)
{
	(void)path, (void)f;
	if (write_down((uint64_t)at, n, p, n) < 0 || pwrite(image, p, n, at) != (ssize_t)n)
		return -EIO;
	return (int)n;
}

static int do_fsync(const char *path, int data_only, struct fuse_file_info *f)
{
	(void)path, (void)data_only, (void)f;
	return write_down(UINT64_MAX, UINT64_MAX, NULL, 0);
}

static const struct fuse_operations operations = {
	.getattr = do_getattr,
	.readdir = do_readdir,
	.open = do_open,
	.read = do_read,
	.write = do_write,
	.fsync = do_fsync,
};

int main(int argc, char **argv)
{
	char *call[] = { argv[0], "-f", "-s", "-o", "default_permissions", NULL, NULL };

	if (argc != 4) {
		fprintf(stderr, "usage: recorder IMAGE LOG MOUNTPOINT\n");
		return 64;
	}
	image = open(argv[1], O_RDWR | O_CLOEXEC);
	record = open(argv[2], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (image < 0 || record < 0) {
		perror("recorder");
		return 1;
	}
	prctl(PR_SET_PDEATHSIG, SIGTERM);       /* a mount must not outlive the test that made it */
	call[5] = argv[3];
	return fuse_main(6, call, &operations, NULL);
}
