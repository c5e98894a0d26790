/*
 * A disk through the C API, from its making to its closing: creates an image with ext4, mounts it, writes many files,
 * unmounts, mounts again, compares every byte, and asks everything on the way. The disk stays behind, closed.
 *
 * Usage: basic EMPTY-FOLDER [LIBRARY]    as root; LIBRARY (or $PLOOP_TEST_LIBRARY): the file that must be the one loaded
 * $BASIC_SIZE_MIB: size of the disk (10240). $BASIC_DATA_MIB: bytes written into files (1024).
 */
#include "../common.h"

#include <fcntl.h>
#include <stdint.h>
#include <sys/mount.h>
#include <sys/vfs.h>
#include <time.h>

#define MIB (1ULL << 20)
#define PER_FOLDER 64

/* Exported; the classic's header does not declare it either. */
int ploop_mount(struct ploop_disk_images_data *di, char **images, struct ploop_mount_param *param, int raw);

static char folder[2048], image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX];
static unsigned long long disk_mib = 10240, data_mib = 1024;
static uint64_t block[MIB / 8], other[MIB / 8];
/* What to detach when a check that everything else depends on fails. */
static char attached[64];

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void give_up(const char *what)
{
    fprintf(stderr, "%s: %s (%s)\n", what, ploop_get_last_error(), strerror(errno));
    if (attached[0] && ploop_umount(attached, NULL))
        fprintf(stderr, "and %s stays attached: %s\n", attached, ploop_get_last_error());
    exit(1);
}

#define MUST(expr) \
    do { \
        if ((expr) != 0) \
            give_up(#expr); \
    } while (0)

/* Content of file number n: a stream that no other file has. */
static uint64_t state;

static void seed(unsigned int n)
{
    state = 0x9e3779b97f4a7c15ULL * (n + 1);
}

static void fill(uint64_t *words, size_t count)
{
    while (count--) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *words++ = state;
    }
}

/* Sizes from 1 byte to 8 MiB, many small ones, no multiples of anything. */
static size_t size_of(unsigned int n)
{
    static const size_t top[] = {4096, 70000, 1 << 20, 30000, 8 << 20, 300000, 4096, 3 << 20};

    seed(n);
    fill(block, 8);
    return 1 + block[7] % top[n % 8];
}

static void path_of(unsigned int n, char *path)
{
    snprintf(path, PATH_MAX + 64, "%s/d%u/f%u", target, n / PER_FOLDER, n);
}

/* Writes files until the data is as much as asked for; returns their number. */
static unsigned int write_files(void)
{
    unsigned long long left = data_mib * MIB;
    unsigned int n;
    char path[PATH_MAX + 64];
    int fd;

    for (n = 0; left; n++) {
        size_t size = size_of(n);

        if (size > left)
            size = left;
        left -= size;
        if (n % PER_FOLDER == 0) {
            snprintf(path, sizeof(path), "%s/d%u", target, n / PER_FOLDER);
            MUST(mkdir(path, 0755));
        }
        path_of(n, path);
        fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0644);
        if (fd < 0)
            give_up(path);
        while (size) {
            size_t part = size < sizeof(block) ? size : sizeof(block);

            fill(block, sizeof(block) / 8);
            if (write(fd, block, part) != (ssize_t)part)
                give_up(path);
            size -= part;
        }
        MUST(close(fd));
    }
    return n;
}

static void compare_files(unsigned int count)
{
    unsigned long long left = data_mib * MIB;
    unsigned int n;
    char path[PATH_MAX + 64];
    struct stat st;
    int fd;

    for (n = 0; n < count; n++) {
        size_t size = size_of(n);

        if (size > left)
            size = left;
        left -= size;
        path_of(n, path);
        fd = open(path, O_RDONLY);
        if (fd < 0 || fstat(fd, &st) || (size_t)st.st_size != size)
            give_up(path);
        while (size) {
            size_t part = size < sizeof(block) ? size : sizeof(block), got = 0;

            fill(block, sizeof(block) / 8);
            while (got < part) {
                ssize_t r = read(fd, (char *)other + got, part - got);

                if (r <= 0)
                    give_up(path);
                got += r;
            }
            if (memcmp(block, other, part)) {
                fprintf(stderr, "%s: wrong content\n", path);
                failures++;
                break;
            }
            size -= part;
        }
        close(fd);
    }
}

