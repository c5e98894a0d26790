//! Giving space of a running device's top back.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::bail;
use crate::device::driver::{Rates, Watch};
use crate::device::model::Device;
use crate::device::served::record;
use crate::device::served::switch::ask;
use crate::engine::api::GivenBack;
use crate::error::Result;
use crate::server::give_back::GiveBackOrder;
use crate::server::proto::{Answer, Command};
use crate::server::{control, runtime};

/// Limit for the supervisor's answer to a question.
const SHORT: Duration = Duration::from_secs(10);

/// See [`give_back`](crate::device::give_back).
pub fn give_back(device: &Device, rates: Rates, watch: &mut dyn Watch) -> Result<GivenBack> {
    let name = device.name();
    let dir = runtime::device_dir(name);
    let token = uuid::Uuid::new_v4().as_u64_pair().0 | 1;
    // 0 is no limit there.
    let rate = |rate: Option<u64>| rate.map_or(0, |r| r.max(1));
    let order = GiveBackOrder { token, rate: rate(rates.most), busy_rate: rate(rates.busy) };
    let command = Command::GiveBack(order);
    if let Some(unsupported) = record(device).refuse(&command) {
        return Err(unsupported.context(format!("run ploop reload {name} to have the installed program serve it")));
    }
    let mut cancelled = false;
    let mut waiting = || {
        let info = control::ask(&dir, &Command::Info, SHORT);
        if let Ok((Answer::Info { giving_back: Some((seen, all)), .. }, _)) = info {
            watch.progress(seen, all);
        }
        if watch.cancelled() && !cancelled {
            cancelled = control::ask(&dir, &Command::CancelGiveBack(token), SHORT).is_ok();
        }
    };
    match ask(name, &command, &[], &mut || Ok(()), &mut |_| {}, &mut waiting)? {
        Answer::GaveBack(outcome) => outcome.into_result(),
        other => bail!(Protocol, "{name}: the supervisor answered {other:?}, GaveBack was expected"),
    }
}
