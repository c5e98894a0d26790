/* The headers, twice; and their macros and names used as a caller does. */
#include <ploop/libploop.h>
#include <ploop/dynload.h>
#include <ploop/libploop.h>
#include <ploop/dynload.h>

#include <string.h>

#if !defined(_LIBPLOOP_H_) || !defined(_PLOOP_DYNLOAD_H_)
#error "the guards' names are what old code tests for"
#endif

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
    return ploop_create_image(&create) == SYSEXIT_PARAM ? 0 : 1;
}
