/*
 * Bad arguments for every function, and what works without root and devices. Usage: args EMPTY-FOLDER
 */
#include "../common.h"

#include <fcntl.h>

/* Exported; the classic's header does not declare it either. */
int ploop_mount(struct ploop_disk_images_data *di, char **images, struct ploop_mount_param *param, int raw);

static const char TOP[] = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
static const char SNAPSHOT[] = "{11111111-2222-3333-4444-555555555555}";

static const char XML[] =
    "<?xml version=\"1.0\"?>\n"
    "<Parallels_disk_image Version=\"1.0\">\n"
    "  <Disk_Parameters>\n"
    "    <Disk_size>2097152</Disk_size><Cylinders>2080</Cylinders><Heads>16</Heads><Sectors>63</Sectors>\n"
    "    <Padding>0</Padding>\n"
    "  </Disk_Parameters>\n"
    "  <StorageData>\n"
    "    <Storage>\n"
    "      <Start>0</Start><End>2097152</End><Blocksize>512</Blocksize>\n"
    "      <Image><GUID>{11111111-2222-3333-4444-555555555555}</GUID><Type>Compressed</Type><File>root.hds</File></Image>\n"
    "      <Image><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID><Type>Compressed</Type><File>top.hds</File></Image>\n"
    "    </Storage>\n"
    "  </StorageData>\n"
    "  <Snapshots>\n"
    "    <TopGUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</TopGUID>\n"
    "    <Shot><GUID>{11111111-2222-3333-4444-555555555555}</GUID>"
    "<ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID></Shot>\n"
    "    <Shot><GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>"
    "<ParentGUID>{11111111-2222-3333-4444-555555555555}</ParentGUID></Shot>\n"
    "  </Snapshots>\n"
    "</Parallels_disk_image>\n";

static void write_file(const char *path, const void *data, size_t len)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);

    if (fd < 0 || write(fd, data, len) != (ssize_t)len || close(fd))
        die("%s: %s", path, strerror(errno));
}

static int exists(const char *path)
{
    return access(path, F_OK) == 0;
}

static void folder(const char *path)
{
    if (mkdir(path, 0700) || chdir(path))
        die("%s: %s", path, strerror(errno));
}

static struct ploop_disk_images_data *open_or_die(const char *path)
{
    struct ploop_disk_images_data *di = NULL;

    if (ploop_open_dd(&di, path) || !di)
        die("ploop_open_dd(%s): %s", path, ploop_get_last_error());
    return di;
}

