/*
 * How vzctl 4.x uses the library: loaded lazily by dlopen(), all functions through the table, into a zeroed buffer of 96
 * pointers; the descriptor is read before anything else; exactly those members of the structs are set that it sets. A
 * container's disk is made, mounted with quota, snapshotted, switched, merged, resized, converted and unmounted; children are
 * forked in between.
 *
 * Usage: vzctl4 EMPTY-FOLDER LIBRARY [plain|ignore|thread]    as root
 *   ignore: SIGCHLD is ignored, as some managers do     thread: all of it in a thread, which unloads the library at its end
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PLOOP_DEPRECATED
#include <ploop/libploop.h>
#include <ploop/dynload.h>

static union {
    struct ploop_functions f;
    void *pointers[64 + 32];
} table;
#define ploop table.f

static char image[PATH_MAX], descriptor[PATH_MAX], target[PATH_MAX];
static const char *folder, *library;
static int failures, ignored;

#define CHECK(expr, want) \
    do { \
        long long got_ = (long long)(expr), want_ = (long long)(want); \
        if (got_ != want_) { \
            failures++; \
            fprintf(stderr, "%s:%d: %s is %lld, want %lld (last error: %s)\n", __FILE__, __LINE__, #expr, got_, want_, \
                    ploop.get_last_error ? ploop.get_last_error() : ""); \
        } \
    } while (0)
#define CHECK_TRUE(expr) CHECK(!!(expr), 1)

static const char FIRST[] = "{11111111-2222-3333-4444-555555555555}";
static const char OLD_TOP[] = "{22222222-2222-3333-4444-555555555555}";
static const char UNKNOWN[] = "{33333333-2222-3333-4444-555555555555}";

static void *load(void)
{
    void (*resolve)(struct ploop_functions *), *handle;
    struct stat loaded, wanted;
    Dl_info info;
    size_t i;

    handle = dlopen("libploop.so.1", RTLD_LAZY);
    if (!handle)
        handle = dlopen("libploop.so", RTLD_LAZY);
    if (!handle) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    *(void **)&resolve = dlsym(handle, "ploop_resolve_functions");
    if (!resolve || !dladdr(*(void **)&resolve, &info) || stat(info.dli_fname, &loaded) || stat(library, &wanted) ||
        loaded.st_ino != wanted.st_ino || loaded.st_dev != wanted.st_dev) {
        fprintf(stderr, "this is not %s\n", library);
        exit(1);
    }
    memset(&table, 0, sizeof(table));
    resolve(&ploop);
    for (i = 0; i < 53; i++)
        CHECK_TRUE(table.pointers[i] != NULL);
    /* More would be "newer than expected". */
    for (; i < 96; i++)
        CHECK_TRUE(table.pointers[i] == NULL);
    ploop.set_verbose_level(PLOOP_LOG_NOSTDOUT);
    ploop.set_log_level(3);
    return handle;
}

static struct ploop_disk_images_data *read_descriptor(void)
{
    struct ploop_disk_images_data *di = NULL;

    if (ploop.read_disk_descr(&di, descriptor)) {
        fprintf(stderr, "%s: %s\n", descriptor, ploop.get_last_error());
        exit(1);
    }
    return di;
}

static void create(void)
{
    struct ploop_create_param param;
    unsigned long long most = 0;

    memset(&param, 0, sizeof(param));
    param.mode = PLOOP_EXPANDED_MODE;
    param.size = 128 * 2048;
    param.image = image;
    param.fstype = "ext4";
    CHECK_TRUE(ploop.get_max_size != NULL);
    CHECK(ploop.get_max_size(0, &most), 0);
    CHECK_TRUE(param.size < most);
    CHECK(ploop.create_image(&param), 0);
}

static int mount(const char *guid, int quota, int ro, char *device)
{
    struct ploop_disk_images_data *di = read_descriptor();
    struct ploop_mount_param param;
    int rc;

    memset(&param, 0, sizeof(param));
    param.fstype = "ext4";
    param.target = target;
    param.guid = (char *)guid;
    param.quota = quota;
    param.ro = ro;
    param.fsck = !ro;
    param.mount_data = "noatime";
    rc = ploop.mount_image(di, &param);
    if (rc == 0)
        memcpy(device, param.device, sizeof(param.device));
    ploop.free_diskdescriptor(di);
    return rc;
}

