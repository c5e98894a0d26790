/*
 * Snapshots of a disk that does not run, and what the classic's own programs ask. Usage: snapshots EMPTY-FOLDER
 */
#include "../common.h"

#include <fcntl.h>

/* Exported; the classic's header does not declare them either. */
struct merge_info {
    int start_level, end_level, raw, top_level, merge_top;
    char **names;
};
int guidcmp(const char *p1, const char *p2);
int is_valid_guid(const char *guid);
char *find_image_by_guid(struct ploop_disk_images_data *di, const char *guid);
int find_snapshot_by_guid(struct ploop_disk_images_data *di, const char *guid);
char **make_images_list(struct ploop_disk_images_data *di, const char *guid, int reverse);
int read_line(const char *path, char *nbuf, int len);
int check_deltas_same(const char *img1, const char *img2);
int find_level_by_delta(const char *device, const char *delta, int *level);
int get_delta_info(const char *device, struct merge_info *info);
int merge_image(const char *device, int start_level, int end_level, int raw, int merge_top, char **images,
                const char *new_delta);
int ploop_check(char *img, int flags, unsigned int *blocksize_p);
int check_dd(struct ploop_disk_images_data *di, const char *uuid);
char *mntn2str(int mntn_type);
int create_snapshot(const char *device, const char *delta, int syncfs);
int replace_delta(const char *device, int level, const char *image);

#define TOP "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
#define NONE "{00000000-0000-0000-0000-000000000000}"
#define ONE "{11111111-2222-4333-8444-555555555501}"
#define TWO "{11111111-2222-4333-8444-555555555502}"
#define THREE "{11111111-2222-4333-8444-555555555503}"
#define KEPT "{11111111-2222-4333-8444-5555555555ff}"
#define UPPER "{11111111-2222-4333-8444-5555555555FF}"

static struct ploop_disk_images_data *di;

static int snapshot(const char *guid)
{
    struct ploop_snapshot_param param = {0};

    param.guid = (char *)guid;
    return ploop_create_snapshot(di, &param);
}

static int merge(const char *guid, const char *guid2, int all, const char *new_delta)
{
    struct ploop_merge_param param = {0};

    param.guid = guid;
    param.guid2 = guid2;
    param.merge_all = all;
    param.new_delta = new_delta;
    return ploop_merge_snapshot(di, &param);
}

static int switch_to(const char *guid, const char *old, int flags)
{
    struct ploop_snapshot_switch_param param = {0};

    param.guid = guid;
    param.guid_old = old;
    param.flags = flags;
    return ploop_switch_snapshot_ex(di, &param);
}

static int replace(const char *guid, const char *cur_file, int level, const char *file, int flags)
{
    struct ploop_replace_param param = {0};

    param.guid = (char *)guid;
    param.cur_file = (char *)cur_file;
    param.level = level;
    param.file = (char *)file;
    param.flags = flags;
    return ploop_replace_image(di, &param);
}

static void copy(const char *from, const char *to)
{
    char command[2 * PATH_MAX + 32];

    snprintf(command, sizeof(command), "cp '%s' '%s'", from, to);
    if (system(command))
        die("%s", command);
}