static void must_be_attached(struct ploop_disk_images_data *di, const char *device)
{
    struct ploop_disk_images_data *named;
    char buf[PATH_MAX], partition[128], *point;
    char **devs = NULL;

    CHECK(ploop_get_dev(di, buf, sizeof(buf)), 0);
    CHECK_STR(buf, device);
    CHECK(ploop_get_dev(di, buf, strlen(device)), -1);
    CHECK(ploop_get_dev(di, buf, strlen(device) + 1), 0);
    CHECK(ploop_get_devs(di, &devs), 0);
    if (devs) {
        CHECK_STR(devs[0], device);
        CHECK_TRUE(devs[0] && devs[1] == NULL);
    }
    ploop_free_array(devs);
    CHECK(ploop_is_mounted(di), 1);
    CHECK(ploop_find_dev(NULL, image, buf, sizeof(buf)), 0);
    CHECK_STR(buf, device);
    CHECK(ploop_find_dev("", image, buf, 6), 0);
    CHECK_STR(buf, "/dev/"); /* cut */
    CHECK(ploop_find_dev("component", image, buf, sizeof(buf)), 1);

    /* Another object of the same disk sees the same; one that looks for a component does not. */
    MUST(ploop_open_dd(&named, descriptor));
    CHECK(ploop_is_mounted(named), 1);
    CHECK(ploop_set_component_name(named, "component"), 0);
    CHECK(ploop_get_dev(named, buf, sizeof(buf)), 1);
    CHECK(ploop_umount_image(named), SYSEXIT_DEV_NOT_MOUNTED);
    CHECK(ploop_get_devs(named, &devs), 0);
    ploop_free_array(devs);
    ploop_close_dd(named);

    snprintf(partition, sizeof(partition), "%sp1", device);
    CHECK(ploop_get_dev_by_mnt(target, buf, sizeof(buf)), 0);
    CHECK_STR(buf, device);
    CHECK(ploop_get_dev_by_mnt(target, buf, strlen(device)), -1);
    CHECK(ploop_get_partition_by_mnt(target, buf, sizeof(buf)), 0);
    CHECK_STR(buf, partition);
    CHECK(ploop_get_mnt_by_dev(device, buf, sizeof(buf)), 0);
    point = realpath(target, NULL);
    CHECK_STR(buf, point ? point : "");
    free(point);
    CHECK(ploop_get_mnt_by_dev(device, buf, 2), -1);
}

static void must_be_detached(struct ploop_disk_images_data *di, const char *device)
{
    char buf[PATH_MAX];
    char **devs;

    CHECK(ploop_is_mounted(di), 0);
    CHECK(ploop_get_dev(di, buf, sizeof(buf)), 1);
    CHECK(ploop_get_devs(di, &devs), 1);
    CHECK_TRUE(devs == NULL);
    CHECK(ploop_find_dev(NULL, image, buf, sizeof(buf)), 1);
    CHECK(ploop_get_dev_by_mnt(target, buf, sizeof(buf)), 1);
    CHECK(ploop_get_partition_by_mnt(target, buf, sizeof(buf)), 1);
    CHECK_TRUE(ploop_get_mnt_by_dev(device, buf, sizeof(buf)) != 0);
    CHECK(ploop_umount_image(di), SYSEXIT_DEV_NOT_MOUNTED);
    CHECK_TRUE(ploop_umount(device, NULL) != 0);
}

static void spec_and_names(struct ploop_disk_images_data *di)
{
    struct ploop_spec spec;
    char buf[PATH_MAX];

    memset(&spec, 0, sizeof(spec));
    CHECK(ploop_get_spec(di, &spec), 0);
    CHECK(spec.size, disk_mib * 2048);
    CHECK(spec.blocksize, 2048);
    CHECK(spec.fmt_version, 2);
    CHECK(ploop_get_top_delta_fname(di, buf, sizeof(buf)), 0);
    CHECK_STR(buf, image);
    CHECK(ploop_get_base_delta_fname(di, buf, sizeof(buf)), 0);
    CHECK_STR(buf, image);
    CHECK(di->size, disk_mib * 2048);
    CHECK(di->nimages, 1);
    CHECK(di->nsnapshots, 1);
    CHECK_STR(di->images[0]->file, image);
    CHECK_STR(di->top_guid, "{5fbaabe3-6958-40ff-92a7-860e329aab41}");
}

static void info_is(const struct statfs *fs)
{
    struct ploop_info info;

    memset(&info, 0, sizeof(info));
    CHECK(ploop_get_info_by_descr(descriptor, &info), 0);
    CHECK(info.fs_bsize, fs->f_bsize);
    CHECK(info.fs_blocks, fs->f_blocks);
    CHECK(info.fs_bfree, fs->f_bfree);
    CHECK(info.fs_inodes, fs->f_files);
    CHECK(info.fs_ifree, fs->f_ffree);
}

static void create(void)
{
    struct ploop_create_param param;

    memset(&param, 0, sizeof(param));
    param.size = disk_mib * 2048;
    param.image = image;
    param.fstype = "ext4";
    MUST(ploop_create_image(&param));
    CHECK(ploop_create_image(&param), SYSEXIT_PARAM);
    CHECK_TRUE(access(descriptor, F_OK) == 0);
}

static void attach(struct ploop_disk_images_data *di, struct ploop_mount_param *param)
{
    param->target = target;
    MUST(ploop_mount_image(di, param));
    snprintf(attached, sizeof(attached), "%s", param->device);
    CHECK_TRUE(strncmp(param->device, "/dev/ploop", 10) == 0);
}

