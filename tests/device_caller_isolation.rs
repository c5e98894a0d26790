//! A server is isolated from its caller: it outlives the process, session and namespaces that started it.

mod device_common;

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use device_common::*;
use ploop::device::{self, State, served};
use ploop::server::proto::{Answer, Command as Order};
use ploop::server::{control, runtime};

/// Runs `device::attach` of the image in a process of its own, through a shell prefix; see `child`.
fn attach_in_child(image: &Path, prefix: &str) -> String {
    let exe = std::env::current_exe().unwrap();
    let script = format!("{prefix} exec \"$0\" --exact --nocapture child");
    let mut command = Command::new("timeout");
    command.args(["-k", "5", "60", "sh", "-c", &script]).arg(exe).env("PLOOP_TEST_ATTACH", image);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let name = text.lines().find_map(|l| l.split("ATTACHED ").nth(1)).unwrap_or_else(|| panic!("{output:?}"));
    name.split_whitespace().next().unwrap().to_string()
}

/// Not a test by itself: attaches what the environment names.
#[test]
fn child() {
    let Some(image) = std::env::var_os("PLOOP_TEST_ATTACH") else { return };
    let Some(t) = Bench::new("child") else { return };
    let device = t.attach(Path::new(&image)).unwrap();
    println!("\nATTACHED {} ", device.name());
    std::io::stdout().flush().unwrap();
}

#[test]
fn server_is_isolated_from_its_caller() {
    let Some(t) = Bench::new("server_is_isolated_from_its_caller") else { return };
    let image = t.image("a.hdd", "64M");
    // A session with its own limits, open files and ignored signals, which is killed as a whole afterwards.
    let secret = t.dir.path().join("secret");
    fs::write(&secret, "x").unwrap();
    let prefix = format!(
        "trap '' HUP CHLD; umask 077; cd {}; ulimit -n 200; exec 7<{}; export LEAK=1;",
        t.dir.path().display(),
        secret.display()
    );
    let name = attach_in_child(&image, &prefix);
    let device = device::by_node(&name).unwrap().unwrap();
    assert_eq!(device.state, State::Running);
    for process in [served::record(&device).supervisor, served::record(&device).worker] {
        let proc = PathBuf::from(format!("/proc/{}", process.pid));
        assert_eq!(fs::read_link(proc.join("cwd")).unwrap(), Path::new("/"));
        assert!(!String::from_utf8_lossy(&fs::read(proc.join("environ")).unwrap()).contains("LEAK"));
        for fd in fs::read_dir(proc.join("fd")).unwrap() {
            let link = fs::read_link(fd.unwrap().path()).unwrap_or_default();
            assert!(link != secret && !link.starts_with("/dev/pts"), "{link:?} is open");
        }
        let status = fs::read_to_string(proc.join("status")).unwrap();
        let mask = |key: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        assert_eq!(mask("SigIgn:") & 1 << (libc::SIGCHLD - 1), 0, "{status}");
        assert!(!status.contains("VmLck:\t       0 kB"), "{status}");
        // CAP_SYS_RESOURCE, which root may lack in a sandbox.
        if mask("CapEff:") & 1 << 24 != 0 {
            assert_eq!(fs::read_to_string(proc.join("oom_score_adj")).unwrap().trim(), "-1000");
        }
        let stat = fs::read_to_string(proc.join("stat")).unwrap();
        let fields: Vec<i32> =
            stat.rsplit_once(')').unwrap().1.split_whitespace().skip(1).take(3).map(|f| f.parse().unwrap()).collect();
        let own = nix::unistd::getsid(None).unwrap().as_raw();
        assert!(fields[2] != own, "the same session");
        for line in fs::read_to_string(proc.join("cgroup")).unwrap().lines() {
            assert!(line.ends_with(":/") || line.contains("ploop-server"), "{line}");
        }
    }
    device::detach(&name).unwrap();
    t.assert_gone(&device);
}

/// Whoever mounts a disk with a low priority, on one CPU, does not make it a slow one.
#[test]
fn the_callers_priority_is_left() {
    let Some(t) = Bench::new("the_callers_priority_is_left") else { return };
    let image = t.image("a.hdd", "64M");
    let name = attach_in_child(
        &image,
        "renice -n 7 -p $$ >/dev/null; taskset -p 1 $$ >/dev/null; ionice -c 3 -p $$; chrt -b -p 0 $$;",
    );
    let device = device::by_node(&name).unwrap().unwrap();
    let status = |pid: &str, key: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|l| l.strip_prefix(key)).unwrap().trim().to_owned()
    };
    for process in [served::record(&device).supervisor, served::record(&device).worker] {
        let pid = process.pid.to_string();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        // Fields 19 and 41 of proc(5): the nice value and the policy.
        assert_eq!((fields[16], fields[38]), ("0", "0"), "{stat}");
        assert!(run(Command::new("ionice").args(["-p", &pid])).starts_with("none"));
        assert_eq!(status(&pid, "Cpus_allowed_list:"), status("1", "Cpus_allowed_list:"));
    }
    device::detach(&name).unwrap();
    t.assert_gone(&device);
}

