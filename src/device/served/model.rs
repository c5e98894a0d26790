//! From the server's record to a device and back.

use crate::device::model::{Detail, Device, Image};
use crate::device::state::State;
use crate::format::header::Version;
use crate::server::proto::DeviceRecord;

/// The device that a record describes.
pub(in crate::device) fn device_of(record: DeviceRecord, state: State) -> Device {
    let images = record.levels.iter().zip(&record.ids);
    Device {
        name: record.name.clone(),
        node: record.node.clone(),
        state,
        merging: None,
        images: images.map(|(l, id)| Image { path: l.path.clone(), id: *id, raw: l.raw }).collect(),
        component: record.component.clone(),
        descriptor: record.descriptor.clone(),
        read_only: record.read_only,
        sectors: record.size_sectors,
        cluster_sectors: record.cluster_sectors,
        version: match record.fmt_version {
            0 => None,
            1 => Some(Version::V1),
            _ => Some(Version::V2),
        },
        disk: record.backing.clone(),
        rdev: record.rdev,
        instance: record.token.clone(),
        detail: Detail::Served(record),
    }
}

/// A device that shows these files, base first, for tests of what is decided by its record.
#[cfg(test)]
pub fn made_up(descriptor: Option<&std::path::Path>, files: &[&std::path::Path]) -> Device {
    use crate::server::proto::LevelName;
    let levels = files.iter().map(|f| LevelName { path: f.to_path_buf(), raw: false }).collect();
    let ids = files.iter().map(|f| crate::sys::file_id::FileId::at(f).unwrap()).collect();
    let descriptor = descriptor.map(std::path::Path::to_owned);
    device_of(DeviceRecord { levels, ids, descriptor, ..Default::default() }, State::Running)
}

/// The server's record of a device, as it was when the device was looked up. For tests of the server.
pub fn record(device: &Device) -> &DeviceRecord {
    match &device.detail {
        Detail::Served(record) => record,
    }
}