static void bad_arguments(void)
{
    struct ploop_tsnapshot_param temporary = {0};
    struct merge_info info = {0};
    unsigned int bs = 0;
    int level, fd;
    char buf[16];

    CHECK(ploop_create_snapshot(NULL, NULL), SYSEXIT_LOCK);
    CHECK(ploop_create_snapshot(di, NULL), SYSEXIT_PARAM);
    CHECK(snapshot("no guid"), SYSEXIT_PARAM);
    CHECK(snapshot(""), SYSEXIT_PARAM);
    CHECK(snapshot(TOP), SYSEXIT_PARAM);
    CHECK(snapshot(NONE), SYSEXIT_PARAM);
    CHECK(ploop_create_temporary_snapshot(NULL, &temporary, &fd), SYSEXIT_PARAM);
    CHECK(ploop_create_temporary_snapshot(di, NULL, &fd), SYSEXIT_PARAM);
    CHECK(ploop_create_temporary_snapshot(di, &temporary, &fd), SYSEXIT_PARAM);
    temporary.guid = ONE;
    CHECK(ploop_create_temporary_snapshot(di, &temporary, NULL), SYSEXIT_PARAM);
    CHECK(ploop_delete_snapshot(NULL, ONE), SYSEXIT_LOCK);
    CHECK(ploop_delete_snapshot(di, NULL), SYSEXIT_PARAM);
    CHECK(ploop_delete_snapshot(di, ONE), SYSEXIT_NOSNAP);
    CHECK(ploop_delete_snapshot(di, TOP), SYSEXIT_PARAM);
    CHECK(ploop_delete_top_delta(NULL), SYSEXIT_LOCK);
    CHECK(ploop_delete_top_delta(di), SYSEXIT_PARAM);
    CHECK(ploop_merge_snapshot(NULL, NULL), SYSEXIT_LOCK);
    CHECK(ploop_merge_snapshot(di, NULL), SYSEXIT_PARAM);
    CHECK(merge(NULL, NULL, 0, NULL), SYSEXIT_PARAM);
    CHECK(merge(NULL, NULL, 1, NULL), SYSEXIT_PARAM);
    CHECK(merge(NULL, TOP, 1, NULL), SYSEXIT_PARAM);
    CHECK(merge(ONE, NULL, 0, NULL), SYSEXIT_NOSNAP);
    CHECK(ploop_switch_snapshot_ex(NULL, NULL), SYSEXIT_LOCK);
    CHECK(ploop_switch_snapshot_ex(di, NULL), SYSEXIT_PARAM);
    CHECK(switch_to(NULL, NULL, 0), SYSEXIT_PARAM);
    CHECK(switch_to(ONE, NULL, 0), SYSEXIT_NOSNAP);
    CHECK(switch_to(TOP, NULL, 0), SYSEXIT_PARAM);
    CHECK(ploop_switch_snapshot(di, ONE, 0), SYSEXIT_NOSNAP);
    CHECK(ploop_switch_snapshot(NULL, ONE, 0), SYSEXIT_LOCK);
    CHECK(ploop_replace_image(NULL, NULL), SYSEXIT_LOCK);
    CHECK(ploop_replace_image(di, NULL), SYSEXIT_PARAM);
    CHECK(replace(TOP, NULL, 0, NULL, 0), SYSEXIT_PARAM);
    CHECK_TRUE(replace(TOP, NULL, 0, "missing", 0) > 0);
    CHECK(replace(ONE, NULL, 0, "root.hds", 0), SYSEXIT_NOSNAP);
    CHECK(replace(NULL, "missing", 0, "root.hds", 0), SYSEXIT_PARAM);
    CHECK(replace(NULL, NULL, 0, "root.hds", 0), SYSEXIT_PARAM);
    CHECK(replace(NULL, NULL, -1, "root.hds", 0), SYSEXIT_PARAM);
    CHECK_TRUE(replace(NULL, NULL, 1000, "root.hds", 0) > 0);

    CHECK(guidcmp(UPPER, KEPT), 0);
    CHECK_TRUE(guidcmp(ONE, TWO) < 0 && guidcmp(TWO, ONE) > 0);
    CHECK(is_valid_guid(ONE), 1);
    CHECK(is_valid_guid("11111111-2222-4333-8444-555555555501"), 0);
    CHECK(is_valid_guid(NULL), 0);
    CHECK_TRUE(find_image_by_guid(di, NULL) == NULL && find_image_by_guid(NULL, ONE) == NULL);
    CHECK(find_snapshot_by_guid(di, NULL), -1);
    CHECK_TRUE(make_images_list(di, NULL, 0) == NULL && make_images_list(di, ONE, 0) == NULL);
    CHECK(read_line("missing", buf, sizeof(buf)), -1);
    CHECK(read_line("/proc/self/comm", buf, 0), -1);
    CHECK(read_line("/proc/self/comm", buf, sizeof(buf)), 0);
    CHECK_STR(buf, "snapshots");
    CHECK(find_level_by_delta(NULL, "root.hds", &level), SYSEXIT_PARAM);
    CHECK(find_level_by_delta("/dev/no-such-device", "root.hds", &level), SYSEXIT_SYSFS);
    CHECK(find_level_by_delta("/dev/no-such-device", NULL, &level), SYSEXIT_PARAM);
    CHECK(get_delta_info("/dev/no-such-device", NULL), SYSEXIT_PARAM);
    CHECK(get_delta_info("/dev/no-such-device", &info), SYSEXIT_SYSFS);
    CHECK(merge_image(NULL, 0, 0, 0, 0, NULL, NULL), SYSEXIT_PARAM);
    CHECK(create_snapshot(NULL, "x", 0), SYSEXIT_PARAM);
    CHECK(create_snapshot("/dev/no-such-device", NULL, 0), SYSEXIT_PARAM);
    CHECK(create_snapshot("/dev/no-such-device", "x", 1), SYSEXIT_SYSFS);
    CHECK_TRUE(access("x", F_OK) != 0);
    CHECK(replace_delta("/dev/no-such-device", 0, "missing"), SYSEXIT_OPEN);
    CHECK(replace_delta("/dev/no-such-device", 0, "root.hds"), SYSEXIT_DEVICE);
    CHECK(replace_delta("/dev/no-such-device", -1, "root.hds"), SYSEXIT_PARAM);
    CHECK(ploop_check(NULL, 0, NULL), SYSEXIT_PARAM);
    CHECK(ploop_check("missing", 0, NULL), SYSEXIT_OPEN);
    CHECK(ploop_check("root.hds", 0x20, &bs), 0);
    CHECK(bs, 256);
    CHECK(check_dd(NULL, NULL), SYSEXIT_LOCK);
    CHECK(check_dd(di, ONE), SYSEXIT_NOSNAP);
    CHECK_STR(mntn2str(2), "FBLOADED");
    CHECK_STR(mntn2str(3), "UNKNOWN");
    CHECK_STR(mntn2str(257), "MERGE");
}