static void objects(void)
{
    struct ploop_disk_images_data *mark = (void *)&mark, *di = mark;
    struct ploop_mount_param mount = {{0}};
    struct ploop_spec spec;
    char buf[4096], name[65];
    char **devs = (char **)buf;

    folder("objects");
    CHECK(ploop_open_dd(NULL, "x"), SYSEXIT_PARAM);
    CHECK(ploop_open_dd(&di, NULL), SYSEXIT_PARAM);
    CHECK(ploop_open_dd(&di, ""), SYSEXIT_PARAM);
    CHECK(ploop_open_dd(&di, "missing"), SYSEXIT_DISKDESCR);
    CHECK_TRUE(di == mark);
    ploop_close_dd(NULL);
    ploop_free_array(NULL);

    /* Something that is no descriptor opens, as in the classic, and then cannot be locked. */
    write_file("text", "hello", 5);
    di = open_or_die("text");
    CHECK(ploop_get_top_delta_fname(di, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK(ploop_get_base_delta_fname(di, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK(ploop_get_dev(di, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK(ploop_get_devs(di, &devs), -1);
    CHECK_TRUE(devs == NULL);
    CHECK(ploop_is_mounted(di), -1);
    CHECK(ploop_get_spec(di, &spec), SYSEXIT_LOCK);
    CHECK(ploop_mount_image(di, &mount), SYSEXIT_LOCK);
    CHECK(ploop_umount_image(di), SYSEXIT_LOCK);
    CHECK(di->nimages, 0);
    ploop_close_dd(di);

    if (mkdir("dir", 0700))
        die("dir: %s", strerror(errno));
    di = open_or_die("dir");
    CHECK(ploop_get_top_delta_fname(di, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK_TRUE(!exists("dir.lck"));
    ploop_close_dd(di);

    /* A descriptor; its images are not needed for its own questions. */
    write_file("DiskDescriptor.xml", XML, sizeof(XML) - 1);
    di = open_or_die("DiskDescriptor.xml");
    CHECK(di->nimages, 0);
    CHECK(di->size, 0);
    CHECK_TRUE(di->images == NULL && di->snapshots == NULL && di->top_guid == NULL);
    CHECK(ploop_get_top_delta_fname(di, NULL, 100), SYSEXIT_PARAM);
    CHECK(ploop_get_top_delta_fname(di, buf, 0), SYSEXIT_PARAM);
    CHECK(ploop_get_top_delta_fname(di, buf, -1), SYSEXIT_PARAM);
    CHECK(ploop_get_top_delta_fname(di, buf, sizeof(buf)), 0);
    CHECK_TRUE(buf[0] == '/');
    CHECK_STR(strrchr(buf, '/'), "/top.hds");
    CHECK(ploop_get_top_delta_fname(di, buf + 2000, strlen(buf)), SYSEXIT_PARAM);
    CHECK(ploop_get_top_delta_fname(di, buf + 2000, strlen(buf) + 1), 0);
    CHECK_STR(buf + 2000, buf);
    CHECK(ploop_get_base_delta_fname(di, buf, sizeof(buf)), 0);
    CHECK_STR(strrchr(buf, '/'), "/root.hds");
    CHECK(ploop_get_base_delta_fname(di, buf, 3), SYSEXIT_PARAM);
    CHECK(ploop_get_base_delta_fname(di, NULL, 3), SYSEXIT_PARAM);
    CHECK(di->size, 2097152);
    CHECK(di->heads, 16);
    CHECK(di->cylinders, 2080);
    CHECK(di->sectors, 63);
    CHECK(di->mode, PLOOP_EXPANDED_MODE);
    CHECK(di->blocksize, 512);
    CHECK(di->max_delta_size, 0);
    CHECK_STR(di->top_guid, TOP);
    CHECK(di->nimages, 2);
    CHECK(di->nsnapshots, 2);
    CHECK_STR(di->images[0]->guid, SNAPSHOT);
    CHECK_STR(strrchr(di->images[0]->file, '/'), "/root.hds");
    CHECK_STR(di->images[1]->guid, TOP);
    CHECK_STR(di->snapshots[0]->guid, SNAPSHOT);
    CHECK_STR(di->snapshots[0]->parent_guid, "{00000000-0000-0000-0000-000000000000}");
    CHECK_STR(di->snapshots[1]->parent_guid, SNAPSHOT);
    CHECK(di->snapshots[1]->temporary, 0);

    CHECK(ploop_set_component_name(NULL, "x"), SYSEXIT_PARAM);
    memset(name, 'n', 64);
    name[64] = '\0';
    CHECK(ploop_set_component_name(di, name), SYSEXIT_PARAM);
    name[63] = '\0';
    CHECK(ploop_set_component_name(di, name), 0);
    CHECK(ploop_set_component_name(di, ""), 0);
    CHECK(ploop_set_component_name(di, "x"), 0);
    CHECK(ploop_set_component_name(di, NULL), 0);

    /* The descriptor is read again by each call. */
    if (unlink("DiskDescriptor.xml"))
        die("unlink: %s", strerror(errno));
    CHECK_TRUE(ploop_get_top_delta_fname(di, buf, sizeof(buf)) != 0);
    CHECK(di->nimages, 0);
    ploop_close_dd(di);
    if (chdir(".."))
        die("..");
}

static void nulls(void)
{
    struct ploop_mount_param mount = {{0}};
    struct ploop_spec spec;
    char *no_images[] = {NULL};
    char *missing[] = {"/nonexistent/image", NULL};
    unsigned long long max;
    char buf[64];
    char **devs = (char **)buf;

    CHECK(ploop_get_top_delta_fname(NULL, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK(ploop_get_base_delta_fname(NULL, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK(ploop_get_dev(NULL, buf, sizeof(buf)), SYSEXIT_LOCK);
    CHECK(ploop_get_devs(NULL, &devs), -1);
    CHECK_TRUE(devs == NULL);
    CHECK(ploop_get_devs(NULL, NULL), -1);
    CHECK(ploop_is_mounted(NULL), -1);
    CHECK(ploop_get_spec(NULL, &spec), SYSEXIT_LOCK);
    CHECK(ploop_mount_image(NULL, &mount), SYSEXIT_LOCK);
    CHECK(ploop_umount_image(NULL), SYSEXIT_LOCK);
    CHECK(ploop_umount(NULL, NULL), SYSEXIT_SYS);
    CHECK_TRUE(ploop_umount("", NULL) > 0);
    CHECK(ploop_umount("/dev/no-such-device", NULL), SYSEXIT_DEVICE);
    CHECK(ploop_mount(NULL, NULL, &mount, 0), SYSEXIT_PARAM);
    CHECK(ploop_mount(NULL, no_images, &mount, 0), SYSEXIT_PARAM);
    CHECK(ploop_mount(NULL, missing, NULL, 0), SYSEXIT_PARAM);
    CHECK_TRUE(ploop_mount(NULL, missing, &mount, 0) > 0);
    CHECK(ploop_mount(NULL, missing, &mount, 1), SYSEXIT_PARAM); /* raw, and no cluster size given */
    mount.blocksize = 100;
    CHECK(ploop_mount(NULL, missing, &mount, 1), SYSEXIT_PARAM);
    CHECK(mount.device[0], 0);

    CHECK(ploop_find_dev(NULL, NULL, buf, sizeof(buf)), -1);
    CHECK(ploop_find_dev(NULL, "/nonexistent/delta", buf, sizeof(buf)), 1);
    CHECK(ploop_find_dev("", "/nonexistent/delta", buf, sizeof(buf)), 1);
    CHECK(ploop_find_dev("name", "/nonexistent/delta", buf, sizeof(buf)), 1);
    CHECK(ploop_find_dev(NULL, "/nonexistent/delta", NULL, 64), -1);
    CHECK(ploop_find_dev(NULL, "/nonexistent/delta", buf, 0), -1);
    CHECK(ploop_find_dev(NULL, "/etc/passwd", buf, sizeof(buf)), 1);

    CHECK(ploop_get_dev_by_mnt(NULL, buf, sizeof(buf)), -1);
    CHECK(ploop_get_dev_by_mnt("/nonexistent/folder", buf, sizeof(buf)), 1);
    CHECK(ploop_get_dev_by_mnt("/proc", buf, sizeof(buf)), 1);
    CHECK(ploop_get_dev_by_mnt("/", NULL, 64), -1);
    CHECK(ploop_get_partition_by_mnt(NULL, buf, sizeof(buf)), -1);
    CHECK(ploop_get_partition_by_mnt("/nonexistent/folder", buf, sizeof(buf)), 1);
    CHECK(ploop_get_partition_by_mnt("/proc", buf, -5), -1);
    CHECK(ploop_get_mnt_by_dev(NULL, buf, sizeof(buf)), -1);
    CHECK(ploop_get_mnt_by_dev("/dev/no-such-device", buf, sizeof(buf)), -1);
    CHECK(ploop_get_mnt_by_dev("/dev/ploop0", NULL, 1), -1);

    CHECK(ploop_get_max_size(0, NULL), SYSEXIT_PARAM);
    CHECK(ploop_get_max_size(0, &max), 0);
    CHECK(max, 1ULL << 35);
    CHECK(ploop_get_max_size(64, &max), 0);
    CHECK(max, 1ULL << 35);
    CHECK(ploop_get_max_size(131072, &max), 0);
    CHECK(max, 1ULL << 35);
}

static void guids(void)
{
    char a[40], b[40];
    size_t i;

    memset(a, 'x', sizeof(a));
    CHECK(ploop_uuid_generate(NULL, 39), SYSEXIT_PARAM);
    CHECK(ploop_uuid_generate(a, 38), SYSEXIT_PARAM);
    CHECK(ploop_uuid_generate(a, 0), SYSEXIT_PARAM);
    CHECK(ploop_uuid_generate(a, -1), SYSEXIT_PARAM);
    CHECK(a[0], 'x');
    CHECK(ploop_uuid_generate(a, 39), 0);
    CHECK(a[39], 'x');
    CHECK(strlen(a), 38);
    for (i = 0; i < 38; i++)
        CHECK_TRUE(strchr(i == 0 ? "{" : i == 37 ? "}" : i == 9 || i == 14 || i == 19 || i == 24 ? "-" : i == 15 ? "4"
                          : i == 20 ? "89ab" : "0123456789abcdef", a[i]));
    CHECK(ploop_uuid_generate(b, sizeof(b)), 0);
    CHECK_TRUE(strcmp(a, b));
}

static int create(const char *image, unsigned long long size, int mode, const char *fstype, unsigned int blocksize,
                  int version)
{
    struct ploop_create_param param = {0};

    param.size = size;
    param.mode = mode;
    param.image = (char *)image;
    param.fstype = (char *)fstype;
    param.blocksize = blocksize;
    param.fmt_version = version;
    return ploop_create_image(&param);
}

static void images(void)
{
    struct ploop_disk_images_data *di;
    struct ploop_mount_param mount = {{0}};
    struct ploop_info info, stored = {4096, 1000, 900, 800, 700};
    struct ploop_spec spec;
    struct stat st;
    char **devs;
    char buf[256];

    folder("images");
    CHECK(ploop_create_image(NULL), SYSEXIT_PARAM);
    CHECK(create(NULL, 65536, 0, NULL, 0, 0), SYSEXIT_PARAM);
    CHECK(create("", 65536, 0, NULL, 0, 0), SYSEXIT_PARAM);
    CHECK(create("i", 0, 0, NULL, 0, 0), SYSEXIT_PARAM);
    CHECK(create("i", 65536, 3, NULL, 0, 0), SYSEXIT_CREAT);
    CHECK(create("i", 65536, -1, NULL, 0, 0), SYSEXIT_CREAT);
    CHECK(create("i", 65536, 0, NULL, 63, 0), SYSEXIT_PARAM);
    CHECK(create("i", 65536, 0, NULL, 100, 0), SYSEXIT_PARAM);
    CHECK(create("i", 65536, 0, NULL, 262144, 0), SYSEXIT_PARAM);
    CHECK(create("i", 65536, 0, NULL, 0, 3), SYSEXIT_PARAM);
    CHECK(create("i", 65536, 0, NULL, 0, -1), SYSEXIT_PARAM);
    CHECK(create("i", 1ULL << 45, 0, "ext4", 0, 0), SYSEXIT_PARAM);
    CHECK_TRUE(create("i", 1 << 20, 0, "no-such-fs", 0, 0) > 0);
    CHECK_TRUE(create("/nonexistent/folder/i", 65536, 0, NULL, 0, 0) > 0);
    CHECK_TRUE(!exists("i") && !exists("DiskDescriptor.xml") && !exists("DiskDescriptor.xml.lck"));

    /* What is there is left alone, with or without a descriptor beside it. */
    write_file("i", "mine", 4);
    CHECK(create("i", 65536, 0, NULL, 0, 0), SYSEXIT_PARAM);
    CHECK_TRUE(stat("i", &st) == 0 && st.st_size == 4 && !exists("DiskDescriptor.xml"));
    write_file("DiskDescriptor.xml", "mine", 4);
    CHECK(create("j", 65536, 0, NULL, 0, 0), SYSEXIT_PARAM);
    CHECK_TRUE(stat("DiskDescriptor.xml", &st) == 0 && st.st_size == 4 && !exists("j"));
    if (unlink("i") || unlink("DiskDescriptor.xml"))
        die("unlink: %s", strerror(errno));

    /* A cancel that hit nothing does not stop the next creation. */
    ploop_cancel_operation();
    CHECK(create("root.hds", 65537, PLOOP_EXPANDED_MODE, NULL, 256, 0), 0);
    CHECK_TRUE(stat("root.hds", &st) == 0 && (st.st_mode & 07777) == 0600);
    di = open_or_die("DiskDescriptor.xml");
    memset(&spec, 'x', sizeof(spec));
    CHECK(ploop_get_spec(di, NULL), SYSEXIT_PARAM);
    CHECK(ploop_get_spec(di, &spec), 0);
    CHECK(spec.size, 65792);
    CHECK(spec.blocksize, 256);
    CHECK(spec.fmt_version, 2);
    CHECK(spec.dummy[0], 'x');
    CHECK(spec.dummy[31], 'x');
    CHECK(di->nimages, 1);
    CHECK(di->blocksize, 256);
    CHECK(ploop_is_mounted(di), 0);
    CHECK(ploop_get_dev(di, buf, sizeof(buf)), 1);
    CHECK(ploop_get_dev(di, buf, 0), -1);
    CHECK(ploop_get_dev(di, NULL, 10), -1);
    devs = (char **)buf;
    CHECK(ploop_get_devs(di, &devs), 1);
    CHECK_TRUE(devs == NULL);
    CHECK(ploop_umount_image(di), SYSEXIT_DEV_NOT_MOUNTED);
    CHECK(ploop_mount_image(di, NULL), SYSEXIT_PARAM);
    mount.guid = (char *)SNAPSHOT;
    CHECK(ploop_mount_image(di, &mount), SYSEXIT_NOSNAP);
    mount.guid = "no guid";
    CHECK_TRUE(ploop_mount_image(di, &mount) > 0);
    mount.guid = NULL;
    mount.target = "/nonexistent/folder";
    CHECK(ploop_mount_image(di, &mount), SYSEXIT_PARAM);
    mount.target = "root.hds";
    CHECK(ploop_mount_image(di, &mount), SYSEXIT_PARAM);
    CHECK(ploop_is_mounted(di), 0);
    ploop_close_dd(di);

    CHECK(ploop_get_info_by_descr(NULL, &info), SYSEXIT_PARAM);
    CHECK(ploop_get_info_by_descr("DiskDescriptor.xml", NULL), SYSEXIT_PARAM);
    CHECK_TRUE(ploop_get_info_by_descr("missing.xml", &info) != 0);
    /* The answer stored at an unmount counts; not even a descriptor is needed. */
    write_file(".statfs", &stored, sizeof(stored));
    CHECK(ploop_get_info_by_descr("missing.xml", &info), 0);
    CHECK(memcmp(&info, &stored, sizeof(info)), 0);
    if (chdir(".."))
        die("..");
}

int main(int argc, char **argv)
{
    assert_library(NULL);
    if (argc != 2 || chdir(argv[1]))
        die("usage: args EMPTY-FOLDER");
    CHECK_STR(ploop_get_last_error(), "");
    objects();
    nulls();
    guids();
    images();
    if (failures)
        die("%d checks failed", failures);
    return 0;
}
