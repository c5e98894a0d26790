"""Runs the tests for capi-tests/run: see there."""

import collections
import functools
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import cleanup
import devlib

ROOT = devlib.ROOT
LOGS = os.path.join(devlib.TARGET, "test-logs")
STRICT = os.environ.get("PLOOP_TEST") in ("ci", "full")
GROUP_LIMIT = 900
BUILD_LIMIT = 1800
# The full counts take hours, one of them for the fuzzers.
CARGO_LIMIT = devlib.pick(3600, 14400)

# Test binaries of cargo's that use no device: they come last in cargo's lane, at low priority, in the time in which the device tests wait.
GENTLE = ("cargo.storage_differential", "cargo.bad_input", "cargo.create", "cargo.fuzz", "cargo.layering", "cargo.damage",
          "cargo.offline_differential", "cargo.cmd", "cargo.commands", "cargo.doctor", "cargo.abi", "cargo.abi_panic",
          "cargo.doc", "cargo.lib", "cargo.sim", "cargo.lints")
# Scripts that build with cargo: they would wait for the build beside them.
AFTER_BUILD = ("groups.parsers",)
# Nothing else runs beside these: the one asks for devices by number, the other changes all disks on the machine.
ALONE = ("wiki", "compact.cancelled_estimated_all")

# Scripts beside the groups that are run by name only.
SLOW = ("chroot", "oldkernel")


class Target:
    """A test binary of cargo's, or its doc tests (which have a command instead)."""

    def __init__(self, kind, name, select, command=None):
        self.kind, self.name, self.select, self.command = kind, name, select, command

    def __eq__(self, other):
        return (self.kind, self.name) == (other.kind, other.name)

    @property
    def shown(self):
        # The library and its command have one name.
        return "cargo" if self.kind == "none" else "cargo." + ("lib" if self.kind == "lib" else f"bin.{self.name}" if self.kind == "bin" else self.name)