static void workflow(void)
{
    char **list, first[PATH_MAX], second[PATH_MAX];
    struct ploop_snapshot_param unnamed = {0};

    CHECK(snapshot(ONE), 0);
    CHECK(di->nimages, 2);
    CHECK(snapshot(ONE), SYSEXIT_PARAM);
    CHECK(snapshot(TWO), 0);
    CHECK(snapshot(THREE), 0);
    CHECK(di->nsnapshots, 4);
    CHECK(find_snapshot_by_guid(di, THREE), 2);
    CHECK_STR(ploop_find_parent_by_guid(di, THREE), TWO);
    CHECK_TRUE(ploop_find_parent_by_guid(di, ONE) == NULL && ploop_find_parent_by_guid(di, KEPT) == NULL);
    CHECK_TRUE(ploop_get_base_delta_uuid(di) == NULL);
    CHECK_STR(strrchr(find_image_by_guid(di, ONE), '/'), "/root.hds");
    list = make_images_list(di, TWO, 0);
    CHECK_TRUE(list && list[0] && list[1] && !list[2]);
    CHECK_STR(strrchr(list[0], '/'), "/root.hds");
    ploop_free_array(list);
    list = make_images_list(di, TOP, 1);
    CHECK_TRUE(list && list[3] && !list[4]);
    CHECK_STR(strrchr(list[3], '/'), "/root.hds");
    snprintf(first, sizeof(first), "%s", list[1]);
    snprintf(second, sizeof(second), "%s", list[2]);
    ploop_free_array(list);
    CHECK(check_deltas_same(first, second), 0);

    /* Above TWO: THREE and its top, then KEPT (the old top) and another top. */
    CHECK(switch_to(TWO, ONE, PLOOP_SNAP_SKIP_TOPDELTA_DESTROY), SYSEXIT_PARAM);
    CHECK(switch_to(TWO, KEPT, PLOOP_SNAP_SKIP_TOPDELTA_DESTROY), 0);
    CHECK(di->nimages, 5);
    CHECK_STR(ploop_find_parent_by_guid(di, UPPER), THREE);
    CHECK_STR(ploop_find_parent_by_guid(di, TOP), TWO);
    CHECK(merge(NULL, NULL, 0, NULL), SYSEXIT_PARAM);
    CHECK(merge(KEPT, ONE, 0, NULL), SYSEXIT_PARAM);
    CHECK(merge(UPPER, NULL, 0, NULL), 0);
    CHECK(find_snapshot_by_guid(di, THREE), -1);
    CHECK(ploop_delete_snapshot(di, TWO), 0);
    CHECK(di->snapshots[find_snapshot_by_guid(di, TWO)]->temporary, 1);
    CHECK(ploop_delete_snapshot(di, KEPT), 0);
    CHECK(find_snapshot_by_guid(di, TWO), -1);
    CHECK(di->nimages, 2);

    /* Without a new top, and the top deleted. */
    CHECK(snapshot(TWO), 0);
    CHECK(switch_to(ONE, NULL, PLOOP_SNAP_SKIP_TOPDELTA_CREATE), SYSEXIT_PARAM);
    CHECK(switch_to(TWO, NULL, PLOOP_SNAP_SKIP_TOPDELTA_CREATE | PLOOP_SNAP_SKIP_TOPDELTA_DESTROY), 0);
    CHECK(di->nimages, 2);
    CHECK(find_snapshot_by_guid(di, TWO), -1);
    CHECK(ploop_create_snapshot(di, &unnamed), 0);
    CHECK(di->nimages, 3);
    CHECK(ploop_delete_top_delta(di), 0);
    CHECK(di->nimages, 2);

    /* A copy takes the base's place, and then another one its name. */
    copy("root.hds", "copy");
    CHECK(replace(ONE, NULL, 0, "copy", 0), 0);
    CHECK_STR(strrchr(find_image_by_guid(di, ONE), '/'), "/copy");
    CHECK(replace(NULL, find_image_by_guid(di, ONE), 0, "root.hds", PLOOP_REPLACE_KEEP_NAME), 0);
    CHECK_STR(strrchr(find_image_by_guid(di, ONE), '/'), "/copy");
    CHECK_TRUE(access("root.hds", F_OK) != 0);

    CHECK(check_dd(di, NULL), 0);
    CHECK(merge(NULL, NULL, 1, "root.hds"), 0);
    CHECK(di->nimages, 1);
    CHECK_STR(strrchr(find_image_by_guid(di, TOP), '/'), "/root.hds");
    CHECK_TRUE(access("copy", F_OK) != 0);
}

int main(int argc, char **argv)
{
    struct ploop_create_param create = {0};

    assert_library(NULL);
    if (argc != 2 || chdir(argv[1]))
        die("usage: snapshots EMPTY-FOLDER");
    create.image = "root.hds";
    create.size = 65536;
    create.blocksize = 256;
    CHECK(ploop_create_image(&create), 0);
    CHECK(ploop_read_disk_descr(&di, "missing"), SYSEXIT_DISKDESCR);
    CHECK(ploop_read_disk_descr(&di, "root.hds"), -1);
    ploop_free_diskdescriptor(di);
    CHECK(ploop_read_disk_descr(&di, "DiskDescriptor.xml"), 0);
    CHECK(di->nimages, 1);
    bad_arguments();
    workflow();
    ploop_close_dd(di);
    if (failures)
        die("%d checks failed", failures);
    return 0;
}
