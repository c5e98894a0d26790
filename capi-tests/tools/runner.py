"""Runs the tests for capi-tests/run: see there."""

import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import cleanup
import devlib

ROOT = devlib.ROOT
LOGS = os.path.join(devlib.TARGET, "test-logs")
STRICT = os.environ.get("PLOOP_TEST") in ("ci", "full")
GROUP_LIMIT = 900
# The full counts take hours, one of them for the fuzzers.
CARGO_LIMIT = devlib.pick(3600, 14400)

# Scripts beside the groups that are run by name only.
SLOW = ("chroot", "oldkernel")


class Runner:
    def __init__(self, keep, shared):
        self.keep, self.shared = keep, shared
        self.passed, self.failed, self.skipped = [], [], []
        base = os.environ.get("PLOOP_TEST_TMP", "/var/tmp")
        for old in glob.glob(os.path.join(base, "ploop-tests.*")):
            pid = old.split(".")[-2]
            if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                cleanup.clean(old)
                shutil.rmtree(old, ignore_errors=True)
        self.scratch = tempfile.mkdtemp(prefix=f"ploop-tests.{os.getpid()}.", dir=base)
        os.makedirs(LOGS, exist_ok=True)
        self.before = cleanup.snapshot()
        self.child = None

    def log(self, name):
        return os.path.join(LOGS, name.replace("/", "_") + ".log")

    def command(self, name, cmd, limit, cwd=ROOT, env=None):
        """Runs one test under `limit`; returns its status (124: limit) and the seconds."""
        begin = time.monotonic()
        env = {**os.environ, "PLOOP_TEST_SCRATCH": self.scratch, "PLOOP_TEST_CASE": f"{name}@{os.getpid()}", "PLOOP": devlib.PLOOP,
               "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        with open(self.log(name), "wb") as out:
            self.child = p = subprocess.Popen(cmd, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=env,
                                              start_new_session=True)
            try:
                rc = p.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGKILL)
                rc = 124
                try:
                    p.wait(5)
                except subprocess.TimeoutExpired:
                    pass
            self.child = None
        if rc == 124:
            with open(self.log(name), "a") as out:
                out.write(f"\nno end after {limit} s\n")
        return rc, time.monotonic() - begin

    def tail(self, name, lines=12):
        """The end of a test's log: from the line that says what failed on, or the last lines."""
        try:
            with open(self.log(name), errors="replace") as f:
                text = f.read().splitlines()
        except OSError:
            return []
        said = [i for i, l in enumerate(text) if l.startswith("FAILED")]
        panics = [i for i, l in enumerate(text) if " panicked at " in l]
        if panics and not said:
            # What a test of cargo's said just before it, and why it ended.
            return [l.rstrip()[:400] for i in panics[:5] for l in text[max(0, i - 3):i + 4]]
        return [l.rstrip()[:400] for l in (text[said[0]:][:lines] if said else text[-lines:])]

    def note(self, name, rc, seconds, device, extra=""):
        if rc == 0:
            self.passed.append(name)
            word = "ok"
        elif rc == 77:
            reason = (self.tail(name, 1) or ["no reason given"])[0].removeprefix("skip: ")
            self.skipped.append((name, reason))
            word, extra = "skip", f"({reason})"
            if device and STRICT:
                self.failed.append(name)
                word = "FAILED"
                extra = f"(skipped, which PLOOP_TEST={os.environ['PLOOP_TEST']} forbids: {reason})"
        else:
            self.failed.append(name)
            word = "FAILED"
        print(f"{word:7} {name:40} {seconds:7.1f} s  {extra}".rstrip(), flush=True)
        if word == "FAILED" and rc != 77:
            for line in self.tail(name):
                print("        | " + line, flush=True)

    def cargo(self, name):
        begin = time.monotonic()
        rc, seconds = self.command(name, ["cargo", "test", "--locked", "--no-fail-fast"], CARGO_LIMIT)
        with open(self.log(name), errors="replace") as f:
            text = f.read()
        done = sum(int(n) for n in re.findall(r"^test result: .*? (\d+) passed", text, re.M))
        bad = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.M)
        if rc == 0 and not done:
            rc = 1
        self.note(name, rc, time.monotonic() - begin, False, f"({done} tests{', failed: ' + ' '.join(bad) if bad else ''})")

    def group(self, name, path):
        scratch = os.path.join(self.scratch, name)
        os.makedirs(scratch)
        rc, seconds = self.command(name, ["bash", path], GROUP_LIMIT, env={"PLOOP_TEST_SCRATCH": scratch, "TMPDIR": scratch})
        self.after(name, rc)
        self.note(name, rc, seconds, False)

    def device(self, name, path, case, limit):
        cmd = [sys.executable, path, case] if path.endswith(".py") else ["bash", path, case]
        rc, seconds = self.command(name, cmd, limit)
        undone = self.after(name, rc)
        if undone and rc == 0:
            with open(self.log(name), "a") as f:
                f.write("left behind: " + "; ".join(undone) + "\n")
            rc = 1
        extra = ""
        if rc == 0:
            with open(self.log(name), errors="replace") as f:
                said = [l[8:].strip() for l in f if l.startswith("RESULT: ")]
            extra = "  ".join(said)
        self.note(name, rc, seconds, True, extra)

    def after(self, name, rc):
        killed = cleanup.kill_stragglers(f"{name}@{os.getpid()}")
        undone = cleanup.clean(os.path.join(self.scratch, name))
        if killed:
            undone.append(f"processes {' '.join(killed)}")
        if undone and rc:
            with open(self.log(name), "r+") as f:
                text = f.read()
                f.seek(0)
                f.write("cleared away after the test: " + "; ".join(undone) + "\n" + text)
        if not (self.keep and rc):
            shutil.rmtree(os.path.join(self.scratch, name), ignore_errors=True)
        return undone

    def finish(self):
        """The last test: nothing of ours remains."""
        begin = time.monotonic()
        undone = cleanup.clean(self.scratch)
        left = cleanup.leftovers(self.before, self.scratch, self.shared)
        for _ in range(20 if self.shared else 4):
            # What is on its way out, or another's on its way in, is no leftover.
            if not left:
                break
            time.sleep(0.5)
            left = [l for l in cleanup.leftovers(self.before, self.scratch, self.shared) if l in left]
        with open(self.log("leftovers"), "w") as f:
            f.write("\n".join([f"cleared away at the end: {u}" for u in undone] + [f"still there: {l}" for l in left]) + "\n")
        self.note("leftovers", 1 if left or undone else 0, time.monotonic() - begin, True)
        if not (self.keep and self.failed):
            shutil.rmtree(self.scratch, ignore_errors=True)