static void umount(void)
{
    struct ploop_disk_images_data *di = read_descriptor();

    CHECK(ploop.umount_image(di), 0);
    ploop.free_diskdescriptor(di);
}

/* A mark in a file of the container. */
static void put(const char *text)
{
    char path[PATH_MAX + 8];
    FILE *f;

    snprintf(path, sizeof(path), "%s/mark", target);
    f = fopen(path, "w");
    if (!f || fputs(text, f) < 0 || fclose(f)) {
        failures++;
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
    }
}

static void is(const char *text)
{
    char path[PATH_MAX + 8], found[64] = "";
    FILE *f;

    snprintf(path, sizeof(path), "%s/mark", target);
    f = fopen(path, "r");
    if (!f || !fgets(found, sizeof(found), f) || strcmp(found, text)) {
        failures++;
        fprintf(stderr, "%s has '%s', want '%s'\n", path, found, text);
    }
    if (f)
        fclose(f);
}

/* Another process goes on with what this one has loaded and used. */
static void in_a_child(void (*use)(void))
{
    int status = -1;
    pid_t child = fork();

    if (child == 0) {
        failures = 0;
        use();
        _exit(failures ? 1 : 0);
    }
    CHECK_TRUE(child > 0);
    if (ignored)
        CHECK(waitpid(child, &status, 0), -1); /* the kernel has taken the status; wait() returns when the child has ended */
    else {
        CHECK(waitpid(child, &status, 0), child);
        CHECK(status, 0);
    }
}

static void snapshot(void)
{
    struct ploop_disk_images_data *di = read_descriptor();
    struct ploop_snapshot_param param;

    memset(&param, 0, sizeof(param));
    param.guid = (char *)FIRST;
    CHECK(ploop.create_snapshot(di, &param), 0);
    ploop.free_diskdescriptor(di);
}

static void ask(void)
{
    struct ploop_disk_images_data *di = read_descriptor();
    struct ploop_info info;
    char device[64], partition[64], mnt[PATH_MAX];

    CHECK(ploop.get_dev(di, device, sizeof(device)), 0);
    CHECK(ploop.get_partition_by_mnt(target, partition, sizeof(partition)), 0);
    CHECK(strncmp(partition, device, strlen(device)), 0);
    CHECK(ploop.get_mnt_by_dev(device, mnt, sizeof(mnt)), 0);
    CHECK(strcmp(mnt, target), 0);
    memset(&info, 0, sizeof(info));
    CHECK(ploop.get_info_by_descr(descriptor, &info), 0);
    CHECK_TRUE(info.fs_bsize == 4096 && info.fs_blocks > info.fs_bfree && info.fs_inodes > info.fs_ifree);
    ploop.free_diskdescriptor(di);
}

static void switch_to(const char *guid, const char *old, int flags)
{
    struct ploop_disk_images_data *di = read_descriptor();
    struct ploop_snapshot_switch_param param;

    memset(&param, 0, sizeof(param));
    param.guid = guid;
    param.guid_old = old;
    param.flags = flags;
    CHECK(ploop.switch_snapshot_ex(di, &param), 0);
    ploop.free_diskdescriptor(di);
}

static void merge(const char *guid)
{
    struct ploop_disk_images_data *di = read_descriptor();
    struct ploop_merge_param param;

    memset(&param, 0, sizeof(param));
    param.guid = guid;
    CHECK(ploop.merge_snapshot(di, &param), 0);
    ploop.free_diskdescriptor(di);
}

static int resize(unsigned long long size, int offline)
{
    struct ploop_disk_images_data *di = read_descriptor();
    struct ploop_resize_param param;
    int rc;

    memset(&param, 0, sizeof(param));
    param.size = size;
    param.offline_resize = offline;
    rc = ploop.resize_image(di, &param);
    ploop.free_diskdescriptor(di);
    return rc;
}