static void first_round(unsigned int *files)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param param, again;
    struct statfs fs;
    double t = now();

    MUST(ploop_open_dd(&di, descriptor));
    spec_and_names(di);
    memset(&param, 0, sizeof(param));
    param.fsck = 1;
    param.fsck_rc = 77;
    attach(di, &param);
    CHECK(param.fsck_rc, 0);
    printf("mounted %s on %s in %.2f s\n", param.device, target, now() - t);
    must_be_attached(di, param.device);
    spec_and_names(di);
    memset(&again, 0, sizeof(again));
    CHECK(ploop_mount_image(di, &again), SYSEXIT_MOUNT);

    t = now();
    *files = write_files();
    sync();
    printf("wrote %llu MiB in %u files in %.1f s\n", data_mib, *files, now() - t);
    MUST(statfs(target, &fs));
    info_is(&fs);
    t = now();
    MUST(ploop_umount_image(di));
    printf("unmounted in %.2f s\n", now() - t);
    attached[0] = '\0';
    /* What the file system said last is remembered, but for what its own end of work changed. */
    {
        struct ploop_info info;

        CHECK(ploop_get_info_by_descr(descriptor, &info), 0);
        CHECK(info.fs_bsize, fs.f_bsize);
        CHECK(info.fs_blocks, fs.f_blocks);
    }
    must_be_detached(di, param.device);
    ploop_close_dd(di);
}

static void second_round(unsigned int files)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param param;
    char path[PATH_MAX + 64], line[PATH_MAX * 2];
    int fd, noatime = 0;
    FILE *mounts;
    double t;

    MUST(ploop_open_dd(&di, descriptor));
    memset(&param, 0, sizeof(param));
    param.flags = MS_NOATIME;
    attach(di, &param);
    mounts = fopen("/proc/self/mounts", "r");
    while (mounts && fgets(line, sizeof(line), mounts))
        if (strncmp(line, param.device, strlen(param.device)) == 0 && strstr(line, "noatime"))
            noatime = 1;
    if (mounts)
        fclose(mounts);
    CHECK_TRUE(noatime);
    t = now();
    compare_files(files);
    printf("compared %u files in %.1f s\n", files, now() - t);

    /* Busy: an error, and nothing has changed. */
    path_of(0, path);
    fd = open(path, O_RDONLY);
    CHECK(ploop_umount_image(di), SYSEXIT_UMOUNT);
    CHECK_TRUE(ploop_get_last_error()[0] != '\0');
    CHECK(ploop_is_mounted(di), 1);
    CHECK(read(fd, line, 1), 1);
    close(fd);
    MUST(ploop_umount(param.device, NULL));
    attached[0] = '\0';
    must_be_detached(di, param.device);
    ploop_close_dd(di);
}

/* Read-only, by a list of files, and by name of a device of the caller's choice. */
static void third_round(unsigned int files)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param param;
    struct stat before, after;
    char *images[] = {image, NULL};
    char path[PATH_MAX + 64];

    MUST(stat(image, &before));
    memset(&param, 0, sizeof(param));
    param.ro = 1;
    param.target = target;
    MUST(ploop_mount(NULL, images, &param, 0));
    snprintf(attached, sizeof(attached), "%s", param.device);
    path_of(0, path);
    CHECK_TRUE(open(path, O_WRONLY) < 0 && errno == EROFS);
    compare_files(files < 200 ? files : 200);
    MUST(ploop_open_dd(&di, descriptor));
    must_be_attached(di, param.device);
    MUST(ploop_umount(param.device, di));
    attached[0] = '\0';
    must_be_detached(di, param.device);
    ploop_close_dd(di);
    MUST(stat(image, &after));
    CHECK(after.st_mtime, before.st_mtime);
    CHECK(after.st_ctime, before.st_ctime);
    CHECK(after.st_size, before.st_size);
}

int main(int argc, char **argv)
{
    unsigned int files = 0;
    char *real;
    double t = now();

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 2 || argc > 3 || !(real = realpath(argv[1], NULL)) || strlen(real) >= sizeof(folder))
        die("usage: basic EMPTY-FOLDER [LIBRARY]");
    assert_library(argc > 2 ? argv[2] : NULL);
    if (getenv("BASIC_SIZE_MIB"))
        disk_mib = strtoull(getenv("BASIC_SIZE_MIB"), NULL, 10);
    if (getenv("BASIC_DATA_MIB"))
        data_mib = strtoull(getenv("BASIC_DATA_MIB"), NULL, 10);
    strcpy(folder, real);
    snprintf(image, sizeof(image), "%s/root.hds", folder);
    snprintf(descriptor, sizeof(descriptor), "%s/" DISKDESCRIPTOR_XML, folder);
    snprintf(target, sizeof(target), "%s/mnt", folder);
    MUST(mkdir(target, 0755));

    create();
    printf("created %llu MiB with ext4 in %.1f s\n", disk_mib, now() - t);
    first_round(&files);
    second_round(files);
    third_round(files);
    MUST(rmdir(target));
    if (failures)
        die("%d checks failed", failures);
    printf("all checks passed in %.1f s\n", now() - t);
    return 0;
}
