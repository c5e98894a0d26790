//! A device's control socket, and who and what may come by it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, send, setsockopt, socket, sockopt,
};

use crate::make::{base, disk};
use crate::{ploop, scratch, soon, text};

/// Messages and visitors; see below.
pub const ROWS: usize = 13;

fn visitor(path: &Path) -> OwnedFd {
    let sock = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    connect(sock.as_raw_fd(), &UnixAddr::new(path).expect("address")).expect("connect");
    setsockopt(&sock, sockopt::SndBuf, &(1 << 20)).expect("buffer");
    sock
}

/// What the supervisor answers; nothing if it hangs up.
fn answer(sock: &OwnedFd, limit: Duration) -> Option<String> {
    let end = Instant::now() + limit;
    let mut buf = vec![0; 1 << 20];
    loop {
        match nix::sys::socket::recv(sock.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return None,
            Ok(n) => return Some(String::from_utf8_lossy(&buf[..n]).into_owned()),
            Err(nix::Error::EAGAIN) if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            Err(nix::Error::EAGAIN) => panic!("the supervisor neither answers nor hangs up"),
            Err(_) => return None,
        }
    }
}

struct Device {
    args: Vec<String>,
    socket: PathBuf,
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = ploop(&self.args);
    }
}

#[test]
fn the_control_socket_bears_anything() {
    if !crate::common::skip::devices() {
        return;
    }
    let folder = scratch();
    let dir = folder.path().canonicalize().expect("folder");
    disk(&dir, &[base("f")]);
    let dd = dir.join("DiskDescriptor.xml").to_string_lossy().into_owned();
    let out = ploop(&["mount".into(), dd.clone()]);
    assert!(out.status.success(), "{}", text(&out));
    let said = text(&out);
    let node = said.split("dev=").nth(1).and_then(|t| t.split_whitespace().next()).expect("a device").to_owned();
    let name = node.trim_start_matches("/dev/");
    let device = Device { args: vec!["umount".into(), dd], socket: Path::new("/run/ploop").join(name).join("control") };

    // Nobody but root: neither by the file's mode nor, were that loosened, by who they are.
    let ask = "import socket,sys; s=socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); \
               s.send(b'\"Abort\"'); print(s.recv(100))";
    let as_nobody = |path: &Path| {
        let mut c = Command::new("setpriv");
        c.args(["--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", ask]).arg(path);
        c.stdin(Stdio::null()).output().expect("setpriv and python3 run")
    };
    let denied = as_nobody(&device.socket);
    assert!(!denied.status.success(), "{}", text(&denied));
    assert!(text(&denied).contains("Permission denied"), "{}", text(&denied));
    let open = tempfile::Builder::new().prefix("bad-input-").tempdir().expect("folder");
    fs::set_permissions(open.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    let other = open.path().join("control");
    fs::hard_link(&device.socket, &other).ok();
    if other.exists() {
        fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("mode");
        let denied = as_nobody(&other);
        fs::set_permissions(&other, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
        assert!(!text(&denied).contains("Done"), "{}", text(&denied));
    }

    let long = vec![b'"'; 300 * 1024];
    let deep = [b"[".repeat(100_000), b"]".repeat(100_000)].concat();
    let messages: [(&str, &[u8]); ROWS - 4] = [
        ("no JSON", b"hello"),
        ("zero bytes", &[0; 100]),
        ("not UTF-8", b"\"\xff\xfe\""),
        ("cut off", b"{\"Hold"),
        ("an unknown command", b"\"Reboot\""),
        ("a value of another type", b"{\"HoldForSpace\": \"perhaps\"}"),
        ("a number that overflows", b"{\"HoldForSpace\": 1e999}"),
        ("brackets 100,000 deep", &deep),
        ("two commands", b"\"Info\"\"Info\""),
    ];
    for (what, message) in messages {
        let sock = visitor(&device.socket);
        send(sock.as_raw_fd(), message, MsgFlags::empty()).expect("send");
        let said = answer(&sock, Duration::from_secs(10));
        // What is JSON and no command is refused by name; what is no JSON ends the connection.
        let refused = |a: &String| a.contains("Error") || a.contains("Unsupported");
        assert!(said.as_ref().is_none_or(refused), "{what}: {said:?}");
        if what == "an unknown command" {
            assert!(said.is_some_and(|a| a.contains("Unsupported") && a.contains("Reboot")), "{what}: not by name");
        }
    }
    let sock = visitor(&device.socket);
    let sent = send(sock.as_raw_fd(), &long, MsgFlags::empty());
    if sent.is_ok() {
        assert!(answer(&sock, Duration::from_secs(10)).is_none_or(|a| a.contains("Error")), "a frame that is too long");
    }
    // One who says nothing is sent away, and does not keep others from being heard; nor do many.
    let silent: Vec<OwnedFd> = (0..40).map(|_| visitor(&device.socket)).collect();
    soon("an answer beside 40 silent visitors", || text(&ploop(&["list".into()])).contains(name));
    assert_eq!(answer(&silent[0], Duration::from_secs(20)), None);
    drop(silent);
    // A stream is another kind of socket.
    assert!(UnixStream::connect(&device.socket).is_err());

    // The device has noticed nothing.
    let mut block = fs::File::options().read(true).write(true).open(&node).expect("device");
    block.write_all(&[7; 4096]).expect("write");
    block.sync_all().expect("sync");
    let mut first = [0; 1];
    fs::File::open(&node).expect("device").read_exact(&mut first).expect("read");
    assert_eq!(first, [7]);
    drop(block);
    let out = ploop(&["doctor".into()]);
    assert!(!text(&out).contains(&format!("{name} failed")), "{}", text(&out));
    let ended = ploop(&device.args);
    assert!(ended.status.success(), "{}", text(&ended));
}
