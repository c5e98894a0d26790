/* The headers, twice; and their macros, names and functions used as a caller does. */
#include <ploop/dynload.h>
#include <ploop/libploop.h>
#include <ploop/ploop1_image.h>
#include <ploop/ploop_if.h>
#include <ploop/libploop.h>
#include <ploop/dynload.h>
#include <ploop/ploop_if.h>
#include <ploop/ploop1_image.h>

#include <string.h>

#if !defined(_LIBPLOOP_H_) || !defined(_PLOOP_DYNLOAD_H_)
#error "the guards' names are what old code tests for"
#endif

/* The header of an image, and what the kernel's interface needs. */
static int image(void)
{
    struct ploop_pvd_header head;
    struct ploop_ctl_delta add;
    __u64 clusters = 33 * 2048 + 5;

    memset(&head, 0, sizeof(head));
    memset(&add, 0, sizeof(add));
    add.c.pctl_format = PLOOP_FMT_PLOOP1;
    add.f.pctl_type = PLOOP_IO_AUTO;
    if (generate_pvd_header(&head, 65537, 2048, PLOOP_FMT_V2) != DEF_CLUSTER || head.m_Size != 33)
        return 3;
    if (memcmp(head.m_Sig, "WithouFreSpacExt", 16) != 0 || get_SizeInSectors(&head) != 67584)
        return 4;
    if (ploop1_version(&head) != PLOOP_FMT_V2 || head.m_Heads != 16 || head.m_Cylinders != 132)
        return 5;
    if (generate_pvd_header(&head, 65537, 2048, 3) != 0 || ploop1_signature(0))
        return 6;
    if (ploop_do_div(clusters, 2048) != 5 || clusters != 33)
        return 7;
    return FAST_PATH_DISABLED(PLOOP_MNTN_DISCARD) || !FAST_PATH_DISABLED(PLOOP_MNTN_MERGE) ? 8 : 0;
}

int main(void)
{
    struct ploop_create_param create;
    struct ploop_mount_param mount;
    struct ploop_disk_images_data *di = 0;
    enum ploop_image_mode mode = PLOOP_EXPANDED_PREALLOCATED_MODE;
    const char *name = DISKDESCRIPTOR_XML;
    struct ploop_functions table;

    memset(&create, 0, sizeof(create));
    memset(&mount, 0, sizeof(mount));
    create.mode = mode;
    create.flags = PLOOP_CREATE_NOLAZY;
    ploop_set_verbose_level(PLOOP_LOG_NOCONSOLE);
    ploop_resolve_functions(&table);
    table.close_dd(di);
    if (name[0] != 'D' || ploop_mount_image(di, &mount) != SYSEXIT_LOCK)
        return 2;
    if (ploop_create_image(&create) != SYSEXIT_PARAM)
        return 1;
    return image();
}