#[test]
fn removed_program() {
    let Some(t) = Bench::new("removed_program") else { return };
    let image = t.image("a.hdd", "64M");
    let copy = t.dir.path().join("server");
    fs::copy(env!("CARGO_BIN_EXE_ploop-server"), &copy).unwrap();
    let name = attach_in_child(&image, &format!("export PLOOP_SERVER={};", copy.display()));
    let device = device::by_node(&name).unwrap().unwrap();
    let program = fs::read_link(format!("/proc/{}/exe", served::record(&device).worker.pid)).unwrap();
    assert_eq!(program, copy);
    fs::remove_file(&copy).unwrap();
    kill(served::record(&device).worker);
    let worker = within(20, "another worker", || {
        Some(record(&name).worker).filter(|w| *w != served::record(&device).worker && runtime::alive(*w))
    });
    write_at(device.node(), 0, &pattern(1, 4096));
    kill(served::record(&device).supervisor);
    within(20, "another supervisor", || {
        Some(record(&name).supervisor).filter(|s| *s != served::record(&device).supervisor && runtime::alive(*s))
    });
    assert_eq!(record(&name).worker, worker);
    device::detach(&name).unwrap();
    t.assert_gone(&device);
    t.sound(&image);
}

#[test]
fn rude_clients_block_nobody() {
    let Some(t) = Bench::new("rude_clients_block_nobody") else { return };
    let image = t.image("a.hdd", "64M");
    let device = t.attach(&image).unwrap();
    let dir = runtime::device_dir(device.name());
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, send, socket};
    use std::os::fd::AsRawFd;
    let rude: Vec<_> = (0..40)
        .map(|i| {
            let sock = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
            connect(sock.as_raw_fd(), &UnixAddr::new(&dir.join("control")).unwrap()).unwrap();
            // Silence, nonsense, and questions whose answers are never read.
            let word: &[u8] = match i % 3 {
                0 => return sock,
                1 => b"\xff{[",
                _ => b"\"Info\"",
            };
            let _ = send(sock.as_raw_fd(), word, nix::sys::socket::MsgFlags::MSG_DONTWAIT);
            sock
        })
        .collect();
    let start = std::time::Instant::now();
    let (answer, _) = control::ask(&dir, &Order::Info, std::time::Duration::from_secs(20)).unwrap();
    assert!(matches!(answer, Answer::Info { no_space: false, failed: false, .. }), "{answer:?}");
    println!("answered after {} ms", start.elapsed().as_millis());
    drop(rude);
    // Not the kind of socket that a stream client could speak to.
    assert!(UnixStream::connect(dir.join("control")).is_err());
    let (answer, _) = control::ask(&dir, &Order::Flush, std::time::Duration::from_secs(20)).unwrap();
    assert!(matches!(answer, Answer::Done), "{answer:?}");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(served::record(&device).supervisor.pid),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    pause(300);
    assert_eq!(device::by_node(device.name()).unwrap().unwrap().state, State::Running);
    device::detach(device.name()).unwrap();
    t.assert_gone(&device);
}

#[test]
fn twenty_at_once() {
    let Some(t) = Bench::new("twenty_at_once") else { return };
    let images: Vec<PathBuf> = (0..20).map(|i| t.image(&format!("{i}.hdd"), "32M")).collect();
    let devices: Vec<_> = std::thread::scope(|s| {
        let threads: Vec<_> = images.iter().map(|image| s.spawn(|| t.attach_numbered(image).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let mut names: Vec<&str> = devices.iter().map(|d| d.name()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 20);
    for (i, device) in devices.iter().enumerate() {
        write_at(device.node(), 1 << 20, &pattern(i as u64, 1 << 16));
    }
    for (i, device) in devices.iter().enumerate() {
        assert_eq!(read_at(device.node(), 1 << 20, 1 << 16), pattern(i as u64, 1 << 16));
    }
    std::thread::scope(|s| {
        for device in &devices {
            s.spawn(|| device::detach(device.name()).unwrap());
        }
    });
    devices.iter().for_each(|d| t.assert_gone(d));
}