def tests():
    """[(name, kind, arguments)]."""
    out = [("cargo", "cargo", ())]
    for p in sorted(glob.glob(os.path.join(ROOT, "capi-tests/groups/*.sh"))):
        out.append(("groups." + os.path.basename(p)[:-3], "group", (p,)))
    for p in sorted(glob.glob(os.path.join(ROOT, "capi-tests/devices/*.py")) + glob.glob(os.path.join(ROOT, "capi-tests/devices/*.sh"))):
        stem = os.path.basename(p).rsplit(".", 1)[0]
        r = subprocess.run([sys.executable if p.endswith(".py") else "bash", p, "--list"], stdout=subprocess.PIPE, text=True, timeout=30)
        if r.returncode:
            out.append((stem, "device", (p, "", 10)))
        for line in r.stdout.splitlines():
            case, seconds = line.split()
            out.append((f"{stem}.{case}", "device", (p, case, int(seconds))))
    out += [(name, name, ()) for name in SLOW]
    return out


def wanted(test, names):
    name, kind, _ = test
    if not names:
        return kind not in SLOW
    group = {"group": "groups", "device": "devices"}.get(kind, kind)
    return any(n == group or name == n or name.startswith(n + ".") or (name.startswith(n) and n not in ("c",)) for n in names)


def main():
    names = [a for a in sys.argv[1:] if not a.startswith("--")]
    flags = {a for a in sys.argv[1:] if a.startswith("--")}
    unknown = flags - {"--list", "--keep", "--shared"}
    if unknown:
        sys.exit(f"capi-tests/run: unknown option {' '.join(unknown)}; --help tells")
    chosen = [t for t in tests() if wanted(t, names)]
    if "--list" in flags:
        print("\n".join(t[0] for t in chosen))
        return
    if not chosen:
        sys.exit(f"capi-tests/run: no test is called {' '.join(names)}")
    begin = time.monotonic()
    runner = Runner("--keep" in flags, "--shared" in flags)

    def stop(number, _):
        if runner.child:
            os.killpg(runner.child.pid, signal.SIGKILL)
        raise SystemExit(128 + number)

    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(s, stop)
    if not os.path.exists(devlib.PLOOP):
        print(f"note: {devlib.PLOOP} is not built; --build builds it", flush=True)
    stages = {}
    try:
        for name, kind, args in chosen:
            t = time.monotonic()
            if kind == "cargo":
                runner.cargo(name)
            elif kind == "group":
                runner.group(name, *args)
            elif kind == "device":
                runner.device(name, *args)
            else:
                rc, seconds = runner.command(name, ["bash", os.path.join(ROOT, f"capi-tests/{name}.sh")], 3600)
                runner.after(name, rc)
                runner.note(name, rc, seconds, True)
            stages[kind] = stages.get(kind, 0) + time.monotonic() - t
    finally:
        runner.finish()
    for kind, seconds in stages.items():
        print(f"== {kind}: {seconds:.0f} s")
    for name, reason in runner.skipped:
        print(f"skipped: {name}: {reason}")
    print(f"== all: {time.monotonic() - begin:.0f} s, counts of PLOOP_TEST={os.environ.get('PLOOP_TEST', 'ci')}")
    skipped = [n for n, _ in runner.skipped if n not in runner.failed]
    print(f"{len(runner.passed)} passed, {len(runner.failed)} failed, {len(skipped)} skipped")
    sys.exit(bool(runner.failed))


main()