static void *use(void *unused)
{
    struct ploop_disk_images_data *di;
    char device[64] = "", top[PATH_MAX];
    const char *parent;
    void *handle;
    int rc;

    (void)unused;
    handle = load();
    create();
    /* Quota needs a kernel that has its formats. */
    if (mount(NULL, 1, 0, device) != 0)
        CHECK(mount(NULL, 0, 0, device), 0);
    CHECK(mount(NULL, 0, 0, device), SYSEXIT_MOUNT);
    put("first");
    in_a_child(ask);
    in_a_child(snapshot);
    ask();
    di = read_descriptor();
    CHECK(di->nsnapshots, 2);
    parent = ploop.find_parent_by_guid(di, di->top_guid);
    CHECK_TRUE(parent && strcmp(parent, FIRST) == 0);
    CHECK_TRUE(ploop.find_parent_by_guid(di, FIRST) == NULL);
    CHECK(ploop.get_top_delta_fname(di, top, sizeof(top)), 0);
    ploop.free_diskdescriptor(di);
    put("second");
    rc = resize(192 * 2048, 0);
    umount();
    /* A mounted ext4 is made larger by who has CAP_SYS_RESOURCE, which root of a container may lack; then it is done here. */
    if (rc == SYSEXIT_RESIZE_FS)
        rc = resize(192 * 2048, 1);
    CHECK(rc, 0);
    di = read_descriptor();
    CHECK(ploop.umount_image(di), SYSEXIT_DEV_NOT_MOUNTED);
    ploop.free_diskdescriptor(di);
    CHECK(mount(UNKNOWN, 0, 0, device), SYSEXIT_NOSNAP);

    /* Back to the snapshot, with the top that there was kept under a name; forth again, and that top is merged down. */
    switch_to(FIRST, OLD_TOP, PLOOP_SNAP_SKIP_TOPDELTA_DESTROY);
    CHECK(mount(NULL, 0, 0, device), 0);
    is("first");
    umount();
    switch_to(OLD_TOP, NULL, 0);
    CHECK(mount(NULL, 0, 0, device), 0);
    is("second");
    merge(NULL);
    is("second");
    merge(NULL);
    is("second");
    umount();
    di = read_descriptor();
    CHECK(di->nsnapshots, 1);
    CHECK(ploop.convert_image(di, PLOOP_EXPANDED_PREALLOCATED_MODE, 0), 0);
    ploop.free_diskdescriptor(di);
    CHECK(resize(96 * 2048, 1), 0);
    CHECK(mount(NULL, 0, 1, device), 0);
    is("second");
    umount();
    CHECK(dlclose(handle), 0);
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    const char *way = argc > 3 ? argv[3] : "plain";

    if (argc < 3) {
        fprintf(stderr, "usage: vzctl4 EMPTY-FOLDER LIBRARY [plain|ignore|thread]\n");
        return 2;
    }
    folder = realpath(argv[1], NULL);
    library = argv[2];
    if (!folder)
        return 2;
    snprintf(image, sizeof(image), "%s/root.hdd/root.hdd", folder);
    snprintf(descriptor, sizeof(descriptor), "%s/root.hdd/" DISKDESCRIPTOR_XML, folder);
    snprintf(target, sizeof(target), "%s/root", folder);
    *strrchr(image, '/') = '\0';
    if (mkdir(image, 0700) || mkdir(target, 0700)) {
        fprintf(stderr, "%s: %s\n", folder, strerror(errno));
        return 2;
    }
    image[strlen(image)] = '/';
    ignored = strcmp(way, "ignore") == 0;
    if (ignored)
        signal(SIGCHLD, SIG_IGN);
    if (strcmp(way, "thread") == 0) {
        if (pthread_create(&thread, NULL, use, NULL) || pthread_join(thread, NULL))
            return 2;
    } else {
        use(NULL);
    }
    if (failures) {
        fprintf(stderr, "%d checks failed\n", failures);
        return 1;
    }
    printf("vzctl4 (%s): all checks passed\n", way);
    return 0;
}
