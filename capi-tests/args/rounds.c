/*
 * What is opened is closed, and what is allocated is freed: after many rounds there are as many descriptors, and as many bytes
 * in use, as after the first ones. Usage: rounds EMPTY-FOLDER ROUNDS [MOUNTS]    mounts as root
 */
#include "../common.h"

#include <dirent.h>
#include <malloc.h>

static char folder[2048], descriptor[4096], elsewhere[4096], target[4096];

static int count(const char *path)
{
    DIR *dir = opendir(path);
    int n = 0;

    if (!dir)
        die("%s: %s", path, strerror(errno));
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static void round_of_an_object(void)
{
    struct ploop_disk_images_data *di;
    struct ploop_spec spec;
    char text[4096];
    char **devs = NULL;

    CHECK(ploop_open_dd(&di, descriptor), 0);
    CHECK(ploop_get_top_delta_fname(di, text, sizeof(text)), 0);
    CHECK(ploop_set_component_name(di, "c"), 0);
    CHECK(ploop_get_dev(di, text, sizeof(text)), 1);
    CHECK(ploop_get_devs(di, &devs), 1);
    CHECK(ploop_get_spec(di, &spec), 0);
    CHECK(ploop_store_diskdescriptor(elsewhere, di), 0);
    CHECK(ploop_set_max_delta_size(di, 1 << 20), 0);
    ploop_close_dd(di);
    CHECK(ploop_read_disk_descr(&di, elsewhere), 0);
    CHECK_TRUE(ploop_find_parent_by_guid(di, di->top_guid) == NULL);
    CHECK(ploop_delete_snapshot(di, "{99999999-2222-3333-4444-555555555555}"), SYSEXIT_NOSNAP);
    ploop_close_dd(di);
    CHECK(ploop_read_disk_descr(&di, "/dev/null"), -1);
    ploop_close_dd(di);
}

static void round_of_a_mount(void)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param mount = {{0}};
    char **devs = NULL;

    mount.target = target;
    CHECK(ploop_open_dd(&di, descriptor), 0);
    CHECK(ploop_mount_image(di, &mount), 0);
    CHECK(ploop_get_devs(di, &devs), 0);
    ploop_free_array(devs);
    CHECK(ploop_umount_image(di), 0);
    ploop_close_dd(di);
}

static void rounds(void (*one)(void), int n, const char *what)
{
    int i, descriptors, threads;
    size_t bytes;

    /* What is made once for the whole process is made in the first ones. */
    for (i = 0; i < 3; i++)
        one();
    descriptors = count("/proc/self/fd");
    threads = count("/proc/self/task");
    bytes = mallinfo2().uordblks;
    for (i = 0; i < n && !failures; i++)
        one();
    CHECK(count("/proc/self/fd"), descriptors);
    CHECK(count("/proc/self/task"), threads);
    CHECK(mallinfo2().uordblks, bytes);
    printf("%d %s: %d descriptors, %zu bytes\n", n, what, descriptors, bytes);
}

int main(int argc, char **argv)
{
    struct ploop_create_param create = {0};
    int mounts = argc > 3 ? atoi(argv[3]) : 0;
    char image[4096];

    /* mallinfo() counts what was freed and is kept for the next malloc() as in use. */
    if (!getenv("GLIBC_TUNABLES")) {
        setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0", 1);
        execv("/proc/self/exe", argv);
        die("exec: %s", strerror(errno));
    }
    assert_library(NULL);
    if (argc < 3 || !realpath(argv[1], folder))
        die("usage: rounds EMPTY-FOLDER ROUNDS [MOUNTS]");
    snprintf(image, sizeof(image), "%s/root.hds", folder);
    snprintf(descriptor, sizeof(descriptor), "%s/" DISKDESCRIPTOR_XML, folder);
    snprintf(elsewhere, sizeof(elsewhere), "%s/elsewhere.xml", folder);
    snprintf(target, sizeof(target), "%s/mnt", folder);
    create.image = image;
    create.size = 64 * 2048;
    create.fstype = mounts ? "ext4" : NULL;
    if (mkdir(target, 0700) || ploop_create_image(&create))
        die("%s: %s", image, ploop_get_last_error());
    rounds(round_of_an_object, atoi(argv[2]), "rounds of opening and closing");
    if (mounts)
        rounds(round_of_a_mount, mounts, "rounds of mounting and unmounting");
    if (failures)
        die("%d checks failed", failures);
    return 0;
}