@functools.cache
def cargo_targets():
    """What `cargo test` would run, in its order."""
    if not shutil.which("cargo"):
        return [Target("none", "", [], ["sh", "-c", "echo 'skip: there is no cargo'; exit 77"])]
    r = subprocess.run(["cargo", "metadata", "--no-deps", "--locked", "--format-version", "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                       timeout=120, check=True)
    out = []
    for t in json.loads(r.stdout)["packages"][0]["targets"]:
        kind = "lib" if "rlib" in t["kind"] else t["kind"][0]
        if t["test"] and kind in ("lib", "bin", "test"):
            out.append(Target(kind, t["name"], ["--lib"] if kind == "lib" else [f"--{kind}", t["name"]]))
    out.sort(key=lambda t: (("lib", "bin", "test").index(t.kind), t.name))
    out.append(Target("doc", "doc", [], ["cargo", "test", "--locked", "--doc"]))
    if STRICT:
        # Where the package is only tried out, the lints of another toolchain are no fault of it.
        out.append(Target("lints", "lints", [], ["cargo", "clippy", "--locked", "--all-targets", "--", "-D", "warnings"]))
    return out


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
        self.children = set()
        self.printing = threading.Lock()
        self.binaries, self.cargo_env = {}, {"CARGO_MANIFEST_DIR": ROOT}

    def log(self, name):
        return os.path.join(LOGS, name.replace("/", "_") + ".log")

    def command(self, name, cmd, limit, cwd=ROOT, env=None, nice=0):
        """Runs one test under `limit`; returns its status (124: limit) and the seconds."""
        begin = time.monotonic()
        env = {**os.environ, "PLOOP_TEST_SCRATCH": self.scratch, "PLOOP_TEST_CASE": f"{name}@{os.getpid()}", "PLOOP": devlib.PLOOP,
               "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
        with open(self.log(name), "wb") as out:
            p = subprocess.Popen(["nice", "-n", str(nice), *cmd] if nice else cmd, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd, env=env,
                                 start_new_session=True)
            self.children.add(p)
            try:
                rc = p.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGKILL)
                rc = 124
                try:
                    p.wait(5)
                except subprocess.TimeoutExpired:
                    pass
            self.children.discard(p)
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
            return [l.rstrip()[:400] for i in panics[:5] for l in text[max(0, i - 3):i + 4]] + [l for l in text if l.startswith("replay: ")][:5]
        return [l.rstrip()[:400] for l in (text[said[0]:][:lines] if said else text[-lines:])]

    def note(self, name, rc, seconds, extra=""):
        with self.printing:
            self.note_alone(name, rc, seconds, extra)

    def note_alone(self, name, rc, seconds, extra):
        """One line of the report. The one place that decides what a skipped test is, as tests/common/skip.rs is for cargo's."""
        if rc == 0:
            self.passed.append(name)
            word = "ok"
        elif rc == 77:
            reason = (self.tail(name, 1) or ["no reason given"])[0].removeprefix("skip: ")
            self.skipped.append((name, reason))
            word, extra = "skip", f"({reason})"
            if STRICT:
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

    def build(self, targets, nice=0):
        """Builds the test binaries of these targets in one go, and the commands that they start."""
        targets = [t for t in targets if not t.command]
        if not targets:
            return
        choice = [] if targets == [t for t in cargo_targets() if not t.command] else [w for t in targets for w in t.select]
        rc, seconds = self.command("cargo.build", ["cargo", "test", "--locked", "--no-run", "--message-format=json-render-diagnostics",
                                                   *choice], BUILD_LIMIT, nice=nice)
        with open(self.log("cargo.build"), errors="replace") as f:
            built = [json.loads(line) for line in f if line.startswith('{"')]
        with open(self.log("cargo.build"), "r+", errors="replace") as f:
            text = [line for line in f if not line.startswith('{"')]
            f.seek(0)
            f.truncate()
            f.writelines(text)
        for m in built:
            if m.get("executable") and m["profile"]["test"]:
                self.binaries[("lib" if "rlib" in m["target"]["kind"] else m["target"]["kind"][0], m["target"]["name"])] = m["executable"]
            elif m.get("executable"):
                self.cargo_env["CARGO_BIN_EXE_" + m["target"]["name"]] = m["executable"]
        self.note("cargo.build", rc, seconds, f"({len(self.binaries)} binaries)")

    def cargo(self, name, target, nice=0):
        """Runs one test binary (the tests in it run in parallel) or the doc tests."""
        cmd = target.command or [self.binaries.get((target.kind, target.name))]
        if cmd == [None]:
            with open(self.log(name), "w") as f:
                f.write("FAILED: there is no such binary, see cargo.build\n")
            self.note(name, 1, 0)
            return
        rc, seconds = self.command(name, cmd, CARGO_LIMIT, env=self.cargo_env, nice=nice)
        with open(self.log(name), errors="replace") as f:
            text = f.read()
        totals = re.findall(r"^test result: .*? (\d+) passed; (\d+) failed; (\d+) ignored", text, re.M)
        done, bad, ignored = (sum(int(t[i]) for t in totals) for i in range(3))
        if not totals:
            # tests/worker has no harness: a scene a line.
            done = len(re.findall(r"(?:\.\.\. |^)ok$", text, re.M))
        skipped = list(dict.fromkeys(re.findall(r"SKIP: (\S*): (.*)", text)))
        self.skipped += [(f"{name}: {test}", reason) for test, reason in skipped]
        if rc == 0 and target.kind == "test" and not done + ignored:
            rc = 1
        failed = re.findall(r"^test (\S+) \.\.\. FAILED", text, re.M)
        counts = [f"{done} tests", f"{bad} failed: {' '.join(failed)}" if bad else "", f"{ignored} ignored" if ignored else "",
                  f"{len(skipped)} skipped" if skipped else ""]
        self.note(name, rc, seconds, f"({', '.join(c for c in counts if c)})")

    def group(self, name, path):
        scratch = os.path.join(self.scratch, name)
        os.makedirs(scratch)
        rc, seconds = self.command(name, ["bash", path], GROUP_LIMIT, env={"PLOOP_TEST_SCRATCH": scratch, "TMPDIR": scratch})
        self.after(name, rc)
        self.note(name, rc, seconds)

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
        self.note(name, rc, seconds, extra)

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
        self.note("leftovers", 1 if left or undone else 0, time.monotonic() - begin)
        if not (self.keep and self.failed):
            shutil.rmtree(self.scratch, ignore_errors=True)


def tests():
    """[(name, kind, arguments)]."""
    out = [(t.shown, "cargo", (t,)) for t in cargo_targets()]
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
        for child in list(runner.children):
            os.killpg(child.pid, signal.SIGKILL)
        raise SystemExit(128 + number)

    for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(s, stop)
    if not os.path.exists(devlib.PLOOP):
        print(f"note: {devlib.PLOOP} is not built; --build builds it", flush=True)
    stages = {}
    # Two lanes: cargo's tests, and the scripts', which need only what was built before. The lane that is done first takes over what
    # is left of the other, from the end.
    cargos = sorted((t for t in chosen if t[1] == "cargo"), key=lambda t: GENTLE.index(t[0]) if t[0] in GENTLE else -1)
    to_build, cargos = [args[0] for _, _, args in cargos], collections.deque(cargos)
    alone = [t for t in chosen if t[0] in ALONE or t[0].split(".")[0] in ALONE]
    scripts = [t for t in chosen if t[1] != "cargo" and t not in alone]
    scripts = collections.deque(sorted(scripts, key=lambda t: t[0] in AFTER_BUILD))
    # Alone they need not be gentle.
    nice = 15 if len(cargos) < len(chosen) else 0
    built, taking = threading.Event(), threading.Lock()

    def timed(stage, begin):
        stages[stage] = stages.get(stage, 0) + time.monotonic() - begin

    def run_cargos():
        t = time.monotonic()
        try:
            runner.build(to_build)
        finally:
            built.set()
        timed("cargo's build", t)
        while (test := take(cargos) or take(scripts, last=True)):
            run_one(*test)

    def take(of, last=False):
        with taking:
            if not of:
                return None
            return of.pop() if last else of.popleft()

    def run_one(name, kind, args):
        t = time.monotonic()
        if kind == "cargo":
            runner.cargo(name, *args, nice=nice if name in GENTLE else 0)
        elif kind == "group":
            runner.group(name, *args)
        elif kind == "device":
            runner.device(name, *args)
        else:
            rc, seconds = runner.command(name, ["bash", os.path.join(ROOT, f"capi-tests/{name}.sh")], 3600)
            runner.after(name, rc)
            runner.note(name, rc, seconds)
        timed("cargo's quiet tests" if name in GENTLE else f"{kind} tests", t)

    lane = threading.Thread(target=run_cargos, daemon=True)
    try:
        lane.start()
        while (test := take(scripts)):
            if test[0] in AFTER_BUILD:
                built.wait()
            run_one(*test)
        built.wait()
        while (test := take(cargos, last=True)):
            run_one(*test)
        t = time.monotonic()
        lane.join()
        timed("waiting for cargo's tests", t)
        for test in alone:
            run_one(*test)
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
